"""What `python -m trainer data` does: prepare a data set from documents. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from trainer.data.byte_table import ByteTable
from trainer.data.documents import Split, split_documents, unique_documents
from trainer.data.manifest import (
    MANIFEST_NAME,
    DataSet,
    DataSetError,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    hash_in_order,
)
from trainer.data.shards import HEADER_BYTES, SHARD_TOKENS, ShardWriter, open_shard
from trainer.data.tokenizer import encode_documents, open_tokenizer, train_tokenizer
from trainer.durable import sha256_of, write_whole

TOKENIZER_NAME = "tokenizer.model"
# Merges of the first few thousand pieces are settled by far less text than this.
TOKENIZER_SAMPLE_BYTES = 8_000_000


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    vocab_size: int,
    val_bytes: int,
    seed: int = 1337,
    sample_bytes: int = TOKENIZER_SAMPLE_BYTES,
    shard_tokens: int = SHARD_TOKENS,
    note: Callable[[str], None] = lambda _: None,
) -> DataSet:
    """Split, train the tokenizer on a seeded sample of the train documents, encode, and write the manifest last.

    `val_bytes` bounds the UTF-8 bytes of the validation documents. `note` hears one line per stage. An `out` that
    already holds a data set is refused, so that nobody's validation set changes under a run. Raises DataSetError,
    DocumentError, TokenizerError or OSError.
    """
    if (out / MANIFEST_NAME).exists():
        raise DataSetError(f"{out} already holds a data set; give another --out, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0))

    split = split_documents(inputs, val_bytes=val_bytes, seed=seed)
    note(
        f"split: {len(split.train)} train documents of {split.train_bytes} bytes, "
        f"{len(split.val)} validation documents of {sum(split.val.values())} bytes"
    )
    sample = unique_documents(inputs, _sample(split, sample_bytes), seed)
    write_whole(out / TOKENIZER_NAME, train_tokenizer(sample, vocab_size=vocab_size))
    note(f"tokenizer: {vocab_size} pieces")

    train = _encode(out, "train", unique_documents(inputs, split.train, seed), shard_tokens, threads)
    val = _encode(out, "val", unique_documents(inputs, split.val, seed), shard_tokens, threads)
    dataset = DataSet(path=out, manifest=_manifest(out, train, val, split))
    note(
        f"encoded: {dataset.manifest.train_tokens} train tokens, {dataset.manifest.val_tokens} validation tokens, "
        f"{dataset.manifest.bytes_per_token:.4f} bytes per token"
    )
    dataset.save()
    return dataset


def _sample(split: Split, sample_bytes: int) -> dict[bytes, int]:
    """Train documents in the order of their digests (a seeded shuffle) until there is enough text; at least one."""
    sample: dict[bytes, int] = {}
    total = 0
    for digest in sorted(split.train):
        if sample and total + split.train[digest] > sample_bytes:
            break
        sample[digest] = split.train[digest]
        total += split.train[digest]
    return sample


def _encode(out: Path, name: str, texts: Iterable[str], shard_tokens: int, threads: int) -> list[Path]:
    tokenizer = open_tokenizer(out / TOKENIZER_NAME)
    writer = ShardWriter(out, name, shard_tokens)
    for _, tokens in encode_documents(tokenizer, texts, threads=threads):
        writer.append(tokens)
    writer.close()
    return writer.paths


def _manifest(out: Path, train: Sequence[Path], val: Sequence[Path], split: Split) -> Manifest:
    tokenizer = out / TOKENIZER_NAME
    table = ByteTable.load(tokenizer)
    stream = np.concatenate([open_shard(path) for path in val])
    if stream.size < 2:
        raise DataSetError("the validation documents hold no text to score; give a larger --val-bytes")
    train_entries, val_entries = _entries(train), _entries(val)
    return Manifest(
        vocab_size=table.vocab_size,
        tokenizer=TokenizerEntry(file=TOKENIZER_NAME, sha256=sha256_of(tokenizer), bytes=tokenizer.stat().st_size),
        train=train_entries,
        val=val_entries,
        train_tokens=sum(entry.tokens for entry in train_entries),
        val_tokens=stream.size - 1,
        val_bytes=int(table.count(stream[:-1], stream[1:]).sum()),
        val_sha256=hash_in_order(val),
        documents=len(split.train) + len(split.val),
        val_documents=len(split.val),
    )


def _entries(shards: Sequence[Path]) -> tuple[ShardEntry, ...]:
    return tuple(
        ShardEntry(file=path.name, tokens=(path.stat().st_size - HEADER_BYTES) // 2, sha256=sha256_of(path))
        for path in shards
    )
