"""The first pass over the input: a record of each document, and a hash of each file; and later passes by place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from trainer.data.document_files import BLOCK_BYTES, DocumentFile
from trainer.data.documents import DocumentError, RawDocuments, TextRule, shown_name
from trainer.data.normalization import normalized, normalized_for_training
from trainer.data.parallel import ordered_map
from trainer.data.progress import Advance
from trainer.data.splitting import RECORD, Flags, Ints, record_of
from trainer.data.tokenizer import open_tokenizer
from trainer.durable import replacing

# What is done before other processes have started: bytes of input files to index, bytes of text to encode.
FEW_TO_INDEX = 8 << 20
FEW_TO_ENCODE = 4 << 20
_SPAN_DOCUMENTS = 1 << 21


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the input files are read, the same in every pass; texts are equal as `tokenizer`, if there is one already,
    normalises them."""

    paths: tuple[Path, ...]
    text_rule: TextRule
    max_document_bytes: int
    tokenizer: Path | None = None

    def open(self, path: Path) -> DocumentFile:
        return DocumentFile(path, text_rule=self.text_rule, max_document_bytes=self.max_document_bytes)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedFile:
    """A file as it was read: `records` documents, of which `documents` have text."""

    name: str
    bytes: int
    sha256: str
    records: int
    documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """The work of a worker: parse documents into their records."""

    seed: int
    tokenizer: Path | None

    def __call__(self, task: Sequence[RawDocuments]) -> bytes:
        texts = [document.text for batch in task for document in batch.documents()]
        # What the tokenizer will not see makes no difference: texts that differ in it alone are the same text, and
        # one that has nothing else is empty.
        if self.tokenizer is None:
            normal: Iterable[str] = normalized_for_training(iter(texts))
        else:
            normal = normalized(_opened(self.tokenizer), texts)
        return b"".join(record_of(text, same, self.seed) for text, same in zip(texts, normal, strict=True))


@cache
def _opened(tokenizer: Path) -> SentencePieceProcessor:
    """Once for each worker."""
    return open_tokenizer(tokenizer)


def index_documents(
    reading: Reading, records: Path, *, seed: int, workers: int | None, advance: Advance
) -> tuple[IndexedFile, ...]:
    """Write the records of all documents, in order, and describe the files. Raises DocumentError or OSError."""
    files: list[tuple[DocumentFile, Path, int]] = []

    def batches() -> Iterator[RawDocuments]:
        for path in reading.paths:
            file, count, before = reading.open(path), 0, 0
            for batch in file.batches(hashed=True):
                count += len(batch)
                advance(file.raw_bytes - before)
                before = file.raw_bytes
                yield batch
            advance(file.raw_bytes - before)
            files.append((file, path, count))

    with replacing(records) as stream:
        for found in ordered_map(
            Recording(seed=seed, tokenizer=reading.tokenizer), grouped(batches()), workers=workers
        ):
            stream.write(found)
    indexed, start = [], 0
    for file, path, count in files:
        indexed.append(
            IndexedFile(
                name=shown_name(path),
                bytes=path.stat().st_size,
                sha256=file.sha256,
                records=count,
                documents=_with_text(records, start, start + count),
            )
        )
        start += count
    return tuple(indexed)


def _with_text(records: Path, begin: int, end: int) -> int:
    count = 0
    for low in range(begin, end, _SPAN_DOCUMENTS):
        many = min(end - low, _SPAN_DOCUMENTS)
        found = np.fromfile(records, dtype=RECORD, count=many, offset=low * RECORD.itemsize)
        count += int(np.count_nonzero(found["bytes"]))
    return count


def index_facts(files: Iterable[IndexedFile]) -> dict[str, object]:
    return {"files": [asdict(file) for file in files]}


def index_from(facts: dict[str, Any]) -> tuple[IndexedFile, ...]:
    """The inverse of `index_facts`."""
    return tuple(IndexedFile(**file) for file in facts["files"])


def chosen_documents(
    reading: Reading, index: Sequence[IndexedFile], wanted: Callable[[int, int], Flags], *, start: int = 0
) -> Iterator[tuple[Ints, RawDocuments]]:
    """The documents from place `start` on that `wanted(first, last)` says yes to, with their places; none is parsed.

    A file in which nothing is wanted is not opened, and none is read further than the last that is. Raises
    DocumentError if a file has other documents than when it was indexed.
    """
    end = 0
    for path, file in zip(reading.paths, index, strict=True):
        begin, end = end, end + file.records
        first, last = _span(wanted, max(begin, start), end)
        place = begin
        for batch in reading.open(path).batches() if last > first else ():
            low, high = max(place, first), min(place + len(batch), last)
            if low < high:
                places = np.flatnonzero(wanted(low, high)) + low
                yield places, batch.select((places - place).tolist())
            place += len(batch)
            if place >= last:
                break
        if last > first and place < last:
            raise DocumentError(f"{path} has lost documents while it was read; leave it alone and start again")


def _span(wanted: Callable[[int, int], Flags], begin: int, end: int) -> tuple[int, int]:
    """The places that begin with the first that is wanted and end after the last; empty if there is none."""
    first = last = begin
    for low in range(begin, end, _SPAN_DOCUMENTS):
        places = np.flatnonzero(wanted(low, min(end, low + _SPAN_DOCUMENTS)))
        if places.size:
            first = low + int(places[0]) if last == begin else first
            last = low + int(places[-1]) + 1
    return first, last


def grouped(batches: Iterable[RawDocuments]) -> Iterator[list[RawDocuments]]:
    """Tasks of about `BLOCK_BYTES`, however small the files are; one block of a large file is a task."""
    task: list[RawDocuments] = []
    size = 0
    for batch in batches:
        if not len(batch):
            continue
        task.append(batch)
        size += batch.size
        if size >= BLOCK_BYTES // 2:
            yield task
            task, size = [], 0
    if task:
        yield task


def workers_for(size: int, few: int, workers: int | None) -> int | None:
    """One for fewer bytes than `few`, unless somebody has said how many."""
    return 1 if workers is None and size < few else workers
