"""Everything that can be wrong with one shard, found in one pass over its tokens; the work of `data verify`.

A shard is one task, whatever the others are: the document that it ends in the middle of is read on in the shards
after it, and the token before its first one is read from the shards before it. Tokens are mapped, not read into
memory; what is held are the beginnings of the shard's documents, their digests, and a chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.data.byte_table import ByteTable
from trainer.data.encoding import original_bytes
from trainer.data.file_checks import AGAIN, Fault, file_faults, header_faults
from trainer.data.manifest import FileEntry, ShardEntry
from trainer.data.shards import BOS, HEADER_BYTES, ShardError, Tokens, open_shard
from trainer.data.tokenizer import EOS, PAD, UNK, MarkIds

DIGEST_BYTES = 16
_CHUNK_TOKENS = 4_000_000
# Faults of one kind in one file that are listed one by one; the rest are counted.
_LISTED = 100
# Stands for a token that nobody knows: outside every vocabulary.
_UNREADABLE = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """One shard of a split, and the shards of its stream before and after it."""

    entry: ShardEntry
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFacts:
    """What a shard holds. `text_bytes` is None where it cannot be counted, `digests` are those of its documents."""

    faults: tuple[Fault, ...]
    decodable: bool = False
    documents: int = 0
    tokens: int = 0
    text_bytes: int | None = None
    digests: frozenset[bytes] = frozenset()
    bytes_read: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """Where documents begin `(documents,)`, and whether a token is outside the vocabulary."""

    documents: npt.NDArray[np.int32]
    outside: bool


@dataclass(kw_only=True, slots=True)
class _Places:
    """Indices of tokens at fault: how many, and the first of them; a shard of nothing else must fit into memory."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, indices: npt.NDArray[np.signedinteger], start: int = 0) -> _Places:
        self.count += len(indices)
        self.first += [start + index for index in indices[: _LISTED - len(self.first)].tolist()]
        return self


