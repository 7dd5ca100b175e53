"""Whole tiny runs: lines, switches, resuming, and every way in which a run can end."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.checkpoint import load_model, newest_first
from trainer.clock import TrainingClock
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.data.verbs import prepare
from trainer.evaluation import evaluate
from trainer.loop import is_out_of_memory, train
from trainer.model.gpt import GPT
from trainer.optim import Optimizers
from trainer.report import Event, ExitCode, Header, Line, TrainPoint, TrainResult, ValPoint, parse_line, read_result
from trainer.warmup import build_passes, reachable_switches, warm_up

VOCAB = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "with", "by", "on", "he", "at", "from"]
    choose = random.Random(0)
    folder = tmp_path_factory.mktemp("data")
    text = folder / "docs.jsonl"
    documents = [" ".join(choose.choice(words) for _ in range(80)) for _ in range(60)]
    text.write_text("".join(f'{{"text": "{document}", "src": "made"}}\n' for document in documents), encoding="utf-8")
    prepare([text], folder / "set", vocab_size=VOCAB, val_bytes=2000)
    return folder / "set"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def config(**changed: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "limits": {"steps": 8},
            "model": {
                "vocab_size": VOCAB,
                "num_layers": 2,
                "model_dim": 16,
                "num_heads": 2,
                "num_kv_heads": 1,
                "recurrence": {"first": 0, "last": 0, "start_fraction": 0.4},
            },
            "batch": {"train_batch_tokens": 64, "train_seq_len": 16, "micro_batch_tokens": 32},
            "evaluation": {"every_fraction": 0.5, "batch_tokens": 512},
            "qat": {"start_fraction": 0.7},
            "device": "cpu",
        }
        | changed
    )


def run(
    settings: TrainConfig, data: Path, out: Path, capsys: pytest.CaptureFixture[str], resume: str | None = None
) -> tuple[ExitCode, list[Line]]:
    code = train(settings, data, out, out / "checkpoints", resume)
    lines = [parse_line(line) for line in capsys.readouterr().out.splitlines()]
    known = [line for line in lines if line is not None]
    assert len(known) == len(lines), "the loop printed something that its reader does not know"
    return code, known


def losses(lines: list[Line]) -> dict[int, float]:
    return {line.step: line.train_loss for line in lines if isinstance(line, TrainPoint)}


def events(lines: list[Line]) -> list[tuple[str, int]]:
    return [(line.kind, line.step) for line in lines if isinstance(line, Event)]


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A real SIGTERM to this process in the middle of a step."""
    plain = Optimizers.step

    def stopping(self: Optimizers, steps_done: int, multiplier: float) -> None:
        plain(self, steps_done, multiplier)
        if steps_done + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Optimizers, "step", stopping)


