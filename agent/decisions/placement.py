"""Which queued trials start now, and on what; every other one waits with its reason.

Strict order: priority, then arrival. A trial that finds too little free does not hold up smaller ones behind
it (backfill); it is said in the reason when one is passed. Not for ever: once it has waited for
`reserve_after_seconds`, what is free is held for it until it is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from agent.decisions.after import After, Hold
from agent.decisions.exits import retry_not_before
from agent.decisions.free_devices import FreeDevices
from agent.decisions.thresholds import Policy, RetryPolicy
from agent.domain.actions import Assignment, Launch, Wait
from agent.domain.observations import Device
from agent.domain.trials import RunKind
from agent.domain.views import LedgerView, TrialView
from trainer.config import LimitsConfig, TrainConfig, TrainerSettings
from trainer.sizing import USABLE_SHARE, chosen_micro_tokens, peak_memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlace:
    """No device for a trial. `for_now`: others hold them, so it is passed by those that fit."""

    why: str
    for_now: bool = False
    hopeless: bool = False
    """This machine can never give what is asked for."""


def place(
    queued: Sequence[TrialView], view: LedgerView, free: FreeDevices, now: datetime, policy: Policy
) -> tuple[Launch | Wait, ...]:
    """One verdict for each queued trial, in the order in which they were asked."""
    after = After(view)
    verdicts: list[Launch | Wait] = []
    passed: list[str] = []
    for trial in sorted(queued, key=lambda t: (-t.spec.priority, t.enqueued_at, t.trial_id)):
        hold = _not_yet(trial, now, policy.retries) or after.hold(trial)
        if hold is not None:
            verdicts.append(Wait(trial_id=trial.trial_id, reason=hold.why, hopeless=hold.hopeless))
            continue
        assignment = assign(trial, free)
        if isinstance(assignment, NoPlace):
            kept = _reserve(trial, free, now, policy) if assignment.for_now else ""
            reason, hopeless = f"{assignment.why}{kept}", assignment.hopeless
            verdicts.append(Wait(trial_id=trial.trial_id, reason=reason, hopeless=hopeless))
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
    return after.settle(verdicts, {trial.trial_id: trial for trial in queued})


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
        return NoPlace(why=f"asks for {wants} GPU(s), {has}. Remedy: {remedy}", hopeless=True)
    need = memory_need(trial)
    large_enough = [gpu for gpu in free.gpus if need(gpu) <= gpu.memory_total_bytes]
    fitting = [gpu for gpu in large_enough if not gpu.error]
    if healthy and len(fitting) < wants:
        largest = max(healthy, key=lambda gpu: gpu.memory_total_bytes)
        trainer = trial.spec.trainer
        # Where none is given, the need is that of the smallest already.
        chosen = trainer is None or trainer.batch.micro_batch_tokens is not None
        remedy = "a smaller batch.micro_batch_tokens" if chosen else "a shorter batch.train_seq_len or a smaller model"
        return NoPlace(
            why=f"needs {need(largest) / 1e9:.1f} GB on each of {wants} GPU(s); the largest card "
            f"here has {largest.memory_total_bytes / 1e9:.1f} GB. Remedy: {remedy}, "
            "or say what it really needs in resources.vram_gb",
            hopeless=len(large_enough) < wants,  # a sick card may be large enough, and recover
        )
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


def memory_need(trial: TrialView) -> Callable[[Device], int]:
    """Bytes that a run needs free on a card: as declared, else predicted from the shape and from the micro-batch that
    the trainer will choose on such a card, else half of the card."""
    if trial.spec.resources.vram_gb is not None:
        bytes_needed = int(trial.spec.resources.vram_gb * 1e9)
    elif trial.spec.trainer is not None:
        settings, processes = trial.spec.trainer, trial.spec.processes
        return lambda gpu: _peak_memory(settings, processes, gpu.memory_total_bytes)
    else:
        return lambda gpu: gpu.memory_total_bytes // 2
    return lambda _: bytes_needed


@lru_cache(maxsize=1024)
def _peak_memory(trainer: TrainerSettings, processes: int, total_bytes: int) -> int:
    """Of a run that has a card of `total_bytes` for itself; where not even the least micro-batch fits, of that one.

    It depends on the shape and the batch, not on seed or limits: any will do here.
    """
    config = TrainConfig(**dict(trainer), limits=LimitsConfig(steps=1))
    micro = trainer.batch.micro_batch_tokens
    if micro is None:
        micro = chosen_micro_tokens(config, int(USABLE_SHARE * total_bytes), world_size=processes)
    return peak_memory_bytes(config, micro_tokens=micro, world_size=processes)


def _reserve(trial: TrialView, free: FreeDevices, now: datetime, policy: Policy) -> str:
    """Hold what is free for a trial that has waited long enough; empty if there is nothing to hold or no need yet."""
    waited = (now - trial.state_since).total_seconds()
    if waited < policy.reserve_after_seconds:
        return ""
    wants = gpus_wanted(trial, free)
    if wants == 0:
        held = f"{count} CPU slot(s)" if (count := free.hold_slots(trial.spec.resources.cpus, trial.key)) else ""
    elif isinstance(wants, NoPlace):
        return ""
    else:
        held = f"{count} GPU(s)" if (count := free.hold_gpus(wants, memory_need(trial), trial.key)) else ""
    return f"; {held} held for it, as it has waited for {waited / 3600:.1f} h" if held else ""


def _not_yet(trial: TrialView, now: datetime, retries: RetryPolicy) -> Hold | None:
    if trial.live_run is not None:
        return Hold(why="an earlier run of it may still be alive: nothing is started twice")
    not_before = retry_not_before(trial, retries)
    if not_before is None or now >= not_before or now < trial.state_since:
        return None  # a clock that was set back must not hold a trial for as long as the jump
    return Hold(why=f"retries in {(not_before - now).total_seconds():.0f} s (backoff after its last run ended)")


def _assign_slots(trial: TrialView, free: FreeDevices) -> Assignment | NoPlace:
    need, total = trial.spec.resources.cpus, free.devices.cpu_slots
    if need > total:
        return NoPlace(
            why=f"asks for {need} CPU slots, this machine has {total}. Remedy: lower resources.cpus to {total}",
            hopeless=True,
        )
    taken = free.take_slots(need, trial.key)
    held = "".join(f", {count} held for {key}" for key, count in free.held_slots.items())
    return taken or NoPlace(
        why=f"waits for {need} CPU slot(s): {free.free_slots} of {total} are free{held}", for_now=True
    )


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
