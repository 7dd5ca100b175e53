"""Which row of its table a pair of tokens has."""

from __future__ import annotations

import pytest
import torch

from trainer.model.bigrams import bigram_rows


def test_a_row_depends_on_the_pair_and_on_nothing_else() -> None:
    inputs = torch.tensor([[7, 3, 9, 3, 9], [9, 3, 9, 4, 3]])
    rows = bigram_rows(inputs, 1 << 20)
    assert rows[0, 2] == rows[0, 4] == rows[1, 2]  # 3 9
    assert rows[1, 1] == rows[0, 3]  # 9 3
    assert len({int(row) for row in (rows[0, 1], rows[0, 2], rows[0, 3], rows[1, 3], rows[1, 4])}) == 5
    assert rows[0, 0] == bigram_rows(torch.tensor([[0, 7]]), 1 << 20)[0, 1]


@pytest.mark.parametrize(("vocab_size", "step", "rows"), [(1024, 1, 4096), (1024, 1, 10007), (65536, 64, 8192)])
def test_pairs_fill_all_rows_about_evenly(vocab_size: int, step: int, rows: int) -> None:
    """Also where tokens differ in their high bits alone."""
    tokens = torch.arange(0, vocab_size, step)
    pairs = torch.cartesian_prod(tokens, tokens)
    counts = torch.bincount(bigram_rows(pairs, rows)[:, 1], minlength=rows).double()
    assert len(counts) == rows
    mean = float(counts.mean())
    assert float(counts.std()) < 2 * mean**0.5  # that of numbers drawn at random is the root of the mean
    assert float(counts.max()) < mean + 10 * mean**0.5
    assert float(counts.min()) > 0
