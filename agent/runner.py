"""The small process that owns one run and outlives the daemon: `python -m agent.runner RUN_DIR`.

It claims the run (of two runners only one goes on), starts the trainer in a process group of its own, waits
for its end, a stop request or the timeout, ends whatever the trainer left behind, and writes the exit record.

No trainer without a record: the trainer's process writes `process.json` itself, between fork and exec, and
until that is on disk the kernel kills it together with its runner (PR_SET_PDEATHSIG). So once a runner is
gone and there is no `process.json`, there is no trainer either. Orphans below the trainer become children of
the runner (PR_SET_CHILD_SUBREAPER), so that setsid does not hide them.

Imports the standard library, the records and the process tree only: it starts in a blink and keeps running
the code that it was started with whatever is upgraded.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from agent.atomic_files import write_new, write_text
from agent.domain.errors import ProbeError, RunFileError
from agent.domain.runfiles import (
    CLAIM,
    CONTROL,
    EXIT,
    LOG,
    ORDER,
    PROCESS,
    Claim,
    Control,
    ExitRecord,
    Order,
    ProcessIdentity,
    ProcessRecord,
)
from agent.domain.trials import StopCause
from agent.process_identity import own_identity
from agent.process_tree import RUN_MARK, descendants, send

OK, BAD_ORDER, ALREADY_CLAIMED, CANNOT_WRITE = 0, 2, 3, 4
"""The runner's own exit codes; the trainer's is in the exit record."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_AWAITED = frozenset({signal.SIGCHLD, signal.SIGTERM})
_POLL_SECONDS = 0.2
_STRAGGLER_GRACE_SECONDS = 2.0
_STRAGGLER_DEADLINE_SECONDS = 60.0
"""After this long of KILL a process hangs inside the kernel; the exit record must not wait for it."""
_DISK_FULL_DEADLINE_SECONDS = 600.0


class _Trainer:
    """The trainer's process while it lives, and the stop that was asked for."""

    def __init__(self, directory: Path, order: Order, child: subprocess.Popen[bytes]) -> None:
        self._directory, self._order, self._child = directory, order, child
        self._control: Control | None = None
        self._complaint = ""
        self._stop_deadline: float | None = None
        self._timeout_at = None if order.timeout_seconds is None else time.monotonic() + order.timeout_seconds
        self.cause: StopCause | None = None
        self.killed = False

    def wait(self) -> int:
        """Until its end; returns the code, negative for a signal."""
        while (returncode := self._reap()) is None:
            self._follow_requests(time.monotonic())
            if (received := signal.sigtimedwait(_AWAITED, _POLL_SECONDS)) and received.si_signo == signal.SIGTERM:
                # Somebody ends this runner: its trainer must not stay behind unwatched.
                self._follow_requests(time.monotonic())
                self._interrupted()
                self._ask_to_stop(self._order.grace_seconds)
        if signal.SIGTERM in signal.sigpending():  # a reboot tells all processes at once: the trainer was faster
            self._interrupted()
        return returncode

    def clear_stragglers(self) -> None:
        """End every process that the trainer left behind: TERM, a short grace, KILL until none is left."""
        started = time.monotonic()
        told: set[int] = set()
        while left := descendants(os.getpid()):
            waited = time.monotonic() - started
            if waited > _STRAGGLER_DEADLINE_SECONDS:
                _say(f"processes {sorted(p.pid for p in left)} cannot be killed: they hang inside the kernel")
                return
            for process in left:
                if self.killed or waited > _STRAGGLER_GRACE_SECONDS:
                    _tell(process, signal.SIGKILL)
                elif process.pid not in told:
                    told.add(process.pid)
                    _tell(process, signal.SIGTERM)
            signal.sigtimedwait({signal.SIGCHLD}, _POLL_SECONDS / 4)
            self._reap()

    def _interrupted(self) -> None:
        if self.cause is None:
            self.cause = StopCause.INTERRUPTED

    def _reap(self) -> int | None:
        """Collect ended children, adopted ones too; the trainer's code once it is among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid == self._child.pid:
                self._child.returncode = os.waitstatus_to_exitcode(status)
                return self._child.returncode

    def _follow_requests(self, now: float) -> None:
        try:
            control = _read_control(self._directory, self._order.run_uuid)
        except RunFileError as error:
            if str(error) != self._complaint:  # once, not at every poll
                self._complaint = str(error)
                _say(f"a request that cannot be read is ignored: {error}")
            control = None
        if control is not None and control != self._control:
            self._control, self.cause = control, control.cause
            self._ask_to_stop(control.grace_seconds)
        if self._timeout_at is not None and now >= self._timeout_at and self._stop_deadline is None:
            self.cause = StopCause.TIMEOUT
            self._ask_to_stop(self._order.grace_seconds)
        if self._stop_deadline is not None and now >= self._stop_deadline:
            self.killed = True
            _tell_group(self._child.pid, signal.SIGKILL)
            for process in descendants(os.getpid()):
                _tell(process, signal.SIGKILL)

    def _ask_to_stop(self, grace_seconds: float) -> None:
        """TERM to the whole group, once; a later request can only shorten the grace."""
        deadline = time.monotonic() + grace_seconds
        if self._stop_deadline is None:
            # The leader is not yet reaped, so its PID still names this very group.
            _tell_group(self._child.pid, signal.SIGTERM)
            _tell_group(self._child.pid, signal.SIGCONT)  # one that is suspended could not follow
        self._stop_deadline = deadline if self._stop_deadline is None else min(deadline, self._stop_deadline)


def run(directory: Path) -> int:
    """Claim and carry out the run of this folder. Returns the runner's exit code."""
    # Blocked and then awaited, never handled: nothing is interrupted half-way and no signal is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    for ignored in (signal.SIGHUP, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    try:
        order = Order.from_json((directory / ORDER).read_text(encoding="utf-8"), str(directory / ORDER))
    except (OSError, ValueError, RunFileError) as error:
        _say(f"no usable order in {directory}: {error}")
        return BAD_ORDER
    try:
        claim = Claim(run_uuid=order.run_uuid, claimant="runner", identity=own_identity(), at=_now())
        write_new(directory / CLAIM, claim.to_json())
    except FileExistsError:
        _say(f"{directory} is already claimed; leaving it alone")
        return ALREADY_CLAIMED
    except (OSError, ProbeError) as error:
        _say(f"cannot claim {directory}: {error}")
        return CANNOT_WRITE
    return OK if _write_exit(directory, _carry_out(directory, order)) else CANNOT_WRITE


