"""Attention written out, one position at a time, and packages of attention kernels that are made of it."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def by_hand(q: Tensor, k: Tensor, v: Tensor, documents: list[list[int]] | None, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v one position at a time, in float64; several query heads may share a key.

    A position sees its own document, and no more than the last `window` positions.
    """
    batch, time, heads, width = q.shape
    shared = heads // k.shape[2]
    found = torch.zeros(batch, time, heads, width, dtype=torch.float64)
    for row in range(batch):
        for at in range(time):
            own = None if documents is None else documents[row]
            first = 0 if window is None else max(0, at - window + 1)
            seen = [key for key in range(first, at + 1) if own is None or own[key] == own[at]]
            for head in range(heads):
                keys, values = (part[row, seen, head // shared].double() for part in (k, v))
                scores = keys @ q[row, at, head].double() / math.sqrt(width)
                weights = torch.exp(scores - scores.max())
                found[row, at, head] = weights / weights.sum() @ values
    return found


def window_of(window_size: tuple[int, int]) -> int | None:
    """From how many positions back a kernel is told to see, and how many ahead: none."""
    back, ahead = window_size
    assert ahead == 0
    return None if back == -1 else back + 1


def by_document(
    heads: tuple[Tensor, Tensor, Tensor], starts: Tensor, most: int, window_size: tuple[int, int]
) -> Tensor:
    """Queries, keys and values (tokens, heads, head_dim), document by document, as the starts alone say."""
    assert starts.dtype == torch.int32
    bounds = starts.tolist()
    assert (bounds[0], bounds[-1]) == (0, heads[0].shape[0])
    lengths = [stop - start for start, stop in pairwise(bounds)]
    assert min(lengths) >= 0
    assert max(lengths) <= most
    parts = zip(*(torch.split(part, lengths) for part in heads), strict=True)
    window = window_of(window_size)
    return torch.cat([by_hand(*(part[None] for part in own), None, window)[0] for own in parts])


def package(*, as_tuple: bool) -> SimpleNamespace:
    """Stands for FlashAttention-3's: its two functions, slowly; older ones return the log-sum-exp as well."""

    def answered(found: Tensor, like: Tensor) -> Any:
        whole = found.to(like.dtype)
        return (whole, torch.zeros(1)) if as_tuple else whole

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int] = (-1, 0)
    ) -> Any:
        assert causal
        return answered(by_hand(q, k, v, None, window_of(window_size)), q)

    def flash_attn_varlen_func(  # noqa: PLR0917 - the package's own order
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts_q: Tensor,
        starts_k: Tensor,
        most_q: int,
        most_k: int,
        *,
        causal: bool,
        window_size: tuple[int, int] = (-1, 0),
    ) -> Any:
        assert causal
        assert torch.equal(starts_q, starts_k)
        return answered(by_document((q, k, v), starts_q, min(most_q, most_k), window_size), q)

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


def varlen_attn(  # noqa: PLR0917 - torch's own order
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    most_q: int,
    most_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """Stands for torch's, slowly."""
    assert torch.equal(starts_q, starts_k)
    return by_document((q, k, v), starts_q, min(most_q, most_k), window_size).to(q.dtype)
