"""What an uncompiled CPU computes in as few trips over memory as it can, with gradients written by hand.

A compiler fuses these formulas by itself; eager torch goes over memory once for each operation in them, and a CPU is
slowest there. So here they are `torch.autograd.Function`s, exact in both directions, and plain formulas elsewhere.

Within `bfloat16_products` large matrix products of float32 tensors round their inputs to bfloat16, as passes on CUDA
do, which a CPU with units for that (`has_bfloat16_units`) computes two to four times as fast. Attention is left out: in
its small blocks torch's kernel loses by it; so are gates and all of the optimiser but Newton-Schulz.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

# Of RMS norms. Given explicitly: torch's default depends on the dtype, and the one of bfloat16 would swallow a small
# embedding.
EPS = 1e-7

_ROUNDED: ContextVar[bool] = ContextVar("bfloat16_products", default=False)


def eager_cpu(x: Tensor) -> bool:
    """Whether `x` is on a CPU, and no compiler looks on."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def has_bfloat16_units() -> bool:
    """Whether this CPU has AMX. One without it would emulate bfloat16, and lose a tenth."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return known is not None and bool(known())


@contextmanager
def bfloat16_products(asked: bool) -> Iterator[None]:
    """Within it `linear` and `rounded_inputs` may round, if `asked`."""
    token = _ROUNDED.set(asked)
    try:
        yield
    finally:
        _ROUNDED.reset(token)


def rounded_inputs() -> AbstractContextManager[None]:
    """Within it torch's own products of float32 tensors on a CPU round their inputs, if `bfloat16_products` is in
    force."""
    return _rounding() if _ROUNDED.get() else nullcontext()


@contextmanager
def _rounding() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # has no types
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., in) and (out, in) -> (..., out)."""
    if eager_cpu(x) and _ROUNDED.get():
        product: Tensor = _RoundedLinear.apply(x, weight)  # type: ignore[no-untyped-call]  # torch's own
        return product
    return functional.linear(x, weight)


class _RoundedLinear(torch.autograd.Function):
    """The product and both of its gradients with rounded inputs."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with _rounding():
            return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        (gradient,) = upstream
        for_x, for_weight, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        with _rounding():  # the context of the forward pass may have ended
            return (
                gradient @ weight if for_x else None,
                gradient.flatten(0, -2).t() @ x.flatten(0, -2) if for_weight else None,
            )


def _inverse_rms(x: Tensor) -> Tensor:
    """(..., dim) -> 1 / sqrt(mean(x^2) + eps), (..., 1)."""
    mean_square: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return mean_square.add_(EPS).rsqrt_()


class RmsNorm(torch.autograd.Function):
    """With y = x r and r = 1 / sqrt(mean(x^2) + eps): dx = r (g - y mean(g y)), exactly, and in three passes over
    memory instead of nine."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        inverse = _inverse_rms(x)
        y: Tensor = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        (gradient,) = upstream
        along = (gradient * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(gradient, y, along, value=-1.0).mul_(inverse)


class RmsNormRope(torch.autograd.Function):
    """gain * R x r with r = 1 / sqrt(mean(x^2) + eps), over heads `x` (batch, time, heads, head_dim).

    R turns the first 2 * half dimensions by `cos` and `sin` (time, 1, half) in the half-split layout. `gain` (heads,)
    or None. With h = R^T g, t = sum(h x) over a head's dimensions and s = gain r:

        dx = s h - x s r^2 t / head_dim,    dgain = sum of r t.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None) -> Tensor:
        inverse = _inverse_rms(x)
        scale = inverse if gain is None else inverse * gain.unsqueeze(1)
        turned = _turn(x * scale, cos, sin)
        ctx.save_for_backward(x, cos, sin, inverse, scale)
        ctx.gained = gain is not None  # type: ignore[attr-defined]  # torch's own way
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, inverse, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = _turn(upstream[0], cos, -sin)
        along = (gradient * x).sum(dim=-1, keepdim=True)
        gain = (inverse * along).sum(dim=(0, 1)).squeeze(1) if ctx.gained else None  # type: ignore[attr-defined]
        share = inverse.square().mul_(scale).mul_(along).div_(x.shape[-1])
        return gradient.mul_(scale).addcmul_(x, share, value=-1.0), None, None, gain


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A new tensor; the rest of a partly turned head is copied."""
    half = cos.shape[-1]
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=turned[..., half : 2 * half]).addcmul_(first, sin)
    turned[..., 2 * half :] = x[..., 2 * half :]
    return turned


class SquaredLeakyReLU(torch.autograd.Function):
    """y = l^2 with l = x for x > 0 and slope x below; dy/dx = 2 l there and 2 slope l below."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, slope: float) -> Tensor:
        leaky = functional.leaky_relu(x, slope) if slope else torch.relu(x)
        ctx.save_for_backward(leaky)
        ctx.slope = slope  # type: ignore[attr-defined]  # torch's own way
        return leaky.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (leaky,) = ctx.saved_tensors  # type: ignore[attr-defined]
        slope: float = ctx.slope  # type: ignore[attr-defined]
        # 2 slope l, and for l > 0 the rest to 2 l.
        steep = leaky.clamp_min(0.0).mul_(2.0 * (1.0 - slope))
        return steep.add_(leaky, alpha=2.0 * slope).mul_(upstream[0]), None
