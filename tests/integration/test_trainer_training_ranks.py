"""Two processes train as one does: the same curve, one voice, one set of files; and they end together, however.

Equal is meant up to float rounding: halves of a batch are averaged apart and then added in another order, which moves
a gradient by some 1e-7 of itself. Muon and AdamW divide gradients by their own size, so rounding of those near zero
comes through, and fake quantisation may round a weight to its other neighbour. Over these few steps that stays below
1e-4 of a loss, which is also what a log line can show.

With input-aware Muon, whose running covariances take in one sample a forward pass, this holds at equally many passes a
step, and as long as no pass is larger than the rows it samples. A batch that grows does so in whole passes of all
processes. Losses weighted by bytes are ratios of each micro-batch, and are left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import ROOT, TORCHRUN

from agent.adapters.run_orders import build_order, run_directory, trial_directory
from agent.domain.actions import Assignment, Launch
from agent.domain.runfiles import Order
from agent.domain.trials import RunKind, RunState
from agent.domain.views import TrialView
from placement_views import run as ended_run
from placement_views import trial
from small_data_set import make_data_set
from tiny_training import (
    EVERYTHING,
    PLAIN,
    Settings,
    losses,
    parsed,
    result,
    run,
    scores,
    settings,
    stop_at_step,
    weights,
)
from trainer.checkpoint import checkpoints_in
from trainer.config import TrainConfig
from trainer.report import Event, ExitCode, Header, Line, TrainPoint

ROUNDING = 1e-4

CURVES: dict[str, TrainConfig] = {
    "plain": settings(PLAIN),
    "everything": settings(EVERYTHING),
    "swa": settings(EVERYTHING, averaging={"kind": "swa", "start_fraction": 0.5}, data={"order": "sequential"}),
    "input_aware": settings(EVERYTHING, optimizer={"muon_input_aware": True}),
}
# Four passes a step or, shared, two: the covariances forget half as fast.
OTHER_PASSES = settings(PLAIN, optimizer={"muon_input_aware": True}, batch={"micro_batch_tokens": 32})
RELAYED = ("everything", "input_aware")
STOPPED_STEP = 5

# Runs one after another in one pair of processes, for starting a pair takes longest; each meets at a port of its own.
# What a process says goes to a file of its own. "stop" sends a signal in mid-step to the rank that is named.
PROGRAM = """
import contextlib, json, os, signal, sys
from pathlib import Path
import torch
from trainer.config import TrainConfig
from trainer.errors import InputError
from trainer.loop import train
from trainer.optim import Optimizers
from trainer.ranks import Ranks

torch.set_num_threads(1)
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
ranks, plain = Ranks.from_environment(), Optimizers.step
jobs, data, codes = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), {}
for name, job in jobs.items():
    out = Path(sys.argv[3]) / name
    def step(self, steps_done, *multipliers, stopped=job["stop"]):
        plain(self, steps_done, *multipliers)
        if stopped == [ranks.rank, steps_done + 1]:
            os.kill(os.getpid(), signal.SIGTERM)
    Optimizers.step, os.environ["MASTER_PORT"] = step, str(job["port"])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"said_{ranks.rank}", "w") as log, contextlib.redirect_stdout(log):
        config = TrainConfig.model_validate_json(job["config"])
        checkpoints = out / ("elsewhere" if job.get("elsewhere") == ranks.rank else "checkpoints")
        try:
            codes[name] = int(train(config, data, out, checkpoints, "auto", ranks=ranks))
        except InputError as error:  # both leave so, and then do not part by themselves
            codes[name] = str(error)
            torch.distributed.destroy_process_group()
