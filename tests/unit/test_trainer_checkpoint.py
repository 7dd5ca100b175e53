"""Weights come back as they were; damaged, foreign and other-configuration files are refused by name."""

from __future__ import annotations

import errno
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.artifact import MAGIC, is_artifact
from trainer.checkpoint import (
    Checkpoint,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from trainer.config import LimitsConfig, ModelConfig, OptimizerConfig, RecurrenceConfig, TrainConfig
from trainer.model.gpt import GPT
from trainer.model_file import CheckpointError, load_model, save_model

CONFIG = TrainConfig(
    limits=LimitsConfig(steps=4),
    model=ModelConfig(
        vocab_size=16,
        num_layers=2,
        model_dim=8,
        num_heads=2,
        num_kv_heads=1,
        recurrence=RecurrenceConfig(first=0, last=0, start_fraction=0.5),
    ),
)


def checkpoint(step: int, config: TrainConfig = CONFIG) -> Checkpoint:
    return Checkpoint(
        config=config.to_json(),
        step=step,
        tokens=step * 8,
        training_seconds=1.5,
        wall_seconds=2.5,
        evaluations_due=1,
        evaluation_pending=False,
        recurrence_active=True,
        fake_quant_active=False,
        val_sha256="ab",
        train_sha256="cd",
        model=GPT(config.model).state_dict(),
        optimizers={"muon": {"momentum": torch.ones(2)}},
        loader={"epoch": 0},
        rng={"cpu": torch.get_rng_state()},
    )


def written(folder: Path, step: int, second: int) -> Path:
    path = save_checkpoint(folder, checkpoint(step))
    os.utime(path, (second, second))
    return path


def saved(path: Path, model: GPT, config: TrainConfig = CONFIG) -> Path:
    save_model(path, model, config, tokenizer_sha256="tk", val_sha256="ab")
    return path


@pytest.mark.parametrize("active", [True, False])
def test_a_model_file_gives_the_model_back_with_its_loop_as_it_was(tmp_path: Path, active: bool) -> None:
    model = GPT(CONFIG.model, CONFIG.export)
    model.set_recurrence(active)
    loaded = load_model(saved(tmp_path / "model.pt", model), "cpu")
    assert (loaded.config, loaded.tokenizer_sha256, loaded.val_sha256) == (CONFIG, "tk", "ab")
    assert loaded.model.recurrence_active is active
    assert not loaded.model.fake_quant_active
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    original = checkpoint(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path, original))
    assert (loaded.step, loaded.tokens, loaded.training_seconds, loaded.config) == (7, 56, 1.5, original.config)
    assert torch.equal(loaded.rng["cpu"], original.rng["cpu"])
    assert all(torch.equal(tensor, loaded.model[name]) for name, tensor in original.model.items())


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.pt"
    saved(path, GPT(CONFIG.model))
    data = path.read_bytes()
    if damage == "foreign":
        torch.save({"format": "something else"}, path)
    else:
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load_model(path, "cpu")


def test_a_missing_file_is_named_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*model\.pt; give a model\.pt of a run"):
        load_model(tmp_path / "model.pt", "cpu")
    with pytest.raises(CheckpointError, match=r"no file .*step_1\.pt; give a checkpoint \(step_N*\.pt\) of a run"):
        find_checkpoint(str(tmp_path / "step_1.pt"), tmp_path, CONFIG)


def test_an_artifact_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "model.caddie"
    path.write_bytes(MAGIC + bytes(50))
    with pytest.raises(CheckpointError, match=r"model\.caddie is an exported artifact, .* give a checkpoint \("):
        find_checkpoint(str(path), tmp_path, CONFIG)
    path.write_bytes(MAGIC[:-1] + b"\xff")
    assert is_artifact(path)
    path.write_bytes(MAGIC[:-2])
    assert not is_artifact(path)


@pytest.mark.parametrize("averaging", [None, "ema"])
def test_a_model_file_says_what_average_it_is(tmp_path: Path, averaging: str | None) -> None:
    path = tmp_path / "model.pt"
    model = GPT(CONFIG.model, CONFIG.export)
    save_model(path, model, CONFIG, tokenizer_sha256="tk", val_sha256="ab", averaging=averaging)
    assert load_model(path, "cpu").averaging == averaging


