"""Bytes of a configuration's artifact before anything is trained; the face of `trainer.memory` too. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from trainer.config import Coder, ExportConfig, TrainConfig
from trainer.export_config import CODER_MODULES, FITTED_BITS, FITTED_SLACK
from trainer.memory import (
    USABLE_SHARE,
    chosen_micro_tokens,
    fitting_micro_tokens,
    memory_terms,
    peak_memory_bytes,
)
from trainer.parameters import TABLE_KINDS, Kind, Parameter, parameter_count, parameter_shapes, parameters

__all__ = [
    "INFERENCE_MODULES",
    "USABLE_SHARE",
    "Calibration",
    "SizeEstimate",
    "cheapest_coders",
    "chosen_micro_tokens",
    "code_bytes",
    "coder_bytes",
    "fitting_micro_tokens",
    "inference_files",
    "memory_terms",
    "parameter_count",
    "parameter_shapes",
    "peak_memory_bytes",
    "predict_artifact",
]

INFERENCE_MODULES = (
    "trainer",
    "trainer.artifact",
    "trainer.config",
    "trainer.config_section",
    "trainer.data",
    "trainer.data.byte_table",
    "trainer.data.manifest",
    "trainer.data.shards",
    "trainer.durable",
    "trainer.errors",
    "trainer.evaluation",
    "trainer.evaluation_boundaries",
    "trainer.evaluation_windows",
    "trainer.export_config",
    "trainer.model",
    "trainer.model.attention",
    "trainer.model.attention_backends",
    "trainer.model.bigrams",
    "trainer.model.blocks",
    "trainer.model.eager",
    "trainer.model.fused_heads",
    "trainer.model.fused_loss",
    "trainer.model.fused_mlp",
    "trainer.model.gpt",
    "trainer.model.head",
    "trainer.model.head_kernels",
    "trainer.model.input_statistics",
    "trainer.model.loss_kernels",
    "trainer.model.mlp_kernels",
    "trainer.model.norm",
    "trainer.model.recurrence",
    "trainer.model.regions",
    "trainer.model.smear",
    "trainer.model.stack",
    "trainer.model.triton_operators",
    "trainer.model.varlen_attention",
    "trainer.model_config",
    "trainer.optimization_config",
    "trainer.parameters",
    "trainer.presets",
    "trainer.quantization",
    "trainer.quantization.coders",
    "trainer.quantization.coding",
    "trainer.quantization.fake_quant",
    "trainer.quantization.rounding",
    "trainer.ranks",
)
"""What decoding and scoring an artifact imports of this package, on CUDA (the kernels); their source counts as the
artifact's code."""

# Bits per coded weight beyond those of Gaussian rows, by kind: means over int6 exports (row-maximum scales) of six
# shapes, 64 to 384 wide with vocabularies of 1024 and 4096, trained 150 to 1500 steps on prose. Muon's matrices are
# a little flatter than a Gaussian. Output projections and the embedding have heavier tails, and these grow with
# training (the embedding: +.15 early, -.85 late), which is what the interval is for. No export had an untied head,
# bigram or value embeddings: an untied head is taken for an embedding, and none of them is calibrated.
_OFFSET_BITS: dict[Kind, float] = {
    "embedding": -0.25,
    "head": -0.25,
    "attention_in": 0.07,
    "mlp_in": 0.09,
    "proj": -0.13,
}
_GAUSSIAN_ENTROPY_BITS = 0.5 * math.log2(2 * math.pi * math.e)
# Over the order-0 entropy, measured on Gaussian and Student-t rows: Huffman codes .03 to .05 bits, and ANS nothing but
# its tables, about so many bytes for each of the integers there are. (What it gains by classes of columns is a matter
# of the weights, and not predicted.)
_HUFFMAN_BITS = 0.045
_TABLE_BYTES = 2.3
# Untrained uniform rows fill all levels evenly.
_UNIFORM_MARGIN_BITS = 0.05
# Measured on the same exports: a stream's own bytes, an fp16 number after coding, the manifest and its entries.
_STREAM_BYTES = 60
_HALF_BYTES = 1.57
_FRAME_BYTES = 830
_TENSOR_BYTES = 13.3
_LOW_SHARE = 0.15
_HIGH_SHARE = 0.06


