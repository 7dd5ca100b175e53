"""How fast the loader hands out batches, and how many documents each way of cutting windows cuts.

    python -m benchmarks.loader DATA [--seq-len 1024] [--batch-tokens 65536]

Nothing is trained: batches are taken one after the other on this machine's CPU, with nothing read ahead, so the rates
are those of one thread. A document is cut if it does not lie in one window; those longer than a window always are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from trainer.config import DataOrder
from trainer.data.loader import TokenLoader
from trainer.data.manifest import DataSet
from trainer.data.packing import PackedDocuments, document_lengths
from trainer.data.token_stream import TokenStream

_BATCHES = 300
ORDERS: tuple[DataOrder, ...] = ("sequential", "shuffled", "documents")


def rates(dataset: DataSet, seq_len: int, batch_tokens: int) -> None:
    print("order        boundaries  opening s  first batch ms  median ms  M tokens/s")
    for order in ORDERS:
        for boundaries in (False, True):
            begun = time.perf_counter()
            with TokenLoader(
                dataset.train_shards,
                batch_tokens,
                seq_len,
                seed=1,
                device="cpu",
                vocab_size=dataset.manifest.vocab_size,
                order=order,
                boundaries=boundaries,
            ) as loader:
                opened = time.perf_counter()
                taken = []
                for _ in range(_BATCHES):
                    before = time.perf_counter()
                    loader.next_batch()
                    taken.append(time.perf_counter() - before)
            print(
                f"{order:<12} {boundaries!s:<10} {opened - begun:10.2f} {1e3 * taken[0]:15.1f} "
                f"{1e3 * float(np.median(taken)):10.2f} {_BATCHES * batch_tokens / sum(taken) / 1e6:11.1f}"
            )


def cuts(dataset: DataSet, seq_len: int) -> None:
    stream = TokenStream(dataset.train_shards)
    starts = stream.document_starts()
    lengths = document_lengths(starts, stream.size)
    order = PackedDocuments(starts, stream.size, seq_len, 1)
    begun = time.perf_counter()
    pieces = order.pieces(0, 0, order.rows)
    seconds = time.perf_counter() - begun
    whole = np.isin(starts, pieces[(pieces[:, 1] - pieces[:, 0]) == _length_at(starts, lengths, pieces[:, 0])][:, 0])
    in_one_window = starts // seq_len == (starts + lengths - 1) // seq_len
    fits = lengths <= seq_len
    print(f"\n{lengths.size} documents, median {int(np.median(lengths))} tokens, windows of {seq_len}")
    print(f"longer than a window       {1 - fits.mean():7.2%}")
    for name, kept in (("the stream's windows", in_one_window), ("order `documents`", whole)):
        print(f"cut by {name:<20}{1 - kept.mean():7.2%}, of those that fit {1 - kept[fits].mean():7.2%}")
    print(f"an epoch of it is planned in {seconds:.2f} s")


def _length_at(starts: np.ndarray, lengths: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """The length of the document that begins at each place, 0 where none does."""
    at = np.clip(np.searchsorted(starts, begins), 0, starts.size - 1)
    return np.where(starts[at] == begins, lengths[at], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dataset = DataSet.load(given.data)
    rates(dataset, given.seq_len, given.batch_tokens)
    cuts(dataset, given.seq_len)


if __name__ == "__main__":
    main()
