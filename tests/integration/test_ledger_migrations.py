"""The ledger's file: created, checked, migrated with a copy kept, refused if not ours, and never half-written."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, event

from agent.domain.errors import LedgerCorruptError, LedgerError, LedgerSchemaError, NotFoundError
from agent.domain.observations import Devices, Observation, SpecArrival
from agent.domain.specs import Spec
from agent.ledger import migrations, schema
from agent.ledger.connection import reader_engine, writer_engine
from agent.ledger.ledger import Ledger
from agent.ledger.queries import LedgerReader
from agent.ledger.tables import SCHEMA_REVISION, Base

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def enqueue(ledger: Ledger, name: str) -> None:
    spec = Spec(name=name, command=("true",))
    arrival = SpecArrival(spec=spec, source_text="t", source_name="s", claimed_path="p", val_sha256=None)
    ledger.record(Observation(at=NOW, devices=Devices(gpus=(), cpu_slots=1), arrivals=(arrival,)))


def make(path: Path, *names: str) -> None:
    ledger = Ledger.open(path)
    for name in names:
        enqueue(ledger, name)
    ledger.close()


def names(path: Path) -> list[str]:
    with LedgerReader.open(path) as reader:
        return [trial.name for trial in reader.trials()]


def test_the_newest_revision_is_the_schema_of_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    make(path)
    script = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert script.get_current_head() == SCHEMA_REVISION
    engine = reader_engine(path)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_ledger_survives_power_cuts_by_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    make(path)
    engine = writer_engine(path)
    with engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_opening_again_changes_nothing_and_odd_paths_are_fine(tmp_path: Path) -> None:
    folder = tmp_path / "a b%20ü?#"
    folder.mkdir()
    path = folder / "e.db"
    make(path, "one")
    make(path, "two")
    assert names(path) == ["one", "two"]
    assert list(folder.glob("*.backup")) == []


REVISION_2 = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None


def upgrade() -> None:
    op.add_column("trials", sa.Column("note", sa.Text()))
    op.execute("UPDATE trials SET note = 'old'")
"""


