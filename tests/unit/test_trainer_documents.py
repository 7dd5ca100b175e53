"""Files of documents of every form: what they give, and what is said of those that are broken."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from trainer.data import document_files
from trainer.data.document_files import DocumentFile, form_of, read_documents
from trainer.data.documents import Document, DocumentError, TextRule, write_documents
from trainer.data.input_stream import InputStream
from trainer.errors import InputError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)


def _texts(path: Path, rule: TextRule | None = None, limit: int = 1 << 20) -> list[str]:
    return [document.text for document in read_documents(path, text_rule=rule, max_document_bytes=limit)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.builds(Document, text=texts, src=texts), max_size=8))
def test_documents_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[Document]) -> None:
    path = tmp_path_factory.mktemp("documents") / "a.jsonl"
    count, size = write_documents(path, documents)
    assert list(read_documents(path)) == documents
    assert (count, size) == (len(documents), sum(len(document.text.encode()) for document in documents))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_every_form_and_compression_reads_the_same_in_small_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, name: str
) -> None:
    monkeypatch.setattr(document_files, "BLOCK_BYTES", 7)
    wanted = [f"document {i} naïve 漢字 " + "x" * (i % 50) for i in range(200)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) if name != "a.txt" else text for text in wanted]
    data = ("\ufeff" + "\n\n".join(lines)).encode()
    path = tmp_path / (name + suffix)
    path.write_bytes(PACK[suffix](data))
    assert [text.rstrip() for text in _texts(path, TextRule(cut="line"))] == [text.rstrip() for text in wanted]
    file = DocumentFile(path, text_rule=TextRule(cut="line"))
    batches = list(file.batches(hashed=True))
    assert (file.sha256, file.raw_bytes) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    stripped = data.decode().split("\n")
    for batch in batches:
        for payload, line, offset in zip(batch.payloads, batch.lines, batch.offsets or [], strict=True):
            assert data[offset : offset + len(payload)] == payload
            assert stripped[line - 1].encode().removeprefix(b"\xef\xbb\xbf") == payload


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_files_of_several_parts_are_read_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b'{"text": "one"}\n{"te') + PACK[suffix](b'xt": "two"}'))
    assert _texts(path) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_broken_compressed_data_is_named_with_how_far_it_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, damage: str
) -> None:
    monkeypatch.setattr(document_files, "BLOCK_BYTES", 1 << 12)
    lines = b"".join(b'{"text": "document %d"}\n' % (i * i) for i in range(20_000))
    whole = bytearray(PACK[suffix](lines))
    path = tmp_path / f"a.jsonl{suffix}"
    if damage == "cut":
        del whole[-len(whole) // 3 :]
    else:
        whole[-6] ^= 255  # within the checksum of each format, or its index
    path.write_bytes(whole)
    with pytest.raises(DocumentError, match=r"a\.jsonl.*breaks at byte (\d+) .*after (\d+) bytes of text") as caught:
        _texts(path)
    got = int(str(caught.value).split("after ")[1].split(" ")[0])
    assert 1 << 12 <= got <= len(lines)


def test_a_zstd_bomb_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b"\n" * (300 << 20)))
    tracemalloc.start()
    try:
        with InputStream(path) as stream:
            count = 0
            while data := stream.read(1 << 20):
                count += len(data)
        assert count == 300 << 20
        assert tracemalloc.get_traced_memory()[1] < 90 << 20
    finally:
        tracemalloc.stop()


def test_a_zstd_window_beyond_the_memory_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()
    path.write_bytes(wide.compress(b'{"text": "a"}\n') + wide.flush())
    with pytest.raises(DocumentError, match="more than 128 MiB; compress it again without --long"):
        _texts(path)


def test_names_that_are_no_utf8_become_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("a text")
    assert list(read_documents(path)) == [Document(text="a text", src="caf\ufffd.txt")]
    with pytest.raises(InputError, match="not UTF-8"):
        TextRule.parse(os.fsdecode(b"\xe9"))


def test_lone_surrogates_become_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b\\udc00 \\ud83d\\ude00", "src": "\\ud800"}\n')
    assert list(read_documents(path)) == [Document(text="a\ufffd b\ufffd \U0001f600", src="\ufffd")]


def test_the_source_is_the_first_of_its_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"src": "s", "url": "u"}, {"source": "o", "url": "u"}, {"source": {"id": 3}, "url": "u"}, {"src": None}]
    path.write_text("\n".join(json.dumps({"text": "t", **line}) for line in lines))
    assert [document.src for document in read_documents(path)] == ["s", "o", "u", ""]


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 3}', '{"src": "x"}', '{"text": "a", "src": 1}', "[" * 99_999])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line.encode() + b"\n")
    with pytest.raises(DocumentError, match=r"bad\.jsonl, line 3: .*must be JSON like"):
        list(read_documents(path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_that_is_not_utf8_is_named_with_line_and_offset(tmp_path: Path, suffix: str) -> None:
    for name, rule in (("a.jsonl", None), ("a.txt", TextRule(cut="blank-line")), ("a.txt", TextRule())):
        data = b'{"text": "fine"}\n\n{"text": "b\xc3\xa4h"}\n{"text": "b\xe4h"}\n'
        path = tmp_path / (name + suffix)
        path.write_bytes(PACK[suffix](data))
        with pytest.raises(DocumentError, match=rf"line 4, offset {data.index(0xE4.to_bytes(1))}: byte 0xe4"):
            list(read_documents(path, text_rule=rule))


def test_a_text_file_is_cut_by_its_rule(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n one\n\n \t\n\n<|end|>\ntwo<|end|><|end|>three\n\nfour\n")
    assert _texts(path) == [path.read_bytes().decode()]
    assert _texts(path, TextRule(cut="line")) == ["one", " one", "<|end|>", "two<|end|><|end|>three", "four"]
    assert _texts(path, TextRule(cut="blank-line")) == ["one\r\n one", "<|end|>\ntwo<|end|><|end|>three", "four"]
    separated = _texts(path, TextRule(cut="separator", separator="<|end|>"))
    assert separated == ["one\r\n one\n\n \t", "two", "three\n\nfour"]
    assert [document.src for document in read_documents(path)] == ["a.txt"]


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.sampled_from(["a", "bc", "\n", "\n\n", "|", "||", "é"]), max_size=40),
    block=st.integers(1, 9),
    separator=st.sampled_from(["||", "\n", "c\na"]),
)
def test_cutting_does_not_depend_on_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, data: list[str], block: int, separator: str
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    text = "".join(data)
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_files, "BLOCK_BYTES", block)
        file = DocumentFile(path, text_rule=TextRule(cut="separator", separator=separator))
        found = [entry for b in file.batches() for entry in zip(b.payloads, b.lines, b.offsets or [], strict=True)]
    pieces = [piece.strip("\n") for piece in text.split(separator)]
    assert [payload.decode() for payload, _, _ in found] == [piece for piece in pieces if piece]
    raw = text.encode()
    for payload, line, offset in found:
        assert raw[offset : offset + len(payload)] == payload
        assert line == raw[:offset].count(b"\n") + 1


@pytest.mark.parametrize(
    ("name", "rule", "place"),
    [
        ("a.jsonl", "file", "line 3, offset 33"),
        ("a.txt", "line", "line 3, offset 33"),
        ("a.txt", "blank-line", "line 3, offset 33"),
        ("a.txt", "file", "line 1, offset 0"),
        ("a.txt", "\\n\\n", "line 3, offset 33"),
    ],
)
def test_a_document_that_is_too_long_is_found_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rule: str, place: str
) -> None:
    monkeypatch.setattr(document_files, "BLOCK_BYTES", 16)
    path = tmp_path / name
    path.write_bytes(b'{"text": "as long as it may"}' + b"  \n\n" + b"x" * 5_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(DocumentError, match=rf"{name}, {place}: .*--max-document-bytes"):
            _texts(path, TextRule.parse(rule), limit=1000)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_paragraphs_that_grow_too_long_line_by_line_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n\n" + b"bcd\n" * 300)
    with pytest.raises(DocumentError, match=r"line 3, offset 3: .*longer than 1000 bytes"):
        _texts(path, TextRule(cut="blank-line"), limit=1000)
    assert len(_texts(path, TextRule(cut="blank-line"), limit=1200)) == 2


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_read_by_rows(tmp_path: Path, kind: pa.DataType) -> None:
    wanted = [f"row {i} é" for i in range(600)]
    column = pa.array([*wanted, None], type=pa.string()).cast(kind)
    table = pa.table({"id": range(601), "text": column, "url": [f"u{i}" for i in range(601)], "n": range(601)})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=250)
    read = list(read_documents(path))
    assert [document.text for document in read] == [*wanted, ""]
    assert [document.src for document in read] == [f"u{i}" for i in range(601)]
    file = DocumentFile(path)
    assert sum(len(batch) for batch in file.batches(hashed=True)) == 601
    assert (file.sha256, file.raw_bytes) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


def test_long_parquet_rows_come_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i:03} " * (1 << 18) for i in range(40)]
    parquet.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    batches = list(DocumentFile(path).batches())
    assert max(batch.size for batch in batches) <= 4 << 20
    assert [document.text for batch in batches for document in batch.documents()] == texts


def test_parquet_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(
        DocumentError, match=r"needs one column `text` of strings, but has body \(string\), n \(int64\)"
    ):
        _texts(path)
    parquet.write_table(pa.table({"text": [1]}), path)
    with pytest.raises(DocumentError, match=r"has text \(int64\)"):
        _texts(path)
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    parquet.write_table(twice, path)
    with pytest.raises(DocumentError, match=r"one column `text` .* has text \(string\), text \(string\)"):
        _texts(path)
    parquet.write_table(pa.table({"text": pa.array([b"fine", b"b\xe4h"], pa.binary())}), path)
    with pytest.raises(DocumentError, match="row 2: byte 0xe4 at 1"):
        _texts(path)
    with pytest.raises(DocumentError, match="row 1: the text is longer than 3 bytes"):
        _texts(path, limit=3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DocumentError, match="broken parquet after row 0"):
        _texts(path)
    parquet.write_table(pa.table({"text": [f"{i}" * 99 for i in range(3000)]}), path, compression="snappy")
    data = bytearray(path.read_bytes())
    data[2000:2400] = b"\xff" * 400
    path.write_bytes(data)
    with pytest.raises(DocumentError, match="broken parquet after row"):
        _texts(path)


@pytest.mark.parametrize("name", ["a.csv", "a.gz", "a.txt.bz2", "a.parquet.gz", "a"])
def test_another_suffix_is_refused_with_those_that_are_read(name: str) -> None:
    with pytest.raises(DocumentError, match=r"\.jsonl.*\.txt.*\.gz, \.xz or \.zst.*\.parquet"):
        form_of(Path(name))


def test_a_text_rule_is_written_in_words() -> None:
    assert TextRule.parse("file") == TextRule()
    assert TextRule.parse("\\n---\\n") == TextRule(cut="separator", separator="\n---\n")
    assert TextRule.parse("blank-line").cut == "blank-line"
    with pytest.raises(InputError, match="separates nothing"):
        TextRule.parse("")
    with pytest.raises(ValueError, match="separator"):
        TextRule(cut="line", separator="x")


def test_a_missing_file_is_an_os_error_that_names_it(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(FileNotFoundError, match=name):
            _texts(tmp_path / name)
