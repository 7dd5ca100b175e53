"""The nearest orthogonal matrix by matrix products alone: odd polynomials of the singular values, iterated.

One step maps X = U S V^T to U p(S) V^T with p(s) = a s + b s^3 + c s^5, which needs X X^T and two products more.

classic: one quintic for all steps (Jordan et al. 2024, kellerjordan.github.io/posts/muon), whose slope at 0 is so
large that it never settles: singular values end scattered within about .7 to 1.2.
polar_express (Amsel et al. 2025, arXiv:2505.16932): for each step the quintic that is best in the worst case, given
what the steps before it have made of the interval [1e-3, 1]. They come ever nearer to the fifth-order Newton-Schulz
polynomial, which converges; from the eighth step on it is used itself.

MuonEq-R (arXiv:2603.28254): every row of the matrix, the incoming weights of one output unit, is first scaled to
unit norm, so that no unit's gradient drowns the others' in the few steps there are.
"""

from __future__ import annotations

from itertools import chain, islice, repeat
from typing import Literal, Protocol

import torch
from torch import Tensor

Coefficients = Literal["classic", "polar_express"]
Quintic = tuple[float, float, float]

CLASSIC: Quintic = (3.4445, -4.7750, 2.0315)

# Table of the paper for l = 1e-3 with cushion .024: minimax on [max(l, .024 u), u], re-centred on [l, u]; a test
# finds the same by linear programming.
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# The paper's: in bfloat16 singular values overshoot what the next polynomial was made for, so each but the last
# takes its argument this much smaller.
SAFETY = 1.01

_NORM_FLOOR = 1e-7


class Orthogonalize(Protocol):
    """`orthogonalize`, compiled or not."""

    def __call__(
        self,
        matrices: Tensor,
        steps: int,
        coefficients: Coefficients = "classic",
        transposed: Tensor | None = None,
    ) -> Tensor: ...


def polynomials(coefficients: Coefficients, steps: int) -> list[Quintic]:
    """The quintic of each of `steps` steps; past the end of a table its last one is repeated."""
    if coefficients == "classic":
        return [CLASSIC] * steps
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return list(islice(chain(safe, repeat(POLAR_EXPRESS[-1])), steps))


def orthogonalize(
    matrices: Tensor, steps: int, coefficients: Coefficients = "classic", transposed: Tensor | None = None
) -> Tensor:
    """(count, rows, columns), rows <= columns, to nearly orthogonal rows, each matrix by itself.

    With X = U S V^T it returns about U V^T. In bfloat16 on CUDA, where the iteration tolerates it; float32 elsewhere.
    `transposed` (count,) bool asks for unit rows first, and says of which matrices the rows stand here as columns.
    """
    if transposed is not None:
        matrices = unit_rows(matrices, transposed)
    X = matrices.bfloat16() if matrices.is_cuda else matrices
    # Below the spectral norm 1 the iteration converges; the Frobenius norm bounds it.
    margin = 1.0 if coefficients == "classic" else SAFETY
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * margin + _NORM_FLOOR)
    for a, b, c in polynomials(coefficients, steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.to(matrices.dtype)


def unit_rows(matrices: Tensor, transposed: Tensor) -> Tensor:
    """(count, rows, columns) with rows of norm 1, or columns where `transposed` (count,) says so; zeros stay zeros."""
    norms = torch.where(
        transposed.view(-1, 1, 1), matrices.norm(dim=-2, keepdim=True), matrices.norm(dim=-1, keepdim=True)
    )
    return matrices / norms.clamp_min(torch.finfo(norms.dtype).tiny)
