"""The MLP and the residual block.

- Squared ReLU: So et al. 2021 (Primer), arXiv:2109.08668; the leaky variant keeps a gradient for negative inputs and
  bought about .003 BPB in the public runs. SwiGLU: Shazeer 2020, arXiv:2002.05202.
- Residual branches carry a learned scale per dimension and start at zero through zero-initialised output projections.
- `ln_scale`: the normed inputs of layer l are scaled by 1 / sqrt(l + 1) (Sun et al. 2025, arXiv:2502.05795).
- `residual_mix`: x <- mix_0 * x + mix_1 * x0, with x0 the input embedding, before each run of the block; (1, 0) at
  first (the "x0 lambdas" of the public modded-nanogpt runs).
- Two lanes (parallel residuals; Wang and Komatsuzaki 2021, GPT-J): both branches read their own lane as the layer
  found it, and both lanes take a learned share of either:

      a <- a + w_00 A(norm(a)) + w_01 M(norm(m))
      m <- m + w_10 A(norm(a)) + w_11 M(norm(m))

  With w = 1, as it begins, the lanes are equal: GPT-J's block. They part as soon as they train, for in all but the
  last layer the gradient of a comes through later attentions and that of m through later MLPs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import ModelConfig
from trainer.model.attention import AttentionWeights, CausalSelfAttention, PassContext, Projection
from trainer.model.eager import SquaredLeakyReLU, eager_cpu, linear
from trainer.model.input_statistics import InputCovariance, MakeInputStatistics
from trainer.model.norm import rms_norm
from trainer.model.stack import Lanes
from trainer.model.triton_operators import HAS_KERNELS, fusible_mlp
from trainer.model_config import Activation

if TYPE_CHECKING:
    from trainer.model.adapters import BlockAdapters

if TYPE_CHECKING or HAS_KERNELS:
    from trainer.model.fused_mlp import squared_mlp

SLOPES: Mapping[Activation, float] = {"relu_squared": 0.0, "leaky_relu_squared": 0.5}
"""What the squared activations multiply negative inputs with before they square them."""


def activate(x: Tensor, kind: Activation) -> Tensor:
    """ReLU(x)^2 or LeakyReLU(x, 0.5)^2, elementwise; or SiLU of the first half of the last dimension times the
    second."""
    if kind == "swiglu":
        first, second = x.chunk(2, dim=-1)
        return functional.silu(first) * second
    slope = SLOPES[kind]
    if eager_cpu(x):
        squared: Tensor = SquaredLeakyReLU.apply(x, slope)  # type: ignore[no-untyped-call]  # torch's own
        return squared
    return (functional.leaky_relu(x, slope) if slope else functional.relu(x)).square()


class BlockWeights(NamedTuple):
    """The matrices of one block as one pass uses them; the scales of its branches are in `proj`."""

    attention: AttentionWeights
    fc: Tensor
    proj: Tensor


class Prepare(Protocol):
    """A float32 weight (out, in), and perhaps a scale (out,) of its rows -> the matrix that a pass multiplies with."""

    def __call__(self, weight: Tensor, row_scale: Tensor | None = None, /) -> Tensor: ...


class Mlp(nn.Module):
    """Two matrices with an activation between them; they come prepared. (hidden, dim), twice as high for SwiGLU, and
    (dim, hidden)."""

    def __init__(self, config: ModelConfig, watch_inputs: MakeInputStatistics | None) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        gated = 2 if config.activation == "swiglu" else 1
        self.fc = Projection(config.model_dim, gated * config.mlp_dim)
        self.proj = Projection(config.mlp_dim, config.model_dim)
        self.fc_inputs = self.proj_inputs = None
        if watch_inputs is not None:
            self.fc_inputs = watch_inputs(config.model_dim)
            self.proj_inputs = watch_inputs(config.mlp_dim)

    def forward(self, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        """(batch, time, dim) -> (batch, time, dim)."""
        watched = self.fc_inputs is not None
        if not watched and self.activation in SLOPES and fusible_mlp(x, fc):
            return squared_mlp(x, fc, proj, SLOPES[self.activation])
        hidden = activate(linear(x, fc), self.activation)
        if self.fc_inputs is not None and self.proj_inputs is not None:
            self.fc_inputs.observe(x)
            self.proj_inputs.observe(hidden)
        return linear(hidden, proj)


class Block(nn.Module):
    """x + attn_scale * attention(norm(x)), then the same with the MLP; or both at once, in two lanes. Norms carry no
    weights."""

    norm_scale: Tensor

    def __init__(self, config: ModelConfig, layer: int, watch_inputs: MakeInputStatistics | None = None) -> None:
        super().__init__()
        dim = config.model_dim
        self.attn = CausalSelfAttention(config, layer, watch_inputs)
        self.mlp = Mlp(config, watch_inputs)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = self.lane_weights = None
        if config.residual_mix:
            self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        if config.parallel_from is not None and layer >= config.parallel_from:
            self.lane_weights = nn.Parameter(torch.ones(2, 2))
        # A tensor, as a number of each layer's own would be a compiled graph of its own.
        self.ln_scale = config.ln_scale
        self.register_buffer("norm_scale", torch.tensor(1 / math.sqrt(layer + 1)), persistent=False)

    def prepared_weights(self, prepare: Prepare) -> BlockWeights:
        """The block's matrices, each after `prepare`. A branch's scale goes into the rows of its last matrix, once a
        pass: per token it would be another trip to memory, and its gradient one more."""
        attn, mlp = self.attn, self.mlp
        return BlockWeights(
            attention=AttentionWeights(
                qkv=torch.cat([prepare(part.weight) for part in (attn.q, attn.k, attn.v)]),
                proj=prepare(attn.proj.weight, self.attn_scale),
            ),
            fc=prepare(mlp.fc.weight),
            proj=prepare(mlp.proj.weight, self.mlp_scale),
        )

    def input_covariances(self, prefix: str) -> dict[str, InputCovariance]:
        """By the name of each matrix, in the state dict's order; empty if inputs are not tracked."""
        found = {
            f"{prefix}.attn.q.weight": self.attn.qkv_inputs,
            f"{prefix}.attn.k.weight": self.attn.qkv_inputs,
            f"{prefix}.attn.v.weight": self.attn.qkv_inputs,
            f"{prefix}.attn.proj.weight": self.attn.proj_inputs,
            f"{prefix}.mlp.fc.weight": self.mlp.fc_inputs,
            f"{prefix}.mlp.proj.weight": self.mlp.proj_inputs,
        }
        return {name: covariance for name, covariance in found.items() if covariance is not None}

    def forward(
        self, lanes: Lanes, weights: BlockWeights, shared: PassContext, adapters: BlockAdapters | None = None
    ) -> Lanes:
        """One or two lanes, each (batch, time, dim) -> as many."""
        dtype = lanes[0].dtype
        if self.resid_mix is not None:
            own, embedded = self.resid_mix.to(dtype).unbind()
            lanes = tuple(torch.addcmul(lane * own, shared.embedded, embedded) for lane in lanes)
        if self.lane_weights is None:
            (x,) = lanes
            x = x + self.attn(self._normed(x), weights.attention, shared, adapters)
            return (x + self.mlp(self._normed(x), weights.fc, weights.proj),)
        a, m = lanes
        from_attention = self.attn(self._normed(a), weights.attention, shared, adapters)
        from_mlp = self.mlp(self._normed(m), weights.fc, weights.proj)
        share = self.lane_weights.to(dtype)
        return (
            a + share[0, 0] * from_attention + share[0, 1] * from_mlp,
            m + share[1, 0] * from_attention + share[1, 1] * from_mlp,
        )

    def _normed(self, x: Tensor) -> Tensor:
        if not self.ln_scale:
            return rms_norm(x)
        # In float32: eager CUDA would round the scale itself to bfloat16 first, a compiled pass would not.
        return (rms_norm(x).float() * self.norm_scale).to(x.dtype)
