"""Runs under way: divergence and pruning, each with its counter-example."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent.decisions.policy import Policy, PruningPolicy, decide
from agent.decisions.projection.project import project
from agent.domain.actions import Action, Assignment, Keep, Stop
from agent.domain.observations import Devices, LogPoint
from agent.domain.projections import Projection
from agent.domain.specs import Metric, Spec, track_of
from agent.domain.trials import Result, RunKind, RunState, StopCause, TrialState
from agent.domain.views import ArtifactView, LedgerView, RunView, TrialView

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
NORMAL_START = [8.32, 17.43, 11.48, 8.85, 8.05, 8.01, 7.81, 7.5, 7.2, 6.9, 6.6, 6.4, 6.2, 6.1, 6.0]


def trial(
    trial_id: int = 1, *, run_state: RunState = RunState.RUNNING, spec: dict[str, Any] | None = None, **fields: Any
) -> TrialView:
    made = Spec.model_validate({"name": f"t{trial_id}", "trainer": {}, "limits": {"steps": 1000}} | (spec or {}))
    run = RunView(
        run_uuid=f"run-{trial_id}",
        trial_id=trial_id,
        kind=RunKind.TRAIN,
        attempt=1,
        state=run_state,
        directory="runs/1",
        assignment=Assignment(cpu_slots=1),
        intended_at=NOW - timedelta(minutes=5),
    )
    given: dict[str, Any] = {"state": TrialState.RUNNING, "runs": (run,)}
    return TrialView(
        trial_id=trial_id,
        name=made.name,
        seed=1337,
        spec=made,
        track=track_of(made, "ab" * 32),
        state_since=NOW,
        enqueued_at=NOW,
        **(given | fields),
    )


def course(end: float, upto: int = 1000, every: int = 100, start: float = 5.0) -> tuple[LogPoint, ...]:
    """A validation curve of 1000 steps that ends at `end`."""
    shape = {step: (step / 1000) ** -0.5 - 1 for step in range(every, upto + 1, every)}
    scale = (start - end) / ((every / 1000) ** -0.5 - 1)
    return tuple(LogPoint(step=step, val_bpb=end + scale * fall) for step, fall in shape.items())


def peer(trial_id: int, final: float, **fields: Any) -> TrialView:
    ended = {"state": TrialState.FINISHED, "result": Result.COMPLETED, "scores": {Metric.RAW: final}}
    return trial(trial_id, run_state=RunState.EXITED, **({"val_curve": course(final)} | ended | fields))


PEERS = (peer(11, 2.104), peer(12, 2.15), peer(13, 2.2))


def projected(low90: float) -> Projection:
    return Projection(
        trial_id=1,
        run_uuid="run-1",
        law="power",
        step=400,
        progress=0.4,
        n_points=4,
        final_bpb=low90 + 0.5,
        low50=low90 + 0.2,
        high50=low90 + 0.8,
        low90=low90,
        high90=low90 + 1.2,
        r2=0.99,
        parameters={},
        final_tokens=1e6,
    )


def verdict(
    view: TrialView, *others: TrialView, projection: Projection | None = None, policy: Policy | None = None
) -> Action:
    ledger = LedgerView(at=NOW, trials=(view, *others))
    found = decide(
        NOW,
        ledger,
        Devices(gpus=(), cpu_slots=0),
        {1: projection} if projection else {},
        policy or Policy(),
        lambda _: None,
    )
    (action,) = [action for action in found.actions if action.trial_id == view.trial_id]
    return action


def train_points(losses: list[float]) -> tuple[LogPoint, ...]:
    return tuple(LogPoint(step=i + 1, train_loss=loss) for i, loss in enumerate(losses))


class TestDivergence:
    @pytest.mark.parametrize("length", range(1, len(NORMAL_START) + 1))
    def test_a_normal_start_is_let_be(self, length: int) -> None:
        assert isinstance(verdict(trial(train_curve=train_points(NORMAL_START[:length]))), Keep)

    def test_a_lasting_rise_is_stopped(self) -> None:
        action = verdict(trial(train_curve=train_points([*NORMAL_START, 7.6, 7.7, 7.8, 7.9, 8.0])))
        assert isinstance(action, Stop)
        assert action.cause is StopCause.DIVERGED
        assert "7.800 at step 20" in action.reason
        assert "6.200 that it had reached by step 15" in action.reason

    def test_a_run_that_goes_wrong_at_once_has_its_first_loss_as_yardstick(self) -> None:
        losses = [6.9, 17.0, *[20.0 - i % 3 / 4 for i in range(12)]]
        assert isinstance(verdict(trial(train_curve=train_points(losses))), Keep), "14 points: still a spike"
        action = verdict(trial(train_curve=train_points([*losses, 19.0])))
        assert isinstance(action, Stop)
        assert "6.900 that it had reached by step 1" in action.reason

    def test_two_bad_steps_are_not(self) -> None:
        assert isinstance(verdict(trial(train_curve=train_points([*NORMAL_START, 17.0, 12.0]))), Keep)

    def test_a_rise_below_the_threshold_is_not(self) -> None:
        assert isinstance(verdict(trial(train_curve=train_points([*NORMAL_START, *[7.19] * 5]))), Keep)
        assert isinstance(verdict(trial(train_curve=train_points([*NORMAL_START, *[7.21] * 5]))), Stop)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("prunable", [True, False])
    def test_a_loss_that_is_no_number_is_final(self, value: float, prunable: bool) -> None:
        view = trial(train_curve=train_points([6.0, value]), spec={"prunable": prunable})
        assert isinstance(verdict(view), Stop)
        assert isinstance(verdict(trial(val_curve=(LogPoint(step=5, val_bpb=value),))), Stop)

    def test_a_validation_score_far_above_its_best(self) -> None:
        points = (LogPoint(step=1, val_bpb=4.0), LogPoint(step=2, val_bpb=2.0), LogPoint(step=3, val_bpb=3.01))
        assert isinstance(verdict(trial(val_curve=points)), Stop)
        assert isinstance(verdict(trial(val_curve=(*points[:2], LogPoint(step=3, val_bpb=2.99)))), Keep)

    def test_a_baseline_runs_on(self) -> None:
        losses = [*NORMAL_START, *[9.0] * 5]
        assert isinstance(verdict(trial(train_curve=train_points(losses), spec={"prunable": False})), Keep)

    def test_a_run_that_is_not_seen_is_not_judged(self) -> None:
        view = trial(train_curve=train_points([6.0, math.nan]), run_state=RunState.UNKNOWN)
        action = verdict(view)
        assert isinstance(action, Keep)
        assert "unknown is not dead" in action.reason


class TestPruning:
    BAD = course(5.0, upto=400, start=7.0)

    def test_first_suspect_then_stopped(self) -> None:
        first = verdict(trial(val_curve=self.BAD), *PEERS, projection=projected(4.6))
        assert isinstance(first, Keep)
        assert first.suspect
        again = verdict(trial(val_curve=self.BAD, suspect_step=300), *PEERS, projection=projected(4.6))
        assert isinstance(again, Stop)
        assert again.cause is StopCause.PRUNE
        for words in ("at 40% of the run", "3 finished peers", "4.600 to 5.800", "t11@1337 2.104 + 0.002", "step 300"):
            assert words in again.reason
        assert again.numbers["incumbent_bpb"] == 2.104

    def test_the_same_point_does_not_confirm_itself(self) -> None:
        action = verdict(trial(val_curve=self.BAD, suspect_step=400), *PEERS, projection=projected(4.6))
        assert isinstance(action, Keep)
        assert action.suspect

    def test_a_power_law_alone_does_not_condemn(self) -> None:
        """The warmdown that it does not know of is in the peers' courses."""
        view = trial(val_curve=course(2.05, upto=400), suspect_step=300)
        action = verdict(view, *PEERS, projection=projected(2.3))
        assert isinstance(action, Keep)
        assert not action.suspect
        assert "by its peers' course it can still reach" in action.reason

    def test_peers_alone_do_not_condemn(self) -> None:
        action = verdict(trial(val_curve=self.BAD, suspect_step=300), *PEERS, projection=projected(2.0))
        assert isinstance(action, Keep)
        assert not action.suspect
        assert "by its projection" in action.reason

    @pytest.mark.parametrize("low90", [2.1061, 2.1059])
    def test_the_margin_decides(self, low90: float) -> None:
        action = verdict(trial(val_curve=self.BAD, suspect_step=300), *PEERS, projection=projected(low90))
        assert isinstance(action, Stop) is (low90 > 2.106)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"val_curve": course(5.0, upto=190, every=40, start=7.0)}, "grace"),
            ({"val_curve": course(5.0, upto=900, start=7.0)}, "last 15%"),
            ({"val_curve": course(5.0, upto=600, every=200, start=7.0)}, "3 validation points"),
            ({"val_curve": ()}, "no validation point"),
            ({"spec": {"prunable": False}}, "prunable: false"),
            ({"spec": {"trainer": None, "command": ["x"], "limits": None}}, "no limit"),
        ],
    )
    def test_guards(self, fields: dict[str, Any], words: str) -> None:
        view = trial(**({"val_curve": self.BAD, "suspect_step": 1} | fields))
        action = verdict(view, *PEERS, projection=projected(4.6))
        assert isinstance(action, Keep)
        assert words in action.reason

    def test_switched_off(self) -> None:
        policy = Policy(pruning=PruningPolicy(enabled=False))
        view = trial(val_curve=self.BAD, suspect_step=300)
        assert isinstance(verdict(view, *PEERS, projection=projected(4.6), policy=policy), Keep)

    @pytest.mark.parametrize(
        "others",
        [
            PEERS[:2],
            (*PEERS[:2], peer(13, 2.2, result=Result.PRUNED)),
            (*PEERS[:2], peer(13, 2.2, spec={"limits": {"steps": 2000}})),
            (*PEERS[:2], peer(13, 2.2, spec={"budget_bytes": 8_000_000})),
            (*PEERS[:2], peer(13, 2.2, val_curve=())),
            (*PEERS[:2], peer(13, 2.2, val_curve=(LogPoint(step=900, val_bpb=3.0), LogPoint(step=1000, val_bpb=2.2)))),
        ],
    )
    def test_only_completed_peers_of_the_track_that_were_seen_there_count(self, others: tuple[TrialView, ...]) -> None:
        action = verdict(trial(val_curve=self.BAD, suspect_step=300), *others, projection=projected(4.6))
        assert isinstance(action, Keep)
        assert "2 finished peers" in action.reason

    def test_no_projection_no_verdict(self) -> None:
        action = verdict(trial(val_curve=self.BAD, suspect_step=300), *PEERS)
        assert isinstance(action, Keep)
        assert "no projection" in action.reason

    def test_an_incumbent_over_its_budget_is_none(self) -> None:
        heavy = ArtifactView(
            run_uuid="e",
            path="a",
            sha256="",
            artifact_bytes=16_000_001,
            weights_bytes=0,
            code_bytes=0,
            tokenizer_bytes=0,
            scheme="",
        )
        others = (dataclasses.replace(PEERS[0], artifact=heavy), *PEERS[1:])
        action = verdict(trial(val_curve=self.BAD, suspect_step=300), *others, projection=projected(2.13))
        assert isinstance(action, Keep)
        assert "t12@1337 2.150" in action.reason

    def test_peers_are_read_between_their_points(self) -> None:
        sparse = tuple(
            dataclasses.replace(p, val_curve=tuple(q for q in p.val_curve if q.step % 300 == 0)) for p in PEERS
        )
        action = verdict(trial(val_curve=self.BAD, suspect_step=300), *sparse, projection=projected(4.6))
        assert isinstance(action, Stop)

    def test_with_the_real_projection_a_champion_lives_and_a_dud_dies(self) -> None:
        for end, dies in ((2.0, False), (4.0, True)):
            view = trial(val_curve=course(end, upto=500, every=50), suspect_step=450)
            action = verdict(view, *PEERS, projection=project(view, 2.104))
            assert isinstance(action, Stop) is dies
