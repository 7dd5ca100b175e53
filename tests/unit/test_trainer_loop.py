"""Whole tiny runs: lines, switches, resuming, and every way in which a run can end."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer import training_run, validating
from trainer.batch_feed import BatchFeed, open_loader
from trainer.checkpoint import Checkpoint, checkpoints_in, save_checkpoint
from trainer.clock import TrainingClock
from trainer.config import TrainConfig
from trainer.data.adopting import adopt
from trainer.data.describing import Provenance, describe
from trainer.data.encoding import Encoder, EncoderSettings
from trainer.data.loader import Batch
from trainer.data.manifest import DataSet
from trainer.data.shards import write_shard
from trainer.data.tokenizer import train_tokenizer
from trainer.devices import is_out_of_memory
from trainer.divergence import DivergedError
from trainer.errors import InputError
from trainer.evaluation import ValidationStream, evaluate
from trainer.interruption import StopAskedError, StopRequest
from trainer.loop import train
from trainer.model.eager import has_bfloat16_units
from trainer.model.gpt import GPT
from trainer.model_file import CheckpointError, load_model
from trainer.optim import Optimizers
from trainer.report import Event, ExitCode, Header, Line, TrainPoint, TrainResult, ValPoint, parse_line, read_result
from trainer.wall_time import WallTime
from trainer.warmup import Passes, build_passes, reachable_switches, warm_up

VOCAB = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "with", "by", "on", "he", "at", "from"]
    choose = random.Random(0)
    folder = tmp_path_factory.mktemp("data")
    documents = [" ".join(choose.choice(words) for _ in range(80)) for _ in range(60)]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(documents[6:], vocab_size=VOCAB))
    encoder = Encoder(EncoderSettings(tokenizer=folder / "tokenizer.model"))
    for name, part in (("val.bin", documents[:6]), ("train.bin", documents[6:])):
        write_shard(folder / name, encoder.encode(part).tokens)
    provenance = Provenance(split="the first six documents")
    describe(folder, tokenizer="tokenizer.model", train=["train.bin"], val=["val.bin"], provenance=provenance).save()
    return folder


@pytest.fixture(autouse=True)
def _one_thread(seeded_on_one_thread: None) -> Iterator[None]:
    yield
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


def windows(data: Path) -> int:
    return DataSet.load(data).manifest.train_tokens // 16


def scores(lines: list[Line]) -> list[tuple[int, float, float]]:
    return [(line.step, line.val_loss, line.val_bpb) for line in lines if isinstance(line, ValPoint)]


def events(lines: list[Line]) -> list[tuple[str, int]]:
    """Those of the run itself, without what it says of its setting."""
    setting = {"micro_batch", "attention", "warm_up", "recompiles", "wall"}
    return [(line.kind, line.step) for line in lines if isinstance(line, Event) and line.kind not in setting]


def detail(lines: list[Line], kind: str) -> str:
    (found,) = [line.detail for line in lines if isinstance(line, Event) and line.kind == kind]
    return found


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A real SIGTERM to this process in the middle of a step."""
    plain = Optimizers.step

    def stopping(self: Optimizers, steps_done: int, *multipliers: float) -> None:
        plain(self, steps_done, *multipliers)
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
    assert events(lines) == [("layer_loop", 4), ("late_qat", 6), ("checkpoint", 8)]
    points = [line for line in lines if isinstance(line, ValPoint)]
    assert [(point.step, point.planned_steps) for point in points] == [(4, 8), (8, 8)]
    result = read_result(tmp_path / "result.json")
    assert isinstance(result, TrainResult)
    assert (result.stop_reason, result.steps, result.tokens) == ("finished", 8, 512)
    assert result.epochs == pytest.approx(512 / 16 / windows(data))
    assert result.data_wait_share is not None
    assert 0 <= result.data_wait_share < 1
    assert all(line.data_wait_share is not None for line in lines if isinstance(line, TrainPoint))
    assert losses(lines)[8] < losses(lines)[1]
    # What was reported is what a reload of the file scores.
    saved = load_model(tmp_path / "model.pt", "cpu")
    saved.require_data(DataSet.load(data))
    assert saved.model.recurrence_active
    assert reloaded_bpb(saved.model, data) == pytest.approx(result.val_bpb, abs=1e-9)


