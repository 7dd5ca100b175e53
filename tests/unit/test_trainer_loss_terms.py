"""The objective's terms against their formulas, and functions with hand-written gradients against differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from trainer.model import head
from trainer.model.eager import RmsNorm
from trainer.model.head import CHUNK_ROWS, PLAIN, LossTerms, _ChunkedLoss, mean_loss, objective

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

TERMS = [PLAIN, LossTerms(focal_gamma=2.0), LossTerms(focal_gamma=0.5), LossTerms(z_loss=0.3), LossTerms(1.5, 0.2)]


def case(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, a head, targets and weights."""
    x = torch.randn(rows, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    return x, weight, torch.randint(11, (rows,)), torch.rand(rows, dtype=dtype) / rows


def by_formula(
    x: Tensor, weight: Tensor, targets: Tensor, cap: float, *, terms: LossTerms, row_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row by row in float64, from probabilities."""
    values, nats, squares = [], [], []
    for i, target in enumerate(targets.tolist()):
        logits = weight.double() @ x[i].double()
        if cap:
            logits = cap * torch.tanh(logits / cap)
        total = torch.exp(logits).sum()
        p = torch.exp(logits[target]) / total
        share = 1 / len(targets) if row_weights is None else row_weights[i].double()
        nats.append(-torch.log(p))
        values.append(share * (1 - p) ** terms.focal_gamma * nats[-1])
        squares.append(torch.log(total) ** 2)
    return torch.stack(values).sum() + terms.z_loss * torch.stack(squares).mean(), torch.stack(nats).mean()


@pytest.mark.parametrize(
    ("terms", "cap", "weighted", "compiled"),
    [(*one, False) for one in itertools.product(TERMS, (0.0, 3.0), (False, True))]
    + [(TERMS[-1], 3.0, True, True), (TERMS[1], 0.0, False, True)],
)
def test_the_objective_is_the_formulas_with_its_gradients(
    terms: LossTerms, cap: float, weighted: bool, compiled: bool
) -> None:
    """Over a chunk and a part of one; compiled passes leave the formula to the compiler."""
    x, weight, targets, shares = case(CHUNK_ROWS + 9)
    row_weights = shares if weighted else None
    wanted = by_formula(x, weight, targets, cap, terms=terms, row_weights=row_weights)
    if compiled:
        torch.compiler.reset()
        run = torch.compile(objective, backend="aot_eager", fullgraph=True, dynamic=False)
    else:
        run = objective
    found = run(x, weight, targets, cap, terms=terms, row_weights=row_weights)
    torch.testing.assert_close(found[0], wanted[0].float())
    torch.testing.assert_close(found[1], wanted[1].detach().float())
    assert not found[1].requires_grad
    expected = torch.autograd.grad(wanted[0] * 3.0, (x, weight))
    for one, other in zip(torch.autograd.grad(found[0] * 3.0, (x, weight)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(objective(x, weight, targets, cap, terms=terms, row_weights=row_weights), found)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_mean_is_the_plain_objective(cap: float) -> None:
    x, weight, targets, _ = case(20)
    value, mean = objective(x, weight, targets, cap, terms=PLAIN, row_weights=None)
    assert float(value.detach()) == float(mean) == float(mean_loss(x, weight, targets, cap).detach())


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_hand_written_gradients_of_the_loss_are_its_differences(terms: LossTerms, cap: float, weighted: bool) -> None:
    x, weight, targets, shares = case(5, torch.float64)
    row_weights = shares if weighted else None

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = _ChunkedLoss.apply(x, weight, targets, cap, row_weights, terms)[0]
        return value

    assert torch.autograd.gradcheck(loss, (x, weight))


@pytest.mark.parametrize("terms", [PLAIN, TERMS[-1]])
def test_hand_written_gradients_hold_across_chunks(monkeypatch: pytest.MonkeyPatch, terms: LossTerms) -> None:
    """Of two whole chunks and a part of one, with an upstream gradient that is not 1."""
    monkeypatch.setattr(head, "CHUNK_ROWS", 2)
    x, weight, targets, shares = case(5, torch.float64)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = _ChunkedLoss.apply(x, weight, targets, 2.0, shares if terms != PLAIN else None, terms)[0]
        return value**3

    assert torch.autograd.gradcheck(loss, (x, weight))


def test_hand_written_gradients_of_the_norm_are_its_differences() -> None:
    assert torch.autograd.gradcheck(RmsNorm.apply, (torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-3, 1e3])
def test_they_hold_where_the_norm_is_mostly_its_epsilon(scale: float) -> None:
    """EPS is 1e-7, which outweighs the mean square of rows below 3e-4."""
    x = (torch.randn(3, 5, dtype=torch.float64) * scale).requires_grad_()
    step = max(scale, 1e-4) * 1e-5
    assert torch.autograd.gradcheck(RmsNorm.apply, (x,), eps=step, rtol=1e-5, atol=1e-5 / max(scale, 3e-4))


@pytest.mark.parametrize("gamma", [0.3, 1.0, 3.0])
def test_a_certain_target_has_no_loss_and_a_finite_gradient(gamma: float) -> None:
    """Where (1 - p)^(gamma - 1) would be infinite; on the chunked path, and on the one that compilers take."""
    weight = torch.eye(4) * 200.0
    for compiling in (False, True):
        x = torch.eye(4)[:1].clone().requires_grad_()
        run = torch.compile(objective, backend="eager", fullgraph=True, dynamic=False) if compiling else objective
        value, _ = run(x, weight, torch.tensor([0]), 0.0, terms=LossTerms(gamma, 0.0), row_weights=None)
        (gradient,) = torch.autograd.grad(value, x)
        assert float(value.detach()) == 0.0
        assert bool(torch.isfinite(gradient).all())
        assert math.isclose(float(gradient.abs().max()), 0.0, abs_tol=1e-6)
