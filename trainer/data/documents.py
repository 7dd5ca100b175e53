"""Documents: their text, where it is from, and the raw bytes that they are read from.

A document is the unit of the split and of encoding. Files are cut into raw documents in one process, which costs
little; what costs more, JSON and UTF-8, is parsed where the text is needed, in worker processes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.durable import replacing
from trainer.errors import InputError

_SURROGATES = re.compile("[\ud800-\udfff]")
_EXAMPLE = 'each line must be JSON like {"text": "..."}'


class DocumentError(InputError):
    """Input that is not documents. Names the file, and the line or the byte offset in its (decompressed) text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """`src` says where the text is from: a name or an address, never a path of this machine."""

    text: str
    src: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRule:
    """How a `.txt` file is cut: whole, by `separator`, at blank lines, or by line.

    A separator is found wherever it stands; one that must fill a line is given with its newlines. Newlines around a
    document are not part of it, unless the document is the whole file.
    """

    cut: Literal["file", "separator", "blank-line", "line"] = "file"
    separator: str = ""

    def __post_init__(self) -> None:
        if (self.cut == "separator") != bool(self.separator):
            raise ValueError("a separator goes with the cut 'separator', and only with it")

    @classmethod
    def parse(cls, words: str) -> TextRule:
        r"""`file`, `blank-line`, `line`, or else the separator itself, in which `\n` and `\t` are newline and tab.

        Raises InputError for an empty text, or one that is no UTF-8.
        """
        match words:
            case "file" | "blank-line" | "line":
                return cls(cut=words)
            case "":
                raise InputError("an empty text separates nothing; give file, blank-line, line or a separator")
        try:
            words.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the separator {words!r} is not UTF-8, so no text can hold it; give another") from error
        return cls(cut="separator", separator=words.replace("\\n", "\n").replace("\\t", "\t"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDocuments:
    """Some documents of one file, in order, not parsed yet.

    `lines` are the numbers, from 1, of the line (or with parquet: the row) that each begins on; `offsets` the bytes
    of decompressed text before it. `sources` are known of parquet only; `src` is the source of plain text.
    """

    file: str
    form: Literal["json", "text"]
    payloads: Sequence[bytes]
    lines: Sequence[int]
    offsets: Sequence[int] | None = None
    sources: Sequence[str] | None = None
    src: str = ""

    def __len__(self) -> int:
        return len(self.payloads)

    @property
    def size(self) -> int:
        """Bytes of all payloads."""
        return sum(map(len, self.payloads))

    def select(self, wanted: Sequence[int]) -> RawDocuments:
        """Those at the wanted indices."""
        if len(wanted) == len(self.payloads):
            return self
        return replace(
            self,
            payloads=[self.payloads[i] for i in wanted],
            lines=[self.lines[i] for i in wanted],
            offsets=None if self.offsets is None else [self.offsets[i] for i in wanted],
            sources=None if self.sources is None else [self.sources[i] for i in wanted],
        )

    def documents(self) -> Iterator[Document]:
        """Parse them. Lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD.

        Raises DocumentError naming file and line, and for text that is not UTF-8 the offset of the bad byte.
        """
        for index, payload in enumerate(self.payloads):
            try:
                if self.form == "json":
                    yield _from_json(payload)
                else:
                    yield Document(
                        text=payload.decode("utf-8"), src=self.src if self.sources is None else self.sources[index]
                    )
            except UnicodeDecodeError as error:
                raise DocumentError(self._bad_byte(index, error)) from error
            except json.JSONDecodeError as error:
                at = f"{error.msg.removesuffix(' at')} at character {error.pos}"
                raise DocumentError(f"{self.file}, line {self.lines[index]}: {at}; {_EXAMPLE}") from error
            except (ValueError, RecursionError) as error:
                raise DocumentError(f"{self.file}, line {self.lines[index]}: {error}; {_EXAMPLE}") from error

    def _bad_byte(self, index: int, error: UnicodeDecodeError) -> str:
        byte = f"byte 0x{error.object[error.start]:02x}"
        if self.offsets is None:
            return f"{self.file}, row {self.lines[index]}: {byte} at {error.start} of the text is not UTF-8"
        line = self.lines[index] + self.payloads[index].count(b"\n", 0, error.start)
        return (
            f"{self.file}, line {line}, offset {self.offsets[index] + error.start}: {byte} is not UTF-8; "
            "convert the file to UTF-8 first"
        )


def shown_name(path: Path) -> str:
    """The file's name as text; what of it is no UTF-8 becomes U+FFFD, because manifests and sources are UTF-8."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def json_line(document: Document) -> bytes:
    """One line of `.jsonl`, with its newline."""
    line = json.dumps({"text": document.text, "src": document.src}, ensure_ascii=False)
    return line.encode("utf-8") + b"\n"


def write_documents(path: Path, documents: Iterable[Document]) -> tuple[int, int]:
    """Write plain JSON lines, whole or not at all. Returns (documents, bytes of their UTF-8 text)."""
    count = size = 0
    with replacing(path) as stream:
        for document in documents:
            stream.write(json_line(document))
            count += 1
            size += len(document.text.encode("utf-8"))
    return count, size


def _from_json(line: bytes) -> Document:
    value = json.loads(line.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} instead of an object")  # noqa: TRY004 - wrong data, not a wrong call
    text, src = value.get("text"), value.get("src")
    if not isinstance(text, str):
        raise ValueError('no string under "text"')  # noqa: TRY004
    if src is None:  # other people's corpora name it otherwise; only what is a string can be a source
        src = next((value[key] for key in ("source", "url") if isinstance(value.get(key), str)), "")
    if not isinstance(src, str):
        raise ValueError('"src" is not a string')  # noqa: TRY004
    return Document(text=_without_surrogates(text), src=_without_surrogates(src))


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
