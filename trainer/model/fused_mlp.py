"""The MLP with its squared activation inside the matrix products, on Hopper.

Between the products of an MLP a compiler goes over its hidden activations, the largest tensors of a pass, once more
forward and twice more backward. Here the first product writes them and their activations, and the product that brings
the gradient back multiplies it by the activation's slope, while a tile is still in registers (the public modded-nanogpt
runs do so too). `trainer.model.blocks` has the formula, which stays in force everywhere else.
"""

# No postponed annotations: torch reads an operator's schema from them.

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

_ROWS, _COLUMNS, _INNER = 128, 256, 64
_GROUP, _STAGES, _WARPS = 8, 3, 8


def _product(first: Tensor, second: Tensor, before: Tensor, after: Tensor, *, slope: float, backward: bool) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - comes with torch for CUDA alone

    from trainer.model.mlp_kernels import squared_product  # noqa: PLC0415 - as above

    (rows, inner), columns = first.shape, second.shape[0]
    programs = torch.cuda.get_device_properties(first.device).multi_processor_count if first.is_cuda else 1
    half = [_ROWS, _COLUMNS // 2]
    squared_product[(min(programs, -(-rows // _ROWS) * -(-columns // _COLUMNS)),)](
        TensorDescriptor.from_tensor(first, [_ROWS, _INNER]),
        TensorDescriptor.from_tensor(second, [_COLUMNS, _INNER]),
        TensorDescriptor.from_tensor(before, half),
        TensorDescriptor.from_tensor(after, half),
        *(rows, columns, inner),
        SLOPE=slope,
        BACKWARD=backward,
        PROGRAMS=programs,
        BLOCK_ROWS=_ROWS,
        BLOCK_COLUMNS=_COLUMNS,
        BLOCK_INNER=_INNER,
        GROUP=_GROUP,
        num_stages=_STAGES,
        num_warps=_WARPS,
    )


@custom_op("caddie::squared_mlp", mutates_args={})
def _squared_mlp(x: Tensor, fc: Tensor, proj: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `squared_mlp` gives for rows (rows, dim), and, for the way back, the hidden rows before and after their
    activation, (rows, hidden)."""
    before = x.new_empty((x.shape[0], fc.shape[0]))
    after = torch.empty_like(before)
    _product(x.contiguous(), fc.contiguous(), before, after, slope=slope, backward=False)
    return after @ proj.t(), before, after


@_squared_mlp.register_fake
def _(x: Tensor, fc: Tensor, proj: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001 - as above
    before = x.new_empty((x.shape[0], fc.shape[0]))
    return x.new_empty((x.shape[0], proj.shape[0])), before, torch.empty_like(before)


@custom_op("caddie::squared_mlp_backward", mutates_args={})
def _squared_mlp_backward(  # noqa: PLR0917 - operators take tensors by position
    gradient: Tensor, x: Tensor, fc: Tensor, proj: Tensor, before: Tensor, after: Tensor, slope: float, trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows and of both matrices; the matrices' are empty if they are not `trained`."""
    gradient = gradient.contiguous()
    d_before = torch.empty_like(before)
    _product(gradient, proj.t().contiguous(), before, d_before, slope=slope, backward=True)
    if not trained:
        return d_before @ fc, fc.new_empty(0), proj.new_empty(0)
    return d_before @ fc, d_before.t() @ x, gradient.t() @ after


@_squared_mlp_backward.register_fake
def _(  # noqa: PLR0917 - as above
    gradient: Tensor,  # noqa: ARG001 - the operator's signature, here and below
    x: Tensor,
    fc: Tensor,
    proj: Tensor,
    before: Tensor,  # noqa: ARG001
    after: Tensor,  # noqa: ARG001
    slope: float,  # noqa: ARG001
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    empty: tuple[int, ...] = (0,)
    return (
        x.new_empty(x.shape),
        fc.new_empty(fc.shape if trained else empty),
        proj.new_empty(proj.shape if trained else empty),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, fc, proj, ctx.slope = inputs
    _, before, after = output
    ctx.save_for_backward(x, fc, proj, before, after)
    ctx.mark_non_differentiable(before, after)
    ctx.set_materialize_grads(False)  # of the hidden rows: they are as large as all else together


def _gradients(ctx: Any, gradient: Tensor, _before: None, _after: None) -> tuple[Tensor | None, ...]:
    trained = any(ctx.needs_input_grad[1:3])  # not so where only adapters learn
    d_x, d_fc, d_proj = _squared_mlp_backward(gradient, *ctx.saved_tensors, ctx.slope, trained)
    return (d_x, d_fc, d_proj, None) if trained else (d_x, None, None, None)


_squared_mlp.register_autograd(_gradients, setup_context=_keep)


def squared_mlp(x: Tensor, fc: Tensor, proj: Tensor, slope: float) -> Tensor:
    """(..., dim), (hidden, dim) and (dim, hidden) -> max(x fc^T, slope x fc^T)^2 proj^T, (..., dim)."""
    found: Tensor
    found, _, _ = _squared_mlp(x.reshape(-1, x.shape[-1]), fc, proj, slope)
    return found.view(*x.shape[:-1], proj.shape[0])
