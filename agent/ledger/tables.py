"""The tables. A change here needs a migration beside it, and `SCHEMA_REVISION` names the newest one."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    UniqueConstraint,
    or_,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from agent.domain.observations import CommandVerb
from agent.domain.specs import Metric
from agent.domain.trials import LIVE_RUN_STATES, Result, RunKind, RunState, StopCause, TrialState
from agent.ledger.column_types import CleanText, UtcDateTime, enumeration, identifier

SCHEMA_REVISION = "0001"

Key = Annotated[int, mapped_column(identifier(), primary_key=True)]
TrialKey = Annotated[int, mapped_column(ForeignKey("trials.id"))]
RunKey = Annotated[int, mapped_column(ForeignKey("runs.id"))]
Name = Annotated[str, mapped_column(String(200))]
Body = Annotated[str, mapped_column(CleanText)]
Instant = Annotated[datetime, mapped_column(UtcDateTime)]
Big = Annotated[int, mapped_column(BigInteger)]

LIVE_RUN = "state IN ({})".format(", ".join(f"'{state.value}'" for state in sorted(LIVE_RUN_STATES)))
HAS_VAL = "(val_loss IS NOT NULL OR val_bpb IS NOT NULL)"


class CommandState(StrEnum):
    PENDING = "pending"
    DONE = "done"
    REFUSED = "refused"


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class ExperimentRow(Base):
    __tablename__ = "experiments"

    id: Mapped[Key]
    name: Mapped[Name] = mapped_column(unique=True)
    study: Mapped[Name]
    spec_json: Mapped[Body]
    spec_sha256: Mapped[Name]
    source_text: Mapped[Body]
    source_name: Mapped[Body]
    enqueued_at: Mapped[Instant]


class TrialRow(Base):
    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("experiment_id", "seed"),)

    id: Mapped[Key]
    experiment_id: Mapped[int] = mapped_column(ForeignKey("experiments.id"))
    seed: Mapped[Big]
    track_key: Mapped[Name] = mapped_column(index=True)
    state: Mapped[TrialState] = mapped_column(enumeration(TrialState), index=True)
    result: Mapped[Result | None] = mapped_column(enumeration(Result))
    reason: Mapped[Body]
    state_since: Mapped[Instant]
    suspect_step: Mapped[Big | None]
    given_up: Mapped[bool]
    priority: Mapped[int]


class RunRow(Base):
    __tablename__ = "runs"
    __table_args__ = (
        # The database itself refuses a second live run of one kind: a trial never runs twice at the same time.
        Index(
            "uq_runs_one_live",
            "trial_id",
            "kind",
            unique=True,
            sqlite_where=text(LIVE_RUN),
            postgresql_where=text(LIVE_RUN),
        ),
    )

    id: Mapped[Key]
    uuid: Mapped[Name] = mapped_column(unique=True)
    trial_id: Mapped[TrialKey] = mapped_column(index=True)
    kind: Mapped[RunKind] = mapped_column(enumeration(RunKind))
    attempt: Mapped[int]
    state: Mapped[RunState] = mapped_column(enumeration(RunState))
    directory: Mapped[Body]
    assignment: Mapped[dict[str, Any]] = mapped_column(JSON)
    intended_at: Mapped[Instant]
    pid: Mapped[Big | None]
    stop_cause: Mapped[StopCause | None] = mapped_column(enumeration(StopCause))
    stop_asked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    returncode: Mapped[int | None]
    killed: Mapped[bool]
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error: Mapped[Body]
    errno: Mapped[int | None]
    last_lines: Mapped[list[str]] = mapped_column(JSON)
    claimed: Mapped[bool | None]
    has_result: Mapped[bool]
    model_path: Mapped[str | None] = mapped_column(CleanText)
    params: Mapped[Big | None]
    log_offset: Mapped[Big]
    log_problems: Mapped[Big]
    header: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    last_progress_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class PointRow(Base):
    __tablename__ = "points"
    __table_args__ = (
        Index("ix_points_run_id_step", "run_id", "step"),
        # Validation points are one in a hundred: their own index makes curves of all trials cheap.
        Index("ix_points_val", "run_id", "step", sqlite_where=text(HAS_VAL), postgresql_where=text(HAS_VAL)),
    )

    id: Mapped[Key]
    run_id: Mapped[RunKey]
    step: Mapped[Big]
    tokens: Mapped[Big | None]
    elapsed_seconds: Mapped[float | None]
    train_loss: Mapped[float | None]
    val_loss: Mapped[float | None]
    val_bpb: Mapped[float | None]


class EventRow(Base):
    """Something that happened: in a run's log, to a spec that was refused, or a look that failed."""

    __tablename__ = "events"

    id: Mapped[Key]
    at: Mapped[Instant]
    trial_id: Mapped[int | None] = mapped_column(ForeignKey("trials.id"), index=True)
    run_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id"))
    kind: Mapped[Name] = mapped_column(index=True)
    step: Mapped[Big | None]
    detail: Mapped[Body]