def _carry_out(directory: Path, order: Order) -> ExitRecord:
    try:
        if control := _read_control(directory, order.run_uuid):
            return _never_started(order, "stopped before its trainer was started", control.cause)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        started_at = _now()
        child = _start(directory, order)
    except (OSError, subprocess.SubprocessError, ValueError, RunFileError) as error:
        what = f"cannot start {' '.join(order.argv[:1])} in {order.cwd}: "
        if isinstance(error, OSError):
            of = f" ({error.filename})" if error.filename else ""
            return _never_started(order, f"{what}{error.strerror or error}{of}", None, error.errno)
        return _never_started(order, f"{what}{error}", None)
    trainer = _Trainer(directory, order, child)
    returncode = trainer.wait()
    ended_at = _now()
    trainer.clear_stragglers()
    return ExitRecord(
        run_uuid=order.run_uuid,
        returncode=returncode,
        started_at=started_at,
        ended_at=ended_at,
        cause=trainer.cause,
        killed=trainer.killed,
    )


def _start(directory: Path, order: Order) -> subprocess.Popen[bytes]:
    runner_pid = os.getpid()

    def become_trainer() -> None:
        """In the child, between fork and exec; this process has a single thread, so that is safe."""
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != runner_pid:  # the runner died before the line above
            os._exit(1)
        try:
            record = ProcessRecord(run_uuid=order.run_uuid, identity=own_identity(), at=_now())
            write_text(directory / PROCESS, record.to_json())
        except OSError as error:
            # Of what is raised here, subprocess tells the parent only that something was.
            os.write(told, str(error.errno or 0).encode())
            raise
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _prctl(_PR_SET_PDEATHSIG, 0)

    # A program in Python that prints into a file would keep its lines back for kilobytes.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **order.env, RUN_MARK: order.run_uuid}
    heard, told = os.pipe()
    with (directory / LOG).open("ab") as log, os.fdopen(heard, "rb") as answer, os.fdopen(told, "wb"):
        try:
            return subprocess.Popen(
                order.argv,
                cwd=order.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                close_fds=True,
                preexec_fn=become_trainer,  # noqa: PLW1509  # see the module's docstring; one thread, no locks held
            )
        except subprocess.SubprocessError as error:
            os.set_blocking(heard, False)
            number = int(answer.read() or 0)
            if not number:
                raise
            raise OSError(number, os.strerror(number), str(directory / PROCESS)) from error


def _read_control(directory: Path, run_uuid: str) -> Control | None:
    """The request for this run, if there is one. Raises RunFileError if it cannot be read."""
    path = directory / CONTROL
    try:
        control = Control.from_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(f"cannot read {path}: {error}") from error
    return control if control.run_uuid == run_uuid else None


def _never_started(order: Order, error: str, cause: StopCause | None, number: int | None = None) -> ExitRecord:
    return ExitRecord(
        run_uuid=order.run_uuid,
        returncode=None,
        started_at=None,
        ended_at=_now(),
        cause=cause,
        error=error,
        errno=number,
    )


def _write_exit(directory: Path, record: ExitRecord) -> bool:
    """Try for a while: a full disk may be made room on, and this record is all that tells how the run ended."""
    deadline, pause = time.monotonic() + _DISK_FULL_DEADLINE_SECONDS, 0.5
    while True:
        try:
            write_text(directory / EXIT, record.to_json())
        except OSError as error:
            _say(f"cannot write the exit record: {error}")
            if time.monotonic() >= deadline or not directory.is_dir():
                return False
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
        else:
            return True


def _tell(process: ProcessIdentity, number: signal.Signals) -> None:
    try:
        send(process, number)
    except (OSError, ProbeError) as error:
        _say(f"cannot signal process {process.pid}: {error}")


def _tell_group(leader_pid: int, number: signal.Signals) -> None:
    """Only for a child that is not yet reaped: its PID cannot name another group before that."""
    try:
        os.killpg(leader_pid, number)
    except ProcessLookupError:  # it has ended already, which is what was wanted
        return
    except OSError as error:
        _say(f"cannot signal the group of process {leader_pid}: {error}")


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl")


_LIBC = ctypes.CDLL(None, use_errno=True)


def _say(text: str) -> None:
    try:
        sys.stderr.write(f"{_now()} runner: {text}\n")
        sys.stderr.flush()
    except OSError:  # a full disk must not end the one process that watches the trainer
        return


def _now() -> str:
    return datetime.now(UTC).isoformat()


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        _say("usage: python -m agent.runner RUN_DIR")
        return BAD_ORDER
    return run(Path(arguments[0]).resolve())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
