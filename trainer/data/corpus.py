"""The input as a whole: which documents it has, which side each is on, and the texts that are needed apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data.document_files import DocumentFile, read_documents
from trainer.data.documents import Document, DocumentError, RawDocuments, json_line
from trainer.data.indexing import (
    FEW_TO_INDEX,
    IndexedFile,
    Reading,
    chosen_documents,
    index_documents,
    index_facts,
    index_from,
    workers_for,
)
from trainer.data.manifest import InputEntry
from trainer.data.progress import Progress
from trainer.data.splitting import (
    TRAIN,
    VAL,
    OwnFile,
    Split,
    SplitRule,
    place_after,
    split_documents,
    tokenizer_sample,
)
from trainer.data.unfinished import Unfinished
from trainer.durable import replacing, write_whole

VAL_SOURCES_NAME = "val_sources.json"
_RECORDS, _SIDES, _VAL, _SAMPLE = "documents.idx", "sides.u8", "val.jsonl", "sample.jsonl"
# A JSON line is longer than the text in it; nothing that we wrote ourselves is too long.
_UNBOUNDED = 1 << 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The indexed and split input of an unfinished data set."""

    work: Unfinished
    reading: Reading
    index: tuple[IndexedFile, ...]
    split: Split

    @property
    def entries(self) -> tuple[InputEntry, ...]:
        return tuple(InputEntry(name=f.name, bytes=f.bytes, sha256=f.sha256, documents=f.documents) for f in self.index)

    def train(self, skip: int) -> Iterator[RawDocuments]:
        """The train documents in the order of the input, without the first `skip`."""
        sides = self.split.sides
        start = place_after(sides, TRAIN, skip)
        chosen = chosen_documents(self.reading, self.index, lambda low, high: sides[low:high] == TRAIN, start=start)
        return (batch for _, batch in chosen)

    def val(self, skip: int) -> Iterator[RawDocuments]:
        """The validation documents as they were drawn, without the first `skip`."""
        for batch in DocumentFile(self.work.folder / _VAL, max_document_bytes=_UNBOUNDED).batches():
            yield batch.select(range(min(skip, len(batch)), len(batch)))
            skip = max(0, skip - len(batch))

    def sample(self) -> Iterator[str]:
        """The texts that the tokenizer is trained on, as they were drawn."""
        drawn = read_documents(self.work.folder / _SAMPLE, max_document_bytes=_UNBOUNDED)
        return (document.text for document in drawn)


def open_corpus(
    work: Unfinished, reading: Reading, rule: SplitRule, *, dedup: bool, workers: int | None, progress: Progress
) -> Corpus:
    """Index and split, or take up what was done of it. Raises DocumentError or OSError."""
    records = work.folder / _RECORDS
    facts = work.done("index")
    if facts is None:
        few = workers_for(reading.bytes, FEW_TO_INDEX, workers)
        with progress.stage("index", total=reading.bytes) as advance:
            found = index_documents(reading, records, seed=rule.seed, workers=few, advance=advance)
        work.finish("index", index_facts(found))
        index = found
    else:
        index = index_from(facts)
    facts = work.done("split")
    if facts is None:
        own = sum(file.records for file in index[: len(rule.paths)]) if isinstance(rule, OwnFile) else 0
        total = sum(file.records for file in index)
        with progress.stage("split", total=total, unit="documents") as advance:
            split = split_documents(records, rule, dedup=dedup, own_documents=own)
            write_whole(work.folder / _SIDES, split.sides.tobytes())
            advance(total)
        work.finish("split", split.facts())
    else:
        split = Split(sides=np.fromfile(work.folder / _SIDES, dtype=np.uint8), **facts)
    if split.sides.size != sum(file.records for file in index):
        raise DocumentError(f"{work.folder} does not belong together; remove it to begin again")
    return Corpus(work=work, reading=reading, index=index, split=split)


def draw(corpus: Corpus, *, sample_bytes: int, progress: Progress) -> bool:
    """Write the validation documents, their sources and the tokenizer's sample (none if 0 bytes) to files apart.

    Returns whether any validation document has a source, so that there is a list of them beside the manifest.
    """
    work = corpus.work
    facts = work.done("draw")
    if facts is None:
        sources: list[str] = []
        with (
            progress.stage("draw", total=corpus.split.val_documents, unit="documents") as advance,
            replacing(work.folder / _VAL) as val,
            replacing(work.folder / _SAMPLE) as sample,
        ):
            for is_val, document in _drawn(corpus, sample_bytes):
                if is_val:
                    sources.append(document.src)
                    advance(1)
                (val if is_val else sample).write(json_line(document))
        if any(sources):
            write_whole(work.out / VAL_SOURCES_NAME, json.dumps(sources, ensure_ascii=False).encode("utf-8") + b"\n")
        facts = {"sources": any(sources)}
        work.finish("draw", facts)
    return bool(facts["sources"])


def _drawn(corpus: Corpus, sample_bytes: int) -> Iterator[tuple[bool, Document]]:
    """(whether it is for validation, document) of those that are drawn, in the order of the input."""
    sides = corpus.split.sides
    marked = sides == VAL
    if sample_bytes:
        marked[tokenizer_sample(corpus.work.folder / _RECORDS, sides, sample_bytes)] = True
    for places, batch in chosen_documents(corpus.reading, corpus.index, lambda low, high: marked[low:high]):
        yield from zip((sides[places] == VAL).tolist(), batch.documents(), strict=True)
