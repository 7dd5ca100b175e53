"""What SentencePiece alone does, on text that lies in memory: the rate that a pipeline is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.documents import RawDocuments
from trainer.data.parallel import usable_cores
from trainer.data.tokenizer import open_tokenizer

SAMPLE_BYTES = 8_000_000
_ROUNDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BareRate:
    """UTF-8 bytes of text per second: of `encode` into lists, its plain call, and into arrays, its fastest."""

    lists: float
    arrays: float


def bare_rate(tokenizer: Path, texts: Sequence[str], *, threads: int | None = None) -> BareRate:
    """One `encode` of all texts on `threads` (default: all usable cores); of either call the best of two, by turns."""
    processor = open_tokenizer(tokenizer)
    batch, count = list(texts), threads or usable_cores()
    size = sum(len(text.encode("utf-8")) for text in batch)
    lists, arrays = [], []
    for _ in range(_ROUNDS):
        lists.append(_seconds(lambda: processor.encode(batch, num_threads=count)))
        arrays.append(_seconds(lambda: processor.encode(batch, return_type="numpy", num_threads=count)))
    return BareRate(lists=size / min(lists), arrays=size / min(arrays))


class Spread:
    """Passes batches of documents on and keeps some, spread evenly over the whole input, for `bare_rate`."""

    def __init__(self, total_bytes: int, sample_bytes: int = SAMPLE_BYTES) -> None:
        self._share = min(1.0, sample_bytes / max(total_bytes, 1))
        self._seen = self._kept_bytes = 0
        self._kept: list[RawDocuments] = []

    def through(self, batches: Iterable[RawDocuments]) -> Iterator[RawDocuments]:
        for batch in batches:
            if self._kept_bytes <= self._seen * self._share:
                self._kept.append(batch)
                self._kept_bytes += batch.size
            self._seen += batch.size
            yield batch

    def texts(self) -> list[str]:
        return [document.text for batch in self._kept for document in batch.documents()]


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return max(time.perf_counter() - begun, 1e-9)
