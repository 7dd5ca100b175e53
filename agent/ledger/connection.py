"""Connections to the ledger's file: the one writer, read-only readers, integrity, backups, and plain errors.

The writer runs in WAL mode with synchronous=FULL: what was committed survives a power cut, and readers never
wait. Every transaction begins IMMEDIATE, so that it holds the write lock before it reads what it will change.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import StatementError
from sqlalchemy.pool import NullPool, StaticPool

from agent.domain.errors import LedgerCorruptError, LedgerError, LedgerSchemaError, NotFoundError
from agent.ledger.tables import SCHEMA_REVISION

_BUSY_SECONDS = 30.0
_WAL_LIMIT_BYTES = 64 * 2**20
"""The WAL is cut back to this after a checkpoint, so that one large transaction does not keep its disk for good."""

_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def writer_engine(path: Path) -> Engine:
    """The one writer's engine: a single connection, made now, shared by the daemon's threads under a lock."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rwc",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        for pragma in (
            f"busy_timeout={int(_BUSY_SECONDS * 1000)}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"journal_size_limit={_WAL_LIMIT_BYTES}",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=StaticPool)
    event.listen(engine, "begin", _begin_immediate)
    return engine


def reader_engine(path: Path) -> Engine:
    """A read-only engine on an existing ledger of this version. Never creates or changes the file."""
    if not path.is_file():
        raise NotFoundError(f"there is no ledger at {path}. Start `caddie up` there once, or name the right workspace")

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute(f"PRAGMA busy_timeout={int(_BUSY_SECONDS * 1000)}").fetchall()
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    event.listen(engine, "begin", _begin_deferred)
    return engine


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_deferred(connection: Connection) -> None:
    # One snapshot for all queries of a read, however long it takes.
    connection.exec_driver_sql("BEGIN DEFERRED")


@contextmanager
def plain_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn the driver's errors into the ledger's own, naming file, work and remedy."""
    try:
        yield
    except StatementError as error:  # DBAPIError, and a value that a column refused
        raise _plain(path, doing, error.orig) from error
    except sqlite3.Error as error:
        raise _plain(path, doing, error) from error


def _plain(path: Path, doing: str, error: BaseException | None) -> LedgerError:
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _CORRUPT:
        return corrupt(path, str(error))
    hint = ""
    if code is not None and code & 0xFF == sqlite3.SQLITE_FULL:
        hint = " Make room on that disk"
    elif code is not None and code & 0xFF in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}:
        hint = " Check the folder's rights and its disk; the ledger must lie on a local disk"
    return LedgerError(
        f"{path}: {doing} failed: {error}. Nothing of this step was stored, all that was stored before stays.{hint}"
    )


def corrupt(path: Path, finding: str) -> LedgerCorruptError:
    backups = sorted(path.parent.glob(f"{path.name}*.backup"), key=lambda file: file.stat().st_mtime)
    copy = f"put {backups[-1].name} in its place" if backups else "put a backup in its place"
    return LedgerCorruptError(
        f"{path} is damaged: {finding}. Stop the daemon, move the file with its -wal and -shm aside, and {copy}, "
        f"or save what is readable with `sqlite3 {path.name} .recover | sqlite3 recovered.db`"
    )


def check_integrity(engine: Engine, path: Path) -> None:
    """Raises LedgerCorruptError if SQLite finds the file damaged."""
    with plain_errors(path, "the integrity check"), engine.connect() as connection:
        findings = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA quick_check(5)")]
    if findings != ["ok"]:
        raise corrupt(path, "; ".join(findings))


def stored_revision(engine: Engine, path: Path) -> str | None:
    """The file's schema revision; None for an empty one. Raises LedgerSchemaError for another program's database."""
    with plain_errors(path, "reading the schema"), engine.connect() as connection:
        tables = {row[0] for row in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return None
        if "alembic_version" in tables and "trials" in tables:
            row = connection.exec_driver_sql("SELECT version_num FROM alembic_version").first()
            if row is not None:
                return str(row[0])
    raise LedgerSchemaError(f"{path} is a database, but not a ledger of Caddie's. Name another file or move it away")


def require_current(revision: str | None, path: Path) -> None:
    """For readers, who may not migrate."""
    if revision != SCHEMA_REVISION:
        raise LedgerSchemaError(
            f"{path} has schema {revision or 'none'}, this version of Caddie reads {SCHEMA_REVISION}. "
            "Start `caddie up` once to bring an older ledger forward; for a newer one, upgrade Caddie"
        )


def backup(source: Path, target: Path) -> None:
    """A consistent copy of a live ledger through SQLite's backup API; whole or not there at all."""
    aside = target.with_name(f".{target.name}.tmp")
    try:
        with (
            plain_errors(source, f"the backup to {target}"),
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_SECONDS)) as live,
            closing(sqlite3.connect(aside)) as copy,
        ):
            live.backup(copy)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
