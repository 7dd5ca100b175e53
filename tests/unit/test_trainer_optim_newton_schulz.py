"""The orthogonalising iteration against singular value decompositions, and its polynomials against a minimax fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from trainer.optim.newton_schulz import (
    CLASSIC,
    POLAR_EXPRESS,
    SAFETY,
    Coefficients,
    orthogonalize,
    polynomials,
    unit_rows,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 24)])
def test_newton_schulz_keeps_directions_and_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = gaussian(*shape) * 7
    found = orthogonalize(matrices, 8)
    singular = torch.linalg.svdvals(found)
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.25
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    core = U.mT @ found @ Vh.mT
    torch.testing.assert_close(core, torch.diag_embed(torch.diagonal(core, dim1=-2, dim2=-1)), rtol=0, atol=2e-3)


@pytest.mark.parametrize("coefficients", ["classic", "polar_express"])
def test_newton_schulz_survives_zeros_and_any_scale(coefficients: Coefficients) -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 6), 5, coefficients), torch.zeros(1, 4, 6))
    matrices = gaussian(1, 4, 6, seed=1)
    scaled = orthogonalize(matrices * 1e4, 5, coefficients)
    torch.testing.assert_close(scaled, orthogonalize(matrices, 5, coefficients), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 256, 256), (2, 128, 256)])
def test_after_five_steps_polar_express_is_nearer_than_the_classic_quintic(shape: tuple[int, int, int]) -> None:
    def error(coefficients: Coefficients) -> float:
        singular = torch.linalg.svdvals(orthogonalize(gaussian(*shape), 5, coefficients))
        assert float(singular.max()) < 1.25
        return float((singular - 1).square().mean().sqrt())

    assert 0.155 < error("classic") < 0.215
    assert 0.08 < error("polar_express") < 0.12


def test_polar_express_converges_to_the_polar_factor() -> None:
    matrices = gaussian(2, 24, 40)
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    torch.testing.assert_close(orthogonalize(matrices, 10, "polar_express"), U @ Vh, rtol=0, atol=1e-5)
    singular = torch.linalg.svdvals(orthogonalize(matrices, 10))
    assert float((singular - 1).abs().max()) > 0.1  # the classic quintic never does


def _minimax_quintic(low: float, high: float) -> np.ndarray:
    """(a, b, c) of a s + b s^3 + c s^5 that is nearest to 1 on [low, high] in the worst case, by linear programming."""
    points = np.union1d(np.geomspace(low, high, 1500), np.linspace(low, high, 1500)) / high
    powers = np.stack([points, points**3, points**5], axis=1)
    slack = np.ones((points.size, 1))
    found = linprog(
        [0, 0, 0, 1],
        A_ub=np.block([[powers, -slack], [-powers, -slack]]),
        b_ub=np.concatenate([np.ones(points.size), -np.ones(points.size)]),
        bounds=[(None, None)] * 4,
    )
    return np.asarray(found.x[:3] / high ** np.array([1, 3, 5]))


def test_the_table_is_what_a_minimax_fit_finds() -> None:
    low, high = 1e-3, 1.0
    for listed in POLAR_EXPRESS[:6]:
        fitted = _minimax_quintic(max(low, 0.02407327424182761 * high), high)

        def value(at: float, found: np.ndarray = fitted) -> float:
            return float(found @ np.array([at, at**3, at**5]))

        fitted = fitted * 2 / (value(low) + value(high))
        np.testing.assert_allclose(listed, fitted, rtol=2e-6, atol=2e-6)
        low = float(fitted @ np.array([low, low**3, low**5]))
        high = 2 - low
    np.testing.assert_allclose(POLAR_EXPRESS[-1], [15 / 8, -10 / 8, 3 / 8])  # of fifth order at 1


def test_tables_are_cut_or_their_last_quintic_repeated() -> None:
    assert polynomials("classic", 3) == [CLASSIC] * 3
    assert polynomials("polar_express", 2) == [
        (a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:2]
    ]
    assert polynomials("polar_express", 11)[7:] == [POLAR_EXPRESS[-1]] * 4
    assert len(polynomials("polar_express", 11)) == 11


def test_rows_of_the_parameter_get_unit_norm_however_it_lies() -> None:
    matrices = gaussian(2, 3, 5) * torch.tensor([1e-3, 1.0, 50.0]).view(1, 3, 1)
    matrices[0, 1] = 0.0
    scaled = unit_rows(matrices, torch.tensor([False, True]))
    for row in range(3):
        wanted = matrices[0, row] / matrices[0, row].norm() if row != 1 else torch.zeros(5)
        torch.testing.assert_close(scaled[0, row], wanted)
    for column in range(5):
        torch.testing.assert_close(scaled[1, :, column], matrices[1, :, column] / matrices[1, :, column].norm())
    found = orthogonalize(matrices, 5, "polar_express", torch.tensor([False, True]))
    torch.testing.assert_close(found, orthogonalize(scaled, 5, "polar_express"))
