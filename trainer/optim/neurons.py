"""NorMuon (Li et al. 2025, arXiv:2510.05491): every neuron of a matrix gets a rate by what it has been moved so far.

An orthogonal direction O has equal norms along its shorter side (1, up to the iteration's error), and unequal ones
along its longer side: those are the neurons here, as in the public modded-nanogpt. In an MLP they are the hidden units,
rows of its first matrix (out, in) and columns of its second; the paper takes rows of both, of which the second's are
equal already. With eps 1e-10 and a running second moment v, one number a neuron,

    v <- beta2 v + (1 - beta2) mean over the shorter side of O^2;   Q = O / (sqrt(v) + eps);   O <- Q ||O|| / ||Q||.

The paper gives Q the norm .2 sqrt(rows columns); it keeps O's here, as in modded-nanogpt, so that Muon's learning rates
hold. That also makes debiasing needless: 1 - beta2^t is a factor of all of v alike, which the norm takes out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.ranks import Ranks

_EPS = 1e-10


def neuron_count(shape: Sequence[int]) -> int:
    return max(shape)


class NeuronMoments:
    """v of a batch, of which this rank has the slice `own`: beside `momentum`, which is (slice, rows, columns)."""

    def __init__(self, momentum: Tensor, *, own: range, beta2: float) -> None:
        self._own, self._beta2 = own, beta2
        count, rows, columns = momentum.shape
        self._along = -1 if rows >= columns else -2
        self._moments = momentum.new_zeros((count, rows, 1) if rows >= columns else (count, 1, columns))

    def equalize_(self, directions: Tensor) -> None:
        """Take O of the slice into v, and make it what the formula says. Zeros stay zeros."""
        norms = directions.norm(dim=self._along, keepdim=True)
        self._moments.lerp_(norms.square().div_(directions.shape[self._along]), 1.0 - self._beta2)
        inverse = (self._moments.sqrt() + _EPS).reciprocal_()
        # The norms of whole matrices come from those of their neurons.
        before = norms.norm(dim=(-2, -1), keepdim=True)
        after = (norms * inverse).norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
        directions.mul_(inverse.mul_(before / after))

    def whole(self, ranks: Ranks) -> list[Tensor]:
        """Copies of v (neurons,) of all matrices of the batch, and of what fills it up. Every rank must call it."""
        return [moment.flatten().clone() for moment in ranks.all_shards(self._moments)]

    def take(self, whole: Sequence[Tensor]) -> None:
        """Go on from what `whole` gave, to any number of ranks."""
        self._moments.zero_()
        for place, number in enumerate(self._own):
            if number < len(whole):
                self._moments[place].view(-1).copy_(whole[number])
