from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent import atomic_files
from agent.adapters.workspace import Workspace
from agent.domain.errors import LockHeldError, WorkspaceError


def test_create_makes_every_folder_once_more_without_harm(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "new" / "place")
    workspace.create()
    (workspace.queue / "a.yaml").write_text("x")
    workspace.create()
    for folder in (workspace.claimed, workspace.accepted, workspace.rejected, workspace.claimed_commands):
        assert folder.is_dir()
    assert workspace.logs.is_dir()
    assert (workspace.queue / "a.yaml").read_text() == "x"
    assert not list(workspace.queue.rglob("*.py"))
    assert not workspace.database.exists()


def test_a_package_in_the_queue_is_refused_with_the_remedy(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.create()
    (workspace.queue / "__init__.py").touch()
    with pytest.raises(WorkspaceError, match="Remove that file"):
        workspace.create()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "queue").write_text("a file")
    with pytest.raises(WorkspaceError, match="queue"):
        Workspace(tmp_path).create()


def test_only_one_daemon_and_its_pid_is_told(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.daemon_pid() is None
    with workspace.lock():
        assert workspace.daemon_pid() == os.getpid()
        assert workspace.pid_file.read_text() == f"{os.getpid()}\n"
        with pytest.raises(LockHeldError, match=rf"pid {os.getpid()} started 20"), workspace.lock():
            pytest.fail("two daemons at once")
        assert workspace.daemon_pid() == os.getpid(), "the failed attempt must not have broken the lock"
    assert workspace.daemon_pid() is None
    assert not workspace.pid_file.exists()
    with workspace.lock():
        assert workspace.daemon_pid() == os.getpid()


def test_the_lock_goes_with_its_process_and_is_not_inherited(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    code = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from agent.adapters.workspace import Workspace\n"
        f"with Workspace(Path({str(tmp_path)!r})).lock():\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as daemon:
        assert daemon.stdout is not None
        sleeper = int(daemon.stdout.readline())
        try:
            assert workspace.daemon_pid() == daemon.pid
            with pytest.raises(LockHeldError, match=str(daemon.pid)), workspace.lock():
                pytest.fail("two daemons at once")
            daemon.kill()
            daemon.wait()
            assert workspace.daemon_pid() is None, "the program that it started still runs, without the lock"
            with workspace.lock():
                assert workspace.daemon_pid() == os.getpid()
        finally:
            os.kill(sleeper, 9)


def test_write_new_is_exclusive_and_leaves_nothing_aside(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    atomic_files.write_new(path, "first")
    with pytest.raises(FileExistsError):
        atomic_files.write_new(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_write_new_without_hard_links_is_still_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "claim.json"
    atomic_files.write_new(path, "first")
    with pytest.raises(FileExistsError):
        atomic_files.write_new(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_write_text_replaces_and_a_failure_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic_files.write_text(path, "old")
    atomic_files.write_text(path, "new")
    assert path.read_text() == "new"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_files.write_text(path, "newer")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
