"""What a training run refuses at its start, and what it leaves behind where it must give up later."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from small_data_set import make_data_set
from tiny_training import PLAIN, Settings, losses, run, settings, stop_at_step
from trainer.__main__ import app
from trainer.config import TrainConfig
from trainer.report import Event, ExitCode, Header


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("refusals") / "data").path


@pytest.fixture(autouse=True)
def _one_thread(seeded_on_one_thread: None) -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


def refusal(config: TrainConfig, data: Path, out: Path, *options: object) -> str:
    """The one line of the verb; an earlier run's result must outlive it, and nothing else appear."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(config.to_json())
    (out / "result.json").write_text("of an earlier run")
    before = sorted(out.rglob("*"))
    arguments = ["train", out / "config.json", "--data", data, "--out", out, *options]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == ExitCode.BAD_INPUT, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sorted(out.rglob("*")) == before
    assert (out / "result.json").read_text() == "of an earlier run"
    return done.stderr


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"schedule": {"warmup_steps": 5, "warmdown_steps": 4}}, ["longer than the run", "5 steps", "4 of", "8 steps"]),
        (
            {"model": {"recurrence": {"first": 0, "last": 0, "start_fraction": 0.9}}},
            ["model.recurrence.start_fraction 0.9", "0.875"],
        ),
        ({"model": {"vocab_size": 512}}, ["vocabulary of 330", "model.vocab_size is 512"]),
        ({"attention_backend": "flash"}, ["attention_backend flash cannot run here", "it needs CUDA", "auto"]),
        ({"batch": {"train_seq_len": 65536, "train_batch_tokens": 65536}}, ["no window of 65536 tokens"]),
    ],
)
def test_a_configuration_that_cannot_run_here_is_named(
    data: Path, tmp_path: Path, changed: dict[str, Any], words: list[str]
) -> None:
    told = refusal(settings(PLAIN, **changed), data, tmp_path / "out")
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "bytes instead of"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "this is not a token shard"),
    ],
)
def test_a_damaged_shard_is_named(data: Path, tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    shutil.copytree(data, tmp_path / "data")
    damage(tmp_path / "data" / "train_000000.bin")
    told = refusal(settings(PLAIN), tmp_path / "data", tmp_path / "out")
    assert str(tmp_path / "data" / "train_000000.bin") in told
    assert words in told


@pytest.mark.parametrize(
    ("processes", "batch", "words"),
    [
        (3, {}, "3 processes cannot share batch.train_batch_tokens 128, which is 8 windows"),
        (2, {"micro_batch_tokens": 128}, "batch.micro_batch_tokens 128 of each of 2 processes does not divide"),
        (8, {"warmup_start_tokens": 64, "warmup_fraction": 0.5}, "8 processes cannot share"),
    ],
)
def test_a_number_of_processes_that_cannot_share_the_batch_is_named(
    data: Path, tmp_path: Path, processes: int, batch: dict[str, Any], words: str
) -> None:
    """Before they meet: there is nobody to meet here."""
    address = {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in address.items():
            patched.setenv(name, str(value))
        assert words in refusal(settings(PLAIN, batch=batch), data, tmp_path / "out")


@pytest.mark.parametrize("resume", ["auto", "file"])
def test_a_run_is_resumed_with_its_own_configuration_only(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: str
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        stop_at_step(patched, 3)
        run(settings(PLAIN), data, out, capsys)
    asked = "auto" if resume == "auto" else out / "checkpoints" / "step_00000003.pt"
    told = refusal(settings(PLAIN, optimizer={"matrix_lr": 0.5}), data, out, "--resume", asked)
    assert "step_00000003.pt" in told
    assert "optimizer.matrix_lr was 0.04, now it is 0.5" in told
    # How it is computed, logged and kept may change.
    other = settings(PLAIN, compile_scope="pass", log_every_steps=3, checkpoints_kept=5)
    code, lines = run(other, data, out, capsys, resume=str(asked))
    assert code is ExitCode.OK
    assert isinstance(lines[0], Header)
    assert lines[0].resumed_step == 3


def test_a_branch_keeps_the_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run(settings(PLAIN, limits={"steps": 1}), data, tmp_path / "trunk", capsys)
    assert code is ExitCode.OK
    source = tmp_path / "trunk" / "model.pt"
    told = refusal(settings(PLAIN, model={"num_layers": 3}), data, tmp_path / "out", "--init-from", source)
    assert str(source) in told
    assert "model.num_layers was 2, now it is 3" in told


HUGE: Settings = PLAIN | {
    "optimizer": {"matrix_lr": 1e38},
    "schedule": {"warmdown_fraction": 0.0},
    "evaluation": {"every_fraction": None, "batch_tokens": 512},
}


def diverged(lines: list[Any]) -> Event:
    (event,) = [line for line in lines if isinstance(line, Event) and line.kind == "diverged"]
    return event


def test_a_run_that_diverges_names_its_step_and_a_checkpoint_that_still_trains(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last checkpoint has finite weights, and yet they are what gives the loss that is not finite."""
    huge = settings(HUGE, checkpoint_seconds=1e-9)
    out = tmp_path / "huge"
    code, lines = run(huge, data, out, capsys)
    assert code is ExitCode.DIVERGED
    event = diverged(lines)
    assert event.step == max(losses(lines))
    assert math.isnan(losses(lines)[event.step])
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == [f"step_{event.step - back:08d}.pt" for back in (2, 1)]
    assert f"the last good checkpoint is {kept[0]}: branch off" in event.detail
    assert not (out / "result.json").exists()
    sane = settings(PLAIN, limits={"steps": 1}, optimizer={"matrix_lr": 1e-3})
    begun = [
        losses(run(sane, data, tmp_path / name, capsys, init_from=out / "checkpoints" / name)[1])[1] for name in kept
    ]
    assert [math.isfinite(loss) for loss in begun] == [True, False]


def test_a_single_checkpoint_of_weights_that_diverge_is_not_called_good(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = settings(HUGE)
    with pytest.MonkeyPatch.context() as patched:
        stop_at_step(patched, 3)
        run(huge, data, tmp_path, capsys)
    code, lines = run(huge, data, tmp_path, capsys, resume="auto")
    assert code is ExitCode.DIVERGED
    event = diverged(lines)
    assert event.step == 4
    assert "step_00000003.pt leads to the same: lower the learning rates" in event.detail


def test_a_checkpoint_of_weights_whose_score_is_not_finite_is_not_called_good(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The final one is written before the final score."""
    code, lines = run(settings(HUGE, limits={"steps": 3}, checkpoint_seconds=1e-9), data, tmp_path, capsys)
    assert code is ExitCode.DIVERGED
    assert diverged(lines).detail.startswith("validation loss not finite; the last good checkpoint is step_00000002.pt")
