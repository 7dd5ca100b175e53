"""Documents as JSON lines: one object a line with `text` (and, if known, `src`); plain, gzip or xz.

A document is the unit of the split: validation is whole documents, chosen by a hash keyed with the seed, so the
choice does not depend on the order of the files, and equal texts always fall on the same side.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.durable import replacing
from trainer.errors import InputError


class DocumentError(InputError):
    """Input that is not documents. Names the file and the line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """`src` says where the text is from: a name or an address, never a path of this machine."""

    text: str
    src: str = ""


def read_documents(path: Path) -> Iterator[Document]:
    """Stream a `.jsonl`, `.jsonl.gz` or `.jsonl.xz` file. Raises DocumentError, or OSError if it cannot be opened.

    Blank lines are skipped. Lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD.
    """
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):  # noqa: B007 - the handler below names the line
                if line.strip():
                    yield _document(line)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DocumentError(f"{path}: the compressed data breaks after line {number}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f'{path}, line {number}: {error}; each line must be JSON like {{"text": "..."}}') from error


def write_documents(path: Path, documents: Iterable[Document]) -> tuple[int, int]:
    """Write plain JSON lines, whole or not at all. Returns (documents, bytes of their UTF-8 text)."""
    count = size = 0
    with replacing(path) as stream:
        for document in documents:
            line = json.dumps({"text": document.text, "src": document.src}, ensure_ascii=False)
            stream.write(line.encode("utf-8") + b"\n")
            count += 1
            size += len(document.text.encode("utf-8"))
    return count, size


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which documents there are, by digest, each with its UTF-8 bytes; equal texts count once."""

    train: dict[bytes, int]
    val: dict[bytes, int]

    @property
    def train_bytes(self) -> int:
        return sum(self.train.values())


def digest_of(text: str, seed: int) -> bytes:
    """The key of a document under a seed; its order is the seeded shuffle."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16, key=seed.to_bytes(8, "little")).digest()


def split_documents(paths: Sequence[Path], *, val_bytes: int, seed: int) -> Split:
    """Choose whole validation documents, together at most `val_bytes` of UTF-8.

    Raises DocumentError if either side would be empty.
    """
    sizes: dict[bytes, int] = {}
    for path in paths:
        for document in read_documents(path):
            if document.text:
                sizes[digest_of(document.text, seed)] = len(document.text.encode("utf-8"))
    val: dict[bytes, int] = {}
    room = val_bytes
    for digest in sorted(sizes):
        if room < val_bytes // 20:
            break  # filling the last gap would pick documents for being short
        if sizes[digest] <= room:
            val[digest] = sizes[digest]
            room -= sizes[digest]
    train = {digest: size for digest, size in sizes.items() if digest not in val}
    if not val or not train:
        side = "validation" if not val else "training"
        raise DocumentError(
            f"{len(sizes)} documents of {sum(sizes.values())} bytes leave nothing for {side} with {val_bytes} "
            "validation bytes; give more documents or another --val-bytes"
        )
    return Split(train=train, val=val)


def unique_documents(paths: Sequence[Path], wanted: dict[bytes, int], seed: int) -> Iterator[str]:
    """The texts of the wanted documents, in the order of the files, each text once."""
    left = set(wanted)
    for path in paths:
        for document in read_documents(path):
            digest = digest_of(document.text, seed)
            if digest in left:
                left.discard(digest)
                yield document.text


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked  # type: ignore[misc] # a GzipFile reads as binary IO; the stubs do not say so
        elif path.suffix == ".xz":
            with lzma.LZMAFile(raw) as unpacked_xz:
                yield unpacked_xz
        else:
            yield raw


def _document(line: bytes) -> Document:
    value = json.loads(line.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} instead of an object")  # noqa: TRY004 - wrong data, not a wrong call
    text, src = value.get("text"), value.get("src", "")
    if not isinstance(text, str):
        raise ValueError('no string under "text"')  # noqa: TRY004
    if not isinstance(src, str):
        raise ValueError('"src" is not a string')  # noqa: TRY004
    return Document(text=text.encode("utf-8", "replace").decode("utf-8"), src=src)
