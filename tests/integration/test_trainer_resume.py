"""A run that was interrupted and resumed is, bit for bit, the run that was not: for every option that has a state.

On the CPU, on one thread, and without a limit on the clock, which no two runs meet at the same step.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from small_data_set import make_data_set
from tiny_training import EVERYTHING, PLAIN, Settings, losses, result, run, same_weights, scores, settings, stop_at_step
from trainer.checkpoint import checkpoints_in, load_checkpoint
from trainer.config import TrainConfig
from trainer.report import Event, ExitCode, FinalPoint, Header, Line, TrainPoint

LOOP = {"first": 0, "last": 0, "start_fraction": 0.25, "gate_fraction": 0.75}
STATES: dict[str, Settings] = {
    "nothing but defaults": {},
    "ema": {"averaging": {"kind": "ema", "horizon_fraction": 0.3}},
    "swa": {"averaging": {"kind": "swa", "start_fraction": 0.5}},
    "swa before it begins": {"averaging": {"kind": "swa", "start_fraction": 0.8}},
    "input-aware Muon": {"optimizer": {"muon_input_aware": True, "input_covariance_damping": 0.1}},
    "input-aware Muon with unit rows": {"optimizer": {"muon_input_aware": True, "muon_row_normalize": True}},
    "MuonEq-R": {"optimizer": {"muon_row_normalize": True, "muon_coefficients": "polar_express"}},
    "NorMuon": {"optimizer": {"muon_neuron_beta2": 0.9}},
    "input-aware NorMuon": {"optimizer": {"muon_input_aware": True, "muon_neuron_beta2": 0.9}},
    "cautious weight decay": {"optimizer": {"weight_decay": 0.5, "cautious_weight_decay": True}},
    "a momentum that warms up": {"optimizer": {"muon_momentum_warmup_steps": 7}},
    "clipping and weight decay": {"optimizer": {"grad_clip_norm": 0.1, "weight_decay": 0.1, "weight_decay_taper": 0.9}},
    "a loop": {"model": {"recurrence": LOOP | {"gate_fraction": 0.0}}},
    "a loop whose gate opens": {"model": {"recurrence": LOOP}},
    "fake quantisation": {"qat": {"enabled": True, "start_fraction": 0.3}, "export": {"bits": 4}},
    "a batch that grows": {
        "limits": {"steps": None, "tokens": 1300},
        "batch": {"warmup_start_tokens": 32, "micro_batch_tokens": 32, "warmup_fraction": 0.8},
    },
    "an epoch that ends": {"batch": {"train_batch_tokens": 1280, "micro_batch_tokens": 256}},
    "whole documents": {"data": {"order": "documents"}, "model": {"document_attention": True}},
    "a window in some layers": {"model": {"attention_window": 5, "full_attention_layers": [1]}},
    "windows as they stand": {"data": {"order": "sequential", "prefetch_batches": 0}},
    "other losses": {"loss": {"focal_gamma": 1.0, "z_loss": 1e-2}},
    "nats per byte": {"loss": {"weighting": "bpb"}},
    "an embedding from the data": {"model": {"embedding_init": "svd"}},
    "snapshots": {"averaging": {"snapshots": 2}},
    "schedule": {"schedule": {"warmup_steps": 6, "warmdown_steps": 2, "warmdown_shape": "sqrt"}},
}
# What depends on the clock, on the memory of the process, or on where the files lie.
_NOT_COMPARED = {
    "training_seconds",
    "wall_seconds",
    "wall_phases",
    "data_wait_share",
    "mfu",
    "peak_memory_bytes",
    "model_path",
    "raw_model_path",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("resume") / "data").path


@pytest.fixture(autouse=True)
def _one_thread(seeded_on_one_thread: None) -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


# Events of a process rather than of the run.
_OF_EACH_START = {"micro_batch", "attention", "checkpoint", "interrupted", "wall"}


def said(lines: list[Line]) -> list[Any]:
    """What a log says of the run itself: points without their clocks, events but those of stopping and wall time."""
    told: list[Any] = []
    for line in lines:
        if isinstance(line, TrainPoint):
            told.append((line.step, line.planned_steps, line.train_loss, line.epoch))
        elif isinstance(line, FinalPoint) or (isinstance(line, Event) and line.kind not in _OF_EACH_START):
            told.append(line)
    return told


def assert_same_end(one: Path, other: Path) -> None:
    ours, theirs = result(one), result(other)
    assert ours.model_dump(exclude=_NOT_COMPARED) == theirs.model_dump(exclude=_NOT_COMPARED)
    names = {path.relative_to(one) for path in one.rglob("*.pt") if path.parent.name != "checkpoints"}
    assert names == {path.relative_to(other) for path in other.rglob("*.pt") if path.parent.name != "checkpoints"}
    assert names
    for name in names:
        assert same_weights(one / name, other / name), name


def interrupt_and_resume(
    config: TrainConfig, data: Path, out: Path, capsys: pytest.CaptureFixture[str], step: int
) -> list[Line]:
    """The lines of both halves, as `joined` has them."""
    with pytest.MonkeyPatch.context() as patched:
        stop_at_step(patched, step)
        code, first = run(config, data, out, capsys)
    assert code is ExitCode.INTERRUPTED
    assert max(losses(first)) == step
    torch.manual_seed(99)  # whatever the next process happens to begin with
    code, second = run(config, data, out, capsys, resume="auto")
    assert code is ExitCode.OK
    header = second[0]
    assert isinstance(header, Header)
    assert header.resumed_step == step
    assert min(losses(second)) == step + 1
    return joined(first, second)


def joined(first: list[Line], second: list[Line]) -> list[Line]:
    """The lines of a run and of its resumption, which tells again which switches are on."""
    on = {line.kind for line in first if isinstance(line, Event) and line.kind in {"layer_loop", "late_qat"}}
    again = [line for line in second if isinstance(line, Event) and line.kind in on]
    assert {line.kind for line in again} == on
    return [*first, *(line for line in second if line not in again)]


@pytest.mark.parametrize("name", STATES)
def test_a_resumed_run_is_the_run_that_went_through(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = settings(PLAIN, **STATES[name])
    _, whole = run(config, data, tmp_path / "whole", capsys)
    parts = interrupt_and_resume(config, data, tmp_path / "parts", capsys, 5)
    assert said(parts) == said(whole)
    assert scores(parts) == scores(whole)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_every_one_of_these_options_changes_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the table above would prove nothing."""
    curves = {name: said(run(settings(PLAIN, **STATES[name]), data, tmp_path / name, capsys)[1]) for name in STATES}
    twins = {(one, other) for one in curves for other in curves if one < other and curves[one] == curves[other]}
    assert not twins


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_with_everything_on_it_may_be_interrupted_anywhere(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    config = settings(EVERYTHING)
    _, whole = run(config, data, tmp_path / "whole", capsys)
    parts = interrupt_and_resume(config, data, tmp_path / "parts", capsys, step)
    assert said(parts) == said(whole)
    assert scores(parts) == scores(whole)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_goes_on_from_its_last_periodic_checkpoint_and_a_finished_one_ends_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(EVERYTHING, checkpoint_seconds=1e-9)
    _, whole = run(config, data, tmp_path / "whole", capsys)
    kept = checkpoints_in(tmp_path / "whole" / "checkpoints")
    assert [load_checkpoint(path).step for path in kept] == [8, 7]
    snapshots = Path("snapshots")
    for checkpoint, out in zip(kept, ("again", "on"), strict=True):
        # What else a killed run leaves: its snapshots so far.
        shutil.copytree(tmp_path / "whole" / snapshots, tmp_path / out / snapshots)
        code, lines = run(config, data, tmp_path / out, capsys, resume=str(checkpoint))
        assert code is ExitCode.OK
        step = load_checkpoint(checkpoint).step
        assert losses(lines) == {at: loss for at, loss in losses(whole).items() if at > step}
        assert scores(lines) == scores(whole)[-1:]
        assert_same_end(tmp_path / "whole", tmp_path / out)


def test_writing_checkpoints_changes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, rarely = run(settings(EVERYTHING), data, tmp_path / "rarely", capsys)
    _, often = run(settings(EVERYTHING, checkpoint_seconds=1e-9), data, tmp_path / "often", capsys)
    assert said(often) == said(rarely)
    for name in ("model.pt", "model_raw.pt"):
        assert same_weights(tmp_path / "rarely" / name, tmp_path / "often" / name)


def test_a_run_may_be_interrupted_again_and_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(EVERYTHING, optimizer={"muon_input_aware": True})
    _, whole = run(config, data, tmp_path / "whole", capsys)
    parts: list[Line] = []
    for step in range(1, 8):
        with pytest.MonkeyPatch.context() as patched:
            stop_at_step(patched, step)
            code, lines = run(config, data, tmp_path / "parts", capsys, resume="auto")
        assert code is ExitCode.INTERRUPTED
        parts = joined(parts, lines)
    code, lines = run(config, data, tmp_path / "parts", capsys, resume="auto")
    assert code is ExitCode.OK
    assert said(joined(parts, lines)) == said(whole)
    assert scores([*parts, *lines]) == scores(whole)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_branch_at_a_constant_rate_is_the_continuation_of_its_trunk(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Momentum's warm-up included, which counts the steps of the optimisers."""
    constant: dict[str, Any] = {
        "schedule": {"warmdown_fraction": 0.0},
        "optimizer": {"muon_momentum_warmup_steps": 7, "muon_momentum_warmup_start": 0.3},
    }
    _, trunk = run(settings(PLAIN, **constant), data, tmp_path / "trunk", capsys)
    with pytest.MonkeyPatch.context() as patched:
        stop_at_step(patched, 4)
        run(settings(PLAIN, **constant), data, tmp_path / "stopped", capsys)
    origin = tmp_path / "stopped" / "checkpoints" / "step_00000004.pt"
    _, branch = run(
        settings(PLAIN, limits={"steps": 4}, **constant), data, tmp_path / "branch", capsys, init_from=origin
    )
    assert losses(branch) == {step - 4: loss for step, loss in losses(trunk).items() if step > 4}
