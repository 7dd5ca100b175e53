"""After training: export the artifact, then score it from its bytes.

The exporter needs a CPU slot; the scorer runs on what the trial was trained on: a model of a GPU takes hours on a
CPU slot and seconds on the card. Both are short there, and the result of a trial is not known without them, so
they go before queued training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from agent.decisions.deadlines import judge_deadline
from agent.decisions.free_devices import FreeDevices
from agent.decisions.placement import NoPlace, gpus_wanted, memory_need_bytes
from agent.decisions.standings import NO_STANDING, Standing
from agent.decisions.thresholds import Policy
from agent.domain.actions import Assignment, Kill, Launch, Void, Wait
from agent.domain.specs import Metric
from agent.domain.trials import Result, RunKind
from agent.domain.views import LedgerView, TrialView

MAX_ATTEMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    kind: RunKind
    source: str
    why: str


def follow_up(
    view: LedgerView, standings: Mapping[str, Standing], free: FreeDevices, now: datetime, policy: Policy
) -> tuple[Launch | Wait | Kill | Void, ...]:
    """At most one action for each finished trial: the overdue follow-up run, or the next one that is due."""
    actions: list[Launch | Wait | Kill | Void] = []
    for trial in _candidates(view):
        live = next((run for run in trial.runs if run.live), None)
        if live is not None:
            if overdue := judge_deadline(trial, live, now, policy):
                actions.append(overdue)
            continue
        due = _due(trial, standings.get(trial.track.key, NO_STANDING))
        if due is not None:
            actions.append(_launch(trial, due, free))
    return tuple(actions)


def _candidates(view: LedgerView) -> Iterable[TrialView]:
    """Trials that are finished for good, whatever their result: a live run of any of them is looked after."""
    return (trial for trial in view.trials if trial.result is not None)


def _due(trial: TrialView, standing: Standing) -> _Due | None:
    spec = trial.spec
    if trial.result is not Result.COMPLETED or spec.trainer is None or spec.export == "never":
        return None
    if trial.artifact is not None:
        if Metric.ARTIFACT in trial.scores or len(trial.runs_of(RunKind.EVALUATE)) >= MAX_ATTEMPTS:
            return None
        size = f"{trial.artifact.artifact_bytes:,} bytes of a budget of {trial.track.budget_bytes:,}"
        return _Due(kind=RunKind.EVALUATE, source=trial.artifact.path, why=f"its artifact ({size}) has no score yet")
    if trial.model_path is None or len(trial.runs_of(RunKind.EXPORT)) >= MAX_ATTEMPTS:
        return None
    if spec.export == "always":
        return _Due(kind=RunKind.EXPORT, source=trial.model_path, why="its spec exports always")
    if standing.incumbent is None or standing.incumbent.trial_id != trial.trial_id:
        return None
    why = f"best raw final of its track, val_bpb {trial.scores[Metric.RAW]:.4f}"
    return _Due(kind=RunKind.EXPORT, source=trial.model_path, why=why)


def _launch(trial: TrialView, due: _Due, free: FreeDevices) -> Launch | Wait:
    attempt = len(trial.runs_of(due.kind)) + 1
    place = _place(trial, due, free)
    if isinstance(place, str):
        return Wait(trial_id=trial.trial_id, reason=f"{due.kind} waits for {place}: {due.why}")
    again = f"; attempt {attempt} of {MAX_ATTEMPTS}" if attempt > 1 else ""
    return Launch(
        trial_id=trial.trial_id,
        kind=due.kind,
        assignment=place,
        source=due.source,
        reason=f"{due.kind} on {free.names(place)}: {due.why}{again}",
        numbers={"attempt": attempt},
    )


def _place(trial: TrialView, due: _Due, free: FreeDevices) -> Assignment | str:
    """Where it runs, or what it waits for."""
    wants = gpus_wanted(trial, free)
    if due.kind is RunKind.EXPORT or wants == 0:
        slots = f"a free CPU slot ({free.free_slots} of {free.devices.cpu_slots} are free)"
        return free.take_slots(1, trial.key) or slots
    if isinstance(wants, NoPlace):
        return wants.why
    need = partial(memory_need_bytes, trial)
    return free.take_gpus(1, need, trial.key) or f"a free GPU ({free.obstacles(need)})"
