"""Input-aware Muon: the inputs' covariance in place of the gradient's own.

For y = W x with G = dL/dW = sum over tokens of delta x^T, Muon's update is the polar factor of G, which is
G (G^T G)^(-1/2): the gradient divided by the root of its own second moment on the input side. One gradient is one
sample of that moment. For a token's g = delta x^T it is E[g^T g] = E[|delta|^2 x x^T], and if delta and x are
independent, which is what K-FAC assumes (Martens and Grosse 2015, arXiv:1503.05671), E|delta|^2 E[x x^T]. So up to a
number the covariance A = E[x x^T], measured in the forward pass, estimates the same matrix from thousands of tokens:

    update = G A^(-1/2),

a one-sided Shampoo step (Gupta et al. 2018, arXiv:1802.09568) with K-FAC's factor. Its direction no longer depends
on the inputs' scales: on the quadratic 1/2 tr(D A D^T), D = W - W*, it is D A^(1/2), whose condition number is the
root of gradient descent's. The update then gets the Frobenius norm that an orthogonal one has, sqrt(min(rows,
columns)), so that Muon's learning rates hold.

A is damped by a share of its mean diagonal, and its root refreshed every REFRESH_STEPS steps. Cost of a refresh: 32
products of dim x dim matrices for each distinct input, 64 dim^3 FLOPs (9 layers of width 512 and MLP 3x: 2.3 TFLOP in
float32, or .23 TFLOP a step), shared among the ranks; and one product of the update with the root in each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.errors import InputError
from trainer.optim.newton_schulz import polynomials
from trainer.ranks import ALONE, Ranks

REFRESH_STEPS = 10
# Enough for condition numbers up to 1e6: of a covariance in units of its trace, damped by 1e-3, the least eigenvalue is
# 1e-3 / dim. Smaller ones drown in float32's rounding; these steps can lift them only so far, more would lift noise.
_ROOT_STEPS = 8
_FLOOR = 1e-30


class OptimizerStateError(InputError):
    """A saved state of other parameters or shapes than the optimisers have."""


class Covariance(Protocol):
    """A decayed sum of x x^T, (dim, dim), and the mass () of its weights; both 0 before the first observation."""

    covariance: Tensor
    mass: Tensor


def inverse_root(matrices: Tensor, steps: int = _ROOT_STEPS) -> Tensor:
    """A^(-1/2) of symmetric positive definite (count, dim, dim) float32, by matrix products alone.

    The coupled iteration M = Z Y, Y <- Y h(M), Z <- h(M) Z with h(m) = a + b m + c m^2 (Higham 2008, Functions of
    Matrices, 6.3) keeps Y Z^(-1) = A and drives M to 1: the square root of M's eigenvalues goes through the same
    polynomials s h(s^2) as Muon's singular values, here Polar Express. Zero matrices stay finite.
    """
    # Polynomials are made for roots of eigenvalues up to 1; the Frobenius norm bounds the largest eigenvalue.
    scale = matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(_FLOOR)
    Y = matrices / scale
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    Z = eye.expand_as(Y)
    for a, b, c in polynomials("polar_express", steps):
        M = Z @ Y
        M = 0.5 * (M + M.mT)  # rounding errors that are not symmetric would grow
        H = torch.baddbmm(M, M, M, beta=b, alpha=c) + a * eye
        Y, Z = Y @ H, H @ Z
    root: Tensor = 0.5 * (Z + Z.mT) * scale.rsqrt()
    return root


def damped(covariances: Tensor, masses: Tensor, damping: float) -> Tensor:
    """Debiased A + damping * mean diagonal * 1, from (count, dim, dim) and masses (count,).

    An input that was never observed (mass 0) counts as white, A = 1: the update is then the gradient itself.
    """
    eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    seen = masses.view(-1, 1, 1) > 0
    debiased = torch.where(seen, covariances / masses.view(-1, 1, 1).clamp_min(_FLOOR), eye)
    mean_diagonal = debiased.diagonal(dim1=-2, dim2=-1).mean(dim=-1).view(-1, 1, 1)
    # An input that has always been zero has no gradient either; any root will do, but a finite one.
    return debiased + (damping * mean_diagonal).clamp_min(_FLOOR) * eye


def with_orthogonal_norm(updates: Tensor) -> Tensor:
    """(count, rows, columns) scaled to the Frobenius norm sqrt(min(rows, columns)) each; zeros stay zeros."""
    norms: Tensor = updates.norm(dim=(-2, -1), keepdim=True).clamp_min(_FLOOR)
    return updates / norms * math.sqrt(min(updates.shape[-2:]))


@dataclass(kw_only=True, slots=True)
class _SameWidth:
    """Distinct inputs of one width; `roots` (count, dim, dim) are None before the first refresh."""

    names: list[str]
    inputs: list[Covariance]
    roots: Tensor | None = None


class InputRoots:
    """A^(-1/2) of every matrix's input; matrices with one input (q, k and v) share one root.

    Each rank observes its own tokens. At a refresh, and before the state is read, the covariances become their mean
    over the ranks; each rank then takes the roots of its share, and all get all.
    """

    def __init__(self, inputs: Mapping[str, Covariance], *, damping: float, ranks: Ranks = ALONE) -> None:
        self._damping, self._ranks = damping, ranks
        self._by_width: dict[int, _SameWidth] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._indices: dict[tuple[str, ...], Tensor] = {}
        places: dict[int, tuple[int, int]] = {}
        for name, observed in inputs.items():
            if id(observed) not in places:
                width = observed.covariance.shape[0]
                same = self._by_width.setdefault(width, _SameWidth(names=[], inputs=[]))
                places[id(observed)] = (width, len(same.inputs))
                same.names.append(name)
                same.inputs.append(observed)
            self._places[name] = places[id(observed)]

    def refresh_if_due(self, steps_done: int) -> None:
        """New roots each REFRESH_STEPS steps, and where there are none."""
        for same in self._by_width.values():
            if same.roots is None or steps_done % REFRESH_STEPS == 0:
                same.roots = self._fresh_roots(same)

    def _fresh_roots(self, same: _SameWidth) -> Tensor:
        covariances, masses = self._averaged(same)
        count, world = len(same.inputs), self._ranks.world_size
        share = -(-count // world)
        own = [min(index, count - 1) for index in range(self._ranks.rank * share, (self._ranks.rank + 1) * share)]
        matrices = damped(covariances, masses, self._damping)
        if world > 1:
            matrices = matrices[own]
        return self._ranks.all_shards(inverse_root(matrices))[:count]

    def _averaged(self, same: _SameWidth) -> tuple[Tensor, Tensor]:
        """Covariances (count, dim, dim) and masses (count,), in place made the mean over the ranks."""
        covariances = torch.stack([each.covariance for each in same.inputs])
        masses = torch.stack([each.mass for each in same.inputs])
        if self._ranks.world_size > 1:
            self._ranks.mean_(covariances)
            self._ranks.mean_(masses)
            for each, covariance, mass in zip(same.inputs, covariances, masses, strict=True):
                each.covariance.copy_(covariance)
                each.mass.copy_(mass)
        return covariances, masses

    def roots(self, names: Sequence[str]) -> Tensor:
        """(count, dim, dim) of matrices whose inputs have one width. Raises KeyError for an unknown name."""
        places = [self._places[name] for name in names]
        roots = self._by_width[places[0][0]].roots
        if roots is None:
            raise ValueError("refresh_if_due comes before the first use of the roots")
        wanted = [index for _, index in places]
        if wanted == list(range(wanted[0], wanted[0] + len(wanted))):
            return roots[wanted[0] : wanted[0] + len(wanted)]
        if tuple(names) not in self._indices:  # copied to the device once, for a copy waits
            self._indices[tuple(names)] = torch.tensor(wanted, device=roots.device)
        return roots.index_select(0, self._indices[tuple(names)])

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Name of the first matrix that has an input -> its covariance, mass and root. Every rank must call it."""
        state: dict[str, dict[str, Tensor]] = {}
        for same in self._by_width.values():
            covariances, masses = self._averaged(same)
            for index, name in enumerate(same.names):
                state[name] = {"covariance": covariances[index].clone(), "mass": masses[index].clone()}
                if same.roots is not None:
                    state[name]["root"] = same.roots[index].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a saved state; from one without inputs (of a run that did not observe them) begin anew.

        Raises OptimizerStateError for a state of other inputs.
        """
        if not state:
            return
        names = [name for same in self._by_width.values() for name in same.names]
        if set(names) != set(state):
            raise OptimizerStateError(
                f"the saved input covariances do not fit the model, which has {len(names)}: "
                f"{', '.join(sorted(set(names) ^ set(state))[:4])}; start from a checkpoint of the same model"
            )
        for width, same in self._by_width.items():
            for name, each in zip(same.names, same.inputs, strict=True):
                if tuple(state[name]["covariance"].shape) != (width, width):
                    raise OptimizerStateError(
                        f"the saved input covariance of {name} has the shape {tuple(state[name]['covariance'].shape)}, "
                        f"the model's {(width, width)}; start from a checkpoint of the same model"
                    )
                each.covariance.copy_(state[name]["covariance"])
                each.mass.copy_(state[name]["mass"])
            if all("root" in state[name] for name in same.names):
                device = same.inputs[0].covariance.device
                same.roots = torch.stack([state[name]["root"].to(device) for name in same.names])
            else:
                same.roots = None
