"""Document-aware packing on realistic lengths: full rows, few cuts, and the work ahead that feeds them."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import PackedDocuments, document_lengths, most_pieces, pack
from trainer.data.prefetch import Prefetcher


def lengths_like_the_web(documents: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    drawn = np.exp(np.random.default_rng(0).normal(5.2, 1.0, documents))
    return np.clip(drawn.astype(np.int64), 8, 60_000)


def test_packing_cuts_hardly_any_document_that_fits_a_row() -> None:
    lengths, seq_len = lengths_like_the_web(20_000), 512
    starts, tokens = np.cumsum(lengths) - lengths, int(lengths.sum())
    order = PackedDocuments(starts, tokens, seq_len, seed=3)
    pieces = order.pieces(0, 0, order.rows)
    assert (np.cumsum(pieces[:, 1] - pieces[:, 0]) % seq_len == 0).sum() == order.rows
    of = np.searchsorted(starts, pieces[:, 0], side="right") - 1
    assert np.all(pieces[:, 1] <= (starts + lengths)[of])
    fits = lengths <= seq_len
    cut = np.bincount(of, minlength=lengths.size) > 1
    cut_by_windows = starts // seq_len != (starts + lengths - 1) // seq_len
    assert cut[fits].mean() < 0.015
    assert cut_by_windows[fits].mean() > 0.25


def test_a_row_read_alone_is_the_row_of_the_whole_epoch() -> None:
    lengths = lengths_like_the_web(6_000)
    starts, tokens = np.cumsum(lengths) - lengths, int(lengths.sum())
    whole = PackedDocuments(starts, tokens, 256, seed=3)
    assert whole.rows > 3 * 1024
    pieces = whole.pieces(1, 0, whole.rows)
    ends = np.cumsum(pieces[:, 1] - pieces[:, 0])
    for row in (0, 1023, 1024, 2500, whole.rows - 1):
        alone = PackedDocuments(starts, tokens, 256, seed=3).pieces(1, row, row + 1)
        np.testing.assert_array_equal(alone, pieces[(ends > row * 256) & (ends <= (row + 1) * 256)])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 20), st.integers(0, 9))
def test_packing_keeps_every_token_and_fills_every_row(drawn: list[int], seq_len: int, seed: int) -> None:
    lengths = np.array([*drawn, -sum(drawn) % seq_len or seq_len], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    pieces, firsts = pack(starts, lengths, seq_len, np.random.default_rng(seed))
    covered = np.concatenate([np.arange(start, stop) for start, stop in pieces])
    np.testing.assert_array_equal(np.sort(covered), np.arange(lengths.sum()))
    assert firsts.size == lengths.sum() // seq_len + 1
    sizes = pieces[:, 1] - pieces[:, 0]
    for first, stop in pairwise(firsts):
        assert sizes[first:stop].sum() == seq_len
    assert pieces.shape[0] <= most_pieces(lengths, seq_len, firsts.size - 1, 1)


def test_document_lengths() -> None:
    assert document_lengths(np.array([0, 3, 4]), 9).tolist() == [3, 1, 5]


def test_work_ahead_is_bounded_and_ends_with_its_owner() -> None:
    made: list[int] = []
    third = threading.Event()

    def produce() -> int:
        made.append(len(made))
        if len(made) == 3:
            third.set()
        return made[-1]

    ahead = Prefetcher(produce, 2)
    assert ahead.get() == 0
    assert third.wait(10)  # one taken, two ready
    ahead.close()
    assert made == [0, 1, 2]
    with pytest.raises(ValueError, match="closed"):
        ahead.get()


def test_an_error_ahead_comes_after_what_was_made_before_it() -> None:
    results = iter([1, 2])

    def produce() -> int:
        try:
            return next(results)
        except StopIteration:
            raise OSError("the disk is gone") from None

    ahead = Prefetcher(produce, 5)
    assert [ahead.get(), ahead.get()] == [1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.get()
    ahead.close()
