"""Every parameter of the GPT: its name, shape and kind. Torch-free, and the one place that says so.

The kind decides what a parameter is to everybody else: which optimiser moves it (`trainer.optim.groups`), whether the
exporter quantises it, how many bits that takes (`trainer.sizing`), and what counts as matrix work (`trainer.flops`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.model_config import ModelConfig

GATE_WIDTH = 12
"""Input dimensions that the smear gate and sparse attention gates look at."""

Kind = Literal["embedding", "head", "attention_in", "mlp_in", "proj", "control"]
"""`embedding`: tables that tokens are looked up in. `head`: an untied one. `attention_in`, `mlp_in`: matrices that read
the residual stream. `proj`: matrices that write to it. `control`: gains, gates, scales and mixes, kept in fp16."""

TABLE_KINDS: frozenset[Kind] = frozenset({"embedding", "head"})
"""With a row for each token, or pair of tokens."""
MATRIX_KINDS: frozenset[Kind] = frozenset({"attention_in", "mlp_in", "proj"})
"""Matrices of the blocks, which Muon moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    shape: tuple[int, ...]
    kind: Kind

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def quantized(self) -> bool:
        """Whether the exporter rounds it, and quantisation-aware training with it."""
        return self.kind != "control"


def parameters(model: ModelConfig) -> dict[str, Parameter]:
    """Every tensor of the GPT's state dict, in the state dict's order. A tied head counts once, as the embedding."""
    return {name: Parameter(shape=shape, kind=kind) for name, shape, kind in _parameters(model)}


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the GPT's state dict with its shape, in the state dict's order. The tied head counts once."""
    return {name: parameter.shape for name, parameter in parameters(model).items()}


def parameter_count(model: ModelConfig) -> int:
    return sum(parameter.count for parameter in parameters(model).values())


_Row = tuple[str, tuple[int, ...], Kind]


def _parameters(model: ModelConfig) -> Iterator[_Row]:
    dim = model.model_dim
    if model.unet_skips:
        yield "skip_weights", (model.skip_count, dim), "control"
    if model.smear_gate:
        yield "smear_gate", (1, min(GATE_WIDTH, dim)), "control"
        yield "smear_scale", (1,), "control"
    if model.bigram_embedding is not None:
        yield "bigram_scale", (1,), "control"
    if model.parallel_from is not None:
        yield "lane_merge", (1,), "control"
    yield "tok_emb.weight", (model.vocab_size, dim), "embedding"
    if model.bigram_embedding is not None:
        yield "bigram_emb.weight", (model.bigram_embedding.rows, model.bigram_embedding.dim), "embedding"
        yield "bigram_proj.weight", (dim, model.bigram_embedding.dim), "attention_in"
    if model.value_embedding is not None:
        yield "value_emb.weight", (model.vocab_size, model.value_embedding.dim), "embedding"
        yield "value_proj.weight", (model.kv_dim, model.value_embedding.dim), "attention_in"
    for layer in range(model.num_layers):
        yield from _block(model, layer)
    if not model.tie_embeddings:
        yield "lm_head.weight", (model.vocab_size, dim), "head"


def _block(model: ModelConfig, layer: int) -> Iterator[_Row]:
    dim, kv_dim, at = model.model_dim, model.kv_dim, f"blocks.{layer}"
    yield f"{at}.attn_scale", (dim,), "control"
    yield f"{at}.mlp_scale", (dim,), "control"
    if model.residual_mix:
        yield f"{at}.resid_mix", (2, dim), "control"
    if model.parallel_from is not None and layer >= model.parallel_from:
        yield f"{at}.lane_weights", (2, 2), "control"
    yield f"{at}.attn.q_gain", (model.num_heads,), "control"
    if model.attention_gate != "none":
        width = dim if model.attention_gate == "full" else min(GATE_WIDTH, dim)
        yield f"{at}.attn.gate", (model.num_heads, width), "control"
    if model.value_embedding is not None and layer in model.value_embedding.layers:
        yield f"{at}.attn.value_scale", (1,), "control"
    yield f"{at}.attn.q.weight", (dim, dim), "attention_in"
    yield f"{at}.attn.k.weight", (kv_dim, dim), "attention_in"
    yield f"{at}.attn.v.weight", (kv_dim, dim), "attention_in"
    yield f"{at}.attn.proj.weight", (dim, dim), "proj"
    gated = 2 if model.activation == "swiglu" else 1
    yield f"{at}.mlp.fc.weight", (gated * model.mlp_dim, dim), "mlp_in"
    yield f"{at}.mlp.proj.weight", (dim, model.mlp_dim), "proj"
