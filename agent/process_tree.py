"""All processes of a run, and signals that reach the very process that was meant.

Standard library only: the runner uses it too. Descendants are found by their parents, which is complete in
a process that reaps orphans (PR_SET_CHILD_SUBREAPER); after that process is gone, by the run's own mark in
their environment, which survives setsid, double forks and a change of name.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from agent.domain.errors import ProbeError
from agent.domain.runfiles import ProcessIdentity
from agent.process_identity import identify

RUN_MARK = "CADDIE_RUN"
"""Environment variable that every process of a run inherits; its value is the run's UUID."""

_PROC = Path("/proc")


def descendants(ancestor: int) -> tuple[ProcessIdentity, ...]:
    """Every live process below `ancestor`, zombies left out."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid in _pids():
        try:
            stat = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
        except OSError:  # it ended while we looked
            continue
        children[int(stat.rpartition(")")[2].split()[1])].append(pid)
    found, pending = [], list(children[ancestor])
    while pending:
        pid = pending.pop()
        pending += children[pid]
        if identity := identify(pid):
            found.append(identity)
    return tuple(found)


def marked_processes(run_uuid: str) -> tuple[ProcessIdentity, ...]:
    """Every live process that carries the run's mark and that this user may look into."""
    mark = f"{RUN_MARK}={run_uuid}".encode()
    found = []
    for pid in _pids():
        try:
            environment = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:  # another user's, or ended: neither is one of ours
            continue
        if mark in environment.split(b"\0") and (identity := identify(pid)):
            found.append(identity)
    return tuple(found)


def processes_with_arguments(*tail: str) -> tuple[int, ...]:
    """PIDs of the processes whose last arguments are these."""
    wanted = [argument.encode() for argument in tail]
    found = []
    for pid in _pids():
        try:
            arguments = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")[:-1]
        except OSError:
            continue
        if arguments[-len(wanted) :] == wanted:
            found.append(pid)
    return tuple(found)


def send(identity: ProcessIdentity, number: signal.Signals) -> bool:
    """Signal that very process. False if it is gone; never hits another one that got its PID.

    Raises ProbeError if it could not be looked at, PermissionError if it may not be signalled.
    """
    try:
        handle = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return False
    try:
        # The handle is of whoever has the PID now: only if that is still our process is the signal sent.
        if identify(identity.pid) != identity:
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def send_to_group(leader: ProcessIdentity, number: signal.Signals) -> bool:
    """Signal the process group of a leader that is verified to live. False if it is gone.

    Raises ProbeError if it could not be looked at or leads no group of its own.
    """
    if identify(leader.pid) != leader:
        return False
    try:
        if os.getpgid(leader.pid) != leader.pid:
            raise ProbeError(f"process {leader.pid} does not lead its own group: signalling it could hit others")
        os.killpg(leader.pid, number)
    except ProcessLookupError:
        return False
    return True


def _pids() -> Iterator[int]:
    for entry in os.scandir(_PROC):
        if entry.name.isdigit():
            yield int(entry.name)
