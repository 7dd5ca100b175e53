"""Which documents train, which validate, and which are left out because their text was there already.

A document is known here by a keyed digest of its normalised text and by its length, in a file of 20-byte records in
the order of the input. Deciding takes, per document, 20 bytes of disk and 1 byte of memory; what else it needs does
not grow: the digests are looked at in buckets of some 4 million, by their first bits, which take some 100 bytes each.
100 million documents (2 GB of records) so stay under 1 GB of memory, in one pass over the records per bucket.

A text is never on both sides. The order of the digests is the seeded shuffle, so seeded choices do not depend on the
order of the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.data.defaults import SEED
from trainer.data.documents import DocumentError, shown_name

DROPPED, TRAIN, VAL = 0, 1, 2
RECORD = np.dtype([("high", ">u8"), ("low", ">u8"), ("bytes", "<u4")])
_DIGEST_BYTES = 16
_BUCKET_DOCUMENTS = 1 << 22
_CHUNK_DOCUMENTS = 1 << 21

Sides = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Chooser = Callable[[Ints], Flags]


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstDocuments:
    """Validation is the first `count` documents; `seed` shuffles what the tokenizer is trained on."""

    count: int
    seed: int = SEED
    option = "--val-first"

    @property
    def words(self) -> str:
        return f"the first {self.count} documents"


@dataclass(frozen=True, kw_only=True, slots=True)
class SeededBytes:
    """Validation is whole documents in seeded order, together at most `val_bytes` of UTF-8."""

    val_bytes: int
    seed: int = SEED
    option = "--val-bytes"

    @property
    def words(self) -> str:
        return f"whole documents in the order of their digests under seed {self.seed}, at most {self.val_bytes} bytes"

    def chooser(self) -> Chooser:
        room = self.val_bytes

        def choose(sizes: Ints) -> Flags:
            nonlocal room
            chosen = np.zeros(sizes.size, dtype=np.bool_)
            for index, size in enumerate(sizes.tolist()):
                if room < self.val_bytes // 20:
                    break  # filling the last gap would pick documents for being short
                if size <= room:
                    chosen[index] = True
                    room -= size
            return chosen

        return choose


@dataclass(frozen=True, kw_only=True, slots=True)
class SeededDocuments:
    """Validation is `count` documents, the first in seeded order."""

    count: int
    seed: int = SEED
    option = "--val-documents"

    @property
    def words(self) -> str:
        return f"{self.count} documents, the first in the order of their digests under seed {self.seed}"

    def chooser(self) -> Chooser:
        left = self.count

        def choose(sizes: Ints) -> Flags:
            nonlocal left
            chosen = np.arange(sizes.size) < left
            left -= int(np.count_nonzero(chosen))
            return chosen

        return choose


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnFile:
    """Validation is all documents of files of its own; `seed` shuffles what the tokenizer is trained on."""

    paths: tuple[Path, ...]
    seed: int = SEED
    option = "--val-file"

    @property
    def words(self) -> str:
        return f"the documents of files of their own: {', '.join(map(shown_name, self.paths))}"


SplitRule = FirstDocuments | SeededBytes | SeededDocuments | OwnFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """`sides` is the decision `(documents,)` of each record; bytes are UTF-8 of the text as given."""

    sides: Sides
    train_documents: int
    train_bytes: int
    val_documents: int
    val_bytes: int
    duplicates: int

    def facts(self) -> dict[str, int]:
        """All but the sides."""
        return {
            "train_documents": self.train_documents,
            "train_bytes": self.train_bytes,
            "val_documents": self.val_documents,
            "val_bytes": self.val_bytes,
            "duplicates": self.duplicates,
        }


def digest_of(text: bytes, seed: int) -> bytes:
    """The key `(16,)` of a document under a seed; its order is the seeded shuffle."""
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES, key=seed.to_bytes(8, "little")).digest()


def record_of(text: str, normalized: str, seed: int) -> bytes:
    """One `RECORD`: the digest of the normalised text, and the UTF-8 bytes of the text; 0 if nothing is left of it."""
    size = len(text.encode("utf-8")) if normalized else 0
    return digest_of(normalized.encode("utf-8"), seed) + size.to_bytes(4, "little")


def split_documents(records: Path, rule: SplitRule, *, dedup: bool, own_documents: int = 0) -> Split:
    """Decide on every record of a file; the first `own_documents` of them are from the files of `OwnFile`.

    With `dedup` the first of equal texts is kept. Without it equal train documents stay, but one that equals a
    validation document is dropped all the same. Raises DocumentError if either side would be empty, or OSError.
    """
    total = records.stat().st_size // RECORD.itemsize
    sides: Sides = np.zeros(total, dtype=np.uint8)
    chooser = rule.chooser() if isinstance(rule, SeededBytes | SeededDocuments) else None
    border = own_documents if isinstance(rule, OwnFile) else 0  # records before it are validation by their place
    if isinstance(rule, FirstDocuments) and not dedup:
        border = _after(((place, chunk["bytes"] > 0) for place, chunk in _chunks(records)), rule.count)
    for places, found in _buckets(records, total):
        first, group = _groups(found)
        if chooser is not None:
            in_val = chooser(found["bytes"][first].astype(np.int64))[group]
        else:
            in_val = (places[first] < border)[group]
        kept_train, kept_val = first | (not dedup), first | ((not dedup) & (places < border))
        sides[places] = np.where(in_val, kept_val * VAL, kept_train * TRAIN)
    if isinstance(rule, FirstDocuments) and dedup:
        head = sides[: place_after(sides, TRAIN, rule.count)]
        head[head == TRAIN] = VAL
    return _checked(records, sides, rule)


def tokenizer_sample(records: Path, sides: Sides, sample_bytes: int) -> Ints:
    """Places of train documents, in seeded order up to `sample_bytes` but at least one; returned in file order."""
    chosen: list[Ints] = []
    room = sample_bytes
    for places, found in _buckets(records, sides.size):
        train = sides[places] == TRAIN
        after = np.cumsum(found["bytes"][train].astype(np.int64))
        count = int(np.searchsorted(after, room, side="right"))
        whole = count == after.size
        if not chosen and not count and after.size:
            count = 1
        if count:
            chosen.append(places[train][:count])
            room -= int(after[count - 1])
        if not whole:
            break
    return np.sort(np.concatenate(chosen))


def place_after(sides: Sides, side: int, count: int) -> int:
    """Where the documents after the first `count` of a side begin; the end, if there are not more."""
    starts = range(0, sides.size, _CHUNK_DOCUMENTS)
    return _after(((start, sides[start : start + _CHUNK_DOCUMENTS] == side) for start in starts), count)


def _after(flags: Iterable[tuple[int, Flags]], count: int) -> int:
    """The place behind the `count`-th that is true, of (place of the first, flags) in order; the end, if there is
    none."""
    end = 0
    for start, chunk in flags if count else ():
        places = np.flatnonzero(chunk)
        if places.size >= count:
            return start + int(places[count - 1]) + 1
        count -= places.size
        end = start + chunk.size
    return end


def _chunks(records: Path) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
    """(place of the first, records) of the file; read, not mapped, so that it does not fill the process's memory."""
    place = 0
    while True:
        chunk = np.fromfile(records, dtype=RECORD, count=_CHUNK_DOCUMENTS, offset=place * RECORD.itemsize)
        if not chunk.size:
            return
        yield place, chunk
        place += chunk.size


