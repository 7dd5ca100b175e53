"""The read-only side: what the CLI shows. Values only; each method is one consistent look."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Engine, Executable, func, select
from sqlalchemy.orm import Session

from agent.domain.errors import NotFoundError
from agent.domain.observations import CommandVerb, Device, DeviceProcess
from agent.domain.projections import Projection
from agent.domain.specs import Metric
from agent.domain.trials import TrialState
from agent.domain.views import TrialView
from agent.ledger.column_types import LARGEST_INTEGER
from agent.ledger.connection import plain_errors, reader_engine, require_current, stored_revision
from agent.ledger.standings import BoardRow, Leaderboard, leaderboards
from agent.ledger.tables import (
    CommandRow,
    CommandState,
    DecisionRow,
    DeviceSampleRow,
    EventRow,
    ExperimentRow,
    HeartbeatRow,
    ProjectionRow,
    TrialRow,
)
from agent.ledger.views import ViewBuilder

__all__ = [
    "BoardRow",
    "CommandRecord",
    "CommandState",
    "DecisionRecord",
    "DeviceSample",
    "EventRecord",
    "HeartbeatRecord",
    "Leaderboard",
    "LedgerReader",
    "ProjectionRecord",
]


_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord:
    at: datetime
    trial_id: int
    run_uuid: str | None
    kind: str
    """Such as launch, prune, retry."""
    reason: str
    numbers: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionRecord:
    at: datetime
    projection: Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatRecord:
    at: datetime
    seconds: float
    report_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    at: datetime
    trial_id: int | None
    kind: str
    step: int | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSample:
    at: datetime
    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRecord:
    command_id: str
    verb: CommandVerb
    trial_id: int
    state: CommandState
    outcome: str
    at: datetime
    """When it arrived."""
    settled_at: datetime | None
    """When it was carried out or refused."""


class LedgerReader:
    """Reads a ledger that the daemon may be writing to. Never creates or changes anything."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises NotFoundError if the file is missing, LedgerSchemaError if another version wrote it."""
        engine = reader_engine(path)
        with ExitStack() as unless_opened:
            unless_opened.callback(engine.dispose)
            require_current(stored_revision(engine, path), path)
            unless_opened.pop_all()
        return cls(engine, path)

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def trials(self, states: Collection[TrialState] | None = None) -> tuple[TrialView, ...]:
        """Trials by id; `states` of None means all."""
        query = select(TrialRow.id).order_by(TrialRow.id)
        if states is not None:
            query = query.where(TrialRow.state.in_(states))
        with self._look() as session:
            return tuple(ViewBuilder().trials(session, list(session.scalars(query))))

    def trial(self, reference: str) -> TrialView:
        """One trial by `12`, `name` (if it has one seed) or `name@seed`; NotFoundError says what there is."""
        with self._look() as session:
            return next(ViewBuilder().trials(session, [_resolve(session, reference)]))

    def best(self, limit: int = 10, metric: Metric | None = None, track: str | None = None) -> tuple[Leaderboard, ...]:
        """A leaderboard per track, best first, of at most `limit` rows each; `track` is a track's key."""
        with self._look() as session:
            return leaderboards(session, limit, metric, track)

    def decisions(self, trial_id: int) -> tuple[DecisionRecord, ...]:
        """All decisions on a trial, oldest first."""
        query = select(DecisionRow).where(DecisionRow.trial_id == trial_id).order_by(DecisionRow.id)
        return self._values(query, _decision)

    def projections(self, trial_id: int) -> tuple[ProjectionRecord, ...]:
        """All projections of a trial, oldest first."""
        query = select(ProjectionRow).where(ProjectionRow.trial_id == trial_id).order_by(ProjectionRow.id)
        return self._values(query, _projection)

    def latest_projection(self, trial_id: int) -> ProjectionRecord | None:
        query = (
            select(ProjectionRow).where(ProjectionRow.trial_id == trial_id).order_by(ProjectionRow.id.desc()).limit(1)
        )
        return next(iter(self._values(query, _projection)), None)

    def heartbeats(self, last: int) -> tuple[HeartbeatRecord, ...]:
        """The last heartbeats, newest first."""
        query = select(HeartbeatRow).order_by(HeartbeatRow.id.desc()).limit(last)
        return self._values(query, lambda row: HeartbeatRecord(at=row.at, seconds=row.seconds, report_json=row.report))

    def events(self, trial_id: int | None = None, last: int = 1000) -> tuple[EventRecord, ...]:
        """The last events of a trial, oldest first; of None, those of no trial, such as refused specs."""
        belongs = EventRow.trial_id.is_(None) if trial_id is None else EventRow.trial_id == trial_id
        query = select(EventRow).where(belongs).order_by(EventRow.id.desc()).limit(last)
        return self._values(query, _event)[::-1]

    def devices(self) -> tuple[DeviceSample, ...]:
        """Each GPU as it was last seen, by index."""
        newest = select(func.max(DeviceSampleRow.id)).group_by(DeviceSampleRow.uuid)
        query = select(DeviceSampleRow).where(DeviceSampleRow.id.in_(newest)).order_by(DeviceSampleRow.device_index)
        return self._values(query, _device)

    def commands(self, last: int = 100) -> tuple[CommandRecord, ...]:
        """The last commands, newest first."""
        query = select(CommandRow).order_by(CommandRow.id.desc()).limit(last)
        return self._values(query, _command)

    def _values(self, query: Executable, value_of: Callable[[Any], _Value]) -> tuple[_Value, ...]:
        with self._look() as session:
            return tuple(value_of(row) for row in session.scalars(query))

    @contextmanager
    def _look(self) -> Iterator[Session]:
        with plain_errors(self._path, "reading"), Session(self._engine) as session, session.begin():
            yield session


