"""Causal self-attention with grouped key/value heads, rotary positions, QK norm and what else an output can take.

- Rotary position embedding: Su et al. 2021, arXiv:2104.09864; here the half-split layout, on the first
  `rope_dims` dimensions of each head (partial RoPE leaves the others without a position).
- Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245.
- QK norm: Henry et al. 2020, arXiv:2010.04245; RMS norm on queries and keys, then a learned gain per query head.
- Value embeddings (Zhou et al. 2024, value residuals, arXiv:2410.17897; as token tables in the public modded-nanogpt
  runs): v <- v + scale * W table[token], with one table and one W for all layers that have a scale; 0 at first.
- Exclusive self-attention (the public parameter-golf runs): y <- y - (y . u) u with u the position's own value over
  its norm, so that a head tells a position only what its own value does not.
- Gated attention (Qiu et al. 2025, arXiv:2505.06708; "sparse", from a few dimensions, in the public runs):
  y <- y * 2 sigmoid(gate . x), per head, with x the layer's normed input; gate is 0 at first, so the factor is 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import ModelConfig
from trainer.model.attention_backends import Attend
from trainer.model.eager import RmsNormRope, eager_cpu, linear
from trainer.model.input_statistics import MakeInputStatistics
from trainer.model.norm import rms_norm
from trainer.model.triton_operators import HAS_KERNELS, fusible
from trainer.parameters import GATE_WIDTH

if TYPE_CHECKING:
    from trainer.model.adapters import BlockAdapters

if TYPE_CHECKING or HAS_KERNELS:
    from trainer.model.fused_heads import gated_outputs, normed_heads


class RopeTables(NamedTuple):
    """Cosines and sines, each (time, 1, rope_dims / 2), in the dtype of the activations."""

    cos: Tensor
    sin: Tensor


def rope_tables(time: int, rope_dims: int, base: float, device: torch.device) -> RopeTables:
    """Angles position * base^(-2i / rope_dims), in float32; the axis of length 1 broadcasts over heads."""
    exponents = torch.arange(0, rope_dims, 2, dtype=torch.float32, device=device) / rope_dims
    angles = torch.outer(torch.arange(time, dtype=torch.float32, device=device), base**-exponents)
    return RopeTables(angles.cos().unsqueeze(1), angles.sin().unsqueeze(1))


def apply_rope(x: Tensor, tables: RopeTables) -> Tensor:
    """Turn the first rope_dims dimensions of `x` (batch, time, heads, head_dim); the rest passes through."""
    half = tables.cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * tables.cos - second * tables.sin, second * tables.cos + first * tables.sin)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1)


def rms_norm_rope(x: Tensor, tables: RopeTables, gain: Tensor | None = None) -> Tensor:
    """RMS norm over each head of `x` (batch, time, heads, head_dim), RoPE, and `gain` (heads,) if it is given."""
    if eager_cpu(x):
        found: Tensor = RmsNormRope.apply(x, *tables, gain)  # type: ignore[no-untyped-call]  # torch's own
        return found
    turned = apply_rope(rms_norm(x), tables)
    return turned if gain is None else turned * gain.to(x.dtype).unsqueeze(1)


class Projection(nn.Module):
    """A bias-free weight (out, in). It does no work of its own: the GPT prepares weights once per pass
    (precision, fake quantisation), so that a looped layer does not pay for that each time it runs."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))


class AttentionWeights(NamedTuple):
    """What one pass uses: query, key and value projections stacked (dim + 2 * kv_dim, dim), and the output's."""

    qkv: Tensor
    proj: Tensor


class PassContext(NamedTuple):
    """What all layers of one pass share: rotary tables, the attention's kernel with its masks, over whole rows and of
    layers with a window, the input embedding (batch, time, dim), and the projected value embedding (batch, time,
    kv_dim), if there is one."""

    tables: RopeTables
    attend: Attend
    attend_window: Attend
    embedded: Tensor
    values: Tensor | None


def without_own_value(attended: Tensor, v: Tensor) -> Tensor:
    """`attended` (batch, time, heads, head_dim) less its share along the position's own value, `v` (batch, time,
    kv_heads, head_dim); where that is zero, unchanged."""
    own = functional.normalize(v, dim=-1).unsqueeze(3)
    grouped = attended.reshape(*v.shape[:3], -1, v.shape[3])
    return (grouped - (grouped * own).sum(dim=-1, keepdim=True) * own).flatten(2, 3)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention over the past, with RoPE and normed queries and keys; its matrices come prepared."""

    def __init__(self, config: ModelConfig, layer: int, watch_inputs: MakeInputStatistics | None = None) -> None:
        super().__init__()
        dim = config.model_dim
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q = Projection(dim, dim)
        self.k = Projection(dim, config.kv_dim)
        self.v = Projection(dim, config.kv_dim)
        self.proj = Projection(dim, dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.gate = self.value_scale = None
        if config.attention_gate != "none":
            width = dim if config.attention_gate == "full" else min(GATE_WIDTH, dim)
            self.gate = nn.Parameter(torch.zeros(config.num_heads, width))
        if config.value_embedding is not None and layer in config.value_embedding.layers:
            self.value_scale = nn.Parameter(torch.zeros(1))
        self.exclusive = layer >= config.num_layers - config.xsa_last_layers
        self.windowed = config.windowed(layer)
        self.qkv_inputs = self.proj_inputs = None
        if watch_inputs is not None:
            self.qkv_inputs = watch_inputs(dim)
            self.proj_inputs = watch_inputs(dim)

    def forward(
        self, x: Tensor, weights: AttentionWeights, shared: PassContext, adapters: BlockAdapters | None = None
    ) -> Tensor:
        """(batch, time, dim) -> (batch, time, dim); position t sees positions up to t, as its function in `shared` has
        it."""
        batch, time, dim = x.shape
        qkv = linear(x, weights.qkv).view(batch, time, self.heads + 2 * self.kv_heads, self.head_dim)
        fused = fusible(x)
        if fused and adapters is None:
            q, k, v = normed_heads(qkv, *shared.tables, self.q_gain, self.kv_heads)
        else:
            q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=2)
            if adapters is not None:
                q = q + adapters.q(x).view(q.shape)
                v = v + adapters.v(x).view(v.shape)
            q = rms_norm_rope(q, shared.tables, self.q_gain)
            k = rms_norm_rope(k, shared.tables)
        if self.value_scale is not None and shared.values is not None:
            v = torch.addcmul(v, shared.values.view(v.shape), self.value_scale.to(x.dtype))
        attended = shared.attend_window(q, k, v) if self.windowed else shared.attend(q, k, v)
        gate = None if self.gate is None else functional.linear(x[..., : self.gate.shape[1]], self.gate.to(x.dtype))
        if fused and (self.exclusive or gate is not None):
            attended = gated_outputs(attended, v, gate, self.exclusive)
        else:
            attended = without_own_value(attended, v) if self.exclusive else attended
            attended = attended if gate is None else attended * (2 * torch.sigmoid(gate)).unsqueeze(3)
        mixed = attended.reshape(batch, time, dim)
        if self.qkv_inputs is not None and self.proj_inputs is not None:
            self.qkv_inputs.observe(x)
            self.proj_inputs.observe(mixed)
        return linear(mixed, weights.proj)
