"""Documents of a stream: where they begin, and batches that hold all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.shards import BOS
from trainer.document_batches import document_batches, document_bounds


@pytest.mark.parametrize(
    ("tokens", "bounds"),
    [
        ([1, 5, 6, 1, 7, 8], [(0, 3), (3, 5)]),
        ([5, 6, 1, 7, 8], [(0, 2), (2, 4)]),  # what lies before the first BOS is a document too
        ([5, 6, 7], [(0, 2)]),
        ([1, 1, 1, 5, 1], [(0, 1), (1, 2), (2, 4)]),  # a last BOS is a target alone
        ([1, 5], [(0, 1)]),
        ([5, 1], [(0, 1)]),
    ],
)
def test_a_document_is_from_one_bos_to_the_next(tokens: list[int], bounds: list[tuple[int, int]]) -> None:
    starts, ends = document_bounds(np.array(tokens, dtype=np.uint16))
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == bounds


@settings(deadline=None)
@given(st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=2, max_size=60), st.integers(1, 9))
def test_batches_hold_each_position_once_in_whole_documents(tokens: list[int], rows: int) -> None:
    stream = np.array(tokens, dtype=np.uint16)
    batches = document_batches(stream, rows=rows)
    spans = [span for batch in batches for span in zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)]
    assert len(spans) == rows * len(batches)
    real = [(start, end) for start, end in spans if end > start]
    assert len(spans) - len(real) < rows
    assert sorted(at for start, end in real for at in range(start, end)) == list(range(len(tokens) - 1))
    for start, end in real:
        assert start == 0 or tokens[start] == BOS
        assert BOS not in tokens[start + 1 : end]
    lengths = [end - start for start, end in spans]
    assert lengths == sorted(lengths, reverse=True)
    for number, batch in enumerate(batches):
        longest = lengths[number * rows]
        assert (batch.chunks(1), batch.chunks(4), batch.chunks(longest)) == (longest, (longest + 3) // 4, 1)
