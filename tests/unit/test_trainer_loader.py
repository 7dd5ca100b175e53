"""The training loader: every input token once an epoch, in each order, over any ranks, resumable to the next batch."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import DataOrder
from trainer.data import packing
from trainer.data.loader import Batch, TokenLoader
from trainer.data.shards import BOS, HEADER_BYTES, ShardError, write_shard
from trainer.data.token_stream import TokenStream

VOCAB = 3000
ORDERS: tuple[DataOrder, ...] = get_args(DataOrder)
orders = st.sampled_from(ORDERS)


def write_stream(folder: Path, lengths: list[int], sizes: list[int]) -> list[Path]:
    """Documents of these lengths, a BOS and then tokens of ascending numbers, cut into shards of these sizes."""
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.uint16)
    tokens[np.cumsum([0, *lengths[:-1]])] = BOS
    paths = []
    for index, part in enumerate(np.split(tokens, np.cumsum(sizes))):
        paths.append(folder / f"{index}.bin")
        write_shard(paths[-1], part)
    return paths


LENGTHS = [3, 25, 1, 7, 40, 2, 8, 16, 5, 9, 1, 33, 4, 4, 12, 21]
STREAM = sum(LENGTHS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_stream(tmp_path_factory.mktemp("loader"), LENGTHS, [41, 1, 0, 103])


def _loader(shards: list[Path], rows: int = 3, seed: int = 7, seq_len: int = 8, **more: Any) -> TokenLoader:
    return TokenLoader(shards, rows * seq_len, seq_len, seed=seed, device="cpu", vocab_size=VOCAB, **more)


def _stream(shards: list[Path]) -> np.ndarray[Any, Any]:
    """The tokens, and the BOS after them."""
    stream = TokenStream(shards)
    tokens = np.empty(stream.size + 1, dtype=np.int64)
    stream.read(0, tokens)
    return tokens


def _epoch(loader: TokenLoader) -> tuple[list[int], list[int]]:
    """Inputs and targets of one epoch of one-row batches."""
    batches = [loader.next_batch() for _ in range(loader.windows_per_epoch)]
    return (
        [token for batch in batches for token in batch.inputs.flatten().tolist()],
        [token for batch in batches for token in batch.targets.flatten().tolist()],
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seq_len", [1, 5, 8, 30])
def test_every_input_token_once_an_epoch_with_the_token_that_follows_it(
    shards: list[Path], order: DataOrder, seq_len: int
) -> None:
    stream = _stream(shards)
    follows = {int(token): int(after) for token, after in pairwise(stream) if token != BOS}
    loader = _loader(shards, rows=1, seq_len=seq_len, order=order)
    epochs = []
    for epoch in range(2):
        assert loader.epochs == epoch
        inputs, targets = _epoch(loader)
        assert len(inputs) == STREAM // seq_len * seq_len
        plain = [token for token in inputs if token != BOS]
        assert len(set(plain)) == len(plain)
        assert set(plain) <= set(stream.tolist())
        assert inputs.count(BOS) <= len(LENGTHS)
        # What an epoch leaves out is shorter than a window.
        assert STREAM - len(inputs) < seq_len
        assert all(follows[token] == target for token, target in zip(inputs, targets, strict=True) if token != BOS)
        first_tokens = {int(stream[i + 1]) for i in np.flatnonzero(stream[:-1] == BOS)}
        assert {target for token, target in zip(inputs, targets, strict=True) if token == BOS} <= first_tokens
        epochs.append(inputs)
    assert (epochs[0] == epochs[1]) == (order == "sequential" or loader.windows_per_epoch == 1)


def test_sequential_windows_stand_as_in_the_stream(shards: list[Path]) -> None:
    inputs, targets = _epoch(_loader(shards, rows=1, order="sequential"))
    stream = _stream(shards).tolist()
    assert inputs == stream[: len(inputs)]
    assert targets == stream[1 : len(inputs) + 1]


def test_the_shuffle_is_the_one_of_earlier_versions(tmp_path: Path) -> None:
    shard = write_stream(tmp_path, [50], [])
    found = [int(_row[0]) for _row in _loader(shard, rows=6, order="shuffled").next_batch().targets]
    expected = np.random.default_rng([7, 0]).permutation(6) * 8 + 11
    assert found == expected.tolist()


@settings(max_examples=60, deadline=None)
@given(
    order=orders,
    done=st.integers(0, 40),
    rows=st.integers(1, 25),
    seed=st.integers(0, 2**31 - 1),
    ahead=st.integers(0, 2),
)
def test_resumes_to_the_very_next_batch(
    *, shards: list[Path], order: DataOrder, done: int, rows: int, seed: int, ahead: int
) -> None:
    with (
        _loader(shards, rows, seed, order=order, prefetch_batches=ahead) as loader,
        _loader(shards, rows, seed, order=order, boundaries=True) as resumed,
    ):
        for _ in range(done):
            loader.next_batch()
        resumed.load_state_dict(loader.state_dict())
        for _ in range(4):
            ours, theirs = loader.next_batch(), resumed.next_batch()
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.targets, theirs.targets)
        assert loader.epochs == resumed.epochs == pytest.approx((done + 4) * rows / loader.windows_per_epoch)
        assert loader.state_dict() == resumed.state_dict()


@settings(max_examples=60, deadline=None)
@given(
    order=orders,
    rows=st.integers(1, 4),
    ranks=st.integers(1, 4),
    then=st.sampled_from([1, 2, 3]),
    steps=st.integers(0, 9),
)
def test_ranks_share_the_global_batch_and_their_number_may_change(
    *, shards: list[Path], order: DataOrder, rows: int, ranks: int, then: int, steps: int
) -> None:
    whole = _loader(shards, rows * ranks, order=order)
    parts = [_loader(shards, rows, order=order, rank=rank, world_size=ranks) for rank in range(ranks)]
    for _ in range(steps):
        together = torch.cat([part.next_batch().inputs for part in parts])
        assert torch.equal(whole.next_batch().inputs, together)
    assert all(part.state_dict() == whole.state_dict() for part in parts)
    others = [_loader(shards, rows, order=order, rank=rank, world_size=then) for rank in range(then)]
    for other in others:
        other.load_state_dict(parts[-1].state_dict())
    single = _loader(shards, 1, order=order)
    single.load_state_dict(whole.state_dict())
    together = torch.cat([other.next_batch().targets for other in others])
    assert torch.equal(together, torch.cat([single.next_batch().targets for _ in range(rows * then)]))


def _slow_boundaries(loader: TokenLoader, batch: Batch, tokens: np.ndarray[Any, Any]) -> list[int]:
    """A piece begins where a row does, at a BOS, and where a token does not follow the one before it."""
    inputs, targets = batch.inputs.flatten().tolist(), batch.targets.flatten().tolist()
    seq_len = batch.inputs.shape[1]
    starts = [
        at for at in range(len(inputs)) if at % seq_len == 0 or inputs[at] == BOS or targets[at - 1] != inputs[at]
    ]
    return [*starts, len(inputs)]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=40),
    order=orders,
    rows=st.integers(1, 12),
    seq_len=st.integers(1, 17),
    block=st.integers(1, 5),
)
def test_boundaries_are_those_of_a_slow_reference_and_of_one_shape(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    order: DataOrder,
    rows: int,
    seq_len: int,
    block: int,
) -> None:
    lengths = [*lengths, seq_len]
    shards = write_stream(tmp_path_factory.mktemp("cut"), lengths, [sum(lengths) // 3])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "BLOCK_ROWS", block)
        loader = _loader(shards, rows, order=order, seq_len=seq_len, boundaries=True)
        shapes = set()
        for _ in range(5):
            batch = loader.next_batch()
            assert batch.cu_seqlens is not None
            assert batch.cu_seqlens.dtype == torch.int32
            shapes.add(batch.cu_seqlens.shape)
            expected = _slow_boundaries(loader, batch, _stream(shards))
            found = batch.cu_seqlens.tolist()
            assert found[: len(expected)] == expected
            assert set(found[len(expected) :]) <= {rows * seq_len}
        assert len(shapes) == 1


def test_boundaries_are_given_only_if_asked_for(shards: list[Path]) -> None:
    assert _loader(shards).next_batch().cu_seqlens is None


def test_a_batch_larger_than_an_epoch_takes_from_the_next(shards: list[Path]) -> None:
    for order in ORDERS:
        single, large = _loader(shards, rows=1, order=order), _loader(shards, rows=60, order=order)
        rows = torch.cat([single.next_batch().inputs for _ in range(60)])
        assert torch.equal(large.next_batch().inputs, rows)


def test_seeds_differ(shards: list[Path]) -> None:
    for order in ("shuffled", "documents"):
        one, other = (_loader(shards, 8, seed=seed, order=order).next_batch().inputs for seed in (1, 2))
        assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"seed": 8}, "same data and settings"),
        ({"tokens": 3}, "same data and settings"),
        ({"seq_len": 9}, "same data and settings"),
        ({"order": "sequential"}, "same data and settings"),
        ({"version": 1}, "start without --resume"),
        ({"position": 10**6}, "points at window 1000000"),
    ],
)
def test_another_state_is_refused(shards: list[Path], change: dict[str, int], remedy: str) -> None:
    loader = _loader(shards)
    with pytest.raises(ValueError, match=f"loader's state.*{remedy}"):
        loader.load_state_dict(loader.state_dict() | change)


def test_bad_arguments(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match="multiple of seq_len"):
        TokenLoader(shards, 20, 8, seed=1, device="cpu", vocab_size=VOCAB)
    with pytest.raises(ValueError, match="no window"):
        TokenLoader(shards, 500, 500, seed=1, device="cpu", vocab_size=VOCAB)
    with pytest.raises(ValueError, match="no window"):
        TokenLoader([], 8, 8, seed=1, device="cpu", vocab_size=VOCAB, order="documents")
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        _loader(shards, rank=2, world_size=2)


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_token_out_of_range_is_named_after_the_batches_before_it(shards: list[Path], ahead: int) -> None:
    loader = TokenLoader(
        shards, 8, 8, seed=1, device="cpu", vocab_size=90, order="sequential", prefetch_batches=ahead
    )  # token 90 is the 80th of the stream, in the fourth shard, which begins with the 42nd
    with loader:
        for _ in range(9):
            loader.next_batch()
        for _ in range(2):  # and it stays an error
            with pytest.raises(ShardError, match=rf"3\.bin: offset {HEADER_BYTES + 2 * 38} holds token 90"):
                loader.next_batch()


def test_no_thread_outlives_its_loader(shards: list[Path]) -> None:
    before = set(threading.enumerate())
    with _loader(shards, prefetch_batches=2) as loader:
        assert len(set(threading.enumerate()) - before) == 1
        loader.next_batch()
        state = loader.state_dict()
        expected = loader.next_batch()
        loader.load_state_dict(state)  # what was read ahead is dropped
        assert torch.equal(loader.next_batch().inputs, expected.inputs)
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError, match="stop"), _loader(shards, prefetch_batches=1) as loader:
        raise RuntimeError("stop")
    assert set(threading.enumerate()) == before