def reloaded_bpb(model: GPT, data: Path) -> float:
    validation = ValidationStream.load(DataSet.load(data))
    return evaluate(model.token_losses, validation, seq_len=16, batch_tokens=512, device="cpu").bpb


def test_a_loop_that_the_clock_never_reached_is_off_in_the_score_and_in_the_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = config().model.model_dump()
    model["recurrence"] |= {"start_fraction": 1 - 1e-9}
    code, lines = run(config(limits={"wallclock_seconds": 0.1}, model=model), data, tmp_path, capsys)
    assert code is ExitCode.OK
    assert "layer_loop" not in dict(events(lines))
    result = read_result(tmp_path / "result.json")
    assert isinstance(result, TrainResult)
    loaded = load_model(tmp_path / "model.pt", "cpu").model
    assert not loaded.recurrence_active
    assert reloaded_bpb(loaded, data) == pytest.approx(result.val_bpb, abs=1e-9)
    loaded.set_recurrence(True)
    assert reloaded_bpb(loaded, data) != pytest.approx(result.val_bpb, abs=1e-6)


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
    ours, theirs = (load_model(tmp_path / name / "model.pt", "cpu").model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("order", ["sequential", "documents"])
def test_epochs_are_told_and_a_resumed_run_goes_on_within_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    # A batch of 40 windows in 5 micro-batches; an epoch ends within the step that its successor begins in.
    settings = config(
        batch={"train_batch_tokens": 640, "train_seq_len": 16, "micro_batch_tokens": 128},
        data={"order": order, "prefetch_batches": 1},
        limits={"tokens": 2 * 16 * windows(data) + 320},
        evaluation={"every_fraction": None, "batch_tokens": 512},
    )
    _, whole = run(settings, data, tmp_path / "whole", capsys)
    begun = [line for line in whole if isinstance(line, Event) and line.kind == "epoch"]
    assert [line.detail for line in begun] == [f"{number} windows:{windows(data)}" for number in (2, 3)]
    assert [line.step for line in begun] == [number * windows(data) // 40 + 1 for number in (1, 2)]
    result = read_result(tmp_path / "whole" / "result.json")
    assert isinstance(result, TrainResult)
    assert result.epochs == pytest.approx(result.tokens / 16 / windows(data))
    step = begun[0].step
    with monkeypatch.context() as patched:
        stop_at_step(patched, step)
        _, first = run(settings, data, tmp_path / "parts", capsys)
    _, second = run(settings, data, tmp_path / "parts", capsys, resume="auto")
    told = [line for line in (*first, *second) if isinstance(line, Event) and line.kind == "epoch"]
    assert [(line.detail, line.step) for line in told] == [(line.detail, line.step) for line in begun]
    assert losses(first) | losses(second) == losses(whole)


def test_the_logged_loss_is_nats_per_token_whatever_is_minimised(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, *weighted = (
        run(config(loss={"weighting": weighting}, limits={"steps": 5}), data, tmp_path / weighting, capsys)[1]
        for weighting in ("tokens", "bpb", "bytes")
    )
    for lines in weighted:
        assert losses(lines)[1] == pytest.approx(losses(plain)[1], abs=1e-4)
        assert losses(lines)[5] != losses(plain)[5]  # and yet something else was learnt
        assert losses(lines)[5] < losses(lines)[1]
    assert losses(weighted[0]) != losses(weighted[1])


def test_the_share_of_waiting_is_that_of_the_training_clock(data: Path) -> None:
    seconds = 0.0
    clock = TrainingClock(torch.device("cpu"), seconds=90.0, now=lambda: seconds)
    with open_loader(config(), DataSet.load(data), torch.device("cpu")) as loader:
        plain = loader.next_batch

        def slow() -> Batch:
            nonlocal seconds
            seconds += 3.0
            return plain()

        feed = BatchFeed(loader, clock, waited_seconds=4.0)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(loader, "next_batch", slow)
            clock.start()
            for _ in range(2):
                feed.next_batch()
                seconds += 2.0
    assert feed.wait_share() == pytest.approx((4 + 2 * 3) / (90 + 2 * 5))
    assert feed.new_wait_share() == pytest.approx(6 / 10)
    seconds += 5.0
    assert feed.new_wait_share() == 0.0
    assert feed.waited_seconds == 10.0


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = GPT.token_losses

    def stopping(self: GPT, inputs: Tensor, targets: Tensor, **others: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self, inputs, targets, **others)

    settings = config(evaluation={"every_fraction": 0.6, "every_steps": 3, "batch_tokens": 32})
    _, whole = run(settings, data, tmp_path / "whole", capsys)
    with monkeypatch.context() as patched:
        patched.setattr(GPT, "token_losses", stopping)
        code, lines = run(settings, data, tmp_path / "parts", capsys)
        assert code is ExitCode.INTERRUPTED
        assert events(lines)[-1] == ("interrupted", 3)
        assert not any(isinstance(line, ValPoint) for line in lines)
        # Stopped again while it is made good: still owed, and the checkpoint stays as it is.
        written = checkpoints_in(tmp_path / "parts" / "checkpoints")[0].stat().st_mtime_ns
        code, lines = run(settings, data, tmp_path / "parts", capsys, resume="auto")
        assert (code, events(lines)) == (ExitCode.INTERRUPTED, [("interrupted", 3)])
        assert checkpoints_in(tmp_path / "parts" / "checkpoints")[0].stat().st_mtime_ns == written
    code, resumed = run(settings, data, tmp_path / "parts", capsys, resume="auto")
    assert code is ExitCode.OK
    points = [line for line in resumed if isinstance(line, TrainPoint | ValPoint)]
    assert isinstance(points[0], ValPoint)  # before the first step
    assert scores(resumed) == scores(whole)
    assert [step for step, _, _ in scores(whole)] == [3, 5, 6, 8]


def test_the_clock_ends_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(config(limits={"wallclock_seconds": 0.2}), data, tmp_path, capsys)
    assert code is ExitCode.OK
    score, stopping, wall = lines[-3:]
    assert isinstance(score, ValPoint)
    assert isinstance(stopping, Event)
    assert stopping.kind == "stopping_early"
    assert stopping.detail.startswith("wallclock_cap train_time:")
    assert isinstance(wall, Event)
    assert wall.kind == "wall"
    result = read_result(tmp_path / "result.json")
    assert isinstance(result, TrainResult)
    assert result.stop_reason == "wallclock_cap"
    assert result.training_seconds >= 0.2
    phases = result.wall_phases
    assert phases is not None
    assert list(phases) == [part.split(":")[0] for part in wall.detail.split()]
    assert {"start", "plan", "set_up", "training", "scoring", "ending"} <= phases.keys()
    # What is beside the steps is no part of `training`, and the clock counts little else.
    assert phases["training"] + 0.01 >= result.training_seconds


def test_wall_time_knows_scores_from_what_is_saved(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    within: list[str] = []
    done: list[tuple[str, ...]] = []
    spent = WallTime.spent

    @contextmanager
    def watched(self: WallTime, name: str) -> Iterator[None]:
        within.append(name)
        with spent(self, name):
            yield
        within.remove(name)

    def noting(kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> Any:
            done.append((kind, *within))
            return plain(*given, **named)

        return noted

    monkeypatch.setattr(WallTime, "spent", watched)
    for where, kind in {"training_run.keep_snapshot": "snapshot", "training_run.save_checkpoint": "checkpoint"}.items():
        monkeypatch.setattr(f"trainer.{where}", noting(kind, getattr(training_run, where.split(".")[1])))
    monkeypatch.setattr("trainer.validating.score", noting("score", validating.score))
    code, _ = run(config(averaging={"snapshots": 2}), data, tmp_path, capsys)
    assert code is ExitCode.OK
    assert set(done) == {("snapshot", "saving"), ("checkpoint", "saving"), ("score", "scoring")}


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Optimizers.step

    def poisoning(self: Optimizers, steps_done: int, multiplier: float, *others: float) -> None:
        plain(self, steps_done, multiplier if steps_done < 3 else float("nan"), *others)

    monkeypatch.setattr(Optimizers, "step", poisoning)
    code, lines = run(config(checkpoint_seconds=1e-9, evaluation={"every_fraction": None}), data, tmp_path, capsys)
    assert code is ExitCode.DIVERGED
    assert events(lines)[-1] == ("diverged", 4)  # the weights are caught before the next checkpoint
    kept = checkpoints_in(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step_00000003.pt", "step_00000002.pt"]
    assert not (tmp_path / "model.pt").exists()
    assert detail(lines, "diverged").startswith("weights not finite; the last good checkpoint is step_00000003.pt")
    assert "--init-from" in detail(lines, "diverged")

    code, lines = run(config(evaluation={"every_fraction": None}), data, tmp_path / "late", capsys)
    assert code is ExitCode.DIVERGED
    assert events(lines)[-1] == ("diverged", 5)  # without one, the next loss tells
    assert losses(lines)[5] != losses(lines)[5]
    assert "there is no checkpoint: lower the learning rates" in detail(lines, "diverged")


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
    def failing(*_: object, **__: object) -> Tensor:
        raise error

    monkeypatch.setattr(GPT, "forward", failing)
    code, lines = run(config(), data, tmp_path, capsys)
    assert code is ExitCode.OUT_OF_MEMORY
    last = lines[-1]
    assert isinstance(last, Event)
    assert last.kind == "out_of_memory"
    assert last.detail == "a micro-batch of 32 tokens does not fit; set batch.micro_batch_tokens to 16"


def test_an_evaluation_that_does_not_fit_names_its_own_batch(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GPT, "token_losses", failing)
    code, lines = run(config(), data, tmp_path, capsys)
    assert code is ExitCode.OUT_OF_MEMORY
    last = lines[-1]
    assert isinstance(last, Event)
    assert last.detail == "an evaluation batch of 512 tokens does not fit; set evaluation.batch_tokens to 256"


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {2, 3}

    def saving(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
        if checkpoint.step in full:
            raise OSError(errno.ENOSPC, "No space left on device", "the checkpoint")
        return save_checkpoint(directory, checkpoint, keep=keep)

    monkeypatch.setattr("trainer.training_run.save_checkpoint", saving)
    settings = config(limits={"steps": 4}, checkpoint_seconds=1e-9, qat={"enabled": False})
    assert train(settings, data, tmp_path, tmp_path / "checkpoints", None) is ExitCode.OK
    printed = capsys.readouterr().out.splitlines()
    notes = [line for line in printed if parse_line(line) is None]
    assert len(notes) == 2
    assert notes[0].startswith("no checkpoint at step 2: [Errno 28] No space left on device")
    assert [line.split()[0] for line in printed if line.startswith("checkpoint:")] == [
        "checkpoint:step_00000001.pt",
        "checkpoint:step_00000004.pt",
    ]
    full.add(1)
    stop_at_step(monkeypatch, 1)
    with pytest.raises(OSError, match="No space left"):  # what an interruption leaves must not be lost silently
        train(config(), data, tmp_path / "stopped", tmp_path / "stopped" / "checkpoints", None)


def test_other_training_data_is_refused_on_resuming(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_at_step(patched, 2)
        run(config(), data, tmp_path / "out", capsys)
    other = shutil.copytree(data, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["train"][0]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="other training data than"):
        train(config(), other, tmp_path / "out", tmp_path / "out" / "checkpoints", "auto")


def test_weights_that_broke_and_a_switch_that_does_nothing_are_told_apart(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(qat={"start_fraction": 0.0})
    monkeypatch.setattr(GPT, "quantization_error", lambda _: 0.0)
    with pytest.raises(RuntimeError, match="the switch has no effect") as caught:
        run(settings, data, tmp_path, capsys)
    assert not isinstance(caught.value, DivergedError)
    capsys.readouterr()
    monkeypatch.setattr(GPT, "quantization_error", lambda _: float("nan"))
    code, lines = run(settings, data, tmp_path, capsys)
    assert (code, events(lines)[-1]) == (ExitCode.DIVERGED, ("diverged", 0))


def test_a_stop_while_warming_up_ends_the_run_without_a_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiler_dies(*_: object) -> tuple[Tensor, Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a worker of the compiler died")

    def passes(model: GPT, *, compiled: bool, **_: object) -> Passes:
        return replace(build_passes(model, compiled=False), loss=compiler_dies, compiled=compiled)

    monkeypatch.setattr("trainer.run_state.build_passes", passes)
    code, lines = run(config(compile=True), data, tmp_path, capsys)
    assert code is ExitCode.INTERRUPTED
    assert events(lines) == [("interrupted", 0)]
    assert not (tmp_path / "checkpoints").exists()


def test_warming_up_looks_for_a_stop_between_graphs_and_lets_other_errors_be() -> None:
    settings = config()
    model = GPT(settings.model, settings.export)
    stop, calls = StopRequest(), []

    def loss(inputs: Tensor, targets: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        calls.append((model.recurrence_active, model.fake_quant_active))
        stop.receive(signal.SIGTERM, None)
        return plain(inputs, targets)

    plain = build_passes(model, compiled=False).loss

    passes = replace(build_passes(model, compiled=False), loss=loss)
    with pytest.raises(StopAskedError):
        warm_up(model, passes, settings, torch.device("cpu"), stop)
    assert calls == [(False, False)]

    def broken(*_: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        warm_up(model, replace(passes, loss=broken), settings, torch.device("cpu"), StopRequest())


def test_warming_up_a_resumed_run_leaves_out_what_lies_behind() -> None:
    settings = config()
    model = GPT(settings.model, settings.export)
    calls: list[tuple[bool, bool]] = []

    def loss(inputs: Tensor, targets: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        calls.append((model.recurrence_active, model.fake_quant_active))
        return plain(inputs, targets)

    plain = build_passes(model, compiled=False).loss

    passes = replace(build_passes(model, compiled=False), loss=loss)
    warm_up(model, passes, settings, torch.device("cpu"), StopRequest())
    assert calls == [(False, False), (True, False), (True, True)]  # each of them once
    calls.clear()
    model.set_recurrence(True)
    model.set_fake_quant(True)
    warm_up(model, passes, settings, torch.device("cpu"), StopRequest())
    assert calls == [(True, True), (True, False)]  # the second only to see that the switch has an effect
    assert model.recurrence_active
    assert model.fake_quant_active


def test_an_old_result_goes_once_the_input_is_accepted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "result.json").write_text("of an earlier run")
    with pytest.raises(InputError, match="manifest"):
        train(config(), tmp_path / "nowhere", tmp_path, tmp_path / "checkpoints", None)
    assert (tmp_path / "result.json").exists()
    stop_at_step(monkeypatch, 1)
    assert run(config(), data, tmp_path, capsys)[0] is ExitCode.INTERRUPTED
    assert not (tmp_path / "result.json").exists()


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
    with pytest.raises(CheckpointError, match=r"no file .*gone\.pt"):
        train(settings, data, tmp_path / "out", tmp_path / "out", str(tmp_path / "gone.pt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weighting", ["tokens", "bpb", "bytes"])
def test_training_data_without_a_token_is_bad_input(data: Path, tmp_path: Path, weighting: str) -> None:
    shutil.copytree(data, tmp_path / "data")
    dataset = DataSet.load(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    for path in dataset.train_shards:
        write_shard(path, np.zeros(0, dtype=np.uint16))
    adopt(tmp_path / "data", tokenizer=dataset.tokenizer_path)
    with pytest.raises(InputError, match="hold no window of 16 tokens"):
        train(config(loss={"weighting": weighting}), tmp_path / "data", tmp_path / "out", tmp_path / "out", None)


def test_accumulated_micro_batches_have_the_gradient_of_one_batch(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    plain = GPT.__init__

    def with_live_projections(self: GPT, *arguments: Any, **named: Any) -> None:
        plain(self, *arguments, **named)
        with torch.no_grad():  # zero as they start, they would keep most gradients at zero
            for name, parameter in self.named_parameters():
                if name.endswith("proj.weight"):
                    parameter.normal_(std=0.1)
        monkeypatch.setattr(
            Optimizers,
            "step",
            lambda *_: seen.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}),
        )

    monkeypatch.setattr(GPT, "__init__", with_live_projections)
    for micro in (64, 32, 16):
        batch = {"train_batch_tokens": 64, "train_seq_len": 16, "micro_batch_tokens": micro}
        settings = config(batch=batch, limits={"steps": 1}, model=config().model.model_dump() | {"recurrence": None})
        run(settings, data, tmp_path / str(micro), capsys)
    whole, *split = seen
    assert whole.keys() == dict(GPT(config().model).named_parameters()).keys()
    for gradients in split:
        for name, gradient in whole.items():
            assert bool(gradient.abs().max() > 0), name
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_reachable_switches_follow_the_order_of_the_run() -> None:
    assert reachable_switches(config()) == [(False, False), (True, False), (True, True)]
    assert reachable_switches(config(qat={"start_fraction": 0.1})) == [(False, False), (False, True), (True, True)]
    assert reachable_switches(config(qat={"enabled": False}, model={"vocab_size": VOCAB})) == [(False, False)]


def test_warming_up_leaves_everything_as_it_was_and_compares_the_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    model = GPT(settings.model, settings.export)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    warm_up(model, build_passes(model, compiled=False), settings, torch.device("cpu"), StopRequest())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.recurrence_active
    assert not model.fake_quant_active
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    monkeypatch.setattr(GPT, "set_fake_quant", lambda *_: None)  # a switch that a graph has folded away
    with pytest.raises(RuntimeError, match="does not change the loss"):
        warm_up(model, build_passes(model, compiled=False), settings, torch.device("cpu"), StopRequest())


def test_compiled_passes_have_the_losses_and_gradients_of_plain_ones_in_every_state() -> None:
    shape = {"vocab_size": VOCAB, "num_layers": 1, "model_dim": 8, "num_heads": 1, "num_kv_heads": 1}
    recurrence = {"first": 0, "last": 0, "start_fraction": 0.4}
    settings = config(model=shape | {"recurrence": recurrence})
    model = GPT(settings.model, settings.export)
    torch.compiler.reset()
    passes = build_passes(model, compiled=True, backend="aot_eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    window = torch.randint(VOCAB, (2, 17))
    inputs, targets = window[:, :-1], window[:, 1:]
    parameters = list(model.parameters())
    seen = []
    for loop, qat in reachable_switches(settings):
        model.set_recurrence(loop)
        model.set_fake_quant(qat)
        (compiled, nats), plain = passes.loss(inputs, targets), model(inputs, targets)
        assert torch.equal(nats, compiled)
        torch.testing.assert_close(compiled, plain)
        gradients = torch.autograd.grad(compiled, parameters)
        for found, wanted in zip(gradients, torch.autograd.grad(plain, parameters), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        seen.append(gradients[0])
    model.set_fake_quant(False)
    with torch.no_grad():
        torch.testing.assert_close(passes.token_losses(inputs, targets), model.token_losses(inputs, targets))
    assert all(not torch.allclose(one, other, rtol=1e-3) for one, other in pairwise(seen))


def test_quantisation_aware_training_that_no_step_came_to_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = run(config(limits={"steps": 3}, qat={"start_fraction": 0.85}), data, tmp_path, capsys)
    told = [line.detail for line in lines if isinstance(line, Event) and line.kind == "late_qat"]
    assert told == ["never: no step began after 0.85 of the run"]


def test_the_clock_counts_only_while_it_runs() -> None:
    times = iter([10.0, 13.0, 20.0, 21.0, 22.0, 30.0, 31.0])
    clock = TrainingClock(torch.device("cpu"), seconds=5.0, now=lambda: next(times))
    assert clock.seconds == 5.0
    clock.start()
    with clock.paused():
        assert clock.seconds == 8.0
        with clock.paused():
            assert clock.seconds == 8.0
    assert clock.seconds == 9.0
    with pytest.raises(OSError, match="full"), clock.paused():
        raise OSError("the disk is full")
    assert clock.seconds == 11.0  # it runs again, for the run goes on


def test_products_with_rounded_inputs_train_alike_and_score_unrounded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = {}
    for products in ("float32", "bfloat16"):
        code, lines = run(config(cpu_matmul_precision=products), data, tmp_path / products, capsys)
        assert code is ExitCode.OK
        curves[products] = losses(lines)
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=1e-2)
    assert (curves["bfloat16"] != curves["float32"]) == has_bfloat16_units()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # type: ignore[attr-defined]
    dataset, model = DataSet.load(data), load_model(tmp_path / "bfloat16" / "model.pt", "cpu").model
    scored = evaluate(model.token_losses, ValidationStream.load(dataset), seq_len=16, batch_tokens=64, device="cpu")
    recorded = read_result(tmp_path / "bfloat16" / "result.json")
    assert isinstance(recorded, TrainResult)
    assert scored.bpb == pytest.approx(recorded.val_bpb, abs=1e-6)
