"""Users' commands, and the backoff of retries, each with its counter-example."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from agent.decisions.policy import Policy, decide
from agent.domain.actions import (
    Action,
    Finish,
    Keep,
    Launch,
    MarkPaused,
    Resume,
    Stop,
    Wait,
)
from agent.domain.observations import CommandVerb, Devices
from agent.domain.trials import Result, RunKind, RunState, StopCause, TrialState
from agent.domain.views import LedgerView, PendingCommand, RunView
from ending_views import COMMAND, MACHINE, NOW, decisions, run, trial


class TestCommands:
    @pytest.mark.parametrize("state", [TrialState.QUEUED, TrialState.PAUSED])
    def test_stop_of_a_trial_without_a_run_ends_it(self, state: TrialState) -> None:
        found = decisions(trial(state), CommandVerb.STOP)
        (action,) = found.actions
        assert isinstance(action, Finish)
        assert action.result is Result.STOPPED
        assert found.command_outcomes[0][:2] == ("c0", True)

    @pytest.mark.parametrize(
        ("verb", "cause"), [(CommandVerb.STOP, StopCause.USER), (CommandVerb.PAUSE, StopCause.PAUSE)]
    )
    def test_live_runs_are_told(self, verb: CommandVerb, cause: StopCause) -> None:
        found = decisions(trial(TrialState.RUNNING, run(RunState.RUNNING)), verb)
        (action,) = found.actions
        assert isinstance(action, Stop)
        assert (action.cause, action.run_uuid) == (cause, "run-1")

    def test_pause_of_a_program_that_cannot_is_refused(self) -> None:
        found = decisions(trial(TrialState.RUNNING, run(RunState.RUNNING), spec=COMMAND), CommandVerb.PAUSE)
        assert isinstance(found.actions[0], Keep)
        ((_, done, text),) = found.command_outcomes
        assert not done
        assert "resumable: true" in text

    def test_a_resumable_program_can(self) -> None:
        view = trial(TrialState.RUNNING, run(RunState.RUNNING), spec=COMMAND | {"resumable": True})
        assert isinstance(decisions(view, CommandVerb.PAUSE).actions[0], Stop)

    def test_queued_trials_are_held_back_and_paused_ones_resumed(self) -> None:
        assert isinstance(decisions(trial(TrialState.QUEUED), CommandVerb.PAUSE).actions[0], MarkPaused)
        assert isinstance(decisions(trial(TrialState.PAUSED), CommandVerb.RESUME).actions[0], Resume)
        assert isinstance(decisions(trial(TrialState.PAUSED)).actions[0], Wait)

    @pytest.mark.parametrize("verb", list(CommandVerb))
    def test_finished_is_final(self, verb: CommandVerb) -> None:
        view = trial(TrialState.FINISHED, run(), result=Result.PRUNED)
        found = decisions(view, verb)
        assert found.actions == ()
        ((_, done, text),) = found.command_outcomes
        assert not done
        assert "finished" in text

    @pytest.mark.parametrize(
        ("state", "verb", "done"),
        [
            (TrialState.STOPPING, CommandVerb.STOP, True),
            (TrialState.STOPPING, CommandVerb.PAUSE, False),
            (TrialState.STOPPING, CommandVerb.RESUME, False),
            (TrialState.PAUSING, CommandVerb.PAUSE, True),
            (TrialState.RUNNING, CommandVerb.RESUME, True),
        ],
    )
    def test_what_changes_nothing_is_answered(self, state: TrialState, verb: CommandVerb, done: bool) -> None:
        live = run(RunState.RUNNING if state is TrialState.RUNNING else RunState.STOPPING, stop_asked_at=NOW)
        found = decisions(trial(state, live), verb)
        assert isinstance(found.actions[0], Keep)
        assert found.command_outcomes[0][1] is done

    @pytest.mark.parametrize("state", [RunState.RUNNING, RunState.STOPPING])
    def test_stop_reaches_the_follow_up_of_a_finished_trial(self, state: RunState) -> None:
        export = run(state, attempt=2, kind=RunKind.EXPORT, stop_asked_at=None if state is RunState.RUNNING else NOW)
        view = trial(TrialState.FINISHED, run(), export, result=Result.COMPLETED)
        found = decisions(view, CommandVerb.STOP)
        assert found.command_outcomes[0][1] is True
        stops = [(action.cause, action.run_uuid) for action in found.actions if isinstance(action, Stop)]
        assert stops == ([(StopCause.USER, "run-2")] if state is RunState.RUNNING else [])
        assert decisions(view, CommandVerb.PAUSE).command_outcomes[0][1] is False

    def test_resume_waits_until_the_checkpoint_is_written(self) -> None:
        found = decisions(trial(TrialState.PAUSING, run(RunState.STOPPING, stop_asked_at=NOW)), CommandVerb.RESUME)
        assert found.command_outcomes == ()

    def test_a_pausing_run_can_still_be_stopped(self) -> None:
        found = decisions(trial(TrialState.PAUSING, run(RunState.STOPPING, stop_asked_at=NOW)), CommandVerb.STOP)
        assert isinstance(found.actions[0], Stop)

    def test_an_ending_comes_first_and_the_command_waits_its_turn(self) -> None:
        found = decisions(trial(TrialState.RUNNING, run(returncode=0, has_result=True)), CommandVerb.STOP)
        assert isinstance(found.actions[0], Finish)
        assert found.actions[0].result is Result.COMPLETED
        assert found.command_outcomes == ()

    def test_one_change_a_beat_the_next_command_waits(self) -> None:
        found = decisions(trial(TrialState.PAUSED), CommandVerb.RESUME, CommandVerb.STOP)
        assert [type(action) for action in found.actions] == [Resume]
        assert [outcome[0] for outcome in found.command_outcomes] == ["c0"]

    def test_an_unknown_trial_is_refused(self) -> None:
        command = PendingCommand(command_id="c", verb=CommandVerb.STOP, trial_id=99)
        view = LedgerView(at=NOW, commands=(command,))
        found = decide(NOW, view, MACHINE, {}, Policy(), lambda _: None)
        assert found.command_outcomes == (("c", False, "there is no trial 99"),)


class TestBackoff:
    MACHINE = Devices(gpus=(), cpu_slots=4)

    def first(self, now: datetime, *runs: RunView, **fields: Any) -> Action:
        view = LedgerView(at=now, trials=(trial(TrialState.QUEUED, *runs, **fields),))
        return decide(now, view, self.MACHINE, {}, Policy(), lambda _: None).actions[0]

    @pytest.mark.parametrize(("fruitless", "seconds"), [(1, 10), (2, 20)])
    def test_it_doubles(self, fruitless: int, seconds: float) -> None:
        runs = [run(RunState.LOST, attempt=i + 1) for i in range(fruitless)]
        early, late = NOW + timedelta(seconds=seconds - 1), NOW + timedelta(seconds=seconds)
        waiting = self.first(early, *runs)
        assert isinstance(waiting, Wait)
        assert "retries in 1 s" in waiting.reason
        assert isinstance(self.first(late, *runs), Launch)

    def test_none_after_a_pause(self) -> None:
        paused = run(returncode=75, stop_cause=StopCause.PAUSE)
        assert isinstance(self.first(NOW, paused), Launch)

    def test_a_clock_set_back_does_not_hold_it(self) -> None:
        assert isinstance(self.first(NOW - timedelta(hours=1), run(RunState.LOST), state_since=NOW), Launch)
