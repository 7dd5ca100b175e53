"""Can this shape fit its byte budget at all? Asked before a single GPU-second is spent."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from agent.domain.actions import Finish
from agent.domain.budget import BudgetVerdict
from agent.domain.trials import Result, TrialState
from agent.domain.views import TrialView
from trainer.config import LimitsConfig, TrainConfig, TrainerSettings
from trainer.sizing import SizeEstimate, predict_artifact

SizeOf = Callable[[TrialView], BudgetVerdict | None]


def size_of(trial: TrialView) -> BudgetVerdict | None:
    """The predicted artifact of a trainer spec against its budget; None for commands, whose shape is not known."""
    if trial.spec.trainer is None:
        return None
    return verdict_of(_estimate(trial.spec.trainer), trial.track.budget_bytes)


def verdict_of(estimate: SizeEstimate, budget_bytes: int) -> BudgetVerdict:
    return BudgetVerdict(
        budget_bytes=budget_bytes,
        predicted_bytes=estimate.artifact_bytes,
        low_bytes=estimate.low_bytes,
        high_bytes=estimate.high_bytes,
    )


@lru_cache(maxsize=1024)
def _estimate(trainer: TrainerSettings) -> SizeEstimate:
    """Bytes depend on the shape and the export, not on seed or limits: any will do here."""
    return predict_artifact(TrainConfig(**dict(trainer), limits=LimitsConfig(steps=1)))


def judge_budget(trial: TrialView, size: SizeOf) -> Finish | None:
    """Reject a queued trainer trial that is over budget even at the low end of its prediction."""
    if trial.state is not TrialState.QUEUED or trial.spec.trainer is None or trial.last_train_run is not None:
        return None
    verdict = size(trial)
    if verdict is None or not verdict.hopeless:
        return None
    return Finish(
        trial_id=trial.trial_id,
        result=Result.REJECTED_OVER_BUDGET,
        reason=f"{verdict}: over by at least {verdict.low_bytes - verdict.budget_bytes:,} bytes. "
        "Remedy: fewer or narrower layers, a smaller vocabulary, fewer export bits, or a larger budget_bytes",
        numbers={
            "predicted_bytes": verdict.predicted_bytes,
            "low_bytes": verdict.low_bytes,
            "high_bytes": verdict.high_bytes,
            "budget_bytes": verdict.budget_bytes,
        },
    )
