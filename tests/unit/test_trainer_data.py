"""Gathering prose, and shards as files."""

from __future__ import annotations

import ast
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from trainer.data.prose import docstrings, find_files, gather
from trainer.data.prose_text import paragraphs
from trainer.data.shards import HEADER_BYTES, ShardError, check_tokens, open_shard, write_shard

SENTENCE = "The reader of this module is told what it does and why it is the way that it is, in words."


def _library(root: Path) -> Path:
    package = root / "pkg"
    (package / "tests").mkdir(parents=True)
    (package / "mod.py").write_text(
        f'# a comment\n"""{SENTENCE}\n\nAnother paragraph about the things that it can do for its caller.\n"""\n'
        "import does_not_exist\nraise SystemExit(1)\n"
        'TEXT = """This assigned string is not a docstring and so it must not be in the output of the tool."""\n'
        "def f(\n    a: int,\n) -> int:\n"
        '    r"""The raw docstring of a function with a \\alpha that has enough of the common words.\n\n'
        '    >>> the doctest of this and that is to be dropped for it is code\n    1\n    """\n'
    )
    (package / "again.py").write_text(f'"""{SENTENCE}"""\n')
    (package / "LICENSE.txt").write_text(f"licence text that {SENTENCE}" * 20)
    (package / "guide.md").write_text(
        "# A heading\n\n" + "\n\n".join(f"Paragraph {word}: {SENTENCE}" for word in ("one", "two", "three", "four"))
    )
    (package / "tests" / "test_x.py").write_text(f'"""Test folder. {SENTENCE}"""\n')
    (package / "broken.md").write_bytes(b"\xff\xfe" + b"the of and to is in " * 50)
    return root


def test_gather_takes_documentation_without_running_it(tmp_path: Path) -> None:
    documents = list(gather([_library(tmp_path)], processes=1))
    assert {document.src for document in documents} == {"pkg/mod.py", "pkg/guide.md"}
    text = "\n".join(document.text for document in documents)
    assert text.count(SENTENCE) >= 1
    assert "\\alpha" in text
    for unwanted in ("assigned string", "doctest", "licence text", "Test folder", "A heading"):
        assert unwanted not in text


def test_gather_repeats_no_paragraph_and_ignores_the_number_of_processes(tmp_path: Path) -> None:
    root = _library(tmp_path)
    alone, together = list(gather([root], processes=1)), list(gather([root], processes=2))
    assert alone == together
    blocks = [block for document in alone for block in document.text.split("\n\n")]
    assert len(blocks) == len(set(blocks)) > 3


def test_gather_stops_at_max_bytes(tmp_path: Path) -> None:
    root = _library(tmp_path)
    everything = list(gather([root], processes=1))
    first = len(everything[0].text.encode())
    assert list(gather([root], max_bytes=first, processes=1)) == everything[:1]
    assert list(gather([root], max_bytes=first - 1, processes=1)) == []


def test_sources_are_relative_and_in_a_fixed_order(tmp_path: Path) -> None:
    names = [file.src for file in find_files([_library(tmp_path)])]
    assert names == [file.src for file in find_files([tmp_path])]
    assert all(not name.startswith("/") and ".." not in name for name in names)


@pytest.mark.parametrize("module", [json, ast, gzip, lzma])
def test_docstrings_are_those_of_ast(module: object) -> None:
    source = Path(str(module.__file__)).read_text(encoding="utf-8")  # type: ignore[attr-defined]
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = {
        text for node in ast.walk(ast.parse(source)) if isinstance(node, nodes) if (text := ast.get_docstring(node))
    }
    tripled = {text for text in expected if f'"""{text[:12]}' in source}
    assert len(tripled) > 3
    assert tripled <= set(docstrings(source))


def test_prose_loses_its_markup_and_code() -> None:
    text = (
        "Title of it\n===========\n\n"
        "Use :func:`~pkg.run` or ``walk`` to do what the *caller* asked for, as is said in `the guide <https://x.y>`_."
        "\n\nThis is an example of the way that it is used in a program::\n\n    code = of(a, program)\n\n"
        "```\nthe fenced code of a block is not in the output at all\n```\n"
        "| a | table | of | the | things | that | are | in | it | to | be |\n"
    )
    assert paragraphs(text) == [
        "Use pkg.run or walk to do what the caller asked for, as is said in the guide.",
        "This is an example of the way that it is used in a program:",
    ]


def test_what_is_not_english_prose_is_left_out() -> None:
    assert paragraphs("Dieser Absatz ist auf Deutsch und gehört deshalb nicht in eine englische Sammlung hinein.") == []
    assert paragraphs("x = 1; y = 2; z = [a for a in b]; foo(bar)[0] += {1: 2}; while (i < 10) { i++; }") == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "offset 8 announces"),
        (lambda data: data + b"\0\0", "offset 8 announces"),
        (lambda data: data[:100], "header"),
        (lambda data: b"\1" + data[1:], "offset 0 holds"),
        (lambda data: data[:4] + b"\2" + data[5:], "offset 4 holds version"),
        (lambda data: data[:11] + b"\xff" + data[12:], "offset 8 announces"),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "s.bin"
    write_shard(path, np.arange(9, dtype=np.uint16))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ShardError, match=message):
        open_shard(path)


def test_a_token_out_of_range_is_named_with_its_offset(tmp_path: Path) -> None:
    tokens = np.array([1, 2, 50, 3], dtype=np.uint16)
    with pytest.raises(ShardError, match=rf"offset {HEADER_BYTES + 2 * 12} holds token 50"):
        check_tokens(tmp_path / "s.bin", tokens, 50, first_index=10)
    check_tokens(tmp_path / "s.bin", tokens, 51)
