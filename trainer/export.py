"""From trained weights to an artifact, proved on the bytes that were written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trainer import sizing
from trainer.artifact import Artifact, Integers, manifest_of, pack, unpack
from trainer.calibration import calibration_windows, input_covariances
from trainer.config import Rounding, TrainConfig
from trainer.data.manifest import DataSet
from trainer.devices import choose_device
from trainer.durable import write_whole
from trainer.errors import InputError
from trainer.export_config import FITTED_BITS
from trainer.model.gpt import GPT
from trainer.model_file import SavedModel, load_model
from trainer.parameters import parameters
from trainer.quantization.fake_quant import fake_quantize
from trainer.quantization.fitting import Scales, fitted
from trainer.quantization.gptq import Inputs, gptq, inputs_with
from trainer.quantization.rounding import dequantize, largest_value, quantize, row_scales
from trainer.report import RESULT_NAME, ExportResult
from trainer.sensitivity import row_traces

ARTIFACT_NAME = "model.caddie"
# A scale in fp16 is off by at most 2^-11 of itself, or by half of the smallest subnormal.
_HALF_RELATIVE = 2.0**-11
_HALF_ABSOLUTE = 2.0**-25


class ExportError(InputError):
    """An artifact that does not hold what it should; it is not left behind, and an earlier one stays."""


def export(
    model_path: Path,
    dataset: DataSet,
    out: Path,
    *,
    rounding: Rounding | None = None,
    target_bytes: int | None = None,
    device: str = "auto",
) -> ExportResult:
    """Quantise `model_path` into `out/model.caddie`: the written bytes are read back and every tensor is proved
    before they take that name. An old `out/result.json` goes once the input is accepted.

    `rounding` and `target_bytes` take the place of the configuration's own. `device` is where GPTQ and sensitivities
    are computed. Raises OSError, or InputError (a bad model, other data than it was trained on, bytes that cannot be
    met, or an ExportError).
    """
    saved = load_model(model_path, "cpu")
    saved.require_data(dataset)
    config = saved.config
    asked = {"rounding": rounding, "target_bytes": target_bytes}
    changes = {name: value for name, value in asked.items() if value is not None}
    config = config.model_copy(update={"export": config.export.model_copy(update=changes)})
    chosen = choose_device(device, asked_by="--device")
    (out / RESULT_NAME).unlink(missing_ok=True)
    state = {name: tensor.detach() for name, tensor in saved.model.state_dict().items()}
    data, integers, cost = packed(config, saved, dataset, chosen)
    path = out / ARTIFACT_NAME
    proofs: list[tuple[Artifact, float]] = []

    def prove_written(aside: Path) -> None:
        artifact = unpack(aside.read_bytes(), str(path))
        proofs.append((artifact, prove(artifact, state, integers)))

    write_whole(path, data, check=prove_written)
    ((artifact, error),) = proofs
    code_bytes = sizing.code_bytes(artifact.manifest.coders)
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
        rounding_cost=cost,
    )


class Packed(NamedTuple):
    """The artifact of a model, before it is a file."""

    data: bytes
    integers: Integers
    """Those that are not simply the nearest ones of the configured format."""
    cost: float | None
    """What GPTQ's cost all outputs together, over what the nearest would; None if that is nothing."""

    @property
    def artifact_bytes(self) -> int:
        """With the code that decodes it."""
        return len(self.data) + sizing.code_bytes(manifest_of(self.data).coders)


def packed(config: TrainConfig, saved: SavedModel, dataset: DataSet, device: torch.device) -> Packed:
    """The artifact of the saved weights by the export settings of `config`.

    Integers are GPTQ's, if it is asked for, in every matrix that tokens are multiplied with, and the nearest ones in
    the others; steps are the format's, or those with which it fills its bytes (`trainer.quantization.fitting`).
    Raises OSError or InputError.
    """
    export = config.export
    if export.rounding == "nearest" and export.target_bytes is None:
        return _packed(config, saved, {}, None)
    windows = calibration_windows(
        dataset,
        tokens=export.calibration_tokens,
        seq_len=config.batch.train_seq_len,
        vocab_size=config.model.vocab_size,
    )
    covariances = input_covariances(saved.model, windows, device) if export.rounding == "gptq" else {}
    inputs = {name: inputs_with(found, damping=export.damping) for name, found in covariances.items()}
    if export.target_bytes is None:
        return _packed(config, saved, *_compensated(config, saved.model, inputs, device))

    traces = row_traces(saved.model, windows, device)
    weights = {name: saved.model.get_parameter(name).detach().to(device) for name in traces}
    shares = {name: known.flatness for name, known in inputs.items()}
    costs = {name: trace * shares.get(name, 1.0) / weights[name].shape[1] for name, trace in traces.items()}

    def with_steps(scales: Scales) -> tuple[Packed, int]:
        integers, cost = _compensated(config, saved.model, inputs, device, scales)
        for name in weights.keys() - integers.keys():
            values, steps = quantize(weights[name], FITTED_BITS, None, scales[name])
            integers[name] = (values.cpu(), steps.cpu())
        found = _packed(config, saved, integers, cost)
        return found, found.artifact_bytes

    return fitted(weights, costs, with_steps, export.target_bytes)