class ScoreRow(Base):
    __tablename__ = "scores"
    __table_args__ = (
        UniqueConstraint("trial_id", "metric"),
        Index("ix_scores_track_key_metric_val_bpb", "track_key", "metric", "val_bpb"),
    )

    id: Mapped[Key]
    trial_id: Mapped[TrialKey]
    run_id: Mapped[RunKey]
    metric: Mapped[Metric] = mapped_column(enumeration(Metric))
    val_loss: Mapped[float | None]
    val_bpb: Mapped[float]
    track_key: Mapped[Name]
    recorded_at: Mapped[Instant]


class ArtifactRow(Base):
    __tablename__ = "artifacts"

    id: Mapped[Key]
    trial_id: Mapped[TrialKey] = mapped_column(index=True)
    run_id: Mapped[RunKey] = mapped_column(unique=True)
    path: Mapped[Body]
    sha256: Mapped[Name]
    artifact_bytes: Mapped[Big]
    weights_bytes: Mapped[Big]
    code_bytes: Mapped[Big]
    tokenizer_bytes: Mapped[Big]
    scheme: Mapped[Name]
    max_abs_error: Mapped[float]


class ProjectionRow(Base):
    __tablename__ = "projections"

    id: Mapped[Key]
    trial_id: Mapped[TrialKey] = mapped_column(index=True)
    run_uuid: Mapped[Name]
    at: Mapped[Instant]
    law: Mapped[Name]
    step: Mapped[Big]
    progress: Mapped[float]
    n_points: Mapped[int]
    final_bpb: Mapped[float]
    low50: Mapped[float]
    high50: Mapped[float]
    low90: Mapped[float]
    high90: Mapped[float]
    r2: Mapped[float]
    parameters: Mapped[dict[str, float]] = mapped_column(JSON)
    final_tokens: Mapped[float]
    reference_bpb: Mapped[float | None]
    reference_step: Mapped[float | None]
    caveat: Mapped[Body]


class DecisionRow(Base):
    __tablename__ = "decisions"

    id: Mapped[Key]
    trial_id: Mapped[TrialKey] = mapped_column(index=True)
    run_uuid: Mapped[str | None] = mapped_column(String(200))
    at: Mapped[Instant]
    kind: Mapped[Name]
    reason: Mapped[Body]
    numbers: Mapped[dict[str, Any]] = mapped_column(JSON)


class HeartbeatRow(Base):
    __tablename__ = "heartbeats"

    id: Mapped[Key]
    at: Mapped[Instant]
    report: Mapped[Body]
    seconds: Mapped[float]


class DeviceSampleRow(Base):
    __tablename__ = "device_samples"
    __table_args__ = (UniqueConstraint("at", "uuid"),)

    id: Mapped[Key]
    at: Mapped[Instant]
    uuid: Mapped[Name]
    device_index: Mapped[int]
    name: Mapped[Body]
    memory_total_bytes: Mapped[Big]
    memory_used_bytes: Mapped[Big]
    utilization_percent: Mapped[int | None] = mapped_column(Integer)
    temperature_celsius: Mapped[int | None] = mapped_column(Integer)
    power_watts: Mapped[float | None] = mapped_column(Float)
    power_limit_watts: Mapped[float | None] = mapped_column(Float)
    throttle_reasons: Mapped[list[str]] = mapped_column(JSON)
    ecc_uncorrected: Mapped[Big | None]
    processes: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    error: Mapped[Body]


class CommandRow(Base):
    """What a user asked for, numbered in the order of arrival, which is the order in which they are obeyed.

    `trial_id` is no foreign key: a command for a trial that never was is kept, refused.
    """

    __tablename__ = "commands"

    id: Mapped[Key]
    command_id: Mapped[Name] = mapped_column(unique=True)
    verb: Mapped[CommandVerb] = mapped_column(enumeration(CommandVerb))
    trial_id: Mapped[Big]
    state: Mapped[CommandState] = mapped_column(enumeration(CommandState), index=True)
    outcome: Mapped[Body]
    at: Mapped[Instant]
    settled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


def has_val() -> ColumnElement[bool]:
    """The condition of the validation points' own index, in the very shape that lets the planner use it."""
    return or_(PointRow.val_loss.is_not(None), PointRow.val_bpb.is_not(None))
