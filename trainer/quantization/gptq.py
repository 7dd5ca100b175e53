"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): integers that keep a layer's outputs, and not only its weights.

For y = W x, rounding W to V costs E|W x - V x|^2 = tr((W - V) H (W - V)^T) with H = E[x x^T], row by row. Columns are
rounded one after the other, those with the largest H_jj first; what rounding one has cost is made up for by the columns
that are still to come, in the least-squares sense: with U^T U = H^-1, U upper triangular,

    q_j = round(w_j / s),   w_k <- w_k - (w_j - s q_j) U_jk / U_jj   for k > j.

The rows' scales s are those of `trainer.quantization.rounding`, of the weights as they were. A row for which rounding
to nearest costs less keeps that: so the sum is never more than what it would be without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.quantization.rounding import quantize, round_rows

_BLOCK = 128
"""Columns whose corrections to the ones after them are gathered into one product."""
_DAMPING_TRIES = 6


class Rounded(NamedTuple):
    """`values` int8 (rows, columns), `scales` fp16 (rows,), and what they cost beside what rounding to nearest costs:
    tr((W - V) H (W - V)^T), both 0 where nothing is known of the inputs."""

    values: Tensor
    scales: Tensor
    cost: float
    nearest_cost: float


class Inputs(NamedTuple):
    """What is known of a matrix's inputs, factorised once for all steps that are tried."""

    covariance: Tensor
    """E[x x^T], (columns, columns) float64."""
    order: Tensor
    """In which columns are rounded."""
    upper: Tensor | None
    """U of the formula above for columns in that order, float32; None where all inputs were zero."""

    @property
    def flatness(self) -> float:
        """Geometric over arithmetic mean of the damped covariance's eigenvalues: at most 1; 1 for zeros.

        GPTQ leaves of the cost of rounding to nearest about this share, where steps are small: its errors weigh as much
        as the pivots of a Cholesky factorisation, whose product is the determinant in any order.
        """
        if self.upper is None:
            return 1.0
        pivots = -2 * self.upper.diagonal().double().log()
        return float(torch.exp(pivots.mean()) / self.covariance.diagonal().mean())


def inputs_with(covariance: Tensor, *, damping: float) -> Inputs:
    """Of E[x x^T] (columns, columns): `damping` times the mean of the diagonal is added to it, ten times as much where
    that does not make it positive definite. Raises ValueError for what is no such matrix."""
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"a covariance is square, not of shape {tuple(covariance.shape)}")
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("the covariance of the inputs is not finite")
    exact = covariance.double()
    mean = exact.diagonal().mean()
    order = exact.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_root(exact[order][:, order], damping * mean) if bool(mean > 0) else None
    return Inputs(covariance=exact, order=order, upper=upper)


def gptq(weight: Tensor, inputs: Inputs, bits: int, clip_sigma: float | None, scales: Tensor | None = None) -> Rounded:
    """`weight` (rows, columns) -> its integers. `scales` (rows,) fp16 take the place of those that `clip_sigma` gives.

    Computes where `weight` and `inputs` lie; inputs of zeros are rounding to nearest. Raises ValueError for shapes that
    do not go together, InputError for weights that are not finite.
    """
    nearest, halves = quantize(weight, bits, clip_sigma, scales)
    exact, order, upper = inputs
    if len(order) != weight.shape[1]:
        raise ValueError(f"a weight with {weight.shape[1]} columns has no covariance of shape {tuple(exact.shape)}")
    if upper is None:
        return Rounded(values=nearest, scales=halves, cost=0.0, nearest_cost=0.0)
    weight, steps = weight.detach().float(), halves.float().unsqueeze(1)
    values = torch.empty_like(nearest)
    values[:, order] = _rounded(weight[:, order], steps, upper, bits)
    costs, nearest_costs = (_costs(weight - found.float() * steps, exact) for found in (values, nearest))
    better = costs < nearest_costs
    return Rounded(
        values=torch.where(better.unsqueeze(1), values, nearest),
        scales=halves,
        cost=float(torch.minimum(costs, nearest_costs).sum()),
        nearest_cost=float(nearest_costs.sum()),
    )


def _inverse_root(covariance: Tensor, ridge: Tensor) -> Tensor:
    """Upper triangular U with U^T U the inverse of `covariance` + `ridge`, or of that with more; float32."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for _ in range(_DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex(covariance + ridge * identity)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                root: Tensor = upper.float()
                return root
        ridge = ridge * 10
    raise ValueError("the covariance of the inputs is not positive semidefinite")


def _rounded(weight: Tensor, scales: Tensor, upper: Tensor, bits: int) -> Tensor:
    """int8 (rows, columns), column by column from the left; `weight` is a copy that is overwritten."""
    columns = weight.shape[1]
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block, corner = weight[:, start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for index in range(stop - start):
            column = block[:, index : index + 1]
            whole = round_rows(column, scales, bits)
            values[:, start + index : start + index + 1] = whole.to(torch.int8)
            errors[:, index : index + 1] = (column - whole * scales) / corner[index, index]
            block[:, index:].addmm_(errors[:, index : index + 1], corner[index : index + 1, index:], alpha=-1)
        weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return values


def _costs(error: Tensor, covariance: Tensor) -> Tensor:
    """(rows,): e H e^T of each row e, in the covariance's float64."""
    precise = error.to(covariance.dtype)
    return ((precise @ covariance) * precise).sum(dim=1)
