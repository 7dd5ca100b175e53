"""Ledger views and devices for the tests of placement and follow-ups."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from agent.decisions.policy import Policy, decide
from agent.domain.actions import Action, Assignment, Launch, Wait
from agent.domain.budget import BudgetVerdict
from agent.domain.observations import Device, Devices
from agent.domain.specs import Metric, Spec, track_of
from agent.domain.trials import Result, RunKind, RunState, TrialState
from agent.domain.views import LedgerView, RunView, TrialView

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
GB = 1_000_000_000
NO_GPU = Devices(gpus=(), cpu_slots=2, note="no NVIDIA driver")


def gpu(index: int = 0, *, total: int = 16, used: float = 0, **fields: Any) -> Device:
    return Device(
        index=index,
        uuid=f"GPU-{index}",
        name="card",
        memory_total_bytes=total * GB,
        memory_used_bytes=int(used * GB),
        **fields,
    )


def machine(*gpus: Device, cpu_slots: int = 4) -> Devices:
    return Devices(gpus=gpus, cpu_slots=cpu_slots)


def run(
    kind: RunKind = RunKind.TRAIN, state: RunState = RunState.RUNNING, *gpus: int, slots: int = 0, uuid: str = "r"
) -> RunView:
    return RunView(
        run_uuid=uuid,
        trial_id=0,
        kind=kind,
        attempt=1,
        state=state,
        directory="d",
        assignment=Assignment(gpu_uuids=tuple(f"GPU-{i}" for i in gpus), cpu_slots=slots),
        intended_at=NOW - timedelta(hours=1),
        ended_at=NOW - timedelta(hours=1) if state in {RunState.EXITED, RunState.LOST} else None,
        claimed=True,
    )


def trial(trial_id: int = 1, spec: dict[str, Any] | None = None, **fields: Any) -> TrialView:
    made = Spec.model_validate({"name": f"t{trial_id}", "trainer": {}, "limits": {"steps": 1000}} | (spec or {}))
    given_fields: dict[str, Any] = {"state": TrialState.QUEUED, "enqueued_at": NOW + timedelta(seconds=trial_id)}
    return TrialView(
        trial_id=trial_id,
        name=made.name,
        seed=1337,
        spec=made,
        track=track_of(made, "ab" * 32),
        state_since=NOW - timedelta(hours=1),
        **(given_fields | fields),
    )


def command(trial_id: int = 1, **spec: Any) -> TrialView:
    return trial(trial_id, {"trainer": None, "command": ["prog"]} | spec)


def done(trial_id: int, raw: float, *runs: RunView, spec: dict[str, Any] | None = None, **fields: Any) -> TrialView:
    given_fields = {
        "state": TrialState.FINISHED,
        "result": Result.COMPLETED,
        "scores": {Metric.RAW: raw},
        "model_path": f"runs/{trial_id}/model.pt",
    }
    return trial(trial_id, spec, runs=(run(state=RunState.EXITED), *runs), **(given_fields | fields))


def decided(devices: Devices, *trials: TrialView, size: BudgetVerdict | None = None) -> tuple[Action, ...]:
    return decide(NOW, LedgerView(at=NOW, trials=trials), devices, {}, Policy(), lambda _: size).actions


def only(devices: Devices, *trials: TrialView) -> Action:
    """The verdict on the first trial."""
    (action,) = [action for action in decided(devices, *trials) if action.trial_id == trials[0].trial_id]
    return action


def waits(action: Action) -> str:
    assert isinstance(action, Wait), action
    return action.reason


def launched(action: Action) -> Assignment:
    assert isinstance(action, Launch), action
    return action.assignment
