"""From finished shards to their manifest: everything it states is read off the files themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.byte_table import ByteTable
from trainer.data.decoding import Decoder, validation_documents
from trainer.data.manifest import (
    DataSet,
    DataSetError,
    FileEntry,
    InputEntry,
    Manifest,
    ShardEntry,
    text_sha256,
)
from trainer.data.parallel import usable_cores
from trainer.data.shards import BOS, HEADER_BYTES, Tokens, check_tokens, open_shard
from trainer.data.tokenizer import open_tokenizer
from trainer.durable import sha256_of

# Tokens looked at in one go, by each of a few threads: their bytes are counted in int64 arrays of some 15 MB.
_CHUNK_TOKENS = 1 << 19
_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What the shards themselves do not tell. `split` says in words how the validation documents were chosen."""

    split: str
    inputs: tuple[InputEntry, ...] = ()
    duplicates: int = 0
    case_folding: bool = False
    val_sources: str | None = None


def describe(
    folder: Path, *, tokenizer: str, train: Sequence[str], val: Sequence[str], provenance: Provenance
) -> DataSet:
    """The data set of the named files in `folder`; the caller saves it. Reads every shard once, in pieces.

    A shard `X.bin` has its byte sidecar in `X.bytes` where case folding is on. Raises OSError, ShardError for a bad
    shard or token, DataSetError if there is nothing to score, TokenizerError.
    """
    model = open_tokenizer(folder / tokenizer)
    table = ByteTable.of(model)
    # Hashing, and numpy on long arrays, let go of the interpreter.
    with ThreadPoolExecutor(min(_THREADS, usable_cores())) as pool:

        def read(names: Sequence[str]) -> tuple[tuple[ShardEntry, ...], int]:
            shards = _stream(folder, names, case_folding=provenance.case_folding)
            found = list(pool.map(lambda shard: shard.read(table), shards))
            return tuple(entry for entry, _ in found), sum(size for _, size in found)

        train_entries, train_bytes = read(train)
        val_entries, val_bytes = read(val)
    val_tokens = sum(entry.tokens for entry in val_entries) - 1
    if val_tokens < 1 or val_bytes < 1:
        raise DataSetError(f"{folder}: the validation documents hold no text to score; give more of them")
    decoder = Decoder(folder / tokenizer, case_folding=provenance.case_folding)
    texts = validation_documents([folder / name for name in val], decoder)
    sources = provenance.val_sources
    manifest = Manifest(
        vocab_size=table.vocab_size,
        tokenizer=_file(folder, tokenizer),
        case_folding=provenance.case_folding,
        train=train_entries,
        val=val_entries,
        train_tokens=sum(entry.tokens for entry in train_entries),
        train_bytes=train_bytes,
        train_documents=sum(entry.documents for entry in train_entries),
        val_tokens=val_tokens,
        val_bytes=val_bytes,
        val_documents=sum(entry.documents for entry in val_entries),
        val_sha256=text_sha256(texts),
        val_sources=None if sources is None else _file(folder, sources),
        inputs=provenance.inputs,
        split=provenance.split,
        duplicates=provenance.duplicates,
    )
    return DataSet(path=folder, manifest=manifest)


def sidecar_name(shard: str) -> str:
    """`val_000000.bin` -> `val_000000.bytes`."""
    return str(Path(shard).with_suffix(".bytes"))


def _file(folder: Path, name: str) -> FileEntry:
    path = folder / name
    return FileEntry(file=name, bytes=path.stat().st_size, sha256=sha256_of(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """A shard, and the token before it in its stream (None at the beginning)."""

    folder: Path
    name: str
    before: int | None
    case_folding: bool

    def read(self, table: ByteTable) -> tuple[ShardEntry, int]:
        """What the manifest says of it, and the bytes of its tokens but for the first of a stream, which nothing
        scores. It is read, not mapped: what is mapped counts as this process's memory."""
        path = self.folder / self.name
        size = int(open_shard(path).size)
        digest, documents, counted, before = hashlib.sha256(), 0, 0, self.before
        with path.open("rb") as stream:
            digest.update(stream.read(HEADER_BYTES))
            for start in range(0, size, _CHUNK_TOKENS):
                data = stream.read(2 * min(_CHUNK_TOKENS, size - start))
                digest.update(data)
                tokens: Tokens = np.frombuffer(data, dtype="<u2")
                check_tokens(path, tokens, table.vocab_size, start)
                documents += int(np.count_nonzero(tokens == BOS))
                if not self.case_folding:
                    previous = tokens[:-1] if before is None else np.concatenate([[before], tokens[:-1]])
                    counted += int(table.count(previous, tokens[1:] if before is None else tokens).sum())
                before = int(tokens[-1])
        sidecar = _file(self.folder, sidecar_name(self.name)) if self.case_folding else None
        if sidecar is not None:
            original = open_shard(self.folder / sidecar.file)
            counted = int(original[1 if self.before is None else 0 :].sum(dtype=np.int64))
        entry = ShardEntry(
            file=self.name, tokens=size, documents=documents, sha256=digest.hexdigest(), original_bytes=sidecar
        )
        return entry, counted


def _stream(folder: Path, names: Sequence[str], *, case_folding: bool) -> list[_Shard]:
    shards, before = [], None
    for name in names:
        shards.append(_Shard(folder=folder, name=name, before=before, case_folding=case_folding))
        if (tokens := open_shard(folder / name)).size:
            before = int(tokens[-1])
    return shards
