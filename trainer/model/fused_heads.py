"""What attention does to its heads before and after the kernel, in one trip over memory each way.

A compiler makes five kernels of these formulas forward and seven backward, at half to a quarter of what the memory
could do, because it splits and joins heads of different kinds through memory. Two operators of Triton take their place
on CUDA, differentiable, in a compiled pass or not:

- `normed_heads`: the stacked projections to queries and keys with RMS norm, RoPE and gain, and values.
- `gated_outputs`: attention's output without its share along the own value, and gated.

`trainer.model.attention` has the formulas, which stay in force everywhere else; a test holds both against each other.
"""

# No postponed annotations: torch reads an operator's schema from them.

from typing import Any

import torch
import triton
from torch import Tensor

from trainer.model.eager import EPS
from trainer.model.triton_operators import launch, operator

_TINY = 1e-12  # as torch.nn.functional.normalize
_BLOCK_TOKENS = 8


def _launch(kernel: str, tokens: int, heads: int, *arguments: Any, **constants: Any) -> None:
    launch(
        "head_kernels",
        kernel,
        -(-tokens // _BLOCK_TOKENS) * heads,
        *arguments,
        **constants,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_DIM=triton.next_power_of_2(constants["DIM"]),
    )


def _head_constants(cos: Tensor, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    half = cos.shape[-1]
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": head_dim,
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(half),
    }


@operator("caddie::normed_heads")  # type: ignore[untyped-decorator]  # torch's own
def normed_heads(qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv` (batch, time, heads + 2 kv_heads, head_dim) -> queries, keys and values, (batch, time, heads or kv_heads,
    head_dim).

    Queries and keys are normed, turned by `cos` and `sin` (time, 1, rope_dims / 2), and queries multiplied by `gain`
    (heads,) float32.
    """
    batch, time, stacked, head_dim = qkv.shape
    heads, tokens = stacked - 2 * kv_heads, batch * time
    q = qkv.new_empty((batch, time, heads, head_dim))
    k, v = qkv.new_empty((batch, time, kv_heads, head_dim)), qkv.new_empty((batch, time, kv_heads, head_dim))
    _launch(
        "heads_forward",
        tokens,
        stacked,
        *(qkv.contiguous(), cos.contiguous(), sin.contiguous(), gain, q, k, v, tokens, time, EPS),
        **_head_constants(cos, heads, kv_heads, head_dim),
    )
    return q, k, v


@operator("caddie::normed_heads_backward")  # type: ignore[untyped-decorator]  # torch's own
def _normed_heads_backward(  # noqa: PLR0917 - operators take tensors by position
    qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `qkv`, and of `gain` by token, (tokens, heads) float32."""
    batch, time, stacked, head_dim = qkv.shape
    heads, tokens = dq.shape[2], batch * time
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    shares = torch.empty((tokens, heads), dtype=torch.float32, device=qkv.device)
    _launch(
        "heads_backward",
        tokens,
        stacked,
        *(qkv.contiguous(), cos.contiguous(), sin.contiguous(), gain),
        *(dq.contiguous(), dk.contiguous(), dv.contiguous(), dqkv, shares, tokens, time, EPS),
        **_head_constants(cos, heads, dk.shape[2], head_dim),
    )
    return dqkv, shares


def _keep_heads(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
    ctx.save_for_backward(*inputs[:4])


def _heads_gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    dqkv, shares = _normed_heads_backward(*ctx.saved_tensors, dq, dk, dv)
    return dqkv, None, None, shares.sum(dim=0), None


normed_heads.register_autograd(_heads_gradients, setup_context=_keep_heads)


@operator("caddie::gated_outputs")  # type: ignore[untyped-decorator]  # torch's own
def gated_outputs(attended: Tensor, v: Tensor, gate: Tensor | None, exclusive: bool) -> Tensor:
    """`attended` (batch, time, heads, head_dim) -> the same shape: if `exclusive`, less its share along `v` (batch,
    time, kv_heads, head_dim); with a `gate` (batch, time, heads), times 2 sigmoid(gate)."""
    batch, time, heads, head_dim = attended.shape
    kv_heads = v.shape[2]
    mixed = torch.empty_like(attended, memory_format=torch.contiguous_format)
    _launch(
        "outputs_forward",
        batch * time,
        kv_heads,
        *(attended.contiguous(), v.contiguous(), attended if gate is None else gate.contiguous(), mixed, batch * time),
        **_output_constants(heads, kv_heads, head_dim, exclusive=exclusive, gated=gate is not None),
    )
    return mixed


@operator("caddie::gated_outputs_backward")  # type: ignore[untyped-decorator]  # torch's own
def _gated_outputs_backward(
    attended: Tensor, v: Tensor, gate: Tensor | None, exclusive: bool, d_mixed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attended`, `v` and `gate`; what there is no gate or no share for is empty."""
    batch, time, heads, head_dim = attended.shape
    kv_heads, gated = v.shape[2], gate is not None
    d_attended = torch.empty_like(attended, memory_format=torch.contiguous_format)
    d_v = v.new_empty(v.shape if exclusive else (0,))
    d_gate = attended.new_empty((batch, time, heads) if gated else (0,))
    _launch(
        "outputs_backward",
        batch * time,
        kv_heads,
        *(attended.contiguous(), v.contiguous(), attended if gate is None else gate.contiguous()),
        *(d_mixed.contiguous(), d_attended, d_v, d_gate, batch * time),
        **_output_constants(heads, kv_heads, head_dim, exclusive=exclusive, gated=gated),
    )
    return d_attended, d_v, d_gate


def _output_constants(heads: int, kv_heads: int, head_dim: int, *, exclusive: bool, gated: bool) -> dict[str, Any]:
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "DIM": head_dim,
        "EXCLUSIVE": exclusive,
        "GATED": gated,
        "TINY": _TINY,
    }


def _keep_outputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
    attended, v, gate, ctx.exclusive = inputs
    ctx.gated = gate is not None
    ctx.save_for_backward(attended, v, *([gate] if ctx.gated else []))


def _outputs_gradients(ctx: Any, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
    attended, v, *gate = ctx.saved_tensors
    d_attended, d_v, d_gate = _gated_outputs_backward(attended, v, gate[0] if gate else None, ctx.exclusive, d_mixed)
    return d_attended, d_v if ctx.exclusive else None, d_gate if ctx.gated else None, None


gated_outputs.register_autograd(_outputs_gradients, setup_context=_keep_outputs)
