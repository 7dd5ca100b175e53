"""Runs on this machine: each under its own small runner process, which outlives the daemon.

What is true about a run is read from its folder and from /proc, never from memory: a daemon that was just
started knows as much as the one that launched it.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

import agent
from agent.adapters.run_folder import RUNNER_LOG, RunFolder
from agent.domain.errors import ExecutionError, ProbeError, RunFileError
from agent.domain.observations import ProbeState, RunProbe
from agent.domain.runfiles import VOIDED, Control, ExitRecord, Order, ProcessRecord
from agent.process_identity import Liveness, liveness
from agent.process_tree import marked_processes, processes_with_arguments, send, send_to_group

_log = logging.getLogger(__name__)

_SWEEPS = 5
"""Rounds of killing leftovers: each round finds what was forked during the one before."""


class LocalExecutor:
    """Starts, looks at, stops and kills runs. One per daemon; holds nothing but handles for reaping."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []

    def launch(self, directory: Path, order: Order) -> None:
        """Write the order and start a detached runner. Raises ExecutionError; then nothing was started."""
        folder = RunFolder(directory.resolve())
        try:
            folder.give_order(order)
        except FileExistsError as error:
            raise ExecutionError(
                f"{folder.path} already holds an order: a run is started once and never again"
            ) from error
        except OSError as error:
            raise ExecutionError(f"cannot write the order into {folder.path}: {error.strerror}") from error
        try:
            with (folder.path / RUNNER_LOG).open("ab") as log:
                child = subprocess.Popen(
                    _runner_arguments(folder.path),
                    # Where the package lies, so that `-m` finds it and no file of a workspace can shadow a module.
                    cwd=Path(agent.__file__).resolve().parent.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    close_fds=True,
                )
        except OSError as error:
            raise ExecutionError(f"cannot start a runner for {folder.path}: {error}") from error
        self._children.append(child)

    def reap(self) -> int:
        """Collect runners that have ended, so that they do not stay as zombies. Returns how many still run."""
        self._children = [child for child in self._children if child.poll() is None]
        return len(self._children)

    def probe(self, run_uuid: str, directory: Path) -> RunProbe:
        """What is true about the run now. Never raises for a run's state: what cannot be told is UNKNOWN."""
        try:
            return self._probe(run_uuid, RunFolder(directory.resolve()))
        except (RunFileError, ProbeError, OSError) as error:
            return RunProbe(run_uuid=run_uuid, state=ProbeState.UNKNOWN, detail=str(error))

    def request_stop(self, directory: Path, control: Control) -> None:
        """Ask the runner to end its trainer; signal the trainer from here where the runner is gone.

        Raises ExecutionError.
        """
        folder = RunFolder(directory.resolve())
        try:
            folder.ask(control)
            claim, process = folder.claim(), folder.process()
            if claim is None or process is None or liveness(claim.identity) is not Liveness.GONE:
                return
            if send_to_group(process.identity, signal.SIGTERM):
                _log.warning(
                    "the runner of %s is gone: TERM sent to its trainer %s from here", folder.path, process.identity.pid
                )
        except (RunFileError, ProbeError, OSError) as error:
            raise ExecutionError(f"cannot ask the run in {folder.path} to stop: {error}") from error

    def kill(self, directory: Path) -> None:
        """KILL the trainer's group, the runner, and whatever of the run is left. Raises ExecutionError.

        Each process is verified first: a PID that now belongs to somebody else is never signalled.
        """
        folder = RunFolder(directory.resolve())
        try:
            claim, process = folder.claim(), folder.process()
            if claim is None or claim.claimant == VOIDED:
                return
            if process is not None:
                send_to_group(process.identity, signal.SIGKILL)
            send(claim.identity, signal.SIGKILL)
            for _ in range(_SWEEPS):
                if not self._sweep(claim.run_uuid):
                    return
        except (RunFileError, ProbeError, OSError) as error:
            raise ExecutionError(f"cannot kill the run in {folder.path}: {error}") from error

    def void(self, run_uuid: str, directory: Path) -> bool:
        """Claim a run that nobody claimed, so that a late runner can never start it.

        False if a runner claimed it first; True also if it was voided before. Raises ExecutionError.
        """
        folder = RunFolder(directory.resolve())
        try:
            if folder.void(run_uuid):
                return True
            claim = folder.claim()
            return claim is not None and claim.claimant == VOIDED
        except RunFileError:
            return False
        except (ProbeError, OSError) as error:
            raise ExecutionError(f"cannot void the run in {folder.path}: {error}") from error

    def _probe(self, run_uuid: str, folder: RunFolder) -> RunProbe:
        record = folder.exit()
        if record is not None and record.run_uuid != run_uuid:
            detail = f"{folder.path} holds the exit record of another run, {record.run_uuid}"
            return RunProbe(run_uuid=run_uuid, state=ProbeState.UNKNOWN, detail=detail)
        if record is not None:
            return self._over(run_uuid, folder, record)
        if folder.claim_is_empty():
            return self._probe_half_claimed(run_uuid, folder)
        claim = folder.claim()
        if claim is None:
            return RunProbe(run_uuid=run_uuid, state=ProbeState.UNCLAIMED)
        if claim.run_uuid != run_uuid:
            detail = f"{folder.path} is claimed for another run, {claim.run_uuid}"
            return RunProbe(run_uuid=run_uuid, state=ProbeState.UNKNOWN, detail=detail)
        if claim.claimant == VOIDED:
            return RunProbe(run_uuid=run_uuid, state=ProbeState.GONE, detail="voided before any runner claimed it")
        # The runner first: once it is gone no process.json can appear any more (see runner.py), so what is
        # read after that is final.
        runner = liveness(claim.identity)
        process = folder.process()
        trainer = Liveness.GONE if process is None else liveness(process.identity)
        if runner is Liveness.ALIVE:
            pid = process.identity.pid if process is not None and trainer is Liveness.ALIVE else None
            return RunProbe(run_uuid=run_uuid, state=ProbeState.ALIVE, pid=pid)
        return self._probe_without_runner(run_uuid, folder, runner, trainer, process)

    def _probe_without_runner(
        self, run_uuid: str, folder: RunFolder, runner: Liveness, trainer: Liveness, process: ProcessRecord | None
    ) -> RunProbe:
        if process is not None and trainer is Liveness.ALIVE:
            return RunProbe(
                run_uuid=run_uuid,
                state=ProbeState.ALIVE,
                pid=process.identity.pid,
                detail="orphaned: its runner is gone, its trainer works on",
            )
        if Liveness.UNKNOWN in {runner, trainer}:
            detail = "its runner or trainer could not be looked at in /proc"
            return RunProbe(run_uuid=run_uuid, state=ProbeState.UNKNOWN, detail=detail)
        if record := folder.exit():  # written between the first look and the runner's end
            return self._over(run_uuid, folder, record)
        # Ending what the trainer left behind is the runner's last duty; it is gone, so it falls to us.
        if left := self._sweep(run_uuid):
            detail = f"orphaned: {left} process(es) outlived runner and trainer and were killed"
            return RunProbe(run_uuid=run_uuid, state=ProbeState.ALIVE, detail=detail)
        return self._over(run_uuid, folder, None, detail="runner and trainer are gone and left no exit record")

    def _probe_half_claimed(self, run_uuid: str, folder: RunFolder) -> RunProbe:
        """An empty claim: a runner writes its claim before anything else, so it died before it started a trainer,
        or it is just about to write."""
        if processes_with_arguments(*_runner_arguments(folder.path)[-2:]) or not folder.claim_is_empty():
            return RunProbe(run_uuid=run_uuid, state=ProbeState.UNKNOWN, detail="its claim is being written")
        return self._over(run_uuid, folder, None, detail="its runner died while claiming it; no trainer was started")

    @staticmethod
    def _over(run_uuid: str, folder: RunFolder, record: ExitRecord | None, detail: str = "") -> RunProbe:
        """What is left of a run that ended. Raises ProbeError if its result could not be looked at just now."""
        result = None
        try:
            result = folder.result_text()
        except RunFileError as error:  # too large, not text: no later look will find a result there
            detail = f"{detail}; {error}" if detail else str(error)
        return RunProbe(
            run_uuid=run_uuid,
            state=ProbeState.GONE if record is None else ProbeState.EXITED,
            exit=record,
            detail=detail,
            log_tail=folder.log_tail(),
            result_text=result,
        )

    @staticmethod
    def _sweep(run_uuid: str) -> int:
        """KILL every process that carries the run's mark. Returns how many there were."""
        return sum(send(identity, signal.SIGKILL) for identity in marked_processes(run_uuid))


def _runner_arguments(directory: Path) -> list[str]:
    return [sys.executable, "-m", "agent.runner", str(directory)]
