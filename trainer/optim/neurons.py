"""NorMuon (Li et al. 2025, arXiv:2510.05491): every neuron of a matrix gets a rate by what it has been moved so far.

Neurons are the rows of a weight (out, in). Of an orthogonal direction O their norms differ where there are more rows
than columns (all are 1 otherwise, up to the iteration's error), and those of an input-aware direction always. With
eps 1e-10 and a running second moment v, one number a row,

    v <- beta2 v + (1 - beta2) mean over columns of O^2;   Q = O / (sqrt(v) + eps);   O <- Q ||O|| / ||Q||.

The paper gives Q the norm .2 sqrt(rows columns); it keeps O's here, as in the public modded-nanogpt, so that Muon's
learning rates hold. That also makes debiasing needless: 1 - beta2^t is a factor of all rows of v alike, which the norm
takes out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.ranks import Ranks

_EPS = 1e-10


class NeuronMoments:
    """v of a batch, of which this rank has the slice `own`: (slice, rows, columns) like its momentum.

    Neurons are rows, and columns of matrices that lie `transposed`. A batch with some of both keeps both of each matrix
    and uses the one: another reduction costs less than taking the batch apart.
    """

    def __init__(
        self, momentum: Tensor, *, own: range, transposed: Sequence[bool], own_transposed: Tensor, beta2: float
    ) -> None:
        self._own, self._transposed, self._beta2 = own, transposed, beta2
        self._own_transposed = own_transposed.view(-1, 1, 1)
        count, rows, columns = momentum.shape
        self._moments = {
            flip: momentum.new_zeros((count, 1, columns) if flip else (count, rows, 1))
            for flip in sorted(set(transposed))
        }

    def equalize_(self, directions: Tensor) -> None:
        """Take O of the slice into v, and make it what the formula says. Zeros stay zeros."""
        factors = {flip: self._factors(directions, flip) for flip in self._moments}
        if len(factors) == 1:
            (factor,) = factors.values()
        else:
            factor = torch.where(self._own_transposed, factors[True], factors[False])
        directions.mul_(factor)

    def _factors(self, directions: Tensor, flip: bool) -> Tensor:
        """What each neuron is multiplied by; the norms of whole matrices come from those of their neurons."""
        along, moment = -2 if flip else -1, self._moments[flip]
        norms = directions.norm(dim=along, keepdim=True)
        moment.lerp_(norms.square().div_(directions.shape[along]), 1.0 - self._beta2)
        inverse = (moment.sqrt() + _EPS).reciprocal_()
        before = norms.norm(dim=(-2, -1), keepdim=True)
        after = (norms * inverse).norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
        return inverse.mul_(before / after)

    def whole(self, ranks: Ranks) -> list[Tensor]:
        """Copies of v (out,) of all matrices of the batch. Every rank must call it."""
        gathered = {flip: ranks.all_shards(moment) for flip, moment in self._moments.items()}
        return [gathered[flip][number].flatten().clone() for number, flip in enumerate(self._transposed)]

    def take(self, whole: Sequence[Tensor]) -> None:
        """Go on from what `whole` gave, to any number of ranks."""
        for moment in self._moments.values():
            moment.zero_()
        for place, number in enumerate(self._own):
            if number < len(whole):
                self._moments[self._transposed[number]][place].view(-1).copy_(whole[number])
