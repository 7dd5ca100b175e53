"""Faults of a file as a file: missing, of another size or hash, or no shard by its header."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.manifest import FileEntry
from trainer.data.shards import HEADER_BYTES, MAGIC, VERSION
from trainer.durable import sha256_of

AGAIN = "bring the file back (remove it and fetch again, or a copy), or prepare the data set again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something wrong with `file`, at a byte `offset` where there is one place to look."""

    file: str
    offset: int | None = None
    what: str
    remedy: str = AGAIN


def file_faults(folder: Path, expected: FileEntry) -> tuple[list[Fault], int]:
    """What is wrong with a file against its manifest entry, and how many bytes were read to know.

    A file of another size has another hash too; only the size is told then. Raises OSError if it cannot be read.
    """
    path = folder / expected.file
    if not path.is_file():
        return [Fault(file=expected.file, what="missing")], 0
    size = path.stat().st_size
    if size != expected.bytes:
        where = min(size, expected.bytes)
        return [Fault(file=expected.file, offset=where, what=f"{size} bytes instead of {expected.bytes}")], 0
    if (found := sha256_of(path)) != expected.sha256:
        return [Fault(file=expected.file, what=f"sha256 {found} instead of {expected.sha256}")], size
    return [], size


def header_faults(path: Path, tokens: int) -> Iterator[Fault]:
    """What is wrong with the header of a shard (or sidecar) of so many tokens; without a fault it can be opened."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        yield Fault(file=path.name, offset=0, what=f"{size} bytes cannot hold the {HEADER_BYTES}-byte header")
        return
    magic, version, count = (int(value) for value in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        yield Fault(file=path.name, offset=0, what=f"{magic} instead of the magic {MAGIC}: no token shard")
        return
    if version != VERSION:
        yield Fault(file=path.name, offset=4, what=f"format version {version}; this reader knows version {VERSION}")
        return
    if count != tokens:
        yield Fault(file=path.name, offset=8, what=f"announces {count} tokens; the manifest has {tokens}")
    if count == tokens and size != HEADER_BYTES + 2 * count:
        yield Fault(file=path.name, offset=8, what=f"announces {count} tokens; {size} bytes do not hold just those")
