"""Sizes before training: shapes, predicted bytes, memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from trainer.artifact import pack, unpack
from trainer.config import BatchConfig, ExportConfig, LimitsConfig, ModelConfig, RecurrenceConfig, TrainConfig
from trainer.model.gpt import GPT
from trainer.parameters import parameters
from trainer.sizing import (
    Calibration,
    code_bytes,
    parameter_count,
    parameter_shapes,
    peak_memory_bytes,
    predict_artifact,
)


def _config(model: ModelConfig, export: ExportConfig | None = None, batch: BatchConfig | None = None) -> TrainConfig:
    return TrainConfig(
        limits=LimitsConfig(steps=1), model=model, export=export or ExportConfig(), batch=batch or BatchConfig()
    )


SMALL = ModelConfig(vocab_size=128, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, mlp_mult=3)


def test_shapes_are_those_of_the_model() -> None:
    model = GPT(SMALL)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == parameter_shapes(SMALL)
    assert parameter_count(SMALL) == sum(parameter.numel() for parameter in model.parameters())
    quantized = {name for name, parameter in parameters(SMALL).items() if parameter.quantized}
    assert quantized == {name for name, tensor in model.state_dict().items() if tensor.dim() == 2}


def test_the_public_baseline_has_its_public_size() -> None:
    assert parameter_count(ModelConfig()) == pytest.approx(17.1e6, rel=0.01)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("dim", [32, 128])
def test_gaussian_weights_land_in_the_interval(bits: int, dim: int) -> None:
    model = ModelConfig(vocab_size=256, num_layers=2, model_dim=dim, num_heads=4, num_kv_heads=2)
    config = _config(model, ExportConfig(bits=bits))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(model).items()}
    estimate = predict_artifact(config)
    data = pack(config, state, tokenizer_sha256="ab" * 32, recurrence_active=False)
    measured = len(data) + code_bytes(unpack(data, "it").manifest.coders)
    assert estimate.low_bytes <= measured <= estimate.high_bytes


def test_an_estimate_adds_up() -> None:
    estimate = predict_artifact(_config(ModelConfig()))
    assert sum(size for _, _, size in estimate.by_module) + estimate.code_bytes == estimate.artifact_bytes
    assert sum(params for _, params, _ in estimate.by_module) == parameter_count(ModelConfig())
    assert estimate.low_bytes < estimate.artifact_bytes < estimate.high_bytes
    assert estimate.scheme == "int6+zlib+ans"
    assert estimate.code_bytes == code_bytes(["ans"]) > code_bytes() > 10_000


def test_embeddings_may_have_bits_of_their_own() -> None:
    plain, finer = (
        predict_artifact(_config(SMALL, ExportConfig(clip_sigma=12.85, embedding_bits=bits, embedding_clip_sigma=clip)))
        for bits, clip in ((None, None), (8, 20.0))
    )
    assert finer.scheme == "int6e8+zlib+ans"
    before, after = ({name: size for name, _, size in each.by_module} for each in (plain, finer))
    assert {name for name in before if before[name] != after[name]} == {"embedding"}
    count = SMALL.vocab_size * SMALL.model_dim
    # A step is smaller by so many bits.
    assert after["embedding"] - before["embedding"] == pytest.approx(
        count * math.log2(127 / 20.0 * 12.85 / 31) / 8, abs=2
    )


def test_an_artifact_that_fills_its_bytes_is_predicted_to() -> None:
    filled = predict_artifact(_config(ModelConfig(), ExportConfig(target_bytes=9_000_000)))
    assert filled.scheme == "fit9000000+zlib+ans"
    assert 9_000_000 - 10 < filled.artifact_bytes <= filled.high_bytes == 9_000_000
    assert filled.low_bytes == pytest.approx(0.995 * 9_000_000, abs=20)
    assert sum(size for _, _, size in filled.by_module) + filled.code_bytes == filled.artifact_bytes
    finest = predict_artifact(_config(ModelConfig(), ExportConfig(bits=8)))
    roomy = predict_artifact(_config(ModelConfig(), ExportConfig(target_bytes=10**9)))
    assert (roomy.artifact_bytes, roomy.high_bytes) == (finest.artifact_bytes, finest.high_bytes)
    tight = predict_artifact(_config(ModelConfig(), ExportConfig(target_bytes=1000)))
    assert tight.artifact_bytes > 1000  # code, scales and vectors are there all the same


def test_bytes_follow_bits_and_clipping() -> None:
    sizes = [predict_artifact(_config(SMALL, ExportConfig(bits=bits))).artifact_bytes for bits in (4, 5, 6, 7, 8)]
    assert sizes == sorted(set(sizes))
    wide, wider = (predict_artifact(_config(SMALL, ExportConfig(clip_sigma=k))).artifact_bytes for k in (6.4, 12.8))
    quantised = sum(parameter.count for parameter in parameters(SMALL).values() if parameter.quantized)
    assert wide - wider == pytest.approx(quantised / 8, rel=0.01)


def test_a_calibration_scales_and_narrows() -> None:
    config = _config(ModelConfig())
    plain, calibrated = predict_artifact(config), predict_artifact(config, Calibration(ratio=0.9, spread=0.01))
    weights = plain.artifact_bytes - plain.code_bytes
    assert calibrated.artifact_bytes - calibrated.code_bytes == pytest.approx(0.9 * weights, rel=1e-5)
    assert calibrated.high_bytes - calibrated.low_bytes == pytest.approx(0.02 * 0.9 * weights, rel=1e-3)


def test_memory_grows_with_the_micro_batch_and_loops() -> None:
    whole = _config(ModelConfig(), batch=BatchConfig(train_batch_tokens=65536))
    micro = _config(ModelConfig(), batch=BatchConfig(train_batch_tokens=65536, micro_batch_tokens=16384))
    loops = ModelConfig(recurrence=RecurrenceConfig(first=3, last=5, loops=3))
    looped = _config(loops, batch=BatchConfig(train_batch_tokens=65536))
    assert peak_memory_bytes(micro) < peak_memory_bytes(whole) < peak_memory_bytes(looped)


def test_the_face_of_the_trainer_is_torch_free() -> None:
    program = (
        "import sys, trainer.sizing, trainer.config, trainer.report\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'imports torch or numpy'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