class Calibration(BaseModel):
    """What past exports say about the prediction: measured over predicted weights bytes, and how far that scatters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(gt=0, description="Mean of measured / predicted bytes of the weights file.")
    spread: float = Field(
        ge=0, lt=1, description="Half-width of the interval as a share, such as 2 standard deviations."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeEstimate:
    """Predicted bytes of an artifact (weights file and code); `by_module`: (name, parameters, bytes) of the weights."""

    artifact_bytes: int
    low_bytes: int
    high_bytes: int
    code_bytes: int
    by_module: tuple[tuple[str, int, int], ...]
    scheme: str


def code_bytes(coders: Iterable[Coder] = ()) -> int:
    """Bytes of the source files of `INFERENCE_MODULES`, and of what these coders need beside them, as they lie on the
    disk. Raises OSError if one is missing."""
    return sum(path.stat().st_size for path in inference_files()) + coder_bytes(coders)


def coder_bytes(coders: Iterable[Coder]) -> int:
    """Bytes of the source files that are only there to decode what these coders wrote. Raises OSError."""
    modules = {module for coder in coders for module in CODER_MODULES[coder]}
    return sum(_source_of(module).stat().st_size for module in modules)


def cheapest_coders(sizes: Sequence[Mapping[Coder, float]]) -> tuple[Coder, ...]:
    """Of `sizes`, each matrix's bytes by coder, all with the same coders: the choice of coders with which the shortest
    streams and the coders' own code together are fewest. Raises OSError."""
    coders = tuple(sizes[0])
    choices = [chosen for count in range(1, len(coders) + 1) for chosen in combinations(coders, count)]
    return min(
        choices, key=lambda chosen: coder_bytes(chosen) + sum(min(size[coder] for coder in chosen) for size in sizes)
    )


def inference_files() -> Iterator[Path]:
    return map(_source_of, INFERENCE_MODULES)


def _source_of(module: str) -> Path:
    path = Path(__file__).resolve().parent.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def predict_artifact(config: TrainConfig, calibration: Calibration | None = None) -> SizeEstimate:
    """Bytes of the exported artifact, with an interval. Pure but for the sizes of our own source files.

    Without a calibration the interval is asymmetric: the longer the training, the heavier the rows' tails, the
    fewer bits. It is meant for trained weights; rows as they are initialised (uniform) may take more than its
    upper end, which is never above what uniform rows would take, but for 1 %.

    With `export.target_bytes` it is these bytes, unless integers as fine as there are take fewer.
    """
    model, export = config.model, config.export
    if export.target_bytes is not None:
        return _filled(config, export.target_bytes, calibration)
    table = parameters(model)
    sizes = {
        name: {coder: _stream_bytes(export, parameter, coder) for coder in export.coders}
        for name, parameter in table.items()
        if parameter.quantized
    }
    coders = cheapest_coders(list(sizes.values()))
    sums: dict[str, tuple[int, float]] = {}
    halves = 0
    highest = 0.0
    for name, parameter in table.items():
        if not parameter.quantized:
            halves += parameter.count
            continue
        halves += parameter.shape[0]
        module = _module(name, parameter.kind)
        params, total = sums.get(module, (0, 0.0))
        sums[module] = (params + parameter.count, total + min(sizes[name][coder] for coder in coders))
        bits = export.format_of(parameter.kind).bits
        highest += parameter.count * (math.log2(2**bits - 1) + _UNIFORM_MARGIN_BITS) / 8
    vectors = parameter_count(model) - sum(params for params, _ in sums.values())
    sums["scales and vectors"] = (vectors, halves * _HALF_BYTES)
    sums["manifest"] = (0, _FRAME_BYTES + _TENSOR_BYTES * len(table))

    ratio = calibration.ratio if calibration else 1.0
    by_module = tuple((module, params, round(total * ratio)) for module, (params, total) in sums.items())
    weights = sum(size for _, _, size in by_module)
    code = code_bytes(coders)
    if calibration:
        low, high = weights * (1 - calibration.spread), weights * (1 + calibration.spread)
    else:
        fixed = sums["scales and vectors"][1] + sums["manifest"][1]
        low = weights * (1 - _LOW_SHARE)
        high = max(min(weights * (1 + _HIGH_SHARE), highest + 2 * fixed), weights * 1.01)
    return SizeEstimate(
        artifact_bytes=weights + code,
        low_bytes=math.floor(low) + code,
        high_bytes=math.ceil(high) + code,
        code_bytes=code,
        by_module=by_module,
        scheme=export.scheme,
    )