def test_a_run_from_header_to_result(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config()
    code, lines = run(settings, data, tmp_path, capsys)
    assert code is ExitCode.OK
    header = lines[0]
    assert isinstance(header, Header)
    assert header.config == settings
    assert header.val_sha256 == DataSet.load(data).manifest.val_sha256
    assert header.params == sum(p.numel() for p in GPT(settings.model).parameters())
    assert list(losses(lines)) == list(range(1, 9))
    assert events(lines) == [("layer_loop", 4), ("late_qat", 6)]
    points = [line for line in lines if isinstance(line, ValPoint)]
    assert [(point.step, point.planned_steps) for point in points] == [(4, 8), (8, 8)]
    result = read_result(tmp_path / "result.json")
    assert isinstance(result, TrainResult)
    assert (result.stop_reason, result.steps, result.tokens) == ("finished", 8, 512)
    assert losses(lines)[8] < losses(lines)[1]
    # What was reported is what a reload of the file scores.
    model, _ = load_model(tmp_path / "model.pt", "cpu")
    score = evaluate(model.token_losses, DataSet.load(data), seq_len=16, batch_tokens=512, device="cpu")
    assert score.bpb == pytest.approx(result.val_bpb, abs=1e-9)


@pytest.mark.parametrize("step", [2, 7])  # before and after the switches
def test_interrupted_and_resumed_equals_uninterrupted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    _, whole = run(config(), data, tmp_path / "whole", capsys)
    with monkeypatch.context() as patched:
        stop_at_step(patched, step)
        code, first = run(config(), data, tmp_path / "parts", capsys)
    assert code is ExitCode.INTERRUPTED
    assert events(first)[-2:] == [("checkpoint", step), ("interrupted", step)]
    assert not (tmp_path / "parts" / "result.json").exists()
    code, second = run(config(), data, tmp_path / "parts", capsys, resume="auto")
    assert code is ExitCode.OK
    header = second[0]
    assert isinstance(header, Header)
    assert header.resumed_step == step
    assert losses(first) | losses(second) == losses(whole)
    ours, theirs = (load_model(tmp_path / name / "model.pt", "cpu")[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = GPT.token_losses

    def stopping(self: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self, inputs, targets)

    monkeypatch.setattr(GPT, "token_losses", stopping)
    code, lines = run(
        config(evaluation={"every_fraction": None, "every_steps": 3, "batch_tokens": 32}), data, tmp_path, capsys
    )
    assert code is ExitCode.INTERRUPTED
    assert events(lines)[-1] == ("interrupted", 3)
    assert not any(isinstance(line, ValPoint) for line in lines)


def test_the_clock_ends_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(config(limits={"wallclock_seconds": 0.2}), data, tmp_path, capsys)
    assert code is ExitCode.OK
    last = lines[-1]
    assert isinstance(last, Event)
    assert last.kind == "stopping_early"
    assert last.detail.startswith("wallclock_cap train_time:")
    assert isinstance(lines[-2], ValPoint)
    result = read_result(tmp_path / "result.json")
    assert isinstance(result, TrainResult)
    assert result.stop_reason == "wallclock_cap"
    assert result.training_seconds >= 0.2


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Optimizers.step

    def poisoning(self: Optimizers, steps_done: int, multiplier: float) -> None:
        plain(self, steps_done, multiplier if steps_done < 3 else float("nan"))

    monkeypatch.setattr(Optimizers, "step", poisoning)
    code, lines = run(config(checkpoint_seconds=1e-9, evaluation={"every_fraction": None}), data, tmp_path, capsys)
    assert code is ExitCode.DIVERGED
    assert events(lines)[-1] == ("diverged", 4)  # the weights are caught before the next checkpoint
    kept = newest_first(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step_00000003.pt", "step_00000002.pt"]
    assert not (tmp_path / "model.pt").exists()

    code, lines = run(config(evaluation={"every_fraction": None}), data, tmp_path / "late", capsys)
    assert code is ExitCode.DIVERGED
    assert events(lines)[-1] == ("diverged", 5)  # without one, the next loss tells
    assert losses(lines)[5] != losses(lines)[5]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_names_the_micro_batch_and_the_remedy(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def failing(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(GPT, "forward", failing)
    code, lines = run(config(), data, tmp_path, capsys)
    assert code is ExitCode.OUT_OF_MEMORY
    last = lines[-1]
    assert isinstance(last, Event)
    assert last.kind == "out_of_memory"
    assert last.detail == "a micro-batch of 32 tokens does not fit; set batch.micro_batch_tokens to 16"


def test_other_errors_are_not_taken_for_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_bad_input_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    settings = config()
    other = settings.model_copy(update={"model": settings.model.model_copy(update={"vocab_size": 512})})
    with pytest.raises(ValueError, match=r"vocabulary of 300.*model\.vocab_size is 512"):
        train(other, data, tmp_path / "out", tmp_path / "out", None)
    with pytest.raises(ValueError, match="manifest"):
        train(settings, tmp_path / "nowhere", tmp_path / "out", tmp_path / "out", None)
    with pytest.raises(FileNotFoundError):
        train(settings, data, tmp_path / "out", tmp_path / "out", str(tmp_path / "gone.pt"))
    assert not (tmp_path / "out").exists()


def test_accumulated_micro_batches_equal_one_batch(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, split = run(config(), data, tmp_path / "split", capsys)
    batch = {"train_batch_tokens": 64, "train_seq_len": 16}
    _, whole = run(config(batch=batch), data, tmp_path / "whole", capsys)
    assert losses(split)[1] == pytest.approx(losses(whole)[1], abs=2e-4)
    assert losses(split)[3] == pytest.approx(losses(whole)[3], abs=2e-3)


def test_reachable_switches_follow_the_order_of_the_run() -> None:
    assert reachable_switches(config()) == [(False, False), (True, False), (True, True)]
    assert reachable_switches(config(qat={"start_fraction": 0.1})) == [(False, False), (False, True), (True, True)]
    assert reachable_switches(config(qat={"enabled": False}, model={"vocab_size": VOCAB})) == [(False, False)]


def test_warming_up_leaves_everything_as_it_was_and_compares_the_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    model = GPT(settings.model, settings.export)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    warm_up(model, build_passes(model, compiled=False), settings, torch.device("cpu"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.recurrence_active
    assert not model.fake_quant_active
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    monkeypatch.setattr(GPT, "set_fake_quant", lambda *_: None)  # a switch that a graph has folded away
    with pytest.raises(RuntimeError, match="does not change the loss"):
        warm_up(model, build_passes(model, compiled=False), settings, torch.device("cpu"))


def test_compiled_passes_train_like_plain_ones() -> None:
    settings = config(model={"vocab_size": VOCAB, "num_layers": 1, "model_dim": 8, "num_heads": 1, "num_kv_heads": 1})
    model = GPT(settings.model, settings.export)
    passes = build_passes(model, compiled=True, backend="aot_eager")
    warm_up(model, passes, settings, torch.device("cpu"))
    window = torch.randint(VOCAB, (2, 17))
    inputs, targets = window[:, :-1], window[:, 1:]
    torch.testing.assert_close(passes.loss(inputs, targets), model(inputs, targets))
    with torch.no_grad():
        torch.testing.assert_close(passes.token_losses(inputs, targets), model.token_losses(inputs, targets))


def test_the_clock_counts_only_while_it_runs() -> None:
    times = iter([10.0, 13.0, 20.0, 21.0])
    clock = TrainingClock(torch.device("cpu"), seconds=5.0, now=lambda: next(times))
    assert clock.seconds == 5.0
    clock.start()
    with clock.paused():
        assert clock.seconds == 8.0
        with clock.paused():
            assert clock.seconds == 8.0
    assert clock.seconds == 9.0
