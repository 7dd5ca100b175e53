"""The thresholds of the policy: every number that a decision compares with, with its default and its unit."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PruningPolicy(_Section):
    enabled: bool = True
    margin_bpb: float = Field(default=0.002, ge=0, description="A run must be worse than the incumbent by more.")
    grace_fraction: float = Field(default=0.2, ge=0, le=1, description="No pruning before this share of the run.")
    last_fraction: float = Field(default=0.15, ge=0, le=1, description="No pruning in this last share of the run.")
    min_peers: int = Field(default=3, ge=1, description="Finished peers of the track that must have been seen.")
    min_points: int = Field(default=4, ge=4, description="Validation points that the run itself must have.")


class DivergencePolicy(_Section):
    window: int = Field(default=5, ge=1, description="Train losses whose median is compared.")
    rise_nats: float = Field(default=1.0, gt=0, description="Rise over the best earlier median that is divergence.")


class RetryPolicy(_Section):
    max_attempts_without_progress: int = Field(default=3, ge=1, description="Then a run that keeps dying is given up.")
    backoff_seconds: float = Field(default=10.0, ge=0, description="Before a retry; doubled each fruitless time.")


class Policy(_Section):
    pruning: PruningPolicy = PruningPolicy()
    divergence: DivergencePolicy = DivergencePolicy()
    retries: RetryPolicy = RetryPolicy()
    claim_deadline_seconds: float = Field(default=60.0, gt=0, description="After that an unclaimed run is voided.")
    stop_slack_seconds: float = Field(default=30.0, ge=0, description="Beyond a stop's grace, before it is killed.")
    followup_timeout_seconds: float = Field(
        default=3600.0, gt=0, description="An export or evaluation that runs longer is stopped."
    )
    reserve_after_seconds: float = Field(
        default=3600.0, ge=0, description="A trial that waited this long for several devices is passed no more."
    )
    gpu_memory_margin_bytes: int = Field(default=500_000_000, ge=0, description="Left free on a GPU beside a run.")
