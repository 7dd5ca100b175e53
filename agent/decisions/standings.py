"""Who stands where: per track, the completed trials and the incumbent among them, by raw final BPB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent.domain.specs import Metric
from agent.domain.trials import Result
from agent.domain.views import LedgerView, TrialView


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One track's completed trials that have a raw final."""

    completed: tuple[TrialView, ...]
    incumbent: TrialView | None
    """Best raw final among those whose artifact is not known to be over budget; ties go to the older trial."""

    @property
    def incumbent_bpb(self) -> float | None:
        return None if self.incumbent is None else self.incumbent.scores[Metric.RAW]


NO_STANDING = Standing(completed=(), incumbent=None)


def over_budget(trial: TrialView) -> bool:
    """Known to be: its artifact was made and weighed."""
    return trial.artifact is not None and trial.artifact.artifact_bytes > trial.track.budget_bytes


def standings_of(view: LedgerView) -> Mapping[str, Standing]:
    """By track key. Tracks without a completed trial are not in it."""
    by_track: dict[str, list[TrialView]] = {}
    for trial in view.trials:
        if trial.result is Result.COMPLETED and Metric.RAW in trial.scores:
            by_track.setdefault(trial.track.key, []).append(trial)
    return {
        track: Standing(
            completed=tuple(trials),
            incumbent=min(
                (trial for trial in trials if not over_budget(trial)),
                key=lambda trial: (trial.scores[Metric.RAW], trial.trial_id),
                default=None,
            ),
        )
        for track, trials in by_track.items()
    }
