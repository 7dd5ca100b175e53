"""`caddie doctor`: what it finds healthy, what it finds at fault, and that it says what to do."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent import doctor
from agent.adapters.workspace import Workspace
from agent.doctor import Check, Verdict
from agent.domain.observations import Device, DeviceProcess, Devices
from agent.ledger.ledger import Ledger

GB = 1_000_000_000
NO_GPU = Devices(gpus=(), cpu_slots=2, note="no NVIDIA GPU: runs use 2 CPU slots")


class Machine:
    """Stands in for the driver."""

    devices = NO_GPU
    closed = 0

    def __init__(self, deadline_seconds: float) -> None:
        assert deadline_seconds > 0

    def read(self) -> Devices:
        return type(self).devices

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    fresh = type("FreshMachine", (Machine,), {})
    monkeypatch.setattr(doctor, "GpuReader", fresh)
    return fresh


@pytest.fixture(params=["workspace", "study #1 of 50%"])
def workspace(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Workspace]:
    made = Workspace(tmp_path / request.param)
    made.create()
    Ledger.open(made.database).close()
    return made


def found(workspace: Workspace) -> dict[str, Check]:
    checks = doctor.examine(workspace)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def gpu(index: int, **fields: object) -> Device:
    values: dict[str, object] = {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "card",
        "memory_total_bytes": 80 * GB,
        "memory_used_bytes": 5 * GB,
    }
    return Device(**(values | fields))  # type: ignore[arg-type]


def test_a_healthy_workspace_has_no_fault(workspace: Workspace, machine: type[Machine]) -> None:
    checks = found(workspace)
    assert {name: check.finding for name, check in checks.items() if check.verdict is Verdict.FAULT} == {}
    assert list(checks) == [
        *("python", "torch", "sqlite", "processes", "gpus"),
        *("workspace", "settings", "daemon", "ledger", "disk", "refused"),
    ]
    assert checks["ledger"].verdict is Verdict.OK
    assert "quick_check: ok" in checks["ledger"].finding
    assert checks["gpus"].finding == NO_GPU.note
    assert "every 180 s" in checks["settings"].finding
    assert machine.closed == 1


def test_looking_changes_nothing(workspace: Workspace) -> None:
    def state() -> dict[str, bytes | None]:
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in sorted(workspace.root.parent.rglob("*"))
            if not path.name.endswith(("-wal", "-shm"))  # SQLite's own, which any reader makes
        }

    before = state()
    found(workspace)
    assert state() == before


def test_no_workspace_is_a_warning_with_the_remedy(tmp_path: Path) -> None:
    check = found(Workspace(tmp_path / "nowhere"))["workspace"]
    assert check.verdict is Verdict.WARNING
    assert "caddie up" in check.finding
    assert not (tmp_path / "nowhere").exists()


def test_a_workspace_without_a_ledger_yet(tmp_path: Path) -> None:
    Workspace(tmp_path).create()
    assert found(Workspace(tmp_path))["ledger"].verdict is Verdict.WARNING
    assert not Workspace(tmp_path).database.exists()


@pytest.mark.parametrize("damage", ["header", "page", "text"])
def test_a_corrupt_database_is_a_fault_that_names_the_file(workspace: Workspace, damage: str) -> None:
    data = bytearray(workspace.database.read_bytes())
    if damage == "header":
        data[:16] = b"not a database!!"
    elif damage == "page":
        data[4096:] = b"\xff" * (len(data) - 4096)
    else:
        data = bytearray(b"hello\n")
    workspace.database.write_bytes(data)
    check = found(workspace)["ledger"]
    assert check.verdict is Verdict.FAULT
    assert check.finding


def test_a_database_that_is_no_file_is_a_fault(workspace: Workspace) -> None:
    workspace.database.unlink()
    workspace.database.mkdir()
    check = found(workspace)["ledger"]
    assert check.verdict is Verdict.FAULT
    assert str(workspace.database) in check.finding


def test_a_ledger_in_use_is_looked_at_all_the_same(workspace: Workspace) -> None:
    connection = sqlite3.connect(workspace.database, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        assert found(workspace)["ledger"].verdict is Verdict.OK
    finally:
        connection.close()


def test_too_little_disk_is_a_fault_by_the_workspaces_own_floor(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=5000))
    check = found(workspace)["disk"]
    assert check.verdict is Verdict.FAULT
    assert "5,000 bytes free" in check.finding
    assert "1,000,000,000" in check.finding
    workspace.settings_file.write_text("disk_floor_bytes = 5000\n", encoding="utf-8")
    assert found(workspace)["disk"].verdict is Verdict.OK


def test_settings_that_cannot_be_used_are_a_fault_and_do_not_end_the_examination(workspace: Workspace) -> None:
    workspace.settings_file.write_text("intervall = 3\n", encoding="utf-8")
    checks = found(workspace)
    assert checks["settings"].verdict is Verdict.FAULT
    assert "intervall" in checks["settings"].finding
    assert checks["disk"].verdict is Verdict.OK


def test_the_daemon_is_seen_by_its_lock(workspace: Workspace) -> None:
    assert found(workspace)["daemon"].verdict is Verdict.WARNING
    with workspace.lock():
        check = found(workspace)["daemon"]
    assert check.verdict is Verdict.OK
    assert str(os.getpid()) in check.finding


def test_the_newest_refusal_is_named(workspace: Workspace) -> None:
    for name, when in (("b.yaml.txt", 1_000_000), ("a.yaml.txt", 2_000_000), ("c.yaml.txt", 500_000)):
        (workspace.rejected / name).write_text("no\n", encoding="utf-8")
        os.utime(workspace.rejected / name, (when, when))
    check = found(workspace)["refused"]
    assert check.verdict is Verdict.WARNING
    assert check.finding.startswith("3 refused")
    assert check.finding.endswith("a.yaml.txt")


def test_cards_that_are_sick_busy_and_well(workspace: Workspace, machine: type[Machine]) -> None:
    busy = DeviceProcess(pid=1, name="other", memory_bytes=None)
    machine.devices = Devices(
        gpus=(gpu(0), gpu(1, processes=(busy,)), gpu(2, error="GPU is lost")), cpu_slots=2, note=""
    )
    checks = found(workspace)
    assert [checks[f"gpu{n}"].verdict for n in range(3)] == [Verdict.OK, Verdict.WARNING, Verdict.FAULT]
    assert "75.0 of 80.0 GB free" in checks["gpu0"].finding
    assert "1 process(es)" in checks["gpu1"].finding
    assert checks["gpu2"].finding == "GPU is lost"


def test_a_driver_that_does_not_answer_is_a_fault(workspace: Workspace, machine: type[Machine]) -> None:
    machine.devices = Devices(gpus=None, cpu_slots=2, note="GPUs unknown: NVML did not answer within 10 s")
    check = found(workspace)["gpus"]
    assert check.verdict is Verdict.FAULT
    assert "did not answer" in check.finding


def test_a_missing_torch_is_a_fault_with_the_remedy(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    check = found(workspace)["torch"]
    assert check.verdict is Verdict.FAULT
    assert "make demo" in check.finding
