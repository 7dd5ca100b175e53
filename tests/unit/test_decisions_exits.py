"""Endings: exits, overdue stops and unclaimed starts, each with its counter-example."""

from __future__ import annotations

import dataclasses
import errno
from datetime import timedelta
from typing import Any

import pytest

from agent.decisions.exits import fruitless_attempts
from agent.domain.actions import (
    Finish,
    Keep,
    Kill,
    MarkPaused,
    Requeue,
    Stop,
    Void,
)
from agent.domain.observations import LogPoint
from agent.domain.specs import Metric
from agent.domain.trials import Result, RunState, StopCause, TrialState
from agent.domain.views import RunView, TrialView
from ending_views import COMMAND, NOW, TRAINER, finished, run, trial, verdict


class TestExits:
    @pytest.mark.parametrize("cause", [None, *StopCause])
    def test_a_result_with_code_0_completes_whatever_was_asked(self, cause: StopCause | None) -> None:
        over = run(returncode=0, has_result=True, stop_cause=cause)
        result, reason = finished(trial(TrialState.RUNNING, over, scores={Metric.RAW: 2.104}))
        assert result is Result.COMPLETED
        assert "2.1040" in reason

    @pytest.mark.parametrize("over", [run(RunState.LOST, has_result=True), run(returncode=-9, has_result=True)])
    def test_a_result_survives_the_death_of_its_writer(self, over: RunView) -> None:
        assert finished(trial(TrialState.RUNNING, over))[0] is Result.COMPLETED

    def test_a_program_that_says_it_failed_is_believed(self) -> None:
        assert finished(trial(TrialState.RUNNING, run(returncode=1, has_result=True)))[0] is Result.FAILED_CRASHED

    @pytest.mark.parametrize(
        ("cause", "result"),
        [
            (StopCause.PRUNE, Result.PRUNED),
            (StopCause.USER, Result.STOPPED),
            (StopCause.DIVERGED, Result.FAILED_DIVERGED),
        ],
    )
    @pytest.mark.parametrize("code", [75, -9, 1, None])
    def test_a_stopped_run_is_judged_by_the_purpose(self, cause: StopCause, result: Result, code: int | None) -> None:
        state = RunState.EXITED if code is not None else RunState.LOST
        assert finished(trial(TrialState.STOPPING, run(state, returncode=code, stop_cause=cause)))[0] is result

    def test_timeout_names_itself(self) -> None:
        over = run(returncode=75, stop_cause=StopCause.TIMEOUT)
        result, reason = finished(trial(TrialState.RUNNING, over, spec=TRAINER | {"timeout_seconds": 90}))
        assert result is Result.FAILED_STALLED
        assert "timeout_seconds of 90 s" in reason

    @pytest.mark.parametrize(
        ("code", "result", "words"),
        [
            (66, Result.FAILED_DIVERGED, "finite"),
            (67, Result.FAILED_OOM, "of the trainer's own choice: no such shard"),
            (2, Result.FAILED_CRASHED, "refused its input: no such shard"),
            (1, Result.FAILED_CRASHED, "exit code 1: no such shard"),
            (0, Result.FAILED_CRASHED, "no readable result.json"),
            (-11, Result.FAILED_CRASHED, "signal 11"),
            (None, Result.FAILED_CRASHED, "could not be started: ENOENT"),
        ],
    )
    def test_the_trainers_own_word(self, code: int | None, result: Result, words: str) -> None:
        over = run(
            returncode=code, last_lines=("Traceback", "no such shard", ""), error="" if code is not None else "ENOENT"
        )
        found, reason = finished(trial(TrialState.RUNNING, over))
        assert found is result
        assert words in reason

    def test_out_of_memory_names_the_next_valid_micro_batch(self) -> None:
        batch = {"train_batch_tokens": 61440, "micro_batch_tokens": 20480}  # 60 windows, 20 at a time
        spec = {"trainer": {"batch": batch}, "limits": {"steps": 3}}
        reason = finished(trial(TrialState.RUNNING, run(returncode=67), spec=spec))[1]
        assert "micro-batches of 20,480 tokens" in reason
        assert "batch.micro_batch_tokens 10,240" in reason
        single = {"trainer": {"batch": {**batch, "micro_batch_tokens": 1024}}, "limits": {"steps": 3}}
        reason = finished(trial(TrialState.RUNNING, run(returncode=67), spec=single))[1]
        assert reason.endswith("Remedy: a GPU with more free memory")

    def test_out_of_memory_outranks_a_pause(self) -> None:
        over = run(returncode=67, stop_cause=StopCause.PAUSE)
        assert finished(trial(TrialState.PAUSING, over))[0] is Result.FAILED_OOM

    def test_exit_codes_of_other_programs_mean_nothing_special(self) -> None:
        for code in (66, 67, 75, 2):
            view = trial(TrialState.RUNNING, run(returncode=code, last_lines=("boom",)), spec=COMMAND)
            assert finished(view)[0] is Result.FAILED_CRASHED

    def test_other_programs_memory_errors_are_read(self) -> None:
        over = run(returncode=1, last_lines=("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",))
        assert finished(trial(TrialState.RUNNING, over, spec=COMMAND))[0] is Result.FAILED_OOM

    @pytest.mark.parametrize("state", [TrialState.PAUSING])
    @pytest.mark.parametrize(
        "over",
        [
            run(returncode=75, stop_cause=StopCause.PAUSE),
            run(returncode=-9, killed=True, stop_cause=StopCause.PAUSE),
            run(RunState.LOST, stop_cause=StopCause.PAUSE),
            run(returncode=-15),
        ],
    )
    def test_a_paused_run_is_paused(self, state: TrialState, over: RunView) -> None:
        assert isinstance(verdict(trial(state, over)), MarkPaused)

    def test_a_command_that_takes_term_and_exits_0_was_paused_not_finished(self) -> None:
        spec = COMMAND | {"resumable": True}
        over = run(returncode=0, stop_cause=StopCause.PAUSE)
        assert isinstance(verdict(trial(TrialState.PAUSING, over, spec=spec)), MarkPaused)
        at_end = (LogPoint(step=1000, val_bpb=2.0),)
        assert finished(trial(TrialState.PAUSING, over, spec=spec, val_curve=at_end))[0] is Result.COMPLETED

    def test_a_command_brings_its_last_score(self) -> None:
        action = verdict(trial(TrialState.RUNNING, run(returncode=0), spec=COMMAND))
        assert isinstance(action, Finish)
        assert (action.result, action.raw_bpb) == (Result.COMPLETED, 2.25)

    @pytest.mark.parametrize("points", [(), (LogPoint(step=5, val_bpb=float("inf")),)])
    def test_a_command_without_a_score_says_so(self, points: tuple[LogPoint, ...]) -> None:
        action = verdict(trial(TrialState.RUNNING, run(returncode=0), spec=COMMAND, val_curve=points))
        assert isinstance(action, Finish)
        assert (action.result, action.raw_bpb) == (Result.COMPLETED, None)
        assert "no score was found" in action.reason

    @pytest.mark.parametrize(
        "over",
        [
            run(RunState.LOST, last_step=5),
            run(returncode=-9, last_step=5),
            run(returncode=-15, last_step=5),
            run(returncode=75, last_step=5),
        ],
    )
    @pytest.mark.parametrize("state", [TrialState.LAUNCHING, TrialState.RUNNING])
    def test_what_was_not_its_fault_is_tried_again(self, over: RunView, state: TrialState) -> None:
        action = verdict(trial(state, over))
        assert isinstance(action, Requeue)
        assert "last checkpoint" in action.reason

    def test_a_lost_program_that_cannot_resume_starts_over_and_says_so(self) -> None:
        action = verdict(trial(TrialState.RUNNING, run(RunState.LOST), spec=COMMAND))
        assert isinstance(action, Requeue)
        assert "starts again from the beginning" in action.reason

    @pytest.mark.parametrize(
        ("last", "result"),
        [({"state": RunState.LOST}, Result.FAILED_LOST), ({"returncode": -9}, Result.FAILED_CRASHED)],
    )
    def test_three_attempts_without_progress_are_enough(self, last: dict[str, Any], result: Result) -> None:
        runs = [run(RunState.LOST, attempt=i) for i in (1, 2)]
        assert isinstance(verdict(trial(TrialState.RUNNING, *runs)), Requeue)
        found, reason = finished(trial(TrialState.RUNNING, *runs, run(attempt=3, **last)))
        assert found is result
        assert "3 attempts in a row" in reason

    def test_progress_starts_the_count_anew(self) -> None:
        steps = [10, 10, 10, 20, 20, 20]
        runs = [run(RunState.LOST, attempt=i + 1, last_step=step) for i, step in enumerate(steps)]
        assert [fruitless_attempts(trial(TrialState.RUNNING, *runs[:n])) for n in range(1, 7)] == [0, 1, 2, 0, 1, 2]
        paused = run(RunState.EXITED, attempt=7, last_step=20, stop_cause=StopCause.PAUSE)
        assert fruitless_attempts(trial(TrialState.RUNNING, *runs, paused)) == 2, "a pause is no failure"

    def test_a_launch_that_failed_is_tried_again_with_its_reason(self) -> None:
        action = verdict(trial(TrialState.LAUNCHING, run(RunState.LOST, error="disk full", claimed=False)))
        assert isinstance(action, Requeue)
        assert "the run could not be started" in action.reason
        assert "disk full" in action.reason

    @pytest.mark.parametrize("state", [RunState.INTENDED, RunState.RUNNING, RunState.STOPPING, RunState.UNKNOWN])
    def test_nothing_is_judged_over_while_a_run_may_be_alive(self, state: RunState) -> None:
        action = verdict(trial(TrialState.RUNNING, run(RunState.LOST), run(state, attempt=2)))
        assert isinstance(action, Keep)


