"""Token shards, in the public format: a header of 256 little-endian int32, then little-endian uint16 tokens.

The header is (20240520, 1, token count, 0, ...). A shard holds at most 10^8 tokens, and its size is exact:
1024 + 2 * count bytes. One stream of documents, each after a BOS, is cut into shards wherever one is full.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.durable import replacing
from trainer.errors import InputError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
BOS = 1
"""The token that begins each document."""

Tokens = npt.NDArray[np.uint16]


class ShardError(InputError):
    """A file that is not a whole shard, or holds a token outside its vocabulary. Names the file and the offset."""


def shard_header(tokens: int) -> bytes:
    """The `HEADER_BYTES` bytes that announce so many tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = (MAGIC, VERSION, tokens)
    return header.tobytes()


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write `(count,)` tokens whole or not at all."""
    with replacing(path) as stream:
        stream.write(shard_header(tokens.size))
        stream.write(np.ascontiguousarray(tokens, dtype="<u2").tobytes())


def open_shard(path: Path) -> Tokens:
    """Map a shard's tokens `(count,)` read-only, its header and size checked. Raises OSError or ShardError."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ShardError(
            f"{path}: {size} bytes at offset 0 cannot hold the {HEADER_BYTES}-byte header; prepare it again"
        )
    header = np.fromfile(path, dtype="<i4", count=256)
    if header[0] != MAGIC:
        raise ShardError(f"{path}: offset 0 holds {header[0]} instead of the magic {MAGIC}; this is not a token shard")
    if header[1] != VERSION:
        raise ShardError(f"{path}: offset 4 holds version {header[1]}; this reader knows version {VERSION}")
    count = int(header[2])
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        raise ShardError(
            f"{path}: offset 8 announces {count} tokens, so {expected} bytes, but the file has {size}; "
            "it was cut or extended, prepare it again"
        )
    if count == 0:
        return np.zeros(0, dtype=np.uint16)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def check_tokens(path: Path, tokens: Tokens, vocab_size: int, first_index: int = 0) -> None:
    """Raise ShardError, with the byte offset, if a token of `tokens` (from `first_index` of `path`) is out of range."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        index = int(np.argmax(tokens >= vocab_size))
        offset = HEADER_BYTES + 2 * (first_index + index)
        raise ShardError(
            f"{path}: offset {offset} holds token {int(tokens[index])}, outside the vocabulary of {vocab_size}; "
            "the shard and the tokenizer do not belong together"
        )
