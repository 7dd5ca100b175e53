"""Ledger views for the tests of endings and of the user's commands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from agent.decisions.policy import Decisions, Policy, decide
from agent.domain.actions import (
    Action,
    Assignment,
    Finish,
)
from agent.domain.observations import CommandVerb, Devices, LogPoint
from agent.domain.specs import Spec, track_of
from agent.domain.trials import Result, RunKind, RunState, TrialState
from agent.domain.views import LedgerView, PendingCommand, RunView, TrialView

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
TRAINER: dict[str, Any] = {"trainer": {}, "limits": {"steps": 1000}}
COMMAND: dict[str, Any] = {"command": ["prog"], "limits": {"steps": 1000}}
MACHINE = Devices(gpus=(), cpu_slots=0)  # nothing can be launched: these tests are about endings


def run(state: RunState = RunState.EXITED, *, attempt: int = 1, **fields: Any) -> RunView:
    given: dict[str, Any] = {
        "run_uuid": f"run-{attempt}",
        "trial_id": 1,
        "kind": RunKind.TRAIN,
        "attempt": attempt,
        "directory": f"runs/{attempt}",
        "assignment": Assignment(cpu_slots=1),
        "intended_at": NOW - timedelta(minutes=10),
        "ended_at": None
        if state in {RunState.INTENDED, RunState.RUNNING, RunState.STOPPING, RunState.UNKNOWN}
        else NOW,
    }
    return RunView(state=state, **(given | fields))


def trial(
    state: TrialState = TrialState.RUNNING, *runs: RunView, spec: dict[str, Any] = TRAINER, **fields: Any
) -> TrialView:
    made = Spec.model_validate({"name": "plain"} | spec)
    given: dict[str, Any] = {
        "val_curve": (LogPoint(step=400, val_bpb=2.5), LogPoint(step=500, val_bpb=2.25)),
        "state_since": NOW - timedelta(minutes=10),
    }
    return TrialView(
        trial_id=1,
        name=made.name,
        seed=1337,
        spec=made,
        track=track_of(made, "ab" * 32),
        state=state,
        enqueued_at=NOW - timedelta(hours=1),
        runs=runs,
        **(given | fields),
    )


def decisions(view: TrialView, *commands: CommandVerb, now: datetime = NOW) -> Decisions:
    pending = tuple(PendingCommand(command_id=f"c{i}", verb=verb, trial_id=1) for i, verb in enumerate(commands))
    return decide(now, LedgerView(at=now, trials=(view,), commands=pending), MACHINE, {}, Policy(), lambda _: None)


def verdict(view: TrialView, now: datetime = NOW) -> Action:
    (action,) = decisions(view, now=now).actions
    return action


def finished(view: TrialView) -> tuple[Result, str]:
    action = verdict(view)
    assert isinstance(action, Finish), action
    return action.result, action.reason