@pytest.fixture
def tomorrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A later version of Caddie with one more revision. Yields that revision's file."""
    package = tmp_path / "later_migrations"
    shutil.copytree(Path(migrations.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    revision = package / "versions" / "r0002_note.py"
    revision.write_text(REVISION_2)
    later = types.ModuleType("later_migrations")
    later.__file__ = str(package / "__init__.py")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(schema, "migrations", later)
        patch.setattr(schema, "SCHEMA_REVISION", "0002")
        yield revision


def columns(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as raw:
        return {row[1] for row in raw.execute("PRAGMA table_info(trials)")}


def test_an_older_ledger_is_brought_forward_with_a_copy_kept(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "e.db"
    make(path, "one", "two")
    request.getfixturevalue("tomorrow")
    make(path)
    assert "note" in columns(path)
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT count(*) FROM trials WHERE note = 'old'").fetchone() == (2,)
    copy = tmp_path / "e.db.before-0002.backup"
    assert "note" not in columns(copy)
    assert names(copy) == ["one", "two"]


def test_a_migration_that_fails_leaves_everything_as_it_was(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "e.db"
    make(path, "one")
    revision = request.getfixturevalue("tomorrow")
    revision.write_text(REVISION_2 + '    op.drop_table("no_such_table")\n')
    with pytest.raises(LedgerError, match="migration"):
        Ledger.open(path)
    assert "note" not in columns(path)
    assert names(path) == ["one"]


def test_a_newer_ledger_is_refused_by_writer_and_reader(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    make(path, "one")
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
        raw.commit()
    before = path.read_bytes()
    for opener in (Ledger.open, LedgerReader.open):
        with pytest.raises(LedgerSchemaError, match=r"9999.*[Uu]pgrade Caddie"):
            opener(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE recipes (id INTEGER)")
    for opener in (Ledger.open, LedgerReader.open):
        with pytest.raises(LedgerSchemaError, match="not a ledger"):
            opener(path)


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    path.write_text("dear diary " * 1000)
    for opener in (Ledger.open, LedgerReader.open):
        with pytest.raises(LedgerCorruptError, match=r"e\.db"):
            opener(path)
    assert path.read_text().startswith("dear diary")


def test_a_damaged_ledger_is_told_at_the_start_with_the_backup_to_use(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    ledger = Ledger.open(path)
    for number in range(50):
        enqueue(ledger, f"n{number}")
    ledger.backup(tmp_path / "e.db.nightly.backup")
    ledger.close()
    data = bytearray(path.read_bytes())
    data[4096:-4096] = b"\x55" * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(LedgerCorruptError, match=r"e\.db.*nightly"):
        Ledger.open(path)
    shutil.copy(tmp_path / "e.db.nightly.backup", path)
    assert len(names(path)) == 50


def test_a_backup_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    ledger = Ledger.open(path)
    enqueue(ledger, "one")
    ledger.backup(tmp_path / "copy.db")
    enqueue(ledger, "two")
    with pytest.raises(LedgerError, match="backup"):
        ledger.backup(tmp_path / "missing" / "copy.db")
    assert names(tmp_path / "copy.db") == ["one"]
    ledger.close()


def test_a_reader_of_nothing_says_so_and_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="caddie up"):
        LedgerReader.open(tmp_path / "e.db")
    (tmp_path / "empty.db").touch()
    with pytest.raises(LedgerSchemaError):
        LedgerReader.open(tmp_path / "empty.db")
    assert [file.name for file in tmp_path.iterdir()] == ["empty.db"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"missing.*rights"):
        Ledger.open(tmp_path / "missing" / "e.db")


def test_a_reader_cannot_write_and_sees_what_was_committed_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    ledger = Ledger.open(path)
    with LedgerReader.open(path) as reader:
        assert reader.trials() == ()
        enqueue(ledger, "one")
        assert [trial.name for trial in reader.trials()] == ["one"]
    engine = reader_engine(path)
    with engine.connect() as connection, pytest.raises(Exception, match="readonly"):
        connection.exec_driver_sql("DELETE FROM trials")
    engine.dispose()
    ledger.close()


def test_a_full_disk_is_told_and_loses_nothing_committed(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    make(path, "one")

    def small_disk(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA max_page_count=100").fetchall()

    event.listen(Engine, "connect", small_disk)
    try:
        ledger = Ledger.open(path)
        stored = ["one"]
        for number in range(3):
            enqueue(ledger, f"n{number}")
            stored.append(f"n{number}")
        ledger.save_heartbeat(NOW, "x" * 20_000, 1.0)
        with pytest.raises(LedgerError, match=r"full.*Make room"):
            ledger.save_heartbeat(NOW, "x" * 2_000_000, 1.0)
        assert [trial.name for trial in ledger.view(NOW).trials] == stored
        ledger.close()
    finally:
        event.remove(Engine, "connect", small_disk)
    ledger = Ledger.open(path)
    enqueue(ledger, "room-again")
    ledger.close()
    assert names(path) == [*stored, "room-again"]


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from agent.domain.observations import Devices, Observation, SpecArrival
from agent.domain.specs import Spec
from agent.ledger.ledger import Ledger

ledger = Ledger.open(Path(sys.argv[1]))
for number in range(100000):
    spec = Spec(name=f"n{number}", command=("true",), seeds=tuple(range(5)))
    arrival = SpecArrival(spec=spec, source_text="t", source_name="s", claimed_path="p", val_sha256=None)
    now = datetime(2026, 3, 1, tzinfo=UTC)
    ledger.record(Observation(at=now, devices=Devices(gpus=(), cpu_slots=1), arrivals=(arrival,)))
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_a_writer_that_is_killed_loses_nothing_that_it_had_committed(tmp_path: Path) -> None:
    path = tmp_path / "e.db"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    ledger = Ledger.open(path)
    trials = ledger.view(NOW).trials
    ledger.close()
    assert len(trials) >= 5 * (last + 1)
    assert len(trials) % 5 == 0
