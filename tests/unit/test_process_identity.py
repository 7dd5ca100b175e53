from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agent import process_identity, process_tree
from agent.domain.errors import ProbeError
from agent.process_identity import Liveness, identify, liveness, own_identity


def test_a_process_is_told_from_its_predecessor_and_from_another_boot() -> None:
    own = own_identity()
    assert liveness(own) is Liveness.ALIVE
    assert liveness(replace(own, start_ticks=own.start_ticks - 1)) is Liveness.GONE
    assert liveness(replace(own, boot_id="another")) is Liveness.GONE


def test_a_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify(child.pid)
    assert identity is not None
    assert liveness(identity) is Liveness.ALIVE
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert liveness(identity) is Liveness.GONE
    child.communicate()


def test_a_name_with_spaces_and_parentheses_changes_nothing(tmp_path: Path) -> None:
    program = tmp_path / "a) Z (b 1"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "600"])
    try:
        identity = identify(child.pid)
        assert identity is not None
        assert identity.start_ticks >= own_identity().start_ticks
        assert {process.pid for process in process_tree.descendants(os.getpid())} >= {child.pid}
        assert process_tree.send(identity, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()


def test_what_cannot_be_looked_at_is_unknown_not_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = own_identity()
    monkeypatch.setattr(process_identity, "_PROC", tmp_path / "no-proc-here")
    assert liveness(own) is Liveness.UNKNOWN
    with pytest.raises(ProbeError, match="/proc"):
        process_identity.boot_id()


def test_a_group_is_only_signalled_through_its_leader() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        identity = identify(child.pid)
        assert identity is not None
        with pytest.raises(ProbeError, match="does not lead its own group"):
            process_tree.send_to_group(identity, signal.SIGKILL)
        assert liveness(identity) is Liveness.ALIVE
    finally:
        child.kill()
        child.communicate()
    assert not process_tree.send_to_group(identity, signal.SIGKILL)
