"""The smear gate: each embedding takes a gated share of the one before it, so that bigrams cost no attention head.

    e_t <- e_t + scale * sigmoid(gate . e_t[:width]) * e_{t-1}

as in the public modded-nanogpt and parameter-golf runs. There the first version looked across the beginning of a
document, which leaks what a position is not meant to see; here the share is zero at every document's first token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def first_tokens(ids: Tensor) -> Tensor:
    """(batch, time) document ids -> (batch, time) bool: whether a position is the first of its document or row."""
    change = ids[:, 1:] != ids[:, :-1]
    return functional.pad(change, (1, 0), value=True)


def smear(embedded: Tensor, first: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    """`embedded` (batch, time, dim), `first` (batch, time) bool, `gate` (1, width), `scale` (1,) -> like `embedded`."""
    dtype = embedded.dtype
    share = torch.sigmoid(functional.linear(embedded[..., : gate.shape[1]], gate.to(dtype))) * scale.to(dtype)
    before = functional.pad(embedded[:, :-1], (0, 0, 1, 0))
    return torch.addcmul(embedded, before, share.masked_fill(first.unsqueeze(2), 0.0))
