"""The working folder: one object owns every path in it, and the lock that only one daemon holds."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent.atomic_files import write_text
from agent.domain.errors import LockHeldError, WorkspaceError

_FLOCK = "@hhqqi4x"
"""`struct flock` of 64-bit Linux: type, whence, start, length, pid."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths below `root`. Nothing is touched before `create` or `lock`."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "experiments.db"

    @property
    def settings_file(self) -> Path:
        return self.root / "caddie.toml"

    @property
    def lock_file(self) -> Path:
        return self.root / "daemon.lock"

    @property
    def pid_file(self) -> Path:
        """For service managers; whether a daemon runs is said by the lock alone."""
        return self.root / "daemon.pid"

    @property
    def queue(self) -> Path:
        """Where users drop specs."""
        return self.root / "queue"

    @property
    def claimed(self) -> Path:
        """Specs that the daemon took, until the ledger has them."""
        return self.queue / "claimed"

    @property
    def accepted(self) -> Path:
        return self.queue / "accepted"

    @property
    def rejected(self) -> Path:
        """Refused files, each beside a text that says why."""
        return self.queue / "rejected"

    @property
    def commands(self) -> Path:
        return self.queue / "commands"

    @property
    def claimed_commands(self) -> Path:
        return self.commands / "claimed"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def data(self) -> Path:
        return self.root / "data"

    def create(self) -> None:
        """Make the folders that are missing. Raises WorkspaceError."""
        folders = (self.claimed, self.accepted, self.rejected, self.claimed_commands, self.logs, self.runs, self.data)
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkspaceError(
                f"cannot make {error.filename or self.root}: {error.strerror}. "
                f"Give a folder that this user may write to, or remove what is in the way"
            ) from error
        if (package := self.queue / "__init__.py").exists():
            raise WorkspaceError(
                f"{package} makes the queue a Python package, which hides the standard library's `queue` from every "
                f"program started in {self.root}. Remove that file"
            )
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise WorkspaceError(f"{self.root} is not writable by this user. Give another folder")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only daemon of this workspace while inside.

        Raises LockHeldError naming the other daemon, and WorkspaceError. The lock belongs to the open file,
        so it goes with the process however that ends, and is not inherited by programs that it starts.
        """
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise WorkspaceError(f"cannot open {self.lock_file}: {error.strerror}. Is {self.root} writable?") from error
        try:
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock_request(fcntl.F_WRLCK))
            except (BlockingIOError, PermissionError):
                holder = _read(descriptor)
                raise LockHeldError(
                    f"another daemon owns {self.root}: pid {holder or 'not yet written'}. "
                    f"Stop it first, or use another workspace"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(
                descriptor, f"{os.getpid()} started {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode(), 0
            )
            write_text(self.pid_file, f"{os.getpid()}\n")
            try:
                yield
            finally:
                self.pid_file.unlink(missing_ok=True)
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def daemon_pid(self) -> int | None:
        """PID of the daemon that holds the lock; None if nobody does. The lock itself is left alone.

        0 if it is held by a daemon that has not written its PID yet. Raises WorkspaceError.
        """
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WorkspaceError(f"cannot open {self.lock_file}: {error.strerror}") from error
        try:
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _lock_request(fcntl.F_WRLCK))
            if struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK:
                return None
            word = _read(descriptor).partition(" ")[0]
            return int(word) if word.isdigit() else 0
        finally:
            os.close(descriptor)


def _lock_request(kind: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode("ascii", errors="replace").strip()
