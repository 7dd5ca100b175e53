"""The ledger's one writer. Every method is one transaction: all of it is stored when it returns, or none of it.

Only the daemon opens it, under the workspace's lock. Its threads may share it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from agent.domain.actions import Action, Launch
from agent.domain.errors import LedgerError, NotFoundError
from agent.domain.observations import Observation
from agent.domain.projections import Projection
from agent.domain.views import LedgerView, RunView
from agent.ledger import transitions
from agent.ledger.connection import backup, check_integrity, plain_errors, writer_engine
from agent.ledger.recording import Recorded, Recording
from agent.ledger.schema import migrate
from agent.ledger.tables import CommandRow, CommandState, DeviceSampleRow, HeartbeatRow, ProjectionRow
from agent.ledger.views import ViewBuilder, run_view

__all__ = ["Ledger", "Recorded"]

log = logging.getLogger(__name__)

KEPT_HEARTBEATS = 20_000
KEPT_SAMPLES = timedelta(days=30)
_DELETED_AT_ONCE = 1000


class Ledger:
    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self._lock = threading.RLock()
        self._views = ViewBuilder()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for writing: create the file, or check it and bring its schema forward.

        Raises LedgerCorruptError naming the remedy if the file is damaged, LedgerSchemaError if a newer version or
        another program wrote it, LedgerError if it cannot be opened.
        """
        engine = writer_engine(path)
        with ExitStack() as unless_opened:
            unless_opened.callback(engine.dispose)
            check_integrity(engine, path)
            migrate(engine, path)
            unless_opened.pop_all()
        return cls(engine, path)

    def close(self) -> None:
        self._engine.dispose()

    def backup(self, target: Path) -> None:
        """A consistent copy while the ledger is in use; `target` is whole or not there."""
        backup(self._path, target)

    def record(self, observation: Observation) -> Recorded:
        """Store the facts of an observation; repeating it changes nothing."""
        with self._transaction("recording an observation") as session:
            recording = Recording(session=session, at=observation.at)
            recorded = recording.record(observation)
            self._forget(*recording.touched)
        return recorded

    def view(self, now: datetime) -> LedgerView:
        with self._transaction("reading") as session:
            return self._views.view(session, now)

    def intend(self, action: Launch, *, run_uuid: str, directory: str, at: datetime) -> RunView:
        """Commit the intent of a run, before any process may exist.

        Raises TransitionError if the trial may not start one, such as while another of its kind is not over.
        """
        with self._transaction(f"the intent of run {run_uuid}") as session:
            self._forget(action.trial_id)
            row = transitions.intend(session, action, run_uuid=run_uuid, directory=directory, at=at)
            return run_view(row)

    def launch_failed(self, run_uuid: str, error: str, at: datetime) -> None:
        """The run is proved never to have started; what becomes of its trial is decided on the next view.

        `error` goes on "the run could not be started: "; it is for people.
        """
        with self._transaction(f"the failed launch of run {run_uuid}") as session:
            self._forget(transitions.launch_failed(session, run_uuid, error, at))

    def apply(self, action: Action, at: datetime) -> None:
        """Store what an action changes, with its reason. Raises TransitionError if the tables do not allow it."""
        with self._transaction(f"{type(action).__name__} of trial {action.trial_id}") as session:
            self._forget(action.trial_id)
            transitions.apply(session, action, at)

    def stop_asked(self, run_uuid: str, at: datetime) -> None:
        """A stop that was decided before was only now asked of the run: its deadline counts from here."""
        with self._transaction(f"the stop of run {run_uuid}") as session:
            self._forget(transitions.stop_asked(session, run_uuid, at))

    def settle_command(self, command_id: str, *, done: bool, outcome: str, at: datetime) -> None:
        """Raises NotFoundError for a command that the ledger does not hold."""
        with self._transaction(f"command {command_id}") as session:
            row = session.scalar(select(CommandRow).where(CommandRow.command_id == command_id))
            if row is None:
                raise NotFoundError(f"the ledger has no command {command_id}")
            row.state = CommandState.DONE if done else CommandState.REFUSED
            row.outcome, row.settled_at = outcome, at

    def save_projections(self, projections: Sequence[Projection], at: datetime) -> None:
        """Store those that rest on new points; a beat without a new line adds no row."""
        with self._transaction("storing projections") as session:
            for projection in projections:
                newest = (
                    select(ProjectionRow.step, ProjectionRow.n_points)
                    .where(
                        ProjectionRow.trial_id == projection.trial_id,
                        ProjectionRow.run_uuid == projection.run_uuid,
                        ProjectionRow.law == projection.law,
                    )
                    .order_by(ProjectionRow.id.desc())
                )
                if session.execute(newest.limit(1)).one_or_none() == (projection.step, projection.n_points):
                    continue
                values = dataclasses.asdict(projection)
                if not all(math.isfinite(value) for value in values.values() if isinstance(value, float)):
                    raise LedgerError(f"the projection of trial {projection.trial_id} is not finite: {projection}")
                session.add(ProjectionRow(at=at, **values))

    def save_heartbeat(self, at: datetime, report_json: str, seconds: float) -> None:
        """Store a beat, and let go of what is older than the last KEPT_HEARTBEATS beats and KEPT_SAMPLES of devices."""
        with self._transaction("storing a heartbeat") as session:
            row = HeartbeatRow(at=at, report=report_json, seconds=seconds)
            session.add(row)
            session.flush()
            # In portions: a ledger with years behind it must not hold up a beat for minutes.
            beats = select(HeartbeatRow.id).where(HeartbeatRow.id <= row.id - KEPT_HEARTBEATS).order_by(HeartbeatRow.id)
            samples = (
                select(DeviceSampleRow.id)
                .where(DeviceSampleRow.at < at - KEPT_SAMPLES)
                .order_by(DeviceSampleRow.at, DeviceSampleRow.uuid)
            )
            session.execute(delete(HeartbeatRow).where(HeartbeatRow.id.in_(beats.limit(_DELETED_AT_ONCE))))
            session.execute(delete(DeviceSampleRow).where(DeviceSampleRow.id.in_(samples.limit(_DELETED_AT_ONCE))))

    def _forget(self, *trial_ids: int) -> None:
        # Also right when the transaction fails: the next view then reads the same rows once more.
        for trial_id in trial_ids:
            self._views.forget(trial_id)

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[Session]:
        with (
            self._lock,
            plain_errors(self._path, doing),
            Session(self._engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session