Path(sys.argv[3], f"codes_{ranks.rank}").write_text(json.dumps(codes))
"""


@pytest.fixture(autouse=True)
def _one_thread(seeded_on_one_thread: None) -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("ranks") / "data").path


def _environment(order: Order | None = None) -> dict[str, str]:
    asked = order.env if order is not None else {"OMP_NUM_THREADS": "1"}
    return {**os.environ, "PYTHONPATH": str(ROOT), **asked}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def assert_same_curve(found: list[Line], wanted: list[Line]) -> None:
    ours, theirs = losses(found), losses(wanted)
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=ROUNDING)
    assert [step for step, _, _ in scores(found)] == [step for step, _, _ in scores(wanted)]
    for one, other in zip(scores(found), scores(wanted), strict=True):
        assert one == pytest.approx(other, rel=ROUNDING)


def assert_same_end(found: Path, wanted: Path, processes: int = 2) -> None:
    """Result and files, but for what the clock and the number of processes decide."""
    ours, theirs = result(found), result(wanted)
    assert (ours.world_size, theirs.world_size) == (processes, 1)
    for field in ("stop_reason", "steps", "tokens", "epochs", "params", "val_sha256", "averaging", "attention_backend"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for field in ("val_loss", "val_bpb", "averaged_val_loss", "averaged_val_bpb"):
        assert (getattr(ours, field) or 0.0) == pytest.approx(getattr(theirs, field) or 0.0, rel=ROUNDING), field
    files = {path.relative_to(wanted) for path in wanted.rglob("*.pt") if path.parent.name != "checkpoints"}
    assert files == {path.relative_to(found) for path in found.rglob("*.pt") if path.parent.name != "checkpoints"}
    for file in files:
        one, other = weights(found / file), weights(wanted / file)
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            # Of the whole tensor: a single gradient next to zero may have either sign, and AdamW steps by the rate. An
            # output projection begins at zero: Muon makes full steps of its first gradients, small as they are, so
            # that how a CPU rounds shows most there (.018 was seen).
            allowed = 5e-2 if name.endswith("proj.weight") else 5e-3
            assert float((one[name] - tensor).norm()) <= allowed * float(tensor.norm()), (file, name)


def events(lines: list[Line]) -> list[tuple[str, int]]:
    return [(line.kind, line.step) for line in lines if isinstance(line, Event) and line.kind != "micro_batch"]


def test_two_processes_train_as_one_does_and_hand_over_to_each_other(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {name: run(config, data, tmp_path / "alone" / name, capsys)[1] for name, config in CURVES.items()}
    together = tmp_path / "together"
    jobs: dict[str, dict[str, Any]] = {
        name: {"config": config.to_json(), "stop": None} for name, config in CURVES.items()
    }
    first: dict[str, list[Line]] = {}
    for name in RELAYED:
        with pytest.MonkeyPatch.context() as patched:
            stop_at_step(patched, STOPPED_STEP)
            code, first[name] = run(CURVES[name], data, together / f"{name}_taken_over", capsys)
        assert code is ExitCode.INTERRUPTED
        jobs[f"{name}_taken_over"] = {"config": CURVES[name].to_json(), "stop": None}
        jobs[f"{name}_left"] = {"config": CURVES[name].to_json(), "stop": (0, STOPPED_STEP)}
    jobs["other_passes"] = {"config": OTHER_PASSES.to_json(), "stop": None}
    _, few = run(OTHER_PASSES, data, tmp_path / "alone" / "other_passes", capsys)
    jobs["asked_of_the_second"] = {"config": CURVES["plain"].to_json(), "stop": (1, STOPPED_STEP)}
    _, taken = RELAYED
    shutil.copytree(together / f"{taken}_taken_over" / "checkpoints", together / "differing" / "checkpoints")
    jobs["differing"] = {"config": CURVES[taken].to_json(), "stop": None, "elsewhere": 1}
    for job, port in zip(jobs.values(), free_ports(len(jobs)), strict=True):
        job["port"] = port
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [*TORCHRUN, str(tmp_path / "program.py"), str(tmp_path / "jobs.json"), str(data), str(together)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=200,
        env=_environment(),
    )
    assert done.returncode == 0, done.stderr
    codes = [json.loads((together / f"codes_{rank}").read_text()) for rank in range(2)]
    assert codes[0] == codes[1]
    assert "1 of 2 processes found another checkpoint or configuration" in codes[0].pop("differing")
    del jobs["differing"]
    assert codes[0] == {name: int(ExitCode.INTERRUPTED if "_left" in name else ExitCode.OK) for name in jobs}
    said = {name: parsed((together / name / "said_0").read_text()) for name in jobs}
    assert {(together / name / "said_1").read_text() for name in jobs} == {""}

    for name in CURVES:
        assert_same_curve(said[name], alone[name])
        assert_same_end(together / name, tmp_path / "alone" / name)
        assert events(said[name]) == events(alone[name])
    assert {("layer_loop", 2), ("late_qat", 5), ("snapshot", 8)} <= set(events(said["everything"]))
    assert losses(said["other_passes"])[1] == losses(few)[1]
    assert losses(said["other_passes"]) == pytest.approx(losses(few), rel=0.02)
    # A stop that only another one heard of is none.
    assert losses(said["asked_of_the_second"]) == losses(said["plain"])

    for name in RELAYED:
        for half in ("taken_over", "left"):
            out = together / f"{name}_{half}"
            if half == "left":
                begun = said[f"{name}_left"]
                assert events(begun)[-2:] == [("checkpoint", STOPPED_STEP), ("interrupted", STOPPED_STEP)]
                assert not (out / "result.json").exists()
                code, gone_on = run(CURVES[name], data, out, capsys, resume="auto")
                assert code is ExitCode.OK
            else:
                begun, gone_on = first[name], said[f"{name}_taken_over"]
            header = gone_on[0]
            assert isinstance(header, Header)
            assert (header.resumed_step, header.world_size) == (STOPPED_STEP, 2 if half == "taken_over" else 1)
            assert_same_curve([*begun, *gone_on], alone[name])
            assert_same_end(out, tmp_path / "alone" / name, processes=header.world_size)


# Long enough to be met in its middle, and so gentle that rounding does not grow on the way.
LONG: Settings = PLAIN | {
    "limits": {"steps": 40},
    "batch": {"train_batch_tokens": 8192, "train_seq_len": 64},
    "optimizer": {"matrix_lr": 0.002, "tied_embed_lr": 0.002, "scalar_lr": 0.002},
    "log_every_steps": 1,
    "evaluation": {"every_fraction": None, "batch_tokens": 4096},
    "qat": {"enabled": False},
}


class _Training:
    """An order of the agent's for two processes, being carried out; everything it says is kept."""

    def __init__(self, order: Order, log: Path) -> None:
        self._log = log
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                order.argv, cwd=order.cwd, env=_environment(order), stdout=said, stderr=subprocess.STDOUT
            )

    def wait_for(self, text: str) -> None:
        while text not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.01)

    def worker(self, rank: int) -> int:
        """The process of that rank, by the environment that torchrun gave it."""
        parent = self._process.pid
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
        raise AssertionError(f"no process of rank {rank}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        return self._process.wait(timeout=100), self._log.read_text()


@pytest.fixture
def long_trial(tmp_path: Path, data: Path) -> TrialView:
    shutil.copytree(data, tmp_path / "data")
    # GPUs are asked for, to be given several processes; where there are none these run on the CPU.
    settings = {name: value for name, value in LONG.items() if name != "limits"} | {"device": "auto"}
    return trial(1, {"trainer": settings, "limits": LONG["limits"], "resources": {"gpus": 2}, "data": "data"})


def order_of(root: Path, trial: TrialView, uuid: str) -> tuple[Order, Path]:
    """As the agent would launch it, on processors, and its folder."""
    launch = Launch(trial_id=1, reason="", kind=RunKind.TRAIN, source=None, assignment=Assignment(cpu_slots=1))
    directory = run_directory(trial, RunKind.TRAIN, uuid)
    out = root / directory
    out.mkdir(parents=True)
    order, config = build_order(root, trial, launch, run_uuid=uuid, directory=directory)
    assert config is not None
    (out / "config.json").write_text(config)
    return order, out


def trainer_lines(log: str) -> list[Line]:
    """Of a log in which torchrun speaks too."""
    starts = ('{"caddie"', "step:", "micro_batch:", "checkpoint:", "interrupted:")
    return parsed("\n".join(line for line in log.splitlines() if line.startswith(starts)))


def test_torchrun_that_is_told_to_end_leaves_a_checkpoint_from_which_one_or_two_go_on(
    tmp_path: Path, data: Path, long_trial: TrialView, capsys: pytest.CaptureFixture[str]
) -> None:
    config = long_trial.spec.train_config(long_trial.seed)
    _, whole = run(config, data, tmp_path / "whole", capsys)
    order, _ = order_of(tmp_path, long_trial, "0" * 32)
    training = _Training(order, tmp_path / "first.log")
    training.wait_for("step:2/")
    training.send(signal.SIGTERM)
    code, log = training.end()
    assert code != 0
    first = trainer_lines(log)
    step = max(losses(first))
    assert 2 <= step < LONG["limits"]["steps"]
    assert events(first) == [("checkpoint", step), ("interrupted", step)]
    checkpoints = tmp_path / trial_directory(long_trial) / "checkpoints"
    assert len(checkpoints_in(checkpoints)) == 1

    shutil.copytree(checkpoints, tmp_path / "one" / "checkpoints")
    code, gone_on = run(config, data, tmp_path / "one", capsys, resume="auto")
    assert code is ExitCode.OK
    assert_same_curve([*first, *gone_on], whole)

    tried = (ended_run(RunKind.TRAIN, RunState.EXITED),)
    again = trial(
        1, {"trainer": long_trial.spec.trainer, "limits": LONG["limits"], "resources": {"gpus": 2}}, runs=tried
    )
    order, out = order_of(tmp_path, again, "1" * 32)
    code, log = _Training(order, tmp_path / "second.log").end()
    assert code == 0, log
    second = trainer_lines(log)
    assert_same_curve([*first, *second], whole)
    header = second[0]
    assert isinstance(header, Header)
    assert (header.resumed_step, header.world_size) == (step, 2)
    points = [line.step for line in second if isinstance(line, TrainPoint)]
    assert points == list(range(step + 1, LONG["limits"]["steps"] + 1))  # each of them said once
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.pt", "result.json"]
    assert result(out).val_loss == pytest.approx(result(tmp_path / "whole").val_loss, rel=ROUNDING)


def test_a_process_that_is_killed_takes_the_others_with_it(tmp_path: Path, long_trial: TrialView) -> None:
    order, out = order_of(tmp_path, long_trial, "0" * 32)
    training = _Training(order, tmp_path / "log")
    training.wait_for("step:2/")
    os.kill(training.worker(1), signal.SIGKILL)
    code, log = training.end()
    assert code != 0
    assert "error: rank 0 of 2 lost another one while" in log
    assert not (out / "result.json").exists()
    assert not (out / "model.pt").exists()