def _buckets(records: Path, total: int) -> Iterator[tuple[Ints, npt.NDArray[np.void]]]:
    """(places, records) in the order of the digests, equal digests by place; records without text are left out."""
    bits = max(0, (total - 1) // _BUCKET_DOCUMENTS).bit_length()
    for bucket in range(1 << bits):
        places, found = [], []
        for place, chunk in _chunks(records):
            wanted = chunk["bytes"] > 0
            if bits:
                wanted &= (chunk["high"].astype(np.uint64) >> np.uint64(64 - bits)) == bucket
            places.append(np.flatnonzero(wanted) + place)
            found.append(chunk[wanted])
        if not found:
            return
        place_of, record = np.concatenate(places), np.concatenate(found)
        del places, found
        order = np.lexsort((record["low"].astype(np.uint64), record["high"].astype(np.uint64)))
        yield place_of[order], record[order]


def _groups(found: npt.NDArray[np.void]) -> tuple[Flags, Ints]:
    """Of sorted records: whether each is the first of its digest `(n,)`, and the number of its digest `(n,)`."""
    first = np.ones(found.size, dtype=np.bool_)
    first[1:] = (found["high"][1:] != found["high"][:-1]) | (found["low"][1:] != found["low"][:-1])
    return first, np.cumsum(first) - 1


def _checked(records: Path, sides: Sides, rule: SplitRule) -> Split:
    documents, size = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for place, chunk in _chunks(records):
        side = sides[place : place + chunk.size]
        for kind in (DROPPED, TRAIN, VAL):
            of_kind = chunk["bytes"][side == kind]
            documents[kind] += np.count_nonzero(of_kind)
            size[kind] += of_kind.sum(dtype=np.int64)
    if not documents[VAL] or not documents[TRAIN]:
        side_name = "validation" if not documents[VAL] else "training"
        raise DocumentError(
            f"{documents.sum()} documents of {size.sum()} bytes, {documents[DROPPED]} of them duplicates, leave "
            f"nothing for {side_name}; validation is {rule.words}: give more documents or another {rule.option}"
        )
    return Split(
        sides=sides,
        train_documents=int(documents[TRAIN]),
        train_bytes=int(size[TRAIN]),
        val_documents=int(documents[VAL]),
        val_bytes=int(size[VAL]),
        duplicates=int(documents[DROPPED]),
    )
