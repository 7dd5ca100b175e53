"""Bytes, parameters and memory of a configuration, before anything is trained. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.config import ExportConfig, ModelConfig, TrainConfig
from trainer.parameters import parameters

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
    "trainer.evaluation_windows",
    "trainer.model",
    "trainer.model.attention",
    "trainer.model.blocks",
    "trainer.model.gpt",
    "trainer.model.head",
    "trainer.model.norm",
    "trainer.model.recurrence",
    "trainer.model_config",
    "trainer.optimization_config",
    "trainer.parameters",
    "trainer.presets",
    "trainer.quantization",
    "trainer.quantization.coding",
    "trainer.quantization.fake_quant",
    "trainer.quantization.rounding",
    "trainer.ranks",
    "trainer.sizing",
)
"""What decoding and scoring an artifact imports of this package; their source counts as the artifact's code."""

Kind = Literal["embedding", "attention_in", "mlp_in", "proj"]

# Bits per coded weight beyond those of Gaussian rows, by kind: means over int6 exports (row-maximum scales) of six
# shapes, 64 to 384 wide with vocabularies of 1024 and 4096, trained 150 to 1500 steps on prose. Muon's matrices are
# a little flatter than a Gaussian. Output projections and the embedding have heavier tails, and these grow with
# training (the embedding: +.15 early, -.85 late), which is what the interval is for.
_OFFSET_BITS: dict[Kind, float] = {"embedding": -0.25, "attention_in": 0.07, "mlp_in": 0.09, "proj": -0.13}
_GAUSSIAN_ENTROPY_BITS = 0.5 * math.log2(2 * math.pi * math.e)
# Huffman codes over the order-0 entropy, measured on Gaussian and Student-t rows: .03 to .05 bits.
_HUFFMAN_BITS = 0.045
# Untrained uniform rows fill all levels evenly.
_UNIFORM_MARGIN_BITS = 0.05
# Measured on the same exports: code tables of a stream, an fp16 number after coding, the manifest and its entries.
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


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the GPT's state dict with its shape, in the state dict's order. The tied head counts once."""
    return {name: parameter.shape for name, parameter in parameters(model).items()}


def parameter_count(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def quantized_names(model: ModelConfig) -> frozenset[str]:
    """The tensors that the exporter quantises: the blocks' matrices, the embeddings and the head."""
    return frozenset(name for name, parameter in parameters(model).items() if parameter.quantized)


def scheme_name(export: ExportConfig) -> str:
    """Such as `int6+zlib`."""
    return f"int{export.bits}+zlib"


def code_bytes() -> int:
    """Bytes of the source files of `INFERENCE_MODULES`, as they lie on the disk. Raises OSError if one is missing."""
    return sum(path.stat().st_size for path in inference_files())


def inference_files() -> Iterator[Path]:
    root = Path(__file__).resolve().parent
    for module in INFERENCE_MODULES:
        path = root.joinpath(*module.split(".")[1:])
        yield path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


_ALLOCATOR_SLACK = 1.15
"""Workspaces and fragmentation, which the count leaves out: three shapes on an H200 took 1.04 to 1.12 of it."""


def peak_memory_bytes(config: TrainConfig) -> int:
    """Rough estimate of peak device memory in training, for placement, which had better err high.

    Weights, gradients and one (Muon) or two (AdamW) moments in fp32 with a bf16 copy of the weights; activations in
    bf16 for each layer that runs, kept for the backward pass; logits of one micro-batch in bf16 and twice in fp32;
    and .6 GB for the CUDA context. On a CPU, where activations are fp32, less than this is used by the context.
    """
    model, batch = config.model, config.batch
    params = parameter_count(model)
    adam = model.vocab_size * model.model_dim
    states = params * (4 + 4 + 4 + 2) + adam * 4
    tokens = batch.micro_tokens
    kv_dim = model.num_kv_heads * model.head_dim
    per_layer = 2 * (6 * model.model_dim + 2 * kv_dim + 3 * model.mlp_dim)
    activations = tokens * (_layer_runs(model) * per_layer + 12 * model.model_dim + 10 * model.vocab_size)
    return int(_ALLOCATOR_SLACK * (states + activations + 600_000_000))


def predict_artifact(config: TrainConfig, calibration: Calibration | None = None) -> SizeEstimate:
    """Bytes of the exported artifact, with an interval. Pure but for the sizes of our own source files.

    Without a calibration the interval is asymmetric: the longer the training, the heavier the rows' tails, the
    fewer bits. It is meant for trained weights; rows as they are initialised (uniform) may take more than its
    upper end, which is never above what uniform rows would take, but for 1 %.
    """
    model, export = config.model, config.export
    quantized = quantized_names(model)
    sums: dict[str, tuple[int, float]] = {}
    halves = 0
    highest = 0.0
    for name, shape in parameter_shapes(model).items():
        count = math.prod(shape)
        halves += shape[0]
        if name in quantized:
            module, kind = _place(name)
            size = count * _bits_per_weight(export, kind, shape[1]) / 8 + _STREAM_BYTES
            params, total = sums.get(module, (0, 0.0))
            sums[module] = (params + count, total + size)
            highest += count * (math.log2(2**export.bits - 1) + _UNIFORM_MARGIN_BITS) / 8
    vectors = parameter_count(model) - sum(params for params, _ in sums.values())
    sums["scales and vectors"] = (vectors, halves * _HALF_BYTES)
    sums["manifest"] = (0, _FRAME_BYTES + _TENSOR_BYTES * len(parameter_shapes(model)))

    ratio = calibration.ratio if calibration else 1.0
    by_module = tuple((module, params, round(total * ratio)) for module, (params, total) in sums.items())
    weights = sum(size for _, _, size in by_module)
    code = code_bytes()
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
        scheme=scheme_name(export),
    )


def _layer_runs(model: ModelConfig) -> int:
    """Layers that one pass runs with the loop on."""
    loop = model.recurrence
    if loop is None:
        return model.num_layers
    return model.num_layers + (loop.last - loop.first + 1) * (loop.loops - 1)


def _place(name: str) -> tuple[str, Kind]:
    if name.startswith("tok_emb"):
        return "embedding", "embedding"
    module = "attention" if ".attn." in name else "mlp"
    if ".proj." in name:
        return module, "proj"
    return module, "attention_in" if module == "attention" else "mlp_in"


def _bits_per_weight(export: ExportConfig, kind: Kind, columns: int) -> float:
    """Order-0 entropy of a Gaussian row at step size clip / Q, plus the kind's offset and Huffman's rounding."""
    limit = 2 ** (export.bits - 1) - 1
    clip_sigmas = _expected_maximum(columns) if export.clip_sigma is None else export.clip_sigma
    entropy = _GAUSSIAN_ENTROPY_BITS + math.log2(limit / clip_sigmas) + _OFFSET_BITS[kind] + _HUFFMAN_BITS
    return min(max(entropy, 1.0), math.log2(2 * limit + 1) + _UNIFORM_MARGIN_BITS)


def _expected_maximum(count: int) -> float:
    """Of |x| over `count` standard normal draws: the Gumbel limit, Cramer 1946 section 28.6."""
    root = math.sqrt(2 * math.log(2 * count))
    return root - (math.log(math.log(2 * count)) + math.log(4 * math.pi) - 2 * 0.5772) / (2 * root)
