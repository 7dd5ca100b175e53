"""Inverse roots against eigendecompositions, the algebra on a quadratic, and which input belongs to which matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from trainer.optim.input_aware import (
    REFRESH_STEPS,
    InputRoots,
    OptimizerStateError,
    damped,
    inverse_root,
    with_orthogonal_norm,
)
from trainer.optim.muon import Muon


@dataclass
class Observed:
    """Stands for what the model measures."""

    covariance: Tensor
    mass: Tensor = field(default_factory=lambda: torch.ones(()))


def covariance(dim: int, condition: float, seed: int = 0) -> Tensor:
    """(dim, dim) float64 with eigenvalues from 1 down to 1 / condition, evenly in their logarithm."""
    noise = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q, _ = torch.linalg.qr(noise)
    eigenvalues = condition ** -torch.linspace(0, 1, dim, dtype=torch.float64)
    return (Q * eigenvalues) @ Q.mT


def exact_root(matrix: Tensor) -> Tensor:
    eigenvalues, Q = torch.linalg.eigh(matrix.double())
    return (Q * eigenvalues.rsqrt()) @ Q.mT


@pytest.mark.parametrize(("condition", "error"), [(10.0, 1e-5), (1e3, 1e-4), (1e6, 1e-2)])
def test_the_inverse_root_agrees_with_an_eigendecomposition(condition: float, error: float) -> None:
    matrices = torch.stack([covariance(48, condition, seed) * scale for seed, scale in ((0, 1.0), (1, 3e4))])
    found = inverse_root(matrices.float()).double()
    for root, matrix in zip(found, matrices, strict=True):
        exact = exact_root(matrix)
        assert float((root - exact).norm() / exact.norm()) < error
    assert torch.equal(found, found.mT)


def test_damping_makes_any_covariance_invertible() -> None:
    direction = torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    rank_one = 0.25 * direction @ direction.mT
    matrices = damped(
        torch.stack([rank_one, torch.zeros(32, 32), rank_one]), torch.tensor([0.25, 0.5, 0.0]), damping=1e-2
    )
    mean_diagonal = float((direction**2).mean())
    torch.testing.assert_close(matrices[0], direction @ direction.mT + 1e-2 * mean_diagonal * torch.eye(32))
    torch.testing.assert_close(matrices[2], 1.01 * torch.eye(32))  # never observed: white
    roots = inverse_root(matrices)
    assert bool(roots.isfinite().all())
    torch.testing.assert_close(roots[0].double(), exact_root(matrices[0]), rtol=1e-3, atol=1e-3)


def test_on_a_quadratic_the_condition_number_becomes_its_root() -> None:
    """f(W) = 1/2 tr(D A D^T) with D = W - W*: gradient D A, update D A^(1/2), and each contracts as theory says."""
    condition, steps = 400.0, 12
    A = covariance(24, condition)
    root = inverse_root(A.float()[None])[0].double()
    start = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eigenvalues, Q = torch.linalg.eigh(A)
    half_power = (Q * eigenvalues.sqrt()) @ Q.mT
    torch.testing.assert_close((start @ A) @ root, start @ half_power, rtol=1e-3, atol=1e-4)

    def loss_after(preconditioner: Tensor, least: float, largest: float) -> float:
        rate = 2 / (least + largest)  # the best constant one
        D = start
        for _ in range(steps):
            D = D - rate * (D @ A) @ preconditioner
        return float(0.5 * (D @ A @ D.mT).trace())

    begin = float(0.5 * (start @ A @ start.mT).trace())
    plain = loss_after(torch.eye(24, dtype=torch.float64), 1 / condition, 1.0)
    aware = loss_after(root, condition**-0.5, 1.0)
    kappa = condition**0.5
    assert aware < plain / 5
    assert aware < begin * ((kappa - 1) / (kappa + 1)) ** (2 * steps) * 1.01


def test_updates_have_the_norm_of_orthogonal_ones() -> None:
    updates = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    updates[1] = 0.0
    scaled = with_orthogonal_norm(updates)
    assert [float(each.norm()) for each in scaled] == pytest.approx([2.0, 0.0, 2.0])
    torch.testing.assert_close(scaled[0] / scaled[0].norm(), updates[0] / updates[0].norm())


def test_each_matrix_is_divided_by_the_root_of_its_own_input() -> None:
    """q (6, 4) and k (2, 4) share an input, up (8, 4) and down (4, 8) have others; momentum and rows as the formula."""
    generator = torch.Generator().manual_seed(0)
    shared, second, wide = (Observed(covariance(dim, 50.0, dim + 1).float()) for dim in (4, 4, 8))
    second.covariance = second.covariance * 0.5
    second.mass = torch.tensor(0.5)
    inputs = {"q": shared, "k": shared, "up": second, "down": wide}
    shapes = {"q": (6, 4), "k": (2, 4), "up": (8, 4), "down": (4, 8)}
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    expected = {name: parameter.detach().double() for name, parameter in parameters.items()}
    roots = InputRoots(inputs, damping=1e-3)
    muon = Muon(parameters, backend_steps=5, row_normalize=True, inputs=roots)
    velocities = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for step in range(3):
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.clone()
            velocities[name] = 0.9 * velocities[name] + gradient
            update = gradient + 0.9 * velocities[name]
            update = update / update.norm(dim=1, keepdim=True)
            A = (inputs[name].covariance / inputs[name].mass).double()
            update = update @ exact_root(A + 1e-3 * A.diagonal().mean() * torch.eye(len(A)))
            rows, columns = parameter.shape
            scale = min(rows, columns) ** 0.5 / float(update.norm()) * max(1.0, rows / columns) ** 0.5
            expected[name] = expected[name] * (1 - 0.1 * 0.5) - 0.1 * scale * update
        roots.refresh_if_due(step)
        muon.update(muon.take_gradients(), lr=0.1, momentum=0.9, weight_decay=0.5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-4, atol=1e-4)


def test_roots_are_refreshed_when_due_and_saved_with_what_they_are_made_from() -> None:
    observed = Observed(covariance(4, 10.0).float())
    roots = InputRoots({"a": observed, "b": observed}, damping=1e-3)
    with pytest.raises(ValueError, match="refresh_if_due"):
        roots.roots(["a"])
    roots.refresh_if_due(3)
    before = roots.roots(["a", "b"])
    assert torch.equal(before[0], before[1])
    observed.covariance.copy_(covariance(4, 10.0, seed=5))
    roots.refresh_if_due(4)
    assert torch.equal(roots.roots(["a"])[0], before[0])
    saved = roots.state_dict()
    assert set(saved) == {"a"}

    other = Observed(torch.zeros(4, 4), torch.zeros(()))
    resumed = InputRoots({"a": other, "b": other}, damping=1e-3)
    resumed.load_state_dict(saved)
    assert torch.equal(other.covariance, observed.covariance)
    for each in (roots, resumed):
        each.refresh_if_due(5)
        assert torch.equal(each.roots(["b"])[0], before[0])
        each.refresh_if_due(REFRESH_STEPS)
        assert not torch.equal(each.roots(["b"])[0], before[0])
    assert torch.equal(roots.roots(["a"]), resumed.roots(["a"]))

    unlike = Observed(torch.zeros(3, 3))
    with pytest.raises(OptimizerStateError, match=r"of a has the shape \(4, 4\)"):
        InputRoots({"a": unlike}, damping=1e-3).load_state_dict(saved)
    with pytest.raises(OptimizerStateError, match="do not fit the model"):
        InputRoots({"c": observed}, damping=1e-3).load_state_dict(saved)
