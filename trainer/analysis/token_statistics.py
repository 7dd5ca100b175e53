"""Statistics over the losses `(n,)` float32 and bytes `(n,)` of single tokens. Pure numpy; sums in float64.

Written for 10^8 tokens: besides the arrays given, one sorted copy, and chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.analysis.findings import ByteLeverage, Group, LossDistribution, Quantile, Share

Losses = npt.NDArray[np.float32]
Counts = npt.NDArray[Any]

EASY_NATS = 0.1
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_CHUNK_TOKENS = 1_000_000
_BIN_NATS = 0.25
_BINS = 64
# Dense where the curve bends, and every percent: the shares that tables show are among them.
_CURVE = tuple(sorted({0.0, 0.001, 0.002, 0.005, *(percent / 100 for percent in range(101))}))


def loss_distribution(losses: Losses) -> LossDistribution:
    """Quantiles, tail and histogram. `losses` (n,), at least one."""
    rising = np.sort(losses)
    count = rising.size
    ranks = [min(count - 1, math.ceil(share * count) - 1) for share in QUANTILES]
    edges = np.arange(_BINS, dtype=np.float32) * np.float32(_BIN_NATS)
    below = np.searchsorted(rising, edges, side="left")
    below[0] = 0  # a loss that rounding made a little less than nothing
    return LossDistribution(
        quantiles=tuple(
            Quantile(share=share, nats=float(rising[max(0, rank)]))
            for share, rank in zip(QUANTILES, ranks, strict=True)
        ),
        hardest=_curve(rising[::-1]),
        easy_nats=EASY_NATS,
        easy_share=float(np.searchsorted(rising, np.float32(EASY_NATS), side="left")) / count,
        histogram_nats=tuple(float(edge) for edge in edges),
        histogram_tokens=tuple(int(n) for n in np.diff(np.append(below, count))),
    )


def byte_leverage(target_bytes: Counts) -> ByteLeverage:
    """Which share of the bytes the longest tokens carry. `target_bytes` (n,), not all of them zero.

    Exact from the counts of each length; within equally long tokens the curve is a straight line.
    """
    counts = np.zeros(int(target_bytes.max()) + 1, dtype=np.int64)
    for start in range(0, target_bytes.size, _CHUNK_TOKENS):  # bincount makes eight bytes of each number
        counts += np.bincount(target_bytes[start : start + _CHUNK_TOKENS], minlength=counts.size)
    counts = counts[::-1]
    carried = counts * np.arange(counts.size - 1, -1, -1)
    tokens = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    held = np.concatenate([[0], np.cumsum(carried)]) / carried.sum()
    return ByteLeverage(
        longest=tuple(Share(of_tokens=x, of_total=float(np.interp(x, tokens, held))) for x in _CURVE),
        bytes_in_26_percent=float(np.interp(0.26, tokens, held)),
        tokens_for_47_percent=float(np.interp(0.47, held, tokens)),
    )


@dataclass(kw_only=True, slots=True)
class GroupSums:
    """Tokens, bytes and nats of labelled tokens, added up chunk by chunk; labels count from 0 to `groups - 1`."""

    groups: int
    tokens: npt.NDArray[np.int64] = field(init=False)
    bytes: npt.NDArray[np.int64] = field(init=False)
    nats: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = np.zeros(self.groups, dtype=np.int64)
        self.bytes = np.zeros(self.groups, dtype=np.int64)
        self.nats = np.zeros(self.groups, dtype=np.float64)

    def add(self, labels: Counts, losses: Losses, target_bytes: Counts) -> None:
        """`(n,)` each."""
        self.tokens += np.bincount(labels, minlength=self.groups)
        self.nats += np.bincount(labels, weights=losses, minlength=self.groups)
        # Sums of bytes are whole numbers, and exact in float64 up to 2^53.
        self.bytes += np.bincount(labels, weights=target_bytes, minlength=self.groups).astype(np.int64)

    def named(self, names: Sequence[str], *, empty: bool = False) -> tuple[Group, ...]:
        """As groups, with their shares in the whole; those without a token only if `empty`."""
        nats, size = math.fsum(self.nats), int(self.bytes.sum())
        return tuple(
            Group(
                name=name,
                tokens=int(self.tokens[index]),
                bytes=int(self.bytes[index]),
                nats=float(self.nats[index]),
                share_of_loss=float(self.nats[index]) / nats if nats else 0.0,
                bpb_contribution=float(self.nats[index]) / math.log(2) / size,
            )
            for index, name in enumerate(names)
            if empty or self.tokens[index]
        )


def require_whole(groups: Sequence[Group], *, tokens: int, size: int, nats: float) -> None:
    """Raise RuntimeError unless the groups divide the whole: no token lost, none counted twice."""
    found = (sum(group.tokens for group in groups), sum(group.bytes for group in groups))
    total = math.fsum(group.nats for group in groups)
    bpb = math.fsum(group.bpb_contribution for group in groups)
    if (
        found != (tokens, size)
        or not math.isclose(total, nats, rel_tol=1e-9, abs_tol=1e-9)
        or not math.isclose(bpb, nats / math.log(2) / size, rel_tol=1e-9, abs_tol=1e-9)
    ):
        raise RuntimeError(
            f"groups of {found[0]} tokens, {found[1]} bytes, {total} nats, {bpb} bits per byte do not add up to "
            f"{tokens} tokens, {size} bytes, {nats} nats"
        )


def _curve(falling: Losses) -> tuple[Share, ...]:
    """Share of the sum that the first, largest values hold; within one value the curve is a straight line."""
    count = falling.size
    wanted = [share * count for share in _CURVE]
    edges = sorted({min(math.floor(x), count - 1) for x in wanted})  # the curve begins at 0, so edges do too
    pieces = np.add.reduceat(falling, edges, dtype=np.float64)
    before = dict(zip(edges, np.concatenate([[0.0], np.cumsum(pieces)[:-1]]), strict=True))
    total = float(pieces.sum())
    points = []
    for share, x in zip(_CURVE, wanted, strict=True):
        whole = min(math.floor(x), count - 1)
        held = float(before[whole]) + (x - whole) * float(falling[whole])
        points.append(Share(of_tokens=share, of_total=held / total if total else share))
    return tuple(points)
