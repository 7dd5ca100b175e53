"""Export: the written bytes are proved, and what cannot be proved is not left behind."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from trainer.__main__ import app
from trainer.artifact import ArtifactError, pack, read_artifact, unpack
from trainer.calibration import calibration_windows, input_covariances
from trainer.config import BatchConfig, ExportConfig, LimitsConfig, ModelConfig, Rounding, TrainConfig
from trainer.data.documents import Document, write_documents
from trainer.data.manifest import DataSet
from trainer.data.prepare import prepare
from trainer.data.shards import ShardError, open_shard
from trainer.data.splitting import SeededBytes
from trainer.errors import InputError
from trainer.export import ExportError, export, prove
from trainer.model.gpt import GPT
from trainer.model_file import CheckpointError, save_model
from trainer.parameters import parameters
from trainer.quantization.rounding import quantize
from trainer.sensitivity import row_traces
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


def _model(vocab_size: int = VOCAB, clip: float | None = None, **options: Any) -> tuple[GPT, TrainConfig]:
    shape = {"vocab_size": vocab_size, "num_layers": 1, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1}
    config = TrainConfig(
        limits=LimitsConfig(steps=1),
        model=ModelConfig.model_validate(shape | options),
        batch=BatchConfig(train_batch_tokens=64, train_seq_len=16),
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


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_an_artifact_fills_its_bytes(dataset: DataSet, tmp_path: Path, rounding: Rounding) -> None:
    model, config = _model(value_embedding={"layers": (0,), "dim": 5}, bigram_embedding={"rows": 90, "dim": 6})
    _save(tmp_path / "model.pt", dataset, model, config)
    target = code_bytes() + 9000
    result = export(
        tmp_path / "model.pt", dataset, tmp_path / "out", rounding=rounding, target_bytes=target, device="cpu"
    )
    assert 0.995 * target <= result.artifact_bytes <= target
    artifact = read_artifact(tmp_path / "out" / "model.caddie")
    assert artifact.config.export.target_bytes == target
    assert (
        result.scheme
        == artifact.manifest.scheme
        == config.export.model_copy(update={"target_bytes": target, "rounding": rounding}).scheme
    )
    assert (result.rounding_cost is None) == (rounding == "nearest")
    # Tokens that hardly ever come may be off by more than those that do.
    trained = torch.from_numpy(open_shard(dataset.train_shards[0])[: 64 * 16].astype("int64")).view(64, 16)
    traces = row_traces(model, trained, torch.device("cpu"))["tok_emb.weight"]
    errors = (artifact.state["tok_emb.weight"] - model.get_parameter("tok_emb.weight")).detach().abs().mean(dim=1)
    assert errors[traces < traces.median()].mean() > 1.6 * errors[traces > traces.mean()].mean() > 0
    windows = torch.from_numpy(open_shard(dataset.val_shards[0])[: 8 * 16].astype("int64")).view(8, 16)
    before, after = (each.token_losses(windows, windows).detach().mean() for each in (model, artifact.model("cpu")))
    assert float(after) == pytest.approx(float(before), abs=0.05)


def test_a_model_whose_finest_steps_take_fewer_bytes_leaves_the_rest(dataset: DataSet, tmp_path: Path) -> None:
    _save(tmp_path / "model.pt", dataset, *_model())
    result = export(tmp_path / "model.pt", dataset, tmp_path / "out", target_bytes=10**7, device="cpu")
    assert result.artifact_bytes < 0.1 * 10**7
    assert result.max_abs_error < 0.01


def test_bytes_that_cannot_be_met_are_told(dataset: DataSet, tmp_path: Path) -> None:
    _save(tmp_path / "model.pt", dataset, *_model())
    with pytest.raises(InputError, match=r"target_bytes 9000 cannot be met: code, scales and vectors alone take \d+"):
        export(tmp_path / "model.pt", dataset, tmp_path / "out", target_bytes=9000, device="cpu")
    assert not (tmp_path / "out" / "model.caddie").exists()


def test_gptq_writes_its_integers_where_tokens_are_multiplied_and_the_nearest_elsewhere(
    dataset: DataSet, tmp_path: Path
) -> None:
    model, config = _model(clip=3.0, value_embedding={"layers": (0,), "dim": 5}, bigram_embedding={"rows": 9, "dim": 6})
    config = config.model_copy(update={"export": ExportConfig(clip_sigma=3.0, bits=4)})
    _save(tmp_path / "model.pt", dataset, model, config)
    plain = export(tmp_path / "model.pt", dataset, tmp_path / "plain")
    result = export(tmp_path / "model.pt", dataset, tmp_path / "gptq", rounding="gptq", device="cpu")
    assert (plain.scheme, result.scheme) == ("int4+zlib+ans", "int4+gptq+zlib+ans")
    assert plain.rounding_cost is None
    assert result.rounding_cost is not None
    assert 0 < result.rounding_cost < 1
    nearest, found = (read_artifact(tmp_path / name / "model.caddie") for name in ("plain", "gptq"))
    assert found.config.export.rounding == "gptq"
    differ = {name for name in found.state if not torch.equal(found.state[name], nearest.state[name])}
    multiplied = {name for name, p in parameters(config.model).items() if p.kind not in {"control", "embedding"}}
    assert differ <= multiplied | {"tok_emb.weight"}
    assert {"tok_emb.weight", "blocks.0.mlp.fc.weight"} <= differ

    # What it keeps are each matrix's outputs, of other text too.
    windows = torch.from_numpy(open_shard(dataset.val_shards[0])[: 8 * 16].astype("int64")).view(8, 16)
    for name, covariance in input_covariances(model, windows, torch.device("cpu")).items():
        errors = [(model.get_parameter(name) - each.state[name]).detach() for each in (found, nearest)]
        own, near = (float((error @ covariance * error).sum()) for error in errors)
        assert own < near, name


def test_an_integer_that_gptq_did_not_choose_fails_the_proof() -> None:
    model, config = _model()
    state = {key: value.detach() for key, value in model.state_dict().items()}
    name = "blocks.0.mlp.fc.weight"
    values, scales = quantize(state[name], config.export.bits, None)
    integers = {name: (values.clone(), scales)}
    integers[name][0][3, 3] -= 1 if values[3, 3] > 0 else -1
    data = pack(config, state, tokenizer_sha256="x", recurrence_active=False, rounded=integers)
    artifact = unpack(data, "it")
    assert prove(artifact, state, integers) > 0
    with pytest.raises(ExportError, match=f"{name}: the artifact does not hold the intended"):
        prove(artifact, state, {name: (values, scales)})
    with pytest.raises(ExportError, match=name):
        prove(artifact, state)


def test_gptq_without_a_window_of_train_tokens_says_what_to_do(dataset: DataSet, tmp_path: Path) -> None:
    model, config = _model()
    long = {"train_batch_tokens": 1 << 20, "train_seq_len": 1 << 20}
    _save(tmp_path / "model.pt", dataset, model, config.model_copy(update={"batch": BatchConfig(**long)}))
    with pytest.raises(InputError, match=r"less than a window of 1048576 .*set export\.rounding to nearest"):
        export(tmp_path / "model.pt", dataset, tmp_path / "out", rounding="gptq", device="cpu")
    with pytest.raises(InputError, match="--device tpu: use auto, cpu or cuda"):
        export(tmp_path / "model.pt", dataset, tmp_path / "out", rounding="gptq", device="tpu")
    assert not (tmp_path / "out" / "model.caddie").exists()


def test_calibration_windows_are_spread_evenly_and_never_overlap(dataset: DataSet) -> None:
    stream = np.concatenate([open_shard(path) for path in dataset.train_shards])
    windows = calibration_windows(dataset, tokens=40, seq_len=8, vocab_size=VOCAB)
    most = len(stream) // 8
    starts = [number * most // 5 * 8 for number in range(5)]
    assert windows.tolist() == [stream[start : start + 8].tolist() for start in starts]
    assert len(calibration_windows(dataset, tokens=1, seq_len=8, vocab_size=VOCAB)) == 1
    whole = calibration_windows(dataset, tokens=10**9, seq_len=8, vocab_size=VOCAB)
    assert whole.flatten().tolist() == stream[: most * 8].tolist()
    with pytest.raises(ShardError, match="token"):
        calibration_windows(dataset, tokens=10**9, seq_len=8, vocab_size=8)


def test_the_verb_takes_the_rounding_and_tells_what_it_is_worth(dataset: DataSet, tmp_path: Path) -> None:
    _save(tmp_path / "model.pt", dataset, *_model(clip=3.0))

    def run(rounding: str) -> Result:
        where = ["--data", str(dataset.path), "--out", str(tmp_path / rounding), "--device", "cpu"]
        return CliRunner().invoke(app, ["export", str(tmp_path / "model.pt"), *where, "--rounding", rounding])

    answer = run("gptq")
    assert answer.exit_code == 0
    assert "Serialized model int6+gptq+zlib+ans: " in answer.stdout
    assert "of what rounding to nearest costs the matrices' outputs" in answer.stdout
    answer = run("nearest")
    assert answer.exit_code == 0
    assert "GPTQ" not in answer.stdout
    assert run("up").exit_code == 2
    assert not (tmp_path / "up").exists()
