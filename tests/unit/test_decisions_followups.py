"""Follow-ups: export and scoring; and what must hold for any ledger at all."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.domain.actions import Assignment, Finish, Keep, Kill, Launch, Stop, Void, Wait
from agent.domain.observations import Devices
from agent.domain.specs import Metric
from agent.domain.trials import LIVE_TRIAL_STATES, Result, RunKind, RunState, StopCause, TrialState
from agent.domain.views import ArtifactView, RunView, TrialView
from placement_views import NO_GPU, NOW, decided, done, gpu, launched, machine, only, run, trial, waits


def artifact(size: int = 15_000_000) -> ArtifactView:
    return ArtifactView(
        run_uuid="x",
        path="runs/a",
        sha256="s",
        artifact_bytes=size,
        weights_bytes=size,
        code_bytes=0,
        tokenizer_bytes=0,
        scheme="int6",
    )


class TestFollowUps:
    def kinds(self, devices: Devices, *trials: TrialView) -> list[tuple[int, RunKind, str | None]]:
        return [(a.trial_id, a.kind, a.source) for a in decided(devices, *trials) if isinstance(a, Launch)]

    def test_the_best_of_the_track_is_exported(self) -> None:
        assert self.kinds(NO_GPU, done(1, 2.2), done(2, 2.1)) == [(2, RunKind.EXPORT, "runs/2/model.pt")]

    @pytest.mark.parametrize(
        "view",
        [
            done(1, 2.0, spec={"export": "never"}),
            done(1, 2.0, model_path=None),
            done(1, 2.0, result=Result.PRUNED),
            done(1, 2.0, run(RunKind.EXPORT, RunState.EXITED), run(RunKind.EXPORT, RunState.LOST)),
            done(1, 2.0, run(RunKind.EXPORT, RunState.EXITED), run(RunKind.EXPORT, RunState.LOST), given_up=True),
            done(1, 2.0, replace(run(RunKind.EXPORT, RunState.EXITED), stop_cause=StopCause.USER)),
            done(1, 2.0, run(RunKind.EXPORT, RunState.UNKNOWN)),
            done(1, 2.0, artifact=artifact(), scores={Metric.RAW: 2.0, Metric.ARTIFACT: 2.01}),
        ],
    )
    def test_others_are_not(self, view: TrialView) -> None:
        assert self.kinds(NO_GPU, view) == []

    def test_always_means_always(self) -> None:
        assert [t for t, *_ in self.kinds(NO_GPU, done(1, 2.2, spec={"export": "always"}), done(2, 2.1))] == [1, 2]

    def test_one_that_is_over_budget_does_not_hold_the_title(self) -> None:
        heavy = done(2, 2.1, artifact=artifact(16_000_001), scores={Metric.RAW: 2.1, Metric.ARTIFACT: 2.1})
        assert self.kinds(NO_GPU, done(1, 2.2), heavy) == [(1, RunKind.EXPORT, "runs/1/model.pt")]

    def test_an_artifact_is_scored(self) -> None:
        assert self.kinds(NO_GPU, done(1, 2.2, artifact=artifact())) == [(1, RunKind.EVALUATE, "runs/a")]

    def test_scoring_takes_a_free_gpu_and_exporting_does_not(self) -> None:
        cards = machine(gpu(total=80))
        evaluate, export = done(1, 2.2, artifact=artifact()), done(2, 2.1)
        found = {a.trial_id: launched(a) for a in decided(cards, evaluate, export)}
        assert found == {1: Assignment(gpu_uuids=("GPU-0",)), 2: Assignment(cpu_slots=1)}

    def test_with_no_free_gpu_scoring_of_a_gpu_model_waits_for_one(self) -> None:
        holder = trial(9, state=TrialState.RUNNING, runs=(run(RunKind.TRAIN, RunState.RUNNING, 0),))
        action = only(machine(gpu(total=80)), done(1, 2.2, artifact=artifact()), holder)
        assert isinstance(action, Wait)
        assert "free GPU" in action.reason
        assert "taken by t9@1337" in action.reason

    def test_they_go_before_queued_training_and_wait_when_all_is_taken(self) -> None:
        slots = Devices(gpus=(), cpu_slots=1)
        found = decided(slots, trial(1, {"priority": 9}), done(2, 2.1))
        assert [(type(a), a.trial_id) for a in found] == [(Launch, 2), (Wait, 1)]
        holder = trial(9, state=TrialState.RUNNING, runs=(run(slots=1),))
        assert "0 of 1 are free" in waits(only(slots, done(2, 2.1), holder))

    def test_an_unclaimed_follow_up_is_voided(self) -> None:
        lost = RunView(
            run_uuid="e1",
            trial_id=1,
            kind=RunKind.EXPORT,
            attempt=1,
            state=RunState.INTENDED,
            directory="d",
            assignment=Assignment(cpu_slots=1),
            intended_at=NOW - timedelta(hours=1),
            claimed=False,
        )
        action = only(NO_GPU, done(1, 2.0, lost))
        assert isinstance(action, Void)
        assert action.run_uuid == "e1"

    def unstarted(self, count: int, ended: datetime = NOW - timedelta(hours=1)) -> tuple[RunView, ...]:
        lost = run(RunKind.EXPORT, RunState.LOST)
        return (replace(lost, claimed=False, ended_at=ended, error="disk full"),) * count

    @pytest.mark.parametrize("cause", [None, StopCause.INTERRUPTED])
    def test_runs_that_never_began_or_were_interrupted_are_no_attempts(self, cause: StopCause | None) -> None:
        runs = self.unstarted(4) if cause is None else (run(RunKind.EXPORT, RunState.EXITED),) * 4
        action = only(NO_GPU, done(1, 2.0, *(replace(r, stop_cause=cause) for r in runs)))
        assert isinstance(action, Launch)
        assert action.numbers["attempt"] == 1

    def test_a_start_that_failed_is_tried_again_later_each_time(self) -> None:
        first = only(NO_GPU, done(1, 2.0, *self.unstarted(1, NOW)))
        assert "export is tried again in 10 s: its last run could not be started: disk full" in waits(first)
        third = only(NO_GPU, done(1, 2.0, *self.unstarted(3, NOW)))
        assert "in 40 s" in waits(third)
        assert isinstance(first, Wait)
        assert isinstance(third, Wait)
        assert (first.hopeless, third.hopeless) == (False, True)

    def test_giving_up_is_said_once_with_its_reason(self) -> None:
        failed = replace(run(RunKind.EXPORT, RunState.EXITED), returncode=1, last_lines=("no such tensor", ""))
        action = only(NO_GPU, done(1, 2.0, failed, failed))
        assert isinstance(action, Keep)
        assert "given up after 2 attempts" in action.reason
        assert "exit code 1: no such tensor" in action.reason
        assert decided(NO_GPU, done(1, 2.0, failed, failed, given_up=True)) == ()

    def live(self, seconds: float, **fields: Any) -> TrialView:
        return done(1, 2.0, replace(run(RunKind.EXPORT), intended_at=NOW - timedelta(seconds=seconds), **fields))

    def test_one_that_runs_too_long_is_stopped_and_then_killed(self) -> None:
        assert decided(NO_GPU, self.live(3600)) == ()
        action = only(NO_GPU, self.live(3601))
        assert isinstance(action, Stop)
        assert (action.cause, action.run_uuid) == (StopCause.TIMEOUT, "r")
        told: dict[str, Any] = {"state": RunState.STOPPING, "stop_cause": StopCause.TIMEOUT}
        assert decided(NO_GPU, self.live(3700, stop_asked_at=NOW, **told)) == ()
        overdue = only(NO_GPU, self.live(3700, stop_asked_at=NOW - timedelta(seconds=61), **told))
        assert isinstance(overdue, Kill)

    def test_scoring_that_this_machine_can_never_do_is_hopeless(self) -> None:
        small = only(machine(gpu(total=1)), done(1, 2.2, artifact=artifact()))
        busy = only(machine(gpu(total=80, used=79.9)), done(1, 2.2, artifact=artifact()))
        assert isinstance(small, Wait)
        assert isinstance(busy, Wait)
        assert (small.hopeless, busy.hopeless) == (True, False)


@st.composite
def ledgers(draw: st.DrawFn) -> tuple[TrialView, ...]:
    """Any trials at all, also ones that no honest history would leave behind."""
    trials = []
    for trial_id in range(1, draw(st.integers(0, 8)) + 1):
        runs = tuple(
            run(
                draw(st.sampled_from(RunKind)),
                draw(st.sampled_from(RunState)),
                *draw(st.sets(st.integers(0, 3), max_size=2)),
                slots=draw(st.integers(0, 2)),
                uuid=f"r{trial_id}-{i}",
            )
            for i in range(draw(st.integers(0, 3)))
        )
        spec: dict[str, Any] = {
            "priority": draw(st.integers(-2, 2)),
            "resources": {"gpus": draw(st.sampled_from([None, 0, 1])), "vram_gb": draw(st.sampled_from([None, 1, 8]))},
            "export": draw(st.sampled_from(["always", "incumbent", "never"])),
        }
        if draw(st.booleans()):
            spec |= {"trainer": None, "command": ["prog"]}
        state = draw(st.sampled_from(TrialState))
        finished = state is TrialState.FINISHED
        result = draw(st.sampled_from(Result)) if finished else None
        trials.append(
            trial(
                trial_id,
                spec,
                state=state,
                result=result,
                runs=runs,
                scores={Metric.RAW: draw(st.floats(1, 3))} if finished and draw(st.booleans()) else {},
                model_path="m" if finished else None,
                artifact=artifact() if finished and draw(st.booleans()) else None,
            )
        )
    return tuple(trials)


@st.composite
def machines(draw: st.DrawFn) -> Devices:
    cards = tuple(
        gpu(
            i,
            total=draw(st.sampled_from([12, 16, 80])),
            used=draw(st.sampled_from([0, 6])),
            error=draw(st.sampled_from(["", "", "sick"])),
        )
        for i in range(draw(st.integers(0, 4)))
    )
    return Devices(gpus=draw(st.sampled_from([cards, cards, None])), cpu_slots=draw(st.integers(0, 6)))


@given(trials=ledgers(), devices=machines())
@settings(max_examples=150, deadline=None)
def test_no_device_twice_no_trial_twice_one_verdict_each(trials: tuple[TrialView, ...], devices: Devices) -> None:
    actions = decided(devices, *trials)
    launches = [action for action in actions if isinstance(action, Launch)]
    live = [r for t in trials for r in t.runs if r.live]

    held = [uuid for r in live for uuid in r.assignment.gpu_uuids]
    given_out = [uuid for launch in launches for uuid in launch.assignment.gpu_uuids]
    assert len(given_out) == len(set(given_out))
    assert not set(given_out) & set(held)
    assert set(given_out) <= {card.uuid for card in devices.gpus or () if not card.error}
    slots = sum(launch.assignment.cpu_slots for launch in launches)
    assert slots == 0 or slots + sum(r.assignment.cpu_slots for r in live) <= devices.cpu_slots

    by_id = {t.trial_id: t for t in trials}
    for launch in launches:
        view = by_id[launch.trial_id]
        assert view.state is (TrialState.QUEUED if launch.kind is RunKind.TRAIN else TrialState.FINISHED)
        if launch.kind is RunKind.TRAIN:
            assert view.live_run is None
        else:
            assert not any(r.live for r in view.runs)
            assert view.result is Result.COMPLETED

    judged = [action.trial_id for action in actions]
    assert len(judged) == len(set(judged)), "two verdicts on one trial"
    assert {t.trial_id for t in trials if t.state is not TrialState.FINISHED} <= set(judged)
    assert all(action.reason for action in actions)
    finishing = {action.trial_id for action in actions if isinstance(action, Finish)}
    assert not any(by_id[i].live_run for i in finishing if by_id[i].state in LIVE_TRIAL_STATES)
