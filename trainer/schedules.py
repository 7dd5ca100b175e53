"""Schedules as pure functions of progress: learning rate, momentum, weight decay, batch and loop gate at a step.

Progress is the share of the run that is over, 0 to 1: the largest share of any limit that was given, so that a
run on the clock and a run on tokens decay alike, and the limit that ends the run is the one that counts.
Warmdown shapes: linear (trapezoid, arXiv:2405.18392), cosine, and 1 - sqrt (same paper, its best).
A batch that grows at the beginning: McCandlish et al. 2018, arXiv:1812.06162; Smith et al. 2018, arXiv:1711.00489.
"""

from __future__ import annotations

import math

from trainer.config import BatchConfig, LimitsConfig, OptimizerConfig, RecurrenceConfig, ScheduleConfig
from trainer.errors import InputError


def progress(limits: LimitsConfig, *, elapsed_seconds: float, tokens: int, steps: int) -> float:
    """Share of the run that is over, in [0, 1]."""
    shares = [0.0]
    if limits.wallclock_seconds is not None:
        shares.append(elapsed_seconds / limits.wallclock_seconds)
    if limits.tokens is not None:
        shares.append(tokens / limits.tokens)
    if limits.steps is not None:
        shares.append(steps / limits.steps)
    return min(1.0, max(shares))


def warmdown_share(schedule: ScheduleConfig, limits: LimitsConfig, batch_tokens: int) -> float:
    """Share of the run that the warmdown takes, in [0, 1], whether it was given as a share, in seconds or in steps.

    Steps are of `batch_tokens`, the full batch: a batch warm-up lies before the warmdown. Raises InputError if the
    limit that the warmdown is measured by is not there.
    """
    if schedule.warmdown_seconds is not None:
        if limits.wallclock_seconds is None:
            raise InputError("schedule.warmdown_seconds needs limits.wallclock_seconds; give warmdown_fraction instead")
        return min(1.0, schedule.warmdown_seconds / limits.wallclock_seconds)
    if schedule.warmdown_steps is None:
        return schedule.warmdown_fraction
    totals: list[float] = []
    if limits.steps is not None:
        totals.append(limits.steps)
    if limits.tokens is not None:
        totals.append(limits.tokens / batch_tokens)
    if not totals:
        raise InputError("schedule.warmdown_steps needs limits.steps or limits.tokens; give warmdown_fraction instead")
    return min(1.0, schedule.warmdown_steps / min(totals))


def lr_multiplier(done: float, step: int, schedule: ScheduleConfig, limits: LimitsConfig, batch_tokens: int) -> float:
    """Factor on every learning rate for the step that begins at progress `done` after `step` finished steps.

    Warm-up counts steps, because it protects the first updates; warmdown counts progress. Where they meet, both apply.
    `batch_tokens` are those of a full batch.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    share = warmdown_share(schedule, limits, batch_tokens)
    start = 1.0 - share
    if done <= start:
        return warmup
    into = (done - start) / share
    match schedule.warmdown_shape:
        case "linear":
            decay = 1.0 - into
        case "cosine":
            decay = 0.5 * (1.0 + math.cos(math.pi * into))
        case "sqrt":
            decay = 1.0 - math.sqrt(into)
    return warmup * (schedule.min_lr_fraction + (1.0 - schedule.min_lr_fraction) * decay)


def muon_momentum(step: int, optimizer: OptimizerConfig) -> float:
    """Linear from the warm-up's start to the full momentum; counts steps, like every running average does."""
    if step >= optimizer.muon_momentum_warmup_steps:
        return optimizer.muon_momentum
    share = step / optimizer.muon_momentum_warmup_steps
    return (1.0 - share) * optimizer.muon_momentum_warmup_start + share * optimizer.muon_momentum


def weight_decay_multiplier(done: float, optimizer: OptimizerConfig) -> float:
    """Factor on every weight decay: 1, then linearly to 0 over the last `weight_decay_taper` of the run."""
    taper = optimizer.weight_decay_taper
    return 1.0 if done <= 1.0 - taper else (1.0 - done) / taper


def batch_tokens(done: float, batch: BatchConfig, micro_global: int) -> int:
    """Tokens of the step that begins at progress `done`: whole passes of all processes, `micro_global` tokens each.

    Linear in progress from `warmup_start_tokens` to `train_batch_tokens`, rounded down to whole passes. Raises
    InputError if the batch is not made of such passes.
    """
    if batch.train_batch_tokens % micro_global:
        raise InputError(
            f"batch.train_batch_tokens {batch.train_batch_tokens} is not a multiple of the {micro_global} tokens that "
            "all processes take in one pass; change batch.micro_batch_tokens or the number of processes"
        )
    start = batch.warmup_start_tokens
    if start is None or done >= batch.warmup_fraction:
        return batch.train_batch_tokens
    grown = start + (batch.train_batch_tokens - start) * done / batch.warmup_fraction
    return max(1, int(grown) // micro_global) * micro_global


def loop_gate(done: float, recurrence: RecurrenceConfig | None) -> float:
    """What the repeated passes of looped layers are blended in with: linear from 0 to 1 after the loop's start."""
    if recurrence is None or recurrence.gate_fraction == 0.0:
        return 1.0
    return min(1.0, max(0.0, (done - recurrence.start_fraction) / recurrence.gate_fraction))


def planned_steps(limits: LimitsConfig, batch: BatchConfig, *, elapsed_seconds: float, tokens: int, steps: int) -> int:
    """Steps that the whole run will take, after `steps` of them with `tokens` in `elapsed_seconds`.

    Exact under a step limit, and under a token limit once the batch is full; else an estimate (on the clock from the
    pace in tokens per second). Never fewer than the steps already done. On the clock alone, before the first step,
    nothing is known: 1.
    """
    plans = []
    if limits.steps is not None:
        plans.append(limits.steps)
    if limits.tokens is not None:
        plans.append(steps + math.ceil(_remaining_steps(batch, tokens / limits.tokens, limits.tokens - tokens)))
    if limits.wallclock_seconds is not None and tokens and elapsed_seconds > 0:
        seconds = limits.wallclock_seconds
        left = tokens / elapsed_seconds * (seconds - elapsed_seconds)
        plans.append(round(steps + _remaining_steps(batch, elapsed_seconds / seconds, left)))
    return max(steps, min(plans, default=1), 1)


def _remaining_steps(batch: BatchConfig, done: float, tokens: float) -> float:
    """Steps for the `tokens` that are left at progress `done`, if progress goes on evenly with the tokens.

    With d = progress, T = tokens per unit of it and b(d) the batch, d(steps) = T / b(d) d(d): a logarithm where b is
    linear.
    """
    full, start, until = batch.train_batch_tokens, batch.warmup_start_tokens, batch.warmup_fraction
    if start is None or start == full or done >= until or tokens <= 0:
        return tokens / full
    per_progress = tokens / (1.0 - done)
    slope = (full - start) / until
    growing = per_progress / slope * math.log(full / (start + slope * done))
    return growing + per_progress * (1.0 - until) / full
