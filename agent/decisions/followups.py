"""After training: export the artifact, then score it from its bytes.

The exporter needs a CPU slot; the scorer runs on what the trial was trained on: a model of a GPU takes hours on a
CPU slot and seconds on the card. Both are short there, and the result of a trial is not known without them, so
they go before queued training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from agent.decisions.deadlines import judge_deadline
from agent.decisions.exits import backoff_seconds
from agent.decisions.free_devices import FreeDevices
from agent.decisions.placement import NoPlace, gpus_wanted, memory_need
from agent.decisions.standings import NO_STANDING, Standing
from agent.decisions.thresholds import Policy
from agent.domain.actions import Assignment, Keep, Kill, Launch, Stop, Void, Wait
from agent.domain.specs import Metric
from agent.domain.trials import Result, RunKind, StopCause
from agent.domain.views import LedgerView, RunView, TrialView

MAX_ATTEMPTS = 2
"""Of each kind. Runs that never started and runs that a reboot interrupted are not counted."""

FollowUp = Launch | Wait | Keep | Kill | Stop | Void


@dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    kind: RunKind
    source: str
    why: str


def follow_up(  # noqa: PLR0917  # what a follow-up stands on
    view: LedgerView,
    standings: Mapping[str, Standing],
    free: FreeDevices,
    now: datetime,
    policy: Policy,
    judged: Collection[int] = (),
) -> tuple[FollowUp, ...]:
    """At most one action for each finished trial: the overdue follow-up run, or the next one that is due.

    Trials in `judged` have their verdict already, such as a user's stop of the follow-up run.
    """
    actions: list[FollowUp] = []
    for trial in _candidates(view):
        if trial.trial_id in judged:
            continue
        live = next((run for run in trial.runs if run.live), None)
        if live is not None:
            if overdue := judge_deadline(trial, live, now, policy):
                actions.append(overdue)
            continue
        due = _due(trial, standings.get(trial.track.key, NO_STANDING))
        if due is not None and (action := _judge(trial, due, free, now, policy)) is not None:
            actions.append(action)
    return tuple(actions)


def _candidates(view: LedgerView) -> Iterable[TrialView]:
    """Trials that are finished for good, whatever their result: a live run of any of them is looked after."""
    return (trial for trial in view.trials if trial.result is not None)


def _due(trial: TrialView, standing: Standing) -> _Due | None:
    spec = trial.spec
    if trial.result is not Result.COMPLETED or spec.trainer is None or spec.export == "never":
        return None
    if trial.artifact is not None:
        if Metric.ARTIFACT in trial.scores:
            return None
        size = f"{trial.artifact.artifact_bytes:,} bytes of a budget of {trial.track.budget_bytes:,}"
        return _Due(kind=RunKind.EVALUATE, source=trial.artifact.path, why=f"its artifact ({size}) has no score yet")
    if trial.model_path is None:
        return None
    if spec.export == "always":
        return _Due(kind=RunKind.EXPORT, source=trial.model_path, why="its spec exports always")
    if standing.incumbent is None or standing.incumbent.trial_id != trial.trial_id:
        return None
    why = f"best raw final of its track, val_bpb {trial.scores[Metric.RAW]:.4f}"
    return _Due(kind=RunKind.EXPORT, source=trial.model_path, why=why)


def _judge(
    trial: TrialView, due: _Due, free: FreeDevices, now: datetime, policy: Policy
) -> Launch | Wait | Keep | None:
    runs = trial.runs_of(due.kind)
    tried = [run for run in runs if not run.never_claimed and run.stop_cause is not StopCause.INTERRUPTED]
    if (end := _given_up(due, runs, tried)) is not None:
        return None if trial.given_up else Keep(trial_id=trial.trial_id, reason=end, numbers={"attempts": len(tried)})
    unstarted = len(runs) - max((at for at, run in enumerate(runs, start=1) if not run.never_claimed), default=0)
    if unstarted and (ended := runs[-1].ended_at) is not None:
        left = (ended + timedelta(seconds=backoff_seconds(unstarted, policy.retries)) - now).total_seconds()
        if left > 0 and now >= runs[-1].intended_at:  # not for as long as a clock was set back
            reason = f"{due.kind} is tried again in {left:.0f} s: its last run could not be started"
            return Wait(
                trial_id=trial.trial_id,
                reason=f"{reason}: {runs[-1].error}" if runs[-1].error else reason,
                hopeless=unstarted >= policy.retries.max_attempts_without_progress,
            )
    return _launch(trial, due, free, len(tried) + 1)


def _given_up(due: _Due, runs: Sequence[RunView], tried: Sequence[RunView]) -> str | None:
    """Why no more is tried."""
    if any(run.stop_cause is StopCause.USER for run in runs):
        return f"{due.kind} was stopped by the user: it is not tried again"
    if len(tried) < MAX_ATTEMPTS:
        return None
    return f"{due.kind} is given up after {len(tried)} attempts, although {due.why}: {_how_it_ended(tried[-1])}"


def _how_it_ended(run: RunView) -> str:
    if run.stop_cause is StopCause.TIMEOUT:
        return "the last one ran longer than followup_timeout_seconds"
    last = next((line.strip() for line in reversed(run.last_lines) if line.strip()), "")
    code = "without an exit code" if run.returncode is None else f"with exit code {run.returncode}"
    told = run.error or last[:300]
    return f"the last one ended {code}" + (f": {told}" if told else "")


def _launch(trial: TrialView, due: _Due, free: FreeDevices, attempt: int) -> Launch | Wait:
    place = _place(trial, due, free)
    if isinstance(place, NoPlace):
        reason = f"{due.kind} waits for {place.why}: {due.why}"
        return Wait(trial_id=trial.trial_id, reason=reason, hopeless=place.hopeless)
    again = f"; attempt {attempt} of {MAX_ATTEMPTS}" if attempt > 1 else ""
    return Launch(
        trial_id=trial.trial_id,
        kind=due.kind,
        assignment=place,
        source=due.source,
        reason=f"{due.kind} on {free.names(place)}: {due.why}{again}",
        numbers={"attempt": attempt},
    )


def _place(trial: TrialView, due: _Due, free: FreeDevices) -> Assignment | NoPlace:
    """Where it runs, or what it waits for."""
    wants = gpus_wanted(trial, free)
    if due.kind is RunKind.EXPORT or wants == 0:
        total = free.devices.cpu_slots
        slots = NoPlace(why=f"a free CPU slot ({free.free_slots} of {total} are free)", hopeless=total < 1)
        return free.take_slots(1, trial.key) or slots
    if isinstance(wants, NoPlace):
        return wants
    need = memory_need(trial)
    never = all(need(gpu) > gpu.memory_total_bytes for gpu in free.gpus)
    return free.take_gpus(1, need, trial.key) or NoPlace(why=f"a free GPU ({free.obstacles(need)})", hopeless=never)