def _filled(config: TrainConfig, target: int, calibration: Calibration | None) -> SizeEstimate:
    """Of an artifact that fills `target` bytes: what its finest steps would take, matrices scaled down to them."""
    plain = {"bits": FITTED_BITS, "clip_sigma": None, "embedding_bits": None, "embedding_clip_sigma": None}
    export = config.export.model_copy(update={**plain, "target_bytes": None})
    finest = predict_artifact(config.model_copy(update={"export": export}), calibration)
    beside = {"scales and vectors", "manifest"}
    fixed = finest.code_bytes + sum(size for module, _, size in finest.by_module if module in beside)
    share = min(1.0, max(0.0, (target - fixed) / (finest.artifact_bytes - fixed)))
    by_module = tuple(
        (module, params, size if module in beside else math.floor(share * size))
        for module, params, size in finest.by_module
    )
    total = finest.code_bytes + sum(size for _, _, size in by_module)
    return replace(
        finest,
        artifact_bytes=total,
        low_bytes=min(finest.low_bytes, math.floor((1 - FITTED_SLACK) * total)),
        high_bytes=min(finest.high_bytes, max(target, fixed)),
        by_module=by_module,
        scheme=config.export.scheme,
    )


def _module(name: str, kind: Kind) -> str:
    """The row of a quantised tensor in `SizeEstimate.by_module`."""
    for table in ("bigram", "value"):
        if name.startswith(f"{table}_"):
            return f"{table} embeddings"
    if kind in TABLE_KINDS:
        return kind
    return "attention" if ".attn." in name else "mlp"


def _stream_bytes(export: ExportConfig, parameter: Parameter, coder: Coder) -> float:
    """Order-0 entropy of Gaussian rows at step size clip / Q, plus the kind's offset and what the coder adds."""
    bits, clip_sigma = export.format_of(parameter.kind)
    limit = 2 ** (bits - 1) - 1
    clip_sigmas = _expected_maximum(parameter.shape[1]) if clip_sigma is None else clip_sigma
    entropy = _GAUSSIAN_ENTROPY_BITS + math.log2(limit / clip_sigmas) + _OFFSET_BITS[parameter.kind]
    entropy += 0.0 if coder == "ans" else _HUFFMAN_BITS
    per_weight = min(max(entropy, 1.0), math.log2(2 * limit + 1) + _UNIFORM_MARGIN_BITS)
    own = _TABLE_BYTES * (2 * limit + 1) if coder == "ans" else _STREAM_BYTES
    return parameter.count * per_weight / 8 + own


def _expected_maximum(count: int) -> float:
    """Of |x| over `count` standard normal draws: the Gumbel limit, Cramer 1946 section 28.6."""
    root = math.sqrt(2 * math.log(2 * count))
    return root - (math.log(math.log(2 * count)) + math.log(4 * math.pi) - 2 * 0.5772) / (2 * root)
