"""From a decision to launch to the exact order: program, arguments, environment and the files it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from agent.domain.actions import Assignment, Launch
from agent.domain.errors import ExecutionError
from agent.domain.runfiles import Order
from agent.domain.specs import Spec
from agent.domain.trials import RunKind
from agent.domain.views import TrialView

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


def trial_directory(trial: TrialView) -> str:
    """Folder of a trial, relative to the workspace; its runs and checkpoints lie in it."""
    return f"runs/{trial.name}-{trial.seed}"


def run_directory(trial: TrialView, kind: RunKind, run_uuid: str) -> str:
    """Folder of one run, relative to the workspace."""
    attempt = len(trial.runs_of(kind)) + 1
    return f"{trial_directory(trial)}/{kind}-{attempt}-{run_uuid[:8]}"


def build_order(
    root: Path, trial: TrialView, launch: Launch, *, run_uuid: str, directory: str
) -> tuple[Order, str | None]:
    """The order of a run, and the text of the `config.json` that must lie in its folder (None for commands).

    `root` is the workspace; paths in the order are absolute, because the run's working directory is its own.
    """
    spec = trial.spec
    out = root / directory
    data = root / spec.data
    config: str | None = None
    if spec.command is not None:
        argv = list(spec.command)
    elif launch.kind is RunKind.TRAIN:
        config = spec.train_config(trial.seed).to_json()
        argv = _trainer("train", out / CONFIG, data, out, processes=spec.processes)
        argv += ["--checkpoints", str(root / trial_directory(trial) / CHECKPOINTS), "--resume", "auto"]
        if spec.init_from is not None:
            argv += ["--init-from", str(root / spec.init_from)]
    elif launch.source is not None:
        argv = _trainer(str(launch.kind), root / launch.source, data, out)
    else:
        raise ExecutionError(f"{launch.kind} of {trial.key} names no file to read")
    order = Order(
        run_uuid=run_uuid,
        argv=argv,
        cwd=str(_working_directory(root, spec.working_directory, out)),
        env=_environment(launch.assignment, {**_patience(spec), **spec.env}, run_uuid),
        grace_seconds=spec.grace_seconds,
        timeout_seconds=spec.timeout_seconds if launch.kind is RunKind.TRAIN else None,
    )
    return order, config


def _trainer(verb: str, source: Path, data: Path, out: Path, *, processes: int = 1) -> list[str]:
    """A verb of the trainer; under torchrun where it is more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = torchrun if processes > 1 else []
    return [sys.executable, *launcher, "-m", "trainer", verb, str(source), "--data", str(data), "--out", str(out)]


def _patience(spec: Spec) -> dict[str, str]:
    """How long torchrun waits for its processes' checkpoints after TERM: a second less than the runner waits for it,
    so that it can still say how they ended. By itself it kills them after 30 s, as it always does before torch 2.12."""
    if spec.processes == 1:
        return {}
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, int(spec.grace_seconds) - 1))}


def _working_directory(root: Path, asked: str | None, out: Path) -> Path:
    if asked is None:
        return out
    directory = root / asked
    if not directory.is_dir():
        raise ExecutionError(f"working_directory {directory} is not a folder. Make it, or leave the field out")
    return directory


def _environment(assignment: Assignment, asked: Mapping[str, str], run_uuid: str) -> dict[str, str]:
    """What is added to the daemon's environment. A CPU run sees no GPU, and no run sees another's."""
    environment = {
        "CUDA_VISIBLE_DEVICES": ",".join(assignment.gpu_uuids),
        "CADDIE_RUN": run_uuid,
        "PYTHONUNBUFFERED": "1",
    }
    if assignment.cpu_slots:
        environment["OMP_NUM_THREADS"] = str(assignment.cpu_slots)
    elif assignment.gpu_uuids:
        # The host side of a GPU run gets its share of the cores, not all of them times the number of cards.
        environment["OMP_NUM_THREADS"] = str(max(1, min(8, len(os.sched_getaffinity(0)) // 2)))
    return environment | dict(asked)
