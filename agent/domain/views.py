"""The ledger as decisions see it: frozen views of trials, runs and scores at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from agent.domain.actions import Assignment
from agent.domain.observations import CommandVerb, LogPoint
from agent.domain.specs import Metric, Spec, Track
from agent.domain.trials import LIVE_RUN_STATES, Result, RunKind, RunState, StopCause, TrialState


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    run_uuid: str
    trial_id: int
    kind: RunKind
    attempt: int
    """Counts from 1 among the trial's runs of this kind."""
    state: RunState
    directory: str
    """Relative to the workspace."""
    assignment: Assignment
    intended_at: datetime
    pid: int | None = None
    stop_cause: StopCause | None = None
    stop_asked_at: datetime | None = None
    returncode: int | None = None
    killed: bool = False
    ended_at: datetime | None = None
    error: str = ""
    errno: int | None = None
    """Why its program could not be started, as the system numbers it."""
    last_lines: tuple[str, ...] = ()
    claimed: bool | None = None
    """None while nobody has looked; False when the last probe found the run unclaimed."""
    has_result: bool = False
    """A readable result of this run was recorded."""
    last_progress_at: datetime | None = None
    """When the last new log line was read."""
    log_offset: int = 0
    """Bytes of the log that the ledger has taken in."""
    last_step: int | None = None
    """Highest step among the points of this very run; None without any."""

    @property
    def live(self) -> bool:
        return self.state in LIVE_RUN_STATES

    @property
    def never_claimed(self) -> bool:
        """Over before any runner had it: voided, or its launch failed."""
        return self.state is RunState.LOST and self.claimed is False


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactView:
    run_uuid: str
    path: str
    sha256: str
    artifact_bytes: int
    weights_bytes: int
    code_bytes: int
    tokenizer_bytes: int
    scheme: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialView:
    trial_id: int
    name: str
    seed: int
    spec: Spec
    track: Track
    state: TrialState
    state_since: datetime
    enqueued_at: datetime
    result: Result | None = None
    reason: str = ""
    runs: tuple[RunView, ...] = ()
    """All runs, oldest first."""
    val_curve: tuple[LogPoint, ...] = ()
    """Validation points over all training runs, by step, a resumed run's replacing the lost ones."""
    train_curve: tuple[LogPoint, ...] = ()
    """Training points likewise; for finished trials empty."""
    tokens_per_step: int | None = None
    scores: dict[Metric, float] = field(default_factory=dict)
    """Final BPB per metric, as far as they exist."""
    artifact: ArtifactView | None = None
    model_path: str | None = None
    """Raw final weights, relative to the workspace."""
    suspect_step: int | None = None
    """Step at which the last check condemned the trial for the first time."""
    given_up: bool = False
    """It was said that its export or score is not tried any more."""

    @property
    def key(self) -> str:
        return f"{self.name}@{self.seed}"

    @property
    def live_run(self) -> RunView | None:
        """The training run that exists or may exist."""
        return next((run for run in reversed(self.runs) if run.kind is RunKind.TRAIN and run.live), None)

    @property
    def last_train_run(self) -> RunView | None:
        return next((run for run in reversed(self.runs) if run.kind is RunKind.TRAIN), None)

    def runs_of(self, kind: RunKind) -> tuple[RunView, ...]:
        return tuple(run for run in self.runs if run.kind is kind)

    @property
    def last_point(self) -> LogPoint | None:
        """The newest point of either curve."""
        ends = [curve[-1] for curve in (self.val_curve, self.train_curve) if curve]
        return max(ends, key=lambda point: point.step, default=None)

    def progress_at(self, point: LogPoint) -> float | None:
        """Share of the trial's limit that had passed at a point, 0..1; None without a limit or its unit."""
        limits = self.spec.limits
        if limits is None:
            return None
        tokens = point.tokens
        if tokens is None and self.tokens_per_step is not None:
            tokens = point.step * self.tokens_per_step
        shares = [
            value / limit
            for value, limit in (
                (point.elapsed_seconds, limits.wallclock_seconds),
                (tokens, limits.tokens),
                (point.step, limits.steps),
            )
            if value is not None and limit is not None
        ]
        return min(1.0, max(shares)) if shares else None

    @property
    def progress(self) -> float | None:
        return self.progress_at(self.last_point) if self.last_point else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingCommand:
    command_id: str
    verb: CommandVerb
    trial_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerView:
    """Every trial that a decision may concern, by trial id."""

    at: datetime
    trials: tuple[TrialView, ...] = ()
    commands: tuple[PendingCommand, ...] = ()

    def trial(self, trial_id: int) -> TrialView:
        """Raises KeyError."""
        return next((t for t in self.trials if t.trial_id == trial_id), None) or _missing(trial_id)

    def experiment_names(self) -> frozenset[str]:
        return frozenset(trial.name for trial in self.trials)


def _missing(trial_id: int) -> TrialView:
    raise KeyError(f"no trial {trial_id} in this view")
