"""Which windows of a token stream are run, and which of their positions are scored. Torch-free.

A stream of n + 1 tokens has n *positions*: position t is token t as input, its target is token t + 1. Every plan
scores each position exactly once, so every token but the stream's first:

- `plain`: windows of `seq_len` positions side by side, all of their positions scored.
- `sliding` (Baevski and Auli 2019, arXiv:1809.10853; Press et al. 2021, arXiv:2012.15832): windows of `context`
  positions, each `stride` further than the one before, of which only the new positions are scored, so that all but
  the first window's have at least `context - stride` positions before them. The last window is moved back to end
  exactly at the stream's end: its tail is scored once, with as much context as the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError

Positions = npt.NDArray[np.int64]


class WindowError(InputError):
    """Windows that cannot be laid: the message names the number and what to give instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Positions `start` to `end` (exclusive) are run, those from `score_from` on are scored."""

    start: int
    score_from: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPlan:
    """Windows in stream order, as arrays `(windows,)`; what one scores begins where the one before ended.

    `context` is the width of the longest, `stride` the most that a window scores if it does not score all of its
    positions; in a plain plan they are equal.
    """

    starts: Positions
    score_froms: Positions
    ends: Positions
    context: int
    stride: int

    def __len__(self) -> int:
        return int(self.starts.size)

    def __iter__(self) -> Iterator[Window]:
        for start, score_from, end in zip(self.starts, self.score_froms, self.ends, strict=True):
            yield Window(start=int(start), score_from=int(score_from), end=int(end))

    @property
    def scored(self) -> int:
        """Positions scored."""
        return int((self.ends - self.score_froms).sum())

    def share(self, rank: int, world_size: int) -> WindowPlan:
        """The windows of one of `world_size` processes: a contiguous part, of equal size but for one window."""
        return self._part(len(self) * rank // world_size, len(self) * (rank + 1) // world_size)

    def groups(self) -> list[tuple[int, WindowPlan]]:
        """Runs of neighbouring windows that need losses of equally many of their last positions, with that number.

        A window that scores from its start on needs all `context` (it may be shorter, and is padded at its end);
        any other is `context` wide and needs the last `stride`.
        """
        needed = np.where(self.score_froms == self.starts, self.context, self.stride)
        borders = [0, *(np.flatnonzero(np.diff(needed)) + 1).tolist(), len(self)]
        return [(int(needed[first]), self._part(first, last)) for first, last in pairwise(borders) if last > first]

    def context_lengths(self, positions: Positions) -> Positions:
        """How many tokens the model sees when it is scored at each of `positions` `(n,)`; at least 1."""
        window = np.searchsorted(self.score_froms, positions, side="right") - 1
        lengths: Positions = positions - self.starts[window] + 1
        return lengths

    def _part(self, first: int, last: int) -> WindowPlan:
        return WindowPlan(
            starts=self.starts[first:last],
            score_froms=self.score_froms[first:last],
            ends=self.ends[first:last],
            context=self.context,
            stride=self.stride,
        )


def plain(positions: int, *, seq_len: int) -> WindowPlan:
    """Windows side by side; the last one may be shorter. Raises WindowError."""
    _require(positions, seq_len, "a window of")
    starts = np.arange(0, positions, seq_len, dtype=np.int64)
    width = min(seq_len, positions)
    ends = np.minimum(starts + seq_len, positions)
    return WindowPlan(starts=starts, score_froms=starts, ends=ends, context=width, stride=width)


def sliding(positions: int, *, context: int, stride: int) -> WindowPlan:
    """Overlapping windows, each `stride` further. Raises WindowError, such as for a stride beyond the context."""
    _require(positions, context, "a context of")
    if not 1 <= stride <= context:
        raise WindowError(
            f"a stride of {stride} with a context of {context}: give a stride from 1 to the context, "
            "for a longer one would leave tokens unscored"
        )
    width = min(context, positions)
    ends = np.append(np.arange(width, positions, stride, dtype=np.int64), positions)
    score_froms = np.concatenate([[0], ends[:-1]])
    return WindowPlan(starts=ends - width, score_froms=score_froms, ends=ends, context=width, stride=min(stride, width))


def _require(positions: int, width: int, what: str) -> None:
    if positions < 1:
        raise WindowError(f"a stream of {positions + 1} tokens has nothing to score; give at least 2")
    if width < 1:
        raise WindowError(f"{what} {width} tokens: give at least 1")
