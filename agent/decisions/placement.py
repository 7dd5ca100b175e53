"""Which queued trials start now, and on what; every other one waits with its reason.

Strict order: priority, then arrival. A trial that finds no free device does not hold up smaller ones behind
it (backfill); it is said in the reason when one is passed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from agent.decisions.exits import retry_not_before
from agent.decisions.free_devices import FreeDevices
from agent.decisions.thresholds import RetryPolicy
from agent.domain.actions import Assignment, Launch, Wait
from agent.domain.observations import Device
from agent.domain.trials import RunKind, TrialState
from agent.domain.views import LedgerView, TrialView
from trainer.sizing import peak_memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlace:
    """No device for a trial. `for_now`: others hold them, so it is passed by those that fit."""

    why: str
    for_now: bool = False


def place(
    queued: Sequence[TrialView], view: LedgerView, free: FreeDevices, now: datetime, retries: RetryPolicy
) -> tuple[Launch | Wait, ...]:
    """One verdict for each queued trial, in the order in which they were asked."""
    unfinished = {trial.name for trial in view.trials if trial.state is not TrialState.FINISHED}
    known = view.experiment_names()
    verdicts: list[Launch | Wait] = []
    passed: list[str] = []
    for trial in sorted(queued, key=lambda t: (-t.spec.priority, t.enqueued_at, t.trial_id)):
        hold = _not_yet(trial, now, retries) or _waits_for(trial, known, unfinished)
        if hold is not None:
            verdicts.append(Wait(trial_id=trial.trial_id, reason=hold))
            continue
        assignment = assign(trial, free)
        if isinstance(assignment, NoPlace):
            verdicts.append(Wait(trial_id=trial.trial_id, reason=assignment.why))
            if assignment.for_now:
                passed.append(trial.key)
            continue
        verdicts.append(
            Launch(
                trial_id=trial.trial_id,
                kind=RunKind.TRAIN,
                assignment=assignment,
                reason=_reason(trial, assignment, free, passed),
                numbers={"priority": trial.spec.priority, "waited_seconds": (now - trial.enqueued_at).total_seconds()},
            )
        )
    return tuple(verdicts)


def assign(trial: TrialView, free: FreeDevices) -> Assignment | NoPlace:
    """Devices for a training run, taken from `free`, or why there are none."""
    wants = gpus_wanted(trial, free)
    if isinstance(wants, NoPlace):
        return wants
    if wants == 0:
        return _assign_slots(trial, free)
    healthy = [gpu for gpu in free.gpus if not gpu.error]
    if wants > len(free.gpus):
        remedy = f"lower resources.gpus to {len(free.gpus)}" if free.gpus else "set resources.gpus: 0 to use CPU slots"
        has = f"this machine has {len(free.gpus)}" if free.gpus else f"this machine has none ({_note(free)})"
        return NoPlace(why=f"asks for {wants} GPU(s), {has}. Remedy: {remedy}")
    fitting = [gpu for gpu in healthy if memory_need_bytes(trial, gpu) <= gpu.memory_total_bytes]
    if healthy and len(fitting) < wants:
        largest = max(healthy, key=lambda gpu: gpu.memory_total_bytes)
        return NoPlace(
            why=f"needs {memory_need_bytes(trial, largest) / 1e9:.1f} GB on each of {wants} GPU(s); the largest card "
            f"here has {largest.memory_total_bytes / 1e9:.1f} GB. Remedy: a smaller batch.micro_batch_tokens, "
            "or say what it really needs in resources.vram_gb"
        )
    need = partial(memory_need_bytes, trial)
    taken = free.take_gpus(wants, need, trial.key)
    return taken or NoPlace(why=f"waits for {wants} free GPU(s): {free.obstacles(need)}", for_now=True)


def gpus_wanted(trial: TrialView, free: FreeDevices) -> int | NoPlace:
    """How many GPUs a run shall have; 0 is CPU slots."""
    asked, settings = trial.spec.resources.gpus, trial.spec.trainer
    device = "auto" if settings is None else settings.device
    if asked == 0 or (asked is None and device == "cpu"):
        return 0
    if free.devices.gpus is None:
        return NoPlace(why=f"which GPUs there are is not known now ({_note(free)}); asked again at the next beat")
    if asked is not None:
        return asked
    return 1 if free.gpus or device == "cuda" else 0


def memory_need_bytes(trial: TrialView, gpu: Device) -> int:
    """Bytes that a run needs free on a card: as declared, else predicted from the shape, else half of the card."""
    if trial.spec.resources.vram_gb is not None:
        return int(trial.spec.resources.vram_gb * 1e9)
    if trial.spec.trainer is not None:
        return peak_memory_bytes(trial.spec.train_config(trial.seed))
    return gpu.memory_total_bytes // 2


def _not_yet(trial: TrialView, now: datetime, retries: RetryPolicy) -> str | None:
    if trial.live_run is not None:
        return "an earlier run of it may still be alive: nothing is started twice"
    not_before = retry_not_before(trial, retries)
    if not_before is None or now >= not_before or now < trial.state_since:
        return None  # a clock that was set back must not hold a trial for as long as the jump
    return f"retries in {(not_before - now).total_seconds():.0f} s (backoff after its last run ended)"


def _waits_for(trial: TrialView, known: Collection[str], unfinished: Collection[str]) -> str | None:
    missing = [name for name in trial.spec.after if name not in known]
    if missing:
        return (
            f"waits for {', '.join(missing)}, which the ledger does not know. "
            "Remedy: enqueue it, or stop this trial and correct `after`"
        )
    open_ones = [name for name in trial.spec.after if name in unfinished]
    return f"waits for {', '.join(open_ones)} to finish" if open_ones else None


def _assign_slots(trial: TrialView, free: FreeDevices) -> Assignment | NoPlace:
    need, total = trial.spec.resources.cpus, free.devices.cpu_slots
    if need > total:
        return NoPlace(
            why=f"asks for {need} CPU slots, this machine has {total}. Remedy: lower resources.cpus to {total}"
        )
    taken = free.take_slots(need, trial.key)
    return taken or NoPlace(why=f"waits for {need} CPU slot(s): {free.free_slots} of {total} are free", for_now=True)


def _note(free: FreeDevices) -> str:
    return free.devices.note or "no GPU was found"


def _reason(trial: TrialView, assignment: Assignment, free: FreeDevices, passed: Sequence[str]) -> str:
    again = " again" if trial.last_train_run is not None else ""
    order = f"priority {trial.spec.priority}"
    backfill = ""
    if passed:
        others = f" and {len(passed) - 1} more" if len(passed) > 1 else ""
        backfill = f"; passes {passed[0]}{others}, for which too little is free"
    return f"starts{again} on {free.names(assignment)} ({order}{backfill})"
