"""GPTQ against a slow reference, and what holds for any weights and inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.errors import InputError
from trainer.quantization.gptq import gptq, inputs_with
from trainer.quantization.rounding import largest_value, quantize


def inputs_of(columns: int, rows: int, seed: int, *, shared: float = 1.0) -> Tensor:
    """E[x x^T] of `rows` inputs whose dimensions have a direction in common, and sizes that differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) + shared * torch.randn(rows, 1, generator=generator)
    x = x * torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]
    return x.T @ x / rows


def weights_of(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def cost(weight: Tensor, values: Tensor, scales: Tensor, covariance: Tensor) -> Tensor:
    error = weight.double() - values.double() * scales.double().unsqueeze(1)
    return torch.einsum("rc,cd,rd->r", error, covariance.double(), error)


def by_hand(weight: Tensor, covariance: Tensor, bits: int, clip: float | None, damping: float) -> Tensor:
    """Column by column in float64: the exact inverse of what is left is taken anew after each, as in optimal brain
    surgery, which the Cholesky factor of GPTQ only makes faster."""
    _, scales = quantize(weight, bits, clip)
    limit, step = largest_value(bits), scales.double().unsqueeze(1)
    order = covariance.double().diagonal().argsort(descending=True, stable=True)
    h = covariance.double()[order][:, order]
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    left, values = weight.double()[:, order].clone(), torch.zeros(weight.shape, dtype=torch.int8)
    for column in range(len(h)):
        inverse = torch.linalg.inv(h[column:, column:])
        whole = (left[:, column : column + 1].float() / step.float()).round().clamp(-limit, limit)
        values[:, order[column]] = whole[:, 0].to(torch.int8)
        error = (left[:, column : column + 1] - whole * step) / inverse[0, 0]
        left[:, column:] -= error @ inverse[:1]
    return values


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (20, 150), (3, 129)])
@pytest.mark.parametrize(("bits", "clip"), [(4, None), (6, 12.85), (4, 2.5)])
def test_it_is_the_slow_one(rows: int, columns: int, bits: int, clip: float | None) -> None:
    weight, covariance = weights_of(rows, columns, 1), inputs_of(columns, 4 * columns, 2)
    found = gptq(weight, inputs_with(covariance, damping=0.01), bits, clip)
    slow = by_hand(weight, covariance, bits, clip, 0.01)
    nearest, scales = quantize(weight, bits, clip)
    assert torch.equal(found.scales, scales)
    slow_cost, nearest_cost, own = (cost(weight, v, scales, covariance) for v in (slow, nearest, found.values))
    # In float32 a tie may fall to the other side, after which the rest of a row differs, and costs about the same.
    wanted = torch.where((slow_cost < nearest_cost).unsqueeze(1), slow, nearest)
    assert float((found.values != wanted).any(dim=1).double().mean()) <= 0.2
    assert float(own.sum()) == pytest.approx(float(torch.minimum(slow_cost, nearest_cost).sum()), rel=0.02)
    assert found.cost == pytest.approx(float(own.sum()), rel=1e-6)
    assert found.nearest_cost == pytest.approx(float(nearest_cost.sum()), rel=1e-6)


def test_inputs_in_common_are_worth_most_of_the_cost() -> None:
    weight, covariance = weights_of(64, 256, 3), inputs_of(256, 2048, 4)
    found = gptq(weight, inputs_with(covariance, damping=0.01), 4, None)
    assert found.cost < 0.5 * found.nearest_cost


def test_unrelated_inputs_leave_rounding_to_nearest() -> None:
    weight = weights_of(8, 140, 5)
    sizes = torch.rand(140, generator=torch.Generator().manual_seed(6)) + 0.1
    found = gptq(weight, inputs_with(torch.diag(sizes), damping=0.01), 5, None)
    assert torch.equal(found.values, quantize(weight, 5, None)[0])
    assert found.cost == found.nearest_cost > 0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 140),
    seen=st.integers(1, 60),
    bits=st.integers(4, 8),
    clip=st.sampled_from([None, 0.5, 3.0, 12.85]),
    dead=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_no_row_costs_more_than_to_nearest_and_no_integer_leaves_its_range(
    *, rows: int, columns: int, seen: int, bits: int, clip: float | None, dead: bool, seed: int
) -> None:
    """Also with fewer inputs than dimensions, and with dimensions that are never there."""
    weight, covariance = weights_of(rows, columns, seed), inputs_of(columns, seen, seed)
    if dead:
        covariance[0], covariance[:, 0] = 0.0, 0.0
    found = gptq(weight, inputs_with(covariance, damping=0.01), bits, clip)
    nearest, scales = quantize(weight, bits, clip)
    own, theirs = (cost(weight, values, scales, covariance) for values in (found.values, nearest))
    assert bool((own <= theirs * (1 + 1e-5) + 1e-12).all())
    assert int(found.values.abs().max()) <= largest_value(bits)
    assert found.values.dtype == torch.int8


def test_of_inputs_that_are_always_zero_nothing_is_learnt() -> None:
    weight = weights_of(3, 4, 7)
    found = gptq(weight, inputs_with(torch.zeros(4, 4), damping=0.01), 6, None)
    assert torch.equal(found.values, quantize(weight, 6, None)[0])
    assert (found.cost, found.nearest_cost) == (0.0, 0.0)


def test_the_weights_are_left_as_they_were() -> None:
    weight, covariance = weights_of(4, 150, 8), inputs_of(150, 300, 9)
    before = weight.clone(), covariance.clone()
    gptq(weight, inputs_with(covariance, damping=0.01), 4, None)
    assert torch.equal(weight, before[0])
    assert torch.equal(covariance, before[1])


def test_bad_input_is_named() -> None:
    weight = weights_of(3, 4, 10)
    with pytest.raises(ValueError, match=r"4 columns has no covariance of shape \(3, 3\)"):
        gptq(weight, inputs_with(torch.eye(3), damping=0.01), 6, None)
    with pytest.raises(ValueError, match="covariance of the inputs is not finite"):
        gptq(weight, inputs_with(torch.full((4, 4), torch.nan), damping=0.01), 6, None)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        gptq(weight, inputs_with(torch.eye(4) - 9e6 * torch.eye(4).flip(0), damping=0.01), 6, None)
    with pytest.raises(InputError, match="not finite cannot be quantised"):
        gptq(torch.full((3, 4), torch.inf), inputs_with(torch.eye(4), damping=0.01), 6, None)
