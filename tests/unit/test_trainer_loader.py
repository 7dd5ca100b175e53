"""The training loader: every window once an epoch, in an order that the seed decides, resumable to the next batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.loader import TokenLoader
from trainer.data.shards import HEADER_BYTES, ShardError, write_shard

SIZES = (41, 1, 103, 0, 9)
VOCAB = 200


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loader")
    paths, start = [], 0
    for index, size in enumerate(SIZES):
        path = folder / f"{index}.bin"
        write_shard(path, np.arange(start, start + size, dtype=np.uint16))
        paths.append(path)
        start += size
    return paths


def _loader(shards: list[Path], rows: int = 3, seed: int = 7, seq_len: int = 8) -> TokenLoader:
    return TokenLoader(shards, rows * seq_len, seq_len, seed=seed, device="cpu", vocab_size=VOCAB)


def test_every_window_once_an_epoch_and_anew_in_the_next(shards: list[Path]) -> None:
    loader = _loader(shards, rows=1)
    expected = sorted(sum(SIZES[:i]) + 8 * w for i, size in enumerate(SIZES) for w in range(max(0, size - 1) // 8))
    assert loader.windows_per_epoch == len(expected)
    epochs = []
    for epoch in range(3):
        assert loader.epoch == epoch
        epochs.append([int(loader.next_batch()[0][0, 0]) for _ in expected])
        assert sorted(epochs[-1]) == expected
    assert epochs[0] != epochs[1] != epochs[2]


def test_targets_are_the_next_tokens(shards: list[Path]) -> None:
    inputs, targets = _loader(shards).next_batch()
    assert inputs.shape == targets.shape == (3, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(1, 25), st.integers(0, 2**31 - 1))
def test_resumes_to_the_very_next_batch(shards: list[Path], done: int, rows: int, seed: int) -> None:
    loader = _loader(shards, rows, seed)
    for _ in range(done):
        loader.next_batch()
    resumed = _loader(shards, rows, seed)
    resumed.load_state_dict(loader.state_dict())
    for _ in range(5):
        assert torch.equal(loader.next_batch()[0], resumed.next_batch()[0])
    assert loader.epoch == resumed.epoch
    assert loader.state_dict() == resumed.state_dict()


def test_a_batch_larger_than_an_epoch_takes_from_the_next(shards: list[Path]) -> None:
    single, large = _loader(shards, rows=1), _loader(shards, rows=40)
    rows = torch.cat([single.next_batch()[0] for _ in range(40)])
    assert torch.equal(large.next_batch()[0], rows)


def test_seeds_differ(shards: list[Path]) -> None:
    assert not torch.equal(_loader(shards, 8, seed=1).next_batch()[0], _loader(shards, 8, seed=2).next_batch()[0])


@pytest.mark.parametrize("change", [{"seed": 8}, {"windows": 3}, {"seq_len": 9}, {"version": 2}, {"position": 10**6}])
def test_another_state_is_refused(shards: list[Path], change: dict[str, int]) -> None:
    loader = _loader(shards)
    with pytest.raises(ValueError, match="loader's state"):
        loader.load_state_dict(loader.state_dict() | change)


def test_bad_arguments_and_bad_tokens(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match="multiple of seq_len"):
        TokenLoader(shards, 20, 8, seed=1, device="cpu", vocab_size=VOCAB)
    with pytest.raises(ValueError, match="no window"):
        TokenLoader(shards, 500, 500, seed=1, device="cpu", vocab_size=VOCAB)
    loader = TokenLoader(shards[:1], 40, 8, seed=1, device="cpu", vocab_size=40)
    with pytest.raises(ShardError, match=rf"offset {HEADER_BYTES + 80} holds token 40"):
        loader.next_batch()
