"""In which order the windows of an epoch come. Pure and seeded: row r of epoch e is the same on every machine.

A *row* is a training window of exactly `seq_len` input positions. It is made of *pieces*: intervals of the token
stream. In the orders of this module a row is one piece, whatever documents it holds; `trainer.data.packing` makes
rows of whole documents. An order has `tokens // seq_len` rows an epoch, each input position in one of them, so the
tail that an epoch leaves out is shorter than a window.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Pieces = npt.NDArray[np.int64]
"""Intervals `start..stop` of the stream, `(pieces, 2)`; rows follow one another, and no piece crosses into the next."""


class WindowOrder(Protocol):
    """`rows` an epoch, and the pieces of the rows `first..stop` of an epoch."""

    @property
    def rows(self) -> int: ...

    def pieces(self, epoch: int, first: int, stop: int) -> Pieces: ...


class SequentialWindows:
    """Windows as they stand in the stream, every epoch the same."""

    def __init__(self, tokens: int, seq_len: int) -> None:
        self.rows, self._seq_len = tokens // seq_len, seq_len

    def pieces(self, epoch: int, first: int, stop: int) -> Pieces:  # noqa: ARG002 - no epoch differs from another
        return _windows(np.arange(first, stop), self._seq_len)


class ShuffledWindows:
    """The same windows, permuted anew each epoch from the seed."""

    def __init__(self, tokens: int, seq_len: int, seed: int) -> None:
        self.rows, self._seq_len, self._seed = tokens // seq_len, seq_len, seed
        self._epoch, self._permutation = -1, np.zeros(0, dtype=np.int64)

    def pieces(self, epoch: int, first: int, stop: int) -> Pieces:
        if self._epoch != epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self.rows)
            self._epoch = epoch
        return _windows(self._permutation[first:stop], self._seq_len)


def _windows(numbers: npt.NDArray[np.int64], seq_len: int) -> Pieces:
    starts = numbers * seq_len
    return np.stack([starts, starts + seq_len], axis=1)
