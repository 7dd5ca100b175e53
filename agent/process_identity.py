"""Which process is it, really? A PID alone is not an answer: PIDs are reused and do not survive a boot.

A process is its PID, its start time in kernel clock ticks since boot, and the boot's id. Read from /proc, so
a change of the wall clock never makes a live process look like another one. Standard library only: the
runner uses it too.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

from agent.domain.errors import ProbeError
from agent.domain.runfiles import ProcessIdentity

_PROC = Path("/proc")


class Liveness(StrEnum):
    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"


def boot_id() -> str:
    """This boot's id. Raises ProbeError where the kernel does not tell."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError as error:
        raise ProbeError(f"cannot read this boot's id: {error}. Caddie needs Linux with /proc mounted") from error


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of a live process; None if there is none with that PID (a zombie is none).

    Raises ProbeError if it could not be looked at.
    """
    try:
        # The name in parentheses may itself hold spaces and parentheses: count fields after the last ")".
        fields = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise ProbeError(f"cannot look at process {pid}: {error}") from error
    state, start_ticks = fields[0], int(fields[19])
    if state in {"Z", "X", "x"}:
        return None
    return ProcessIdentity(pid=pid, start_ticks=start_ticks, boot_id=boot_id())


def own_identity() -> ProcessIdentity:
    identity = identify(os.getpid())
    if identity is None:
        raise ProbeError("cannot find this process in /proc")
    return identity


def liveness(identity: ProcessIdentity) -> Liveness:
    """Whether that very process still runs. UNKNOWN when it could not be looked at."""
    try:
        if boot_id() != identity.boot_id:
            return Liveness.GONE
        return Liveness.ALIVE if identify(identity.pid) == identity else Liveness.GONE
    except ProbeError:
        return Liveness.UNKNOWN
