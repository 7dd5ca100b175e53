"""Formulas with gradients by hand for an uncompiled CPU, against autograd's own, and rounded matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.model.attention import RopeTables, apply_rope, normed_turned, rope_tables
from trainer.model.blocks import activate
from trainer.model.eager import (
    NormedTurned,
    SquaredLeakyReLU,
    bfloat16_products,
    eager_cpu,
    linear,
    rounded_inputs,
)
from trainer.model.norm import EPS


def heads(*shape: int, scale: float = 1.0) -> Tensor:
    """(..., head_dim) as the attention has them: a slice of wider rows."""
    wide = scale * torch.randn(*shape[:-2], shape[-2] + 2, shape[-1], dtype=torch.float64)
    return wide[..., : shape[-2], :].detach().requires_grad_()


def tables(time: int, rope_dims: int) -> RopeTables:
    return RopeTables(*(table.double() for table in rope_tables(time, rope_dims, 10000.0, torch.device("cpu"))))


def turned_by_autograd(x: Tensor, where: RopeTables, gain: Tensor | None) -> Tensor:
    normed = functional.rms_norm(x, (x.shape[-1],), eps=EPS)
    turned = apply_rope(normed, where)
    return turned if gain is None else turned * gain.unsqueeze(1)


@pytest.mark.parametrize("rope_dims", [8, 4, 2])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 100.0])
def test_norm_rotation_and_gain_in_one(rope_dims: int, gained: bool, scale: float) -> None:
    torch.manual_seed(0)
    x, where = heads(2, 5, 3, 8, scale=scale), tables(5, rope_dims)
    gain = torch.randn(3, dtype=torch.float64, requires_grad=True) if gained else None
    inputs = [x] if gain is None else [x, gain]
    upstream = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    wanted = turned_by_autograd(x, where, gain)
    found = normed_turned(x, where, gain)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 / scale)
    if scale == 1.0:
        tried = (lambda given: NormedTurned.apply(given, *where, None)) if gain is None else _turning(where)
        assert torch.autograd.gradcheck(tried, inputs)


def _turning(where: RopeTables) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, gain: NormedTurned.apply(x, *where, gain)


def test_a_head_of_zeros_stays_zero() -> None:
    x = torch.zeros(1, 2, 1, 4, requires_grad=True)
    found = normed_turned(x, rope_tables(2, 4, 10000.0, torch.device("cpu")), torch.ones(1))
    found.sum().backward()
    assert torch.equal(found, torch.zeros_like(x))
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("relu_squared", lambda x: functional.relu(x).square()),
        ("leaky_relu_squared", lambda x: functional.leaky_relu(x, 0.5).square()),
    ],
)
def test_squared_activations(kind: Any, formula: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(activate(x, kind), formula(x))
    (found,) = torch.autograd.grad(activate(x, kind), x, upstream)
    (wanted,) = torch.autograd.grad(formula(x), x, upstream)
    torch.testing.assert_close(found, wanted)
    slope = 0.0 if kind == "relu_squared" else 0.5
    assert torch.autograd.gradcheck(lambda given: SquaredLeakyReLU.apply(given, slope), (x,))


def test_a_compiler_sees_the_plain_formulas() -> None:
    seen: list[bool] = []

    def looking(x: Tensor) -> Tensor:
        seen.append(eager_cpu(x))
        return x + 1

    looking(torch.zeros(1))
    compiled = torch.compile(lambda x: x + float(eager_cpu(x)), backend="eager", fullgraph=True)
    assert seen == [True]
    assert float(compiled(torch.zeros(1))) == 0.0


def precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def product(x: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    found = linear(x, weight)
    return found, *torch.autograd.grad(found, (x, weight), upstream)


def test_products_are_rounded_in_both_directions_where_that_is_asked_and_nowhere_else() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 128, requires_grad=True), torch.randn(96, 128, requires_grad=True)
    upstream = torch.randn(2, 64, 96)
    exact = functional.linear(x, weight)
    wanted = (exact, *torch.autograd.grad(exact, (x, weight), upstream))
    before = precision()
    with bfloat16_products(True):
        rounded = product(x, weight, upstream)
        assert precision() == before  # attention's own products are not touched
        with rounded_inputs():
            assert precision() == "bf16"
        forward = linear(x, weight)
    assert precision() == before
    # Gradients are rounded also where backward runs after the context.
    later = torch.autograd.grad(forward, (x, weight), upstream)
    for found, again in zip(rounded[1:], later, strict=True):
        assert torch.equal(found, again)
    for found, should in zip(rounded, wanted, strict=True):
        # Inputs with 8 bits, sums of 64 to 192 products in float32; a CPU without such units is exact.
        torch.testing.assert_close(found, should, rtol=0.0, atol=0.03 * float(should.detach().std()))
    with bfloat16_products(False):
        plain = product(x, weight, upstream)
        with rounded_inputs():
            assert precision() == before
    for found, should in zip(plain, wanted, strict=True):
        assert torch.equal(found, should)


def test_an_error_leaves_the_precision_as_it_was() -> None:
    before = precision()
    with contextlib.suppress(RuntimeError), bfloat16_products(True):
        linear(torch.zeros(2, 3), torch.zeros(2, 5))
    assert precision() == before
    with rounded_inputs():
        assert precision() == before