@dataclass(kw_only=True)
class ShardCheck:
    """Checks the shards of one split in one process.

    `table` is None when the tokenizer is unusable, and `marks` without case folding as well: then bytes are not
    counted, and sidecars not worked out again. Against `validation`, the digests of validation documents, every
    document is compared; without it (None) the digests are given back.
    """

    folder: Path
    vocab_size: int
    table: ByteTable | None
    marks: MarkIds | None = None
    validation: frozenset[bytes] | None = None
    _faults: list[Fault] = field(default_factory=list)

    def __call__(self, task: ShardTask) -> ShardFacts:
        """Raises OSError only for a disk that fails: a file that is missing or wrong is a fault."""
        self._faults = []
        name = task.entry.file
        expected = FileEntry(file=name, bytes=HEADER_BYTES + 2 * task.entry.tokens, sha256=task.entry.sha256)
        bytes_read = self._file(expected)
        tokens = self._tokens(name, task.entry.tokens)
        if task.entry.original_bytes is not None:
            bytes_read += self._file(task.entry.original_bytes)
        if tokens is None:
            return ShardFacts(faults=tuple(self._faults), bytes_read=bytes_read)
        seen = self._scan(name, tokens)
        beginnings = seen.documents
        self._placement(task, tokens, beginnings)
        in_range = not seen.outside
        if task.entry.original_bytes is not None:
            text_bytes = self._sidecar(task, tokens, in_range=in_range)
        else:
            text_bytes = self._text_bytes(task, tokens) if in_range else None
        digests = list(self._digests(task, tokens, beginnings))
        if self.validation is not None:
            self._leaks(name, beginnings, digests)
        return ShardFacts(
            faults=tuple(self._faults),
            decodable=in_range,
            documents=len(beginnings),
            tokens=int(tokens.size),
            text_bytes=text_bytes,
            digests=frozenset(digests) if self.validation is None else frozenset(),
            bytes_read=bytes_read,
        )

    def _fault(self, file: str, offset: int | None, what: str, remedy: str = AGAIN) -> None:
        self._faults.append(Fault(file=file, offset=offset, what=what, remedy=remedy))

    def _at(self, file: str, places: _Places, what: str, remedy: str = AGAIN) -> None:
        """The same fault at several tokens of a shard."""
        for index in places.first:
            self._fault(file, HEADER_BYTES + 2 * index, what, remedy)
        if (more := places.count - len(places.first)) > 0:
            self._fault(file, None, f"{more} more: {what}", remedy)

    def _file(self, expected: FileEntry) -> int:
        faults, bytes_read = file_faults(self.folder, expected)
        self._faults += faults
        return bytes_read

    def _tokens(self, name: str, count: int) -> Tokens | None:
        """The shard's tokens, if its header and size allow to read them."""
        path = self.folder / name
        if not path.is_file():
            return None
        faults = list(header_faults(path, count))
        self._faults += faults
        return None if faults else open_shard(path)

    def _scan(self, name: str, tokens: Tokens) -> _Seen:
        special = {PAD: ("pad", _Places()), EOS: ("eos", _Places()), UNK: ("unk", _Places())}
        outside = _Places()
        beginnings = [np.zeros(0, dtype=np.int32)]
        for start in range(0, tokens.size, _CHUNK_TOKENS):
            chunk = tokens[start : start + _CHUNK_TOKENS]
            beginnings.append((np.flatnonzero(chunk == BOS) + start).astype(np.int32))
            if int(chunk.max()) >= self.vocab_size:
                outside.add(np.flatnonzero(chunk >= self.vocab_size), start)
            if np.count_nonzero(chunk <= max(special)) > len(beginnings[-1]):
                for token, (_, places) in special.items():
                    places.add(np.flatnonzero(chunk == token), start)
        for token, (label, places) in special.items():
            again = "encode the text again with byte fallback, BOS before each document and nothing between them"
            self._at(name, places, f"{label} ({token}) inside a document", again)
        what = f"a token outside the vocabulary of {self.vocab_size}"
        self._at(name, outside, what, "the shard and the tokenizer do not belong together: " + AGAIN)
        return _Seen(documents=np.concatenate(beginnings), outside=outside.count > 0)

    def _placement(self, task: ShardTask, tokens: Tokens, beginnings: npt.NDArray[np.int32]) -> None:
        """BOS where documents begin, and documents that are not empty."""
        name = task.entry.file
        encode_again = "encode the text again, leaving empty documents out"
        if len(beginnings) != task.entry.documents:
            self._fault(name, None, f"{len(beginnings)} BOS, but the manifest counts {task.entry.documents} documents")
        if tokens.size and tokens[0] != BOS and self._token_before(task) is None:
            self._fault(name, HEADER_BYTES, f"the stream begins with token {int(tokens[0])} instead of BOS ({BOS})")
        empty = np.flatnonzero(np.diff(beginnings) == 1)
        self._at(name, _Places().add(beginnings[empty]), "an empty document: BOS directly before BOS", encode_again)
        if tokens.size and tokens[-1] == BOS:
            following = next((shard for shard in map(self._known, task.after) if shard is None or shard.size), None)
            last = HEADER_BYTES + 2 * (int(tokens.size) - 1)
            if following is not None and following[0] == BOS:
                self._fault(name, last, "an empty document: BOS directly before BOS of the next shard", encode_again)
            elif not task.after:
                self._fault(name, last, "the last document is empty", encode_again)

    def _known(self, name: str) -> Tokens | None:
        """Another shard of the stream; None if it cannot be read, which is its own task's fault."""
        try:
            return open_shard(self.folder / name)
        except (OSError, ShardError):
            return None

    def _token_before(self, task: ShardTask) -> int | None:
        """The last token before this shard: None at the beginning of the stream, _UNREADABLE where none can be had."""
        for name in reversed(task.before):
            tokens = self._known(name)
            if tokens is None:
                return _UNREADABLE
            if tokens.size:
                return int(tokens[-1])
        return None

    def _text_bytes(self, task: ShardTask, tokens: Tokens) -> int | None:
        """Bytes of the shard's tokens as scoring counts them; the first token of a stream is none."""
        if self.table is None:
            return None
        before = self._token_before(task)
        if before is not None and before >= self.vocab_size:
            return None
        size = self.table.vocab_size
        counts = np.zeros(size, dtype=np.int64)
        after_boundary = np.zeros(size, dtype=np.int64)
        for start in range(0, tokens.size, _CHUNK_TOKENS):
            chunk = tokens[start : start + _CHUNK_TOKENS]
            counts += np.bincount(chunk, minlength=size)
            borders = np.flatnonzero(self.table.boundary[chunk]) + start + 1
            after_boundary += np.bincount(tokens[borders[borders < tokens.size]], minlength=size)
        if tokens.size and before is None:
            counts[tokens[0]] -= 1
        elif tokens.size and before is not None and self.table.boundary[before]:
            after_boundary[tokens[0]] += 1
        spaces = counts - after_boundary
        return int(counts @ self.table.base_bytes + spaces @ self.table.leading_space.astype(np.int64))

    def _sidecar(self, task: ShardTask, tokens: Tokens, *, in_range: bool) -> int | None:
        """Bytes of the shard's tokens by its sidecar, whose every number is worked out again from the tokens."""
        entry = task.entry.original_bytes
        original = None if entry is None else self._tokens(entry.file, task.entry.tokens)
        if entry is None or original is None or not in_range or self.table is None or self.marks is None:
            return None
        differing = _Places()
        context = self._context(task, self.marks)
        for start in range(0, tokens.size, _CHUNK_TOKENS):
            stream = np.concatenate([context, tokens[start : start + _CHUNK_TOKENS]])
            expected = original_bytes(stream, self.table, self.marks)[context.size :]
            differing.add(np.flatnonzero(original[start : start + _CHUNK_TOKENS] != expected), start)
            context = _context_in(stream, self.marks)
        self._at(entry.file, differing, "another number of bytes than its token stands for")
        first = int(original[0]) if original.size and self._token_before(task) is None else 0
        return int(original.sum(dtype=np.int64)) - first

    def _context(self, task: ShardTask, marks: MarkIds) -> Tokens:
        """The end of the stream before this shard, as much of it as decides what the shard's tokens stand for."""
        context = np.zeros(0, dtype=np.uint16)
        for name in reversed(task.before):
            tokens = self._known(name)
            if tokens is None:
                break
            for stop in range(tokens.size, 0, -_CHUNK_TOKENS):
                context = np.concatenate([tokens[max(0, stop - _CHUNK_TOKENS) : stop], context])
                if (context != marks.escape).any():
                    return _context_in(context, marks)
        return context

    def _digests(self, task: ShardTask, tokens: Tokens, beginnings: npt.NDArray[np.int32]) -> Iterator[bytes]:
        """A digest of the tokens of each document that begins in this shard, its BOS left out."""
        whole = tokens.data.cast("B")
        ends = np.append(beginnings, np.int32(tokens.size))[1:]
        for index, (begin, end) in enumerate(zip(beginnings.tolist(), ends.tolist(), strict=True)):
            digest = hashlib.blake2b(whole[2 * begin + 2 : 2 * end], digest_size=DIGEST_BYTES)
            if index == len(beginnings) - 1:
                for piece in self._rest(task.after):
                    digest.update(piece.tobytes())
            yield digest.digest()

    def _rest(self, after: Sequence[str]) -> Iterator[Tokens]:
        """What follows, in the next shards, up to the next BOS."""
        for name in after:
            tokens = self._known(name)
            if tokens is None:
                return
            for start in range(0, tokens.size, _CHUNK_TOKENS):
                chunk = tokens[start : start + _CHUNK_TOKENS]
                found = np.flatnonzero(chunk == BOS)
                if len(found):
                    yield chunk[: found[0]]
                    return
                yield chunk

    def _leaks(self, name: str, beginnings: npt.NDArray[np.int32], digests: Sequence[bytes]) -> None:
        validation = self.validation or frozenset()
        leaked = np.array([digest in validation for digest in digests], dtype=np.bool_)
        self._at(
            name,
            _Places().add(beginnings[leaked]),
            "a training document that is a validation document as well",
            "prepare the data set again from the text: it keeps validation out of training",
        )


def _context_in(tokens: Tokens, marks: MarkIds) -> Tokens:
    """As much of the end of `tokens` as decides what the next ones stand for: the last that is no escape, and on."""
    others = np.flatnonzero(tokens != marks.escape)
    return tokens[others[-1] :] if len(others) else tokens
