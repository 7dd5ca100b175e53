"""Schedules as pure functions of progress: what the learning rate and Muon's momentum are at a step.

Progress is the share of the run that is over, 0 to 1: the largest share of any limit that was given, so that a
run on the clock and a run on tokens decay alike, and the limit that ends the run is the one that counts.
Warmdown shapes: linear (trapezoid, arXiv:2405.18392), cosine, and 1 - sqrt (same paper, its best).
"""

from __future__ import annotations

import math

from trainer.config import LimitsConfig, OptimizerConfig, ScheduleConfig


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


def lr_multiplier(done: float, step: int, schedule: ScheduleConfig) -> float:
    """Factor on every learning rate for the step that begins at progress `done` after `step` finished steps.

    Warm-up counts steps, because it protects the first updates; warmdown counts progress. Where they meet, both apply.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    start = 1.0 - schedule.warmdown_fraction
    if done <= start:
        return warmup
    into = (done - start) / schedule.warmdown_fraction
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


def planned_steps(limits: LimitsConfig, batch_tokens: int, *, elapsed_seconds: float, steps: int) -> int:
    """Steps that the whole run will take: exact under a token or step limit, an estimate from the pace on the clock.

    Never fewer than the steps already done. On the clock alone, before the first step, nothing is known: 1.
    """
    plans = []
    if limits.steps is not None:
        plans.append(limits.steps)
    if limits.tokens is not None:
        plans.append(math.ceil(limits.tokens / batch_tokens))
    if limits.wallclock_seconds is not None and steps and elapsed_seconds > 0:
        plans.append(round(limits.wallclock_seconds * steps / elapsed_seconds))
    return max(steps, min(plans, default=1), 1)
