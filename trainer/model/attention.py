"""Causal self-attention with grouped key/value heads, rotary positions and QK norm.

- Rotary position embedding: Su et al. 2021, arXiv:2104.09864; here the half-split layout, on the first
  `rope_dims` dimensions of each head (partial RoPE leaves the others without a position).
- Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245.
- QK norm: Henry et al. 2020, arXiv:2010.04245; RMS norm on queries and keys, then a learned gain per query head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import ModelConfig
from trainer.model.norm import rms_norm


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


class CausalSelfAttention(nn.Module):
    """Grouped-query attention over the past, with RoPE and normed queries and keys; its matrices come prepared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q = Projection(config.model_dim, config.model_dim)
        self.k = Projection(config.model_dim, kv_dim)
        self.v = Projection(config.model_dim, kv_dim)
        self.proj = Projection(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))

    def forward(self, x: Tensor, weights: AttentionWeights, tables: RopeTables) -> Tensor:
        """(batch, time, dim) -> (batch, time, dim); position t sees positions up to t."""
        batch, time, dim = x.shape
        qkv = functional.linear(x, weights.qkv).view(batch, time, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=2)
        q = apply_rope(rms_norm(q), tables) * self.q_gain.to(x.dtype).unsqueeze(1)
        k = apply_rope(rms_norm(k), tables)
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.kv_heads != self.heads,
        )
        return functional.linear(attended.transpose(1, 2).reshape(batch, time, dim), weights.proj)
