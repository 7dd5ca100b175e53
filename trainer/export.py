"""From trained weights to an artifact, proved on the bytes that were written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer import sizing
from trainer.artifact import Artifact, pack, unpack
from trainer.config import ExportConfig
from trainer.data.manifest import DataSet
from trainer.durable import write_whole
from trainer.errors import InputError
from trainer.model_file import load_model
from trainer.quantization.fake_quant import fake_quantize
from trainer.quantization.rounding import largest_value, row_scales
from trainer.report import RESULT_NAME, ExportResult

ARTIFACT_NAME = "model.caddie"
# A scale in fp16 is off by at most 2^-11 of itself, or by half of the smallest subnormal.
_HALF_RELATIVE = 2.0**-11
_HALF_ABSOLUTE = 2.0**-25


class ExportError(InputError):
    """An artifact that does not hold what it should; it is not left behind, and an earlier one stays."""


def export(model_path: Path, dataset: DataSet, out: Path) -> ExportResult:
    """Quantise `model_path` into `out/model.caddie`: the written bytes are read back and every tensor is proved
    before they take that name. An old `out/result.json` goes once the input is accepted.

    Raises OSError, or InputError (a bad model, other data than it was trained on, or an ExportError).
    """
    saved = load_model(model_path, "cpu")
    saved.require_data(dataset)
    (out / RESULT_NAME).unlink(missing_ok=True)
    config = saved.config
    state = {name: tensor.detach() for name, tensor in saved.model.state_dict().items()}
    data = pack(
        config,
        state,
        tokenizer_sha256=saved.tokenizer_sha256,
        recurrence_active=saved.model.recurrence_active,
    )
    path = out / ARTIFACT_NAME
    proofs: list[tuple[Artifact, float]] = []

    def prove_written(aside: Path) -> None:
        artifact = unpack(aside.read_bytes(), str(path))
        proofs.append((artifact, prove(artifact, state)))

    write_whole(path, data, check=prove_written)
    ((artifact, error),) = proofs
    code_bytes = sizing.code_bytes()
    return ExportResult(
        artifact_path=str(path),
        artifact_sha256=artifact.sha256,
        artifact_bytes=len(data) + code_bytes,
        weights_bytes=len(data),
        code_bytes=code_bytes,
        tokenizer_bytes=dataset.manifest.tokenizer.bytes,
        scheme=artifact.manifest.scheme,
        params=sizing.parameter_count(config.model),
        max_abs_error=error,
    )


def prove(artifact: Artifact, state: dict[str, Tensor]) -> float:
    """Largest |weight - dequantised weight|. Raises ExportError unless every tensor is the intended one.

    Intended: bit for bit what training's fake quantisation gives (vectors: their fp16), and within half a step of
    the weight, plus what rounding the scale to fp16 can move the end of the range. Clipped weights lie beyond.
    """
    export_config = artifact.config.export
    quantized = sizing.quantized_names(artifact.config.model)
    largest = 0.0
    for name, tensor in state.items():
        weight, got = tensor.to(torch.float32), artifact.state[name]
        if name in quantized:
            intended = fake_quantize(weight, export_config.bits, export_config.clip_sigma)
            allowed = _allowed_error(weight, export_config)
        else:
            intended = weight.to(torch.float16).to(torch.float32)
            allowed = weight.abs() * _HALF_RELATIVE + _HALF_ABSOLUTE
        if not torch.equal(got.view(torch.int32), intended.view(torch.int32)):
            raise ExportError(f"{name}: the artifact does not hold the intended values")
        error = (got - weight).abs()
        if bool((error > allowed).any()):
            raise ExportError(f"{name}: an error of {float(error.max()):.3e} is more than half a step")
        largest = max(largest, float(error.max()))
    return largest


def _allowed_error(weight: Tensor, config: ExportConfig) -> Tensor:
    """Per element `(rows, columns)`: half a step and the scale's own error; infinite where the row is clipped."""
    scales = row_scales(weight, config.bits, config.clip_sigma)
    limit = largest_value(config.bits)
    allowed = (scales * (0.5 + limit * _HALF_RELATIVE) + limit * _HALF_ABSOLUTE) * (1 + 1e-5)
    if config.clip_sigma is None:
        return allowed.expand_as(weight)
    return torch.where(weight.abs() > scales * limit, torch.inf, allowed)
