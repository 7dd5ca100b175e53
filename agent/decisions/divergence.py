"""Is this run flying apart? Its own past is the yardstick; no peers and no projection are needed.

Runs normally start with a spike (8.3, 17.4, 11.5, 8.9, ...), so a median over a window is compared with the
best median of windows that lie wholly before it. A run that goes wrong at once has no good window: from
three windows on, its very first loss, that of a model which knows nothing, is a yardstick too. A resumed
run's new points replace the lost ones, so a spike that a restart undid is not held against it.
"""

from __future__ import annotations

import math
from statistics import median

from agent.decisions.thresholds import DivergencePolicy
from agent.domain.actions import Numbers, Stop
from agent.domain.trials import RunState, StopCause, TrialState
from agent.domain.views import TrialView

VAL_RATIO = 1.5
"""A validation score this many times its best is divergence whatever the train losses say."""


def judge_divergence(trial: TrialView, policy: DivergencePolicy) -> Stop | None:
    """Stop a running trial that diverges. A spec that is not `prunable` is stopped only by a loss that is no number."""
    run = trial.live_run
    if trial.state is not TrialState.RUNNING or run is None or run.state is not RunState.RUNNING:
        return None
    found = _not_finite(trial, policy)
    if found is None and trial.spec.prunable:
        found = _train_rise(trial, policy) or _val_rise(trial)
    if found is None:
        return None
    reason, numbers = found
    return Stop(
        trial_id=trial.trial_id, run_uuid=run.run_uuid, cause=StopCause.DIVERGED, reason=reason, numbers=numbers
    )


def _not_finite(trial: TrialView, policy: DivergencePolicy) -> tuple[str, Numbers] | None:
    for point in (*trial.train_curve[-policy.window :], *trial.val_curve[-1:]):
        for name in ("train_loss", "val_loss", "val_bpb"):
            value = getattr(point, name)
            if value is not None and not math.isfinite(value):
                return f"diverged: {name} is {value} at step {point.step:,}", {"step": point.step}
    return None


def _train_rise(trial: TrialView, policy: DivergencePolicy) -> tuple[str, Numbers] | None:
    points = [(p.step, p.train_loss) for p in trial.train_curve if p.train_loss is not None]
    losses, window = [loss for _, loss in points], policy.window
    if len(losses) < 2 * window:
        return None
    now = median(losses[-window:])
    starts = range(len(losses) - 2 * window + 1)
    best, at = min((median(losses[start : start + window]), start) for start in starts)
    best_step = points[at + window - 1][0]
    if points[0][0] <= 1 and len(losses) >= 3 * window and losses[0] < best:
        best, best_step = losses[0], points[0][0]
    if now < best + policy.rise_nats:
        return None
    step = points[-1][0]
    return (
        f"diverged: the median of the last {window} train losses is {now:.3f} at step {step:,}, "
        f"{now - best:.3f} nats above the {best:.3f} that it had reached by step {best_step:,} "
        f"(allowed {policy.rise_nats:g})",
        {"step": step, "median_loss": now, "best_median_loss": best, "rise_nats": policy.rise_nats},
    )


def _val_rise(trial: TrialView) -> tuple[str, Numbers] | None:
    points = [(p.step, p.val_bpb) for p in trial.val_curve if p.val_bpb is not None]
    if len(points) < 2:
        return None
    step, now = points[-1]
    best, best_step = min((bpb, at) for at, bpb in points[:-1])
    if now <= VAL_RATIO * best:
        return None
    return (
        f"diverged: val_bpb is {now:.3f} at step {step:,}, more than {VAL_RATIO:g} times "
        f"its best of {best:.3f} at step {best_step:,}",
        {"step": step, "val_bpb": now, "best_val_bpb": best},
    )
