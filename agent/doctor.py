"""`caddie doctor`: is everything that a week alone needs in place? Looks only, changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sqlite3
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from agent.adapters.gpus import GpuReader
from agent.adapters.workspace import Workspace
from agent.domain.errors import CaddieError
from agent.process_identity import boot_id
from agent.settings import Settings, load_settings


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    verdict: Verdict
    finding: str
    """What was found, and the remedy where something is wrong."""


def examine(workspace: Workspace) -> tuple[Check, ...]:
    """All checks, in the order in which a person would want to read them."""
    return (
        _python(),
        _torch(),
        _sqlite(),
        _processes(),
        *_devices(),
        *_workspace(workspace),
    )


def _python() -> Check:
    found = f"Python {platform.python_version()} on {platform.system()} {platform.release()}"
    return Check(name="python", verdict=Verdict.OK, finding=f"{found}, {sys.executable}")


def _torch() -> Check:
    # By its metadata: importing torch takes seconds and is not the daemon's business.
    if importlib.util.find_spec("torch") is None:
        return Check(
            name="torch", verdict=Verdict.FAULT, finding="not installed: trainer runs cannot start. Run make demo"
        )
    return Check(name="torch", verdict=Verdict.OK, finding=importlib.metadata.version("torch"))


def _sqlite() -> Check:
    version = sqlite3.sqlite_version
    if tuple(map(int, version.split("."))) < (3, 51, 3):
        note = "; before 3.51.3 a WAL may be reset wrongly under several writers, so never let a second program write"
        return Check(name="sqlite", verdict=Verdict.OK, finding=f"{version}, one writer only{note}")
    return Check(name="sqlite", verdict=Verdict.OK, finding=version)


def _processes() -> Check:
    try:
        return Check(name="processes", verdict=Verdict.OK, finding=f"/proc readable, boot {boot_id()}")
    except CaddieError as error:
        return Check(name="processes", verdict=Verdict.FAULT, finding=str(error))


def _devices() -> tuple[Check, ...]:
    reader = GpuReader(deadline_seconds=10.0)
    try:
        devices = reader.read()
    finally:
        reader.close()
    if devices.gpus is None:
        return (Check(name="gpus", verdict=Verdict.FAULT, finding=f"the driver could not be asked: {devices.note}"),)
    if not devices.gpus:
        return (Check(name="gpus", verdict=Verdict.OK, finding=devices.note),)
    return tuple(
        Check(
            name=f"gpu{gpu.index}",
            verdict=Verdict.FAULT if gpu.error else Verdict.WARNING if gpu.processes else Verdict.OK,
            finding=gpu.error
            or f"{gpu.name}, {gpu.memory_free_bytes / 1e9:.1f} of {gpu.memory_total_bytes / 1e9:.1f} GB free"
            + (f", {len(gpu.processes)} process(es) on it" if gpu.processes else ""),
        )
        for gpu in devices.gpus
    )


def _workspace(workspace: Workspace) -> tuple[Check, ...]:
    if not workspace.queue.is_dir():
        return (
            Check(
                name="workspace",
                verdict=Verdict.WARNING,
                finding=f"{workspace.root} is no workspace yet; caddie up or caddie enqueue makes it one",
            ),
        )
    checked, settings = _settings(workspace)
    return (
        Check(name="workspace", verdict=Verdict.OK, finding=str(workspace.root)),
        checked,
        _daemon(workspace),
        _ledger(workspace.database),
        _disk(workspace, settings),
        _refused(workspace.rejected),
    )


def _settings(workspace: Workspace) -> tuple[Check, Settings | None]:
    try:
        settings = load_settings(workspace.settings_file)
    except CaddieError as error:
        return Check(name="settings", verdict=Verdict.FAULT, finding=str(error)), None
    where = workspace.settings_file if workspace.settings_file.exists() else "defaults"
    finding = f"{where}: a beat every {settings.interval_seconds:g} s"
    return Check(name="settings", verdict=Verdict.OK, finding=finding), settings


def _daemon(workspace: Workspace) -> Check:
    pid = workspace.daemon_pid()
    if pid is None:
        return Check(name="daemon", verdict=Verdict.WARNING, finding="not running: caddie up")
    return Check(name="daemon", verdict=Verdict.OK, finding=f"running, pid {pid}" if pid else "starting")


def _ledger(database: Path) -> Check:
    if not database.exists():
        return Check(name="ledger", verdict=Verdict.WARNING, finding="none yet: the first caddie up makes it")
    try:
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=5)
        try:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Check(name="ledger", verdict=Verdict.FAULT, finding=f"{database}: {error}. Restore a backup of it")
    verdict = Verdict.OK if answer == "ok" else Verdict.FAULT
    return Check(name="ledger", verdict=verdict, finding=f"{database.stat().st_size:,} bytes, quick_check: {answer}")


def _disk(workspace: Workspace, settings: Settings | None) -> Check:
    free = shutil.disk_usage(workspace.root).free
    floor = (settings or Settings()).disk_floor_bytes
    if free < floor:
        return Check(
            name="disk", verdict=Verdict.FAULT, finding=f"{free:,} bytes free: no run is launched below {floor:,}"
        )
    return Check(name="disk", verdict=Verdict.OK, finding=f"{free / 1e9:.1f} GB free")


def _refused(rejected: Path) -> Check:
    texts = sorted(rejected.glob("*.txt"), key=lambda path: path.stat().st_mtime)
    if not texts:
        return Check(name="refused", verdict=Verdict.OK, finding="no spec was refused")
    return Check(name="refused", verdict=Verdict.WARNING, finding=f"{len(texts)} refused; newest reason in {texts[-1]}")