def _resolve(session: Session, reference: str) -> int:
    if reference.isascii() and reference.isdigit() and int(reference) <= LARGEST_INTEGER:
        trial_id = session.scalar(select(TrialRow.id).where(TrialRow.id == int(reference)))
        if trial_id is not None:
            return trial_id
    name, _, seed = reference.partition("@")
    query = (
        select(TrialRow.id, TrialRow.seed)
        .join(ExperimentRow, ExperimentRow.id == TrialRow.experiment_id)
        .where(ExperimentRow.name == name)
        .order_by(TrialRow.id)
    )
    found: Sequence[tuple[int, int]] = session.execute(query).all()
    matching = [trial_id for trial_id, own in found if not seed or seed == str(own)]
    if len(matching) == 1:
        return matching[0]
    choices = ", ".join(f"{name}@{own}" for _, own in found)
    if not found:
        raise NotFoundError(f"there is no trial '{reference}'. Give a trial's number, its name, or name@seed")
    if matching:
        raise NotFoundError(f"'{reference}' has {len(matching)} seeds. Choose one of {choices}")
    raise NotFoundError(f"'{name}' has no seed {seed}. There is {choices}")


def _decision(row: DecisionRow) -> DecisionRecord:
    return DecisionRecord(
        at=row.at,
        trial_id=row.trial_id,
        run_uuid=row.run_uuid,
        kind=row.kind,
        reason=row.reason,
        numbers=row.numbers,
    )


def _projection(row: ProjectionRow) -> ProjectionRecord:
    values = {name: getattr(row, name) for name in Projection.__dataclass_fields__}
    return ProjectionRecord(at=row.at, projection=Projection(**values))


def _event(row: EventRow) -> EventRecord:
    return EventRecord(at=row.at, trial_id=row.trial_id, kind=row.kind, step=row.step, detail=row.detail)


def _device(row: DeviceSampleRow) -> DeviceSample:
    device = Device(
        index=row.device_index,
        uuid=row.uuid,
        name=row.name,
        memory_total_bytes=row.memory_total_bytes,
        memory_used_bytes=row.memory_used_bytes,
        utilization_percent=row.utilization_percent,
        temperature_celsius=row.temperature_celsius,
        power_watts=row.power_watts,
        power_limit_watts=row.power_limit_watts,
        throttle_reasons=tuple(row.throttle_reasons),
        ecc_uncorrected=row.ecc_uncorrected,
        processes=tuple(DeviceProcess(**process) for process in row.processes),
        error=row.error,
    )
    return DeviceSample(at=row.at, device=device)


def _command(row: CommandRow) -> CommandRecord:
    return CommandRecord(
        command_id=row.command_id,
        verb=row.verb,
        trial_id=row.trial_id,
        state=row.state,
        outcome=row.outcome,
        at=row.at,
        settled_at=row.settled_at,
    )