def test_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(1))
    with pytest.raises(CheckpointError, match="format caddie-model"):
        load_model(path, "cpu")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    other = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"model_dim": 16})})
    saved(tmp_path / "model.pt", GPT(CONFIG.model), other)
    with pytest.raises(CheckpointError, match="names and shapes"):
        load_model(tmp_path / "model.pt", "cpu")


def test_the_last_two_are_kept_and_the_one_just_written_always(tmp_path: Path) -> None:
    for second, step in enumerate((500, 600, 700), start=1):  # an older run got further
        written(tmp_path, step, second)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_00000700.pt", "step_00000600.pt"]
    written(tmp_path, 10, 4)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_00000010.pt", "step_00000700.pt"]


def test_auto_takes_the_newest_that_can_be_read(tmp_path: Path) -> None:
    assert find_checkpoint(None, tmp_path, CONFIG) is None
    assert find_checkpoint("auto", tmp_path / "nowhere", CONFIG) is None
    written(tmp_path, 1, 1)
    newest = written(tmp_path, 2, 2)
    newest.write_bytes(newest.read_bytes()[:100])
    found = find_checkpoint("auto", tmp_path, CONFIG)
    assert found is not None
    assert found.step == 1
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_checkpoint(str(newest), tmp_path, CONFIG)


def test_auto_passes_over_flipped_bytes_and_other_weights(tmp_path: Path) -> None:
    written(tmp_path, 1, 1)
    original = checkpoint(2)
    newest = save_checkpoint(tmp_path, original)
    data = bytearray(newest.read_bytes())
    place = data.find(original.rng["cpu"].numpy().tobytes())
    assert place > 0
    data[place + 100] ^= 4
    newest.write_bytes(data)
    with pytest.raises(CheckpointError, match="have changed"):
        load_checkpoint(newest)
    found = find_checkpoint("auto", tmp_path, CONFIG)
    assert found is not None
    assert found.step == 1

    for name, wrong in (("model", {"tok_emb.weight": torch.ones(3)}), ("tokens", "2"), ("rng", None)):
        save_checkpoint(tmp_path, replace(checkpoint(2), **{name: wrong}))
        with pytest.raises(CheckpointError, match=r"names and shapes|not a whole checkpoint"):
            load_checkpoint(newest)
        found = find_checkpoint("auto", tmp_path, CONFIG)
        assert found is not None
        assert found.step == 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_noticed_or_changes_nothing(model_file: Path, data: st.DataObject) -> None:
    """Bits between an archive's entries carry nothing; no bit that carries something may pass."""
    raw = bytearray(model_file.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    flipped = model_file.with_name("flipped.pt")
    flipped.write_bytes(raw)
    try:
        loaded = load_model(flipped, "cpu")
    except CheckpointError:
        return
    original = load_model(model_file, "cpu")
    assert loaded.config == original.config
    assert (loaded.tokenizer_sha256, loaded.val_sha256) == (original.tokenizer_sha256, original.val_sha256)
    assert loaded.model.recurrence_active == original.model.recurrence_active
    for name, tensor in original.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("flips") / "model.pt", GPT(CONFIG.model))


@pytest.mark.parametrize("room", [0, 1000])  # torch lets the first failure through and hides later ones
def test_a_write_that_fails_inside_torch_is_an_os_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = save_checkpoint(tmp_path, checkpoint(1))
    before = path.read_bytes()

    class FullDisk(io.BytesIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            if self.tell() + len(memoryview(data)) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def full(descriptor: int, _mode: str) -> FullDisk:
        os.close(descriptor)
        return FullDisk()

    monkeypatch.setattr("trainer.durable.os.fdopen", full)
    with pytest.raises(OSError, match=r"No space left on device.*step_00000001\.pt") as caught:
        save_checkpoint(tmp_path, checkpoint(1))
    assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_another_configuration_is_refused_with_the_field(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(1))
    other = CONFIG.model_copy(update={"optimizer": OptimizerConfig(matrix_lr=0.5)})
    for resume in ("auto", str(path)):
        with pytest.raises(CheckpointError, match=r"optimizer\.matrix_lr was 0\.04, now it is 0\.5"):
            find_checkpoint(resume, tmp_path, other)
