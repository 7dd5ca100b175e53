"""Gathering, documents, shards, manifest, prepare."""

from __future__ import annotations

import ast
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.documents import Document, DocumentError, read_documents, split_documents, write_documents
from trainer.data.manifest import DataSet, DataSetError
from trainer.data.prose import docstrings, find_files, gather
from trainer.data.prose_text import paragraphs
from trainer.data.shards import HEADER_BYTES, ShardError, ShardWriter, check_tokens, open_shard, write_shard
from trainer.data.verbs import prepare

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


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.builds(Document, text=texts, src=texts), max_size=8))
def test_documents_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[Document]) -> None:
    path = tmp_path_factory.mktemp("documents") / "a.jsonl"
    count, size = write_documents(path, documents)
    assert list(read_documents(path)) == documents
    assert (count, size) == (len(documents), sum(len(document.text.encode()) for document in documents))


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_compressed_documents_and_their_damage(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps({"text": f"document {i} \ud83d"}) + "\n" for i in range(50)).encode()
    path = tmp_path / f"a.jsonl.{suffix}"
    whole = gzip.compress(lines) if suffix == "gz" else lzma.compress(lines)
    path.write_bytes(whole)
    read = list(read_documents(path))
    assert len(read) == 50
    assert read[7].text == "document 7 ?"
    path.write_bytes(whole[:-9])
    with pytest.raises(DocumentError, match=r"a\.jsonl"):
        list(read_documents(path))


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 3}', '{"src": "x"}', '{"text": "a", "src": 1}', '"\xff"'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(DocumentError, match=r"bad\.jsonl, line 3"):
        list(read_documents(path))


def test_split_is_by_whole_documents_and_shares_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_documents(path, [Document(text=f"text {i % 40} " * (i % 40 + 1)) for i in range(100)])
    split = split_documents([path], val_bytes=1500, seed=3)
    assert len(split.train) + len(split.val) == 40
    assert not split.train.keys() & split.val.keys()
    assert 0 < sum(split.val.values()) <= 1500
    assert split == split_documents([path, path], val_bytes=1500, seed=3)
    assert split.val != split_documents([path], val_bytes=1500, seed=4).val
    for impossible in (3, 10**9):
        with pytest.raises(DocumentError, match="--val-bytes"):
            split_documents([path], val_bytes=impossible, seed=3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=40), max_size=8), st.integers(1, 50))
def test_shards_round_trip(tmp_path_factory: pytest.TempPathFactory, runs: list[list[int]], shard_tokens: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "train", shard_tokens)
    for run in runs:
        writer.append(np.array(run, dtype=np.uint16))
    writer.close()
    shards = [open_shard(path) for path in writer.paths]
    assert [token for shard in shards for token in shard.tolist()] == [token for run in runs for token in run]
    assert all(shard.size == shard_tokens for shard in shards[:-1])
    assert sorted(folder.iterdir()) == writer.paths


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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("prepared")
    words = paragraphs(SENTENCE)[0].split()
    rng = np.random.default_rng(0)
    write_documents(
        folder / "a.jsonl", (Document(text=" ".join(rng.choice(words, 60)) + f" {i} ü") for i in range(120))
    )
    return prepare([folder / "a.jsonl"], folder / "data", vocab_size=320, val_bytes=2000, seed=5, shard_tokens=2000)


def test_prepare_makes_a_verified_data_set(dataset: DataSet) -> None:
    loaded = DataSet.load(dataset.path)
    assert loaded == dataset
    loaded.verify()
    manifest = loaded.manifest
    assert manifest.documents == 120
    assert len(manifest.train) > 1
    starts = sum(int((open_shard(path) == 1).sum()) for path in (*loaded.train_shards, *loaded.val_shards))
    assert starts == manifest.documents
    assert open_shard(loaded.val_shards[0])[0] == 1


def test_prepare_twice_gives_the_same_bytes_and_never_overwrites(dataset: DataSet) -> None:
    source = dataset.path.parent / "a.jsonl"
    again = prepare([source], dataset.path.parent / "again", vocab_size=320, val_bytes=2000, seed=5, shard_tokens=2000)
    assert again.manifest == dataset.manifest
    with pytest.raises(DataSetError, match="already holds"):
        prepare([source], dataset.path, vocab_size=320, val_bytes=2000)


def test_a_changed_data_set_is_refused(dataset: DataSet, tmp_path: Path) -> None:
    def copy() -> Path:
        for file in dataset.path.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    flip(copy() / dataset.manifest.val[0].file)
    with pytest.raises(DataSetError, match="validation shards"):
        DataSet.load(tmp_path)
    flip(copy() / dataset.manifest.tokenizer.file)
    with pytest.raises(DataSetError, match="not the tokenizer"):
        DataSet.load(tmp_path)
    flip(copy() / dataset.manifest.train[1].file)
    with pytest.raises(DataSetError, match="has changed"):
        DataSet.load(tmp_path).verify()
    (copy() / dataset.manifest.train[0].file).unlink()
    with pytest.raises(DataSetError, match="is missing"):
        DataSet.load(tmp_path)
    (copy() / "manifest.json").write_text(dataset.manifest.model_dump_json().replace("train_000000", "../train"))
    with pytest.raises(DataSetError, match="plain file name"):
        DataSet.load(tmp_path)