def _compensated(
    config: TrainConfig,
    model: GPT,
    inputs: Mapping[str, Inputs],
    device: torch.device,
    scales: Scales | None = None,
) -> tuple[dict[str, tuple[Tensor, Tensor]], float | None]:
    """GPTQ's integers of the matrices there are inputs of, with these steps or those of the format; and their cost."""
    table = parameters(config.model)
    integers: dict[str, tuple[Tensor, Tensor]] = {}
    cost = nearest_cost = 0.0
    for name, known in inputs.items():
        weight = model.get_parameter(name).detach().to(device)
        if scales is None:
            found = gptq(weight, known, *config.export.format_of(table[name].kind))
        else:
            found = gptq(weight, known, FITTED_BITS, None, scales[name])
        integers[name] = (found.values.cpu(), found.scales.cpu())
        cost, nearest_cost = cost + found.cost, nearest_cost + found.nearest_cost
    return integers, cost / nearest_cost if nearest_cost else None


def _packed(config: TrainConfig, saved: SavedModel, integers: Integers, cost: float | None) -> Packed:
    data = pack(
        config,
        saved.model.state_dict(),
        tokenizer_sha256=saved.tokenizer_sha256,
        recurrence_active=saved.model.recurrence_active,
        rounded=integers,
    )
    return Packed(data=data, integers=integers, cost=cost)


def prove(artifact: Artifact, state: dict[str, Tensor], integers: Integers | None = None) -> float:
    """Largest |weight - dequantised weight|. Raises ExportError unless every tensor is the intended one.

    Intended: the `integers` there are; else bit for bit what training's fake quantisation gives (vectors: their fp16),
    and within half a step of the weight, plus what rounding the scale to fp16 can move the end of the range. Clipped
    weights lie beyond.
    """
    table = parameters(artifact.config.model)
    largest = 0.0
    for name, tensor in state.items():
        weight, got = tensor.to(torch.float32), artifact.state[name]
        allowed: Tensor | None = None
        if integers is not None and name in integers:
            intended = dequantize(*integers[name])
        elif table[name].quantized:
            bits, clip_sigma = artifact.config.export.format_of(table[name].kind)
            intended = fake_quantize(weight, bits, clip_sigma)
            allowed = _allowed_error(weight, bits, clip_sigma)
        else:
            intended = weight.to(torch.float16).to(torch.float32)
            allowed = weight.abs() * _HALF_RELATIVE + _HALF_ABSOLUTE
        if not torch.equal(got.view(torch.int32), intended.view(torch.int32)):
            raise ExportError(f"{name}: the artifact does not hold the intended values")
        error = (got - weight).abs()
        if allowed is not None and bool((error > allowed).any()):
            raise ExportError(f"{name}: an error of {float(error.max()):.3e} is more than half a step")
        largest = max(largest, float(error.max()))
    return largest


def _allowed_error(weight: Tensor, bits: int, clip_sigma: float | None) -> Tensor:
    """Per element `(rows, columns)`: half a step and the scale's own error; infinite where the row is clipped."""
    scales = row_scales(weight, bits, clip_sigma)
    limit = largest_value(bits)
    allowed = (scales * (0.5 + limit * _HALF_RELATIVE) + limit * _HALF_ABSOLUTE) * (1 + 1e-5)
    if clip_sigma is None:
        return allowed.expand_as(weight)
    return torch.where(weight.abs() > scales * limit, torch.inf, allowed)
