"""English prose that every machine with Python and our dependencies has: their documentation.

Docstrings (read with `ast`; nothing is imported or run) and `.md`/`.rst`/`.txt` files of the standard library and
of site-packages, cleaned of code and markup and freed of repeated paragraphs. One module or file is one document.
The order is a hash of the document's name: fixed, and mixed, so that the first megabytes are a fair sample.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trainer.data.documents import Document
from trainer.data.prose_text import paragraphs

MAX_FILE_BYTES = 1_000_000
MIN_DOCUMENT_CHARACTERS = 200
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "idle_test", "idlelib", "lib2to3", "lib-dynload", "site-packages", "dist-packages"}
    | {"__pycache__", "include", "licenses", "license_files", "_vendor", "vendored", "third_party"}
)
_SKIPPED_STEMS = re.compile(
    r"(licen[cs]e|copying|notice|authors|contributors|credits|top_level|entry_points|requirements|sources|installed-files"
    r"|record|cmakelists|vendor|native_libs|namespace_packages|zip-safe|generated)",
    re.IGNORECASE,
)
_TEXT_SUFFIXES = frozenset({".md", ".rst", ".txt"})
_QUOTES = re.compile(r"""\"{3}|'{3}""")
_PLACE_CHARACTERS = 400
_DOCSTRING_PLACE = re.compile(r":[ \t]*(?:#[^\n]*)?\n\s*\Z")
_MODULE_START = re.compile(r"(?:\s*#[^\n]*\n)*\s*")
_CHUNK_FILES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file to read, and its name relative to the library root, such as `scipy/optimize/_root.py`."""

    path: Path
    src: str


def library_roots() -> tuple[Path, ...]:
    """The standard library and site-packages of this interpreter, without repeats."""
    names = ("stdlib", "purelib", "platlib")
    return tuple(dict.fromkeys(Path(sysconfig.get_path(name)).resolve() for name in names))


def find_files(roots: Iterable[Path]) -> list[SourceFile]:
    """Python and documentation files under the roots, in the fixed mixed order; each relative name once."""
    found: dict[str, SourceFile] = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name.lower() not in _SKIPPED_FOLDERS)
            for name in names:
                path = Path(folder, name)
                suffix = path.suffix.lower()
                if suffix == ".py" or (suffix in _TEXT_SUFFIXES and not _SKIPPED_STEMS.match(path.stem)):
                    src = PurePosixPath(path.relative_to(root)).as_posix()
                    found.setdefault(src, SourceFile(path=path, src=src))
    return sorted(found.values(), key=lambda file: hashlib.sha256(file.src.encode("utf-8", "replace")).digest())


def gather(
    roots: Sequence[Path] | None = None, *, max_bytes: int | None = None, processes: int | None = None
) -> Iterator[Document]:
    """Documents of prose, up to `max_bytes` of UTF-8 text; a file that cannot be read or parsed is passed over.

    The result depends on the files only, not on `processes` (default: the cores this process may use).
    """
    files = find_files(library_roots() if roots is None else roots)
    workers = processes or len(os.sched_getaffinity(0))
    seen: set[bytes] = set()
    total = 0
    for source, blocks in _read_all(files, workers):
        fresh = []
        for block in blocks:
            digest = hashlib.blake2b(" ".join(block.lower().split()).encode("utf-8"), digest_size=12).digest()
            if digest not in seen:
                seen.add(digest)
                fresh.append(block)
        text = "\n\n".join(fresh)
        if len(text) < MIN_DOCUMENT_CHARACTERS:
            continue
        total += len(text.encode("utf-8"))
        if max_bytes is not None and total > max_bytes:
            return
        yield Document(text=text, src=source.src)


def _read_all(files: Sequence[SourceFile], workers: int) -> Iterator[tuple[SourceFile, list[str]]]:
    if workers <= 1:
        yield from zip(files, map(read_paragraphs, files), strict=True)
        return
    # Spawned, not forked: the caller may have threads (torch does).
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from zip(files, pool.imap(read_paragraphs, files, chunksize=_CHUNK_FILES), strict=True)


def read_paragraphs(file: SourceFile) -> list[str]:
    """The prose paragraphs of one file; none if it is too large, not UTF-8, or not valid Python."""
    try:
        if file.path.stat().st_size > MAX_FILE_BYTES:
            return []
        text = file.path.read_text(encoding="utf-8")
        if file.path.suffix.lower() == ".py":
            return [block for docstring in docstrings(text) for block in paragraphs(docstring)]
        return paragraphs(text)
    except (OSError, UnicodeDecodeError):
        return []


def docstrings(source: str) -> list[str]:
    """All docstrings of a module, in the order of the file, dedented.

    Parsing whole modules with `ast` took four fifths of the time of gathering; so the triple-quoted strings are
    found by their quotes, those that stand where docstrings stand are kept, and `ast` reads only their literals.
    """
    found: list[str] = []
    position = 0
    # One string after the other, so that a closing quote is never taken for an opening one.
    while opening := _QUOTES.search(source, position):
        quotes, start = opening.group(), opening.end()
        if source[opening.start() - 1 : opening.start()] in {"'", '"'}:
            position = start  # quotes within a short string, such as '"""'
            continue
        end = source.find(quotes, start)
        while end > 0 and source[end - 1] == "\\":
            end = source.find(quotes, end + 1)
        if end < 0:
            break
        position = end + 3
        raw = source[opening.start() - 1 : opening.start()] in {"r", "R"}
        before = opening.start() - raw
        if not _DOCSTRING_PLACE.search(source, max(0, before - _PLACE_CHARACTERS), before) and not (
            before <= _PLACE_CHARACTERS and _MODULE_START.fullmatch(source, 0, before)
        ):
            continue
        body = source[start:end]
        if "\\" in body and not raw:
            body = _without_escapes(quotes + body + quotes)
        found.append(inspect.cleandoc(body))
    return found


def _without_escapes(literal: str) -> str:
    """The value of a string literal; empty if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes are not our news
        try:
            value = ast.literal_eval(literal)
        except (SyntaxError, ValueError):
            return ""
    return value if isinstance(value, str) else ""