class TestDeadlines:
    def stopping(self, asked_seconds_ago: float, **fields: Any) -> TrialView:
        asked = NOW - timedelta(seconds=asked_seconds_ago)
        stop = run(RunState.STOPPING, stop_cause=StopCause.PRUNE, stop_asked_at=asked, claimed=True, **fields)
        return trial(TrialState.STOPPING, stop)

    def test_a_stop_past_grace_and_slack_is_killed(self) -> None:
        action = verdict(self.stopping(61))
        assert isinstance(action, Kill)
        assert "61 s ago" in action.reason

    @pytest.mark.parametrize("seconds", [0, 60, -3600])
    def test_not_before_and_not_when_the_clock_jumped_back(self, seconds: float) -> None:
        assert isinstance(verdict(self.stopping(seconds)), Keep)

    @pytest.mark.parametrize(
        ("state", "trial_state"), [(RunState.INTENDED, TrialState.LAUNCHING), (RunState.STOPPING, TrialState.STOPPING)]
    )
    def test_an_unclaimed_run_is_voided(self, state: RunState, trial_state: TrialState) -> None:
        old = run(state, claimed=False, intended_at=NOW - timedelta(seconds=61), stop_asked_at=NOW)
        assert isinstance(verdict(trial(trial_state, old)), Void)

    @pytest.mark.parametrize(("claimed", "age"), [(False, 59), (None, 600), (True, 600)])
    def test_a_claimed_unseen_or_young_one_is_not(self, claimed: bool | None, age: float) -> None:
        view = run(RunState.INTENDED, claimed=claimed, intended_at=NOW - timedelta(seconds=age))
        assert isinstance(verdict(trial(TrialState.LAUNCHING, view)), Keep)

    def test_an_unclaimed_run_that_was_out_of_sight_is_voided(self) -> None:
        old = run(RunState.UNKNOWN, claimed=False, intended_at=NOW - timedelta(seconds=61))
        assert isinstance(verdict(trial(TrialState.LAUNCHING, old)), Void)
        seen = run(RunState.UNKNOWN, claimed=True, intended_at=NOW - timedelta(seconds=61))
        assert isinstance(verdict(trial(TrialState.RUNNING, seen)), Keep)

    def timed(self, age: float, **fields: Any) -> TrialView:
        live = run(RunState.RUNNING, claimed=True, intended_at=NOW - timedelta(seconds=age), **fields)
        return trial(TrialState.RUNNING, live, spec=TRAINER | {"timeout_seconds": 100})

    def test_a_run_whose_runner_is_gone_still_obeys_its_timeout(self) -> None:
        action = verdict(self.timed(161))
        assert isinstance(action, Stop)
        assert (action.cause, action.run_uuid) == (StopCause.TIMEOUT, "run-1")
        assert "100 s" in action.reason

    @pytest.mark.parametrize("age", [99, 159, -500])
    def test_the_runner_has_its_grace_first(self, age: float) -> None:
        assert isinstance(verdict(self.timed(age)), Keep)

    def test_without_a_timeout_nothing_is_too_long(self) -> None:
        live = run(RunState.RUNNING, claimed=True, intended_at=NOW - timedelta(days=9))
        assert isinstance(verdict(trial(TrialState.RUNNING, live)), Keep)


