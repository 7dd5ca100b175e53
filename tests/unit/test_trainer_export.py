"""Export: the written bytes are proved, and what cannot be proved is not left behind."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.artifact import ArtifactError, pack, unpack
from trainer.config import ExportConfig, LimitsConfig, ModelConfig, TrainConfig
from trainer.data.documents import Document, write_documents
from trainer.data.manifest import DataSet
from trainer.data.prepare import prepare
from trainer.data.splitting import SeededBytes
from trainer.export import ExportError, export, prove
from trainer.model.gpt import GPT
from trainer.model_file import CheckpointError, save_model
from trainer.sizing import code_bytes, inference_files, parameter_count, predict_artifact

VOCAB = 300


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "it", "for", "a", "dog"]
    write_documents(folder / "a.jsonl", (Document(text=" ".join(rng.choice(words, 30)) + f" {i}") for i in range(80)))
    rule = SeededBytes(val_bytes=900, seed=1)
    return prepare([folder / "a.jsonl"], folder / "data", vocab_size=VOCAB, rule=rule).dataset


def _model(vocab_size: int = VOCAB, clip: float | None = None) -> tuple[GPT, TrainConfig]:
    config = TrainConfig(
        limits=LimitsConfig(steps=1),
        model=ModelConfig(vocab_size=vocab_size, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1),
        export=ExportConfig(clip_sigma=clip),
    )
    torch.manual_seed(0)
    model = GPT(config.model, config.export)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, config


def _save(path: Path, dataset: DataSet, model: GPT, config: TrainConfig, **other: str) -> None:
    manifest = dataset.manifest
    hashes = {"tokenizer_sha256": manifest.tokenizer.sha256, "val_sha256": manifest.val_sha256} | other
    save_model(path, model, config, **hashes)


@pytest.mark.parametrize("clip", [None, 2.0])
def test_export_writes_a_proved_artifact(dataset: DataSet, tmp_path: Path, clip: float | None) -> None:
    model, config = _model(clip=clip)
    _save(tmp_path / "model.pt", dataset, model, config)
    result = export(tmp_path / "model.pt", dataset, tmp_path / "out")
    written = (tmp_path / "out" / "model.caddie").read_bytes()
    assert result.weights_bytes == len(written)
    assert result.code_bytes == code_bytes() == sum(len(path.read_bytes()) for path in inference_files())
    assert result.artifact_bytes == result.weights_bytes + result.code_bytes
    assert result.tokenizer_bytes == dataset.tokenizer_path.stat().st_size
    assert result.params == parameter_count(config.model)
    state = unpack(written, "it").state
    differences = [float((state[name] - weight).abs().max()) for name, weight in model.state_dict().items()]
    assert result.max_abs_error == max(differences) > 0


def test_the_predicted_interval_covers_the_export(dataset: DataSet, tmp_path: Path) -> None:
    model, config = _model()
    _save(tmp_path / "model.pt", dataset, model, config)
    result = export(tmp_path / "model.pt", dataset, tmp_path / "out")
    estimate = predict_artifact(config)
    assert estimate.low_bytes <= result.artifact_bytes <= estimate.high_bytes


@pytest.mark.parametrize(
    ("vocab_size", "other", "message"),
    [
        (VOCAB + 1, {}, "vocabulary of 301"),
        (VOCAB, {"tokenizer_sha256": "0"}, "another tokenizer"),
        (VOCAB, {"val_sha256": "0"}, "another validation set"),
    ],
)
def test_other_data_than_that_of_the_training_is_refused(
    dataset: DataSet, tmp_path: Path, vocab_size: int, other: dict[str, str], message: str
) -> None:
    (tmp_path / "result.json").write_text("of an earlier export")
    _save(tmp_path / "model.pt", dataset, *_model(vocab_size=vocab_size), **other)
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "model.pt", dataset, tmp_path)
    assert (tmp_path / "result.json").exists()
    assert not (tmp_path / "model.caddie").exists()


def test_a_model_that_names_its_validation_set_as_older_versions_did_is_taken(dataset: DataSet, tmp_path: Path) -> None:
    """They hashed the bytes of the validation shards, one after the other; the shards are the same still."""
    shards = b"".join(path.read_bytes() for path in dataset.val_shards)
    _save(tmp_path / "model.pt", dataset, *_model(), val_sha256=hashlib.sha256(shards).hexdigest())
    assert export(tmp_path / "model.pt", dataset, tmp_path / "out").artifact_bytes > 0


def test_an_old_result_goes_once_the_input_is_accepted(dataset: DataSet, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("of an earlier export")
    _save(tmp_path / "model.pt", dataset, *_model())
    export(tmp_path / "model.pt", dataset, tmp_path)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("name", ["tok_emb.weight", "blocks.0.mlp.proj.weight", "blocks.0.attn_scale"])
def test_a_tensor_off_by_the_smallest_amount_fails_the_proof(name: str) -> None:
    model, config = _model()
    state = {key: value.detach() for key, value in model.state_dict().items()}
    artifact = unpack(pack(config, state, tokenizer_sha256="x", recurrence_active=False), "it")
    assert prove(artifact, state) > 0
    altered = {**artifact.state, name: artifact.state[name].clone()}
    flat = altered[name].view(-1)
    flat[5] = torch.nextafter(flat[5], torch.tensor(torch.inf))
    with pytest.raises(ExportError, match=name):
        prove(replace(artifact, state=altered), state)


@pytest.mark.parametrize("earlier", [None, b"an earlier good artifact"])
def test_a_failed_proof_leaves_no_artifact_and_an_earlier_one_alone(
    dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bytes | None
) -> None:
    _save(tmp_path / "model.pt", dataset, *_model())
    out = tmp_path / "out"
    out.mkdir()
    if earlier is not None:
        (out / "model.caddie").write_bytes(earlier)

    def bad_disk(descriptor: int) -> None:
        last = os.fstat(descriptor).st_size - 1
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, last)[0] ^ 1]), last)

    monkeypatch.setattr("trainer.durable.os.fsync", bad_disk)
    with pytest.raises(ArtifactError, match="payload"):
        export(tmp_path / "model.pt", dataset, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == ({"model.caddie": earlier} if earlier else {})