class TestInterruptions:
    OVER = run(returncode=0, stop_cause=StopCause.INTERRUPTED)

    @pytest.mark.parametrize(("resumable", "words"), [(True, "goes on from its last"), (False, "starts again")])
    @pytest.mark.parametrize("code", [0, 1, 143, -15])
    def test_a_command_told_to_end_by_the_machine_was_not_done(self, code: int, resumable: bool, words: str) -> None:
        over = dataclasses.replace(self.OVER, returncode=code)
        action = verdict(trial(TrialState.RUNNING, over, spec=COMMAND | {"resumable": resumable}))
        assert isinstance(action, Requeue)
        assert words in action.reason

    def test_at_its_limit_it_was_done(self) -> None:
        at_end = (LogPoint(step=1000, val_bpb=2.0),)
        assert finished(trial(TrialState.RUNNING, self.OVER, spec=COMMAND, val_curve=at_end))[0] is Result.COMPLETED

    def test_a_trainer_is_judged_as_ever(self) -> None:
        again = dataclasses.replace(self.OVER, returncode=75)
        assert isinstance(verdict(trial(TrialState.RUNNING, again)), Requeue)
        assert finished(trial(TrialState.RUNNING, self.OVER))[0] is Result.FAILED_CRASHED
        done = dataclasses.replace(self.OVER, has_result=True)
        result, reason = finished(trial(TrialState.RUNNING, done))
        assert result is Result.COMPLETED
        assert "interrupted" not in reason

    def test_reboots_do_not_use_up_the_attempts(self) -> None:
        runs = [dataclasses.replace(self.OVER, attempt=i) for i in range(1, 6)]
        assert isinstance(verdict(trial(TrialState.RUNNING, *runs, spec=COMMAND)), Requeue)


class TestStarts:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EAGAIN, errno.ENOMEM])
    def test_what_the_machine_lacked_is_tried_again_and_not_for_ever(self, number: int) -> None:
        runs = [run(returncode=None, error="No space left", errno=number, attempt=i) for i in (1, 2, 3)]
        action = verdict(trial(TrialState.RUNNING, runs[0]))
        assert isinstance(action, Requeue)
        assert action.reason.startswith("the run could not be started: No space left")
        assert finished(trial(TrialState.RUNNING, *runs))[0] is Result.FAILED_CRASHED

    @pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOEXEC, None])
    def test_what_the_spec_got_wrong_is_final(self, number: int | None) -> None:
        result, reason = finished(trial(TrialState.RUNNING, run(returncode=None, error="no such file", errno=number)))
        assert result is Result.FAILED_CRASHED
        assert reason == "the run could not be started: no such file"
