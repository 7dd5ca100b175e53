"""`data verify`: every kind of damage is told, with its file and its offset, and a good data set has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import shard_checks
from trainer.data.describing import Provenance, describe
from trainer.data.encoding import Encoded, Encoder, EncoderSettings
from trainer.data.file_checks import Fault
from trainer.data.manifest import MANIFEST_NAME
from trainer.data.shards import BOS, HEADER_BYTES, Tokens, open_shard, write_shard
from trainer.data.tokenizer import MarkIds, open_tokenizer, train_tokenizer
from trainer.data.verification import VerifyReport, verify
from trainer.durable import sha256_of

WORDS = ["The", "of", "and", "to", "NASA", "is", "for", "on", "that", "with", "as", "it", "Was", "at", "by", "\uecf1x"]


def _texts() -> list[str]:
    rng = np.random.default_rng(2)
    return [" ".join(rng.choice(WORDS, size)) + "." for size in rng.integers(20, 50, 40)]


def _prepared(folder: Path, *, case_folding: bool) -> Path:
    """30 train documents in three shards and 10 validation documents in two, all cut within documents."""
    folder.mkdir()
    texts = _texts()
    (folder / "tokenizer.model").write_bytes(train_tokenizer(iter(texts), vocab_size=300, case_folding=case_folding))
    encoder = Encoder(EncoderSettings(tokenizer=folder / "tokenizer.model", case_folding=case_folding))
    names: dict[str, list[str]] = {}
    for split, given, pieces in (("train", texts[:30], 3), ("val", texts[30:], 2)):
        names[split] = _shards(folder, split, encoder.encode(given), pieces)
    (folder / "val_sources.json").write_text(json.dumps([f"book {number}" for number in range(10)]))
    provenance = Provenance(split="the last ten", case_folding=case_folding, val_sources="val_sources.json")
    describe(folder, tokenizer="tokenizer.model", train=names["train"], val=names["val"], provenance=provenance).save()
    return folder


def _shards(folder: Path, split: str, encoded: Encoded, pieces: int) -> list[str]:
    names = [f"{split}_{number:06d}" for number in range(pieces)]
    for name, piece in zip(names, np.array_split(encoded.tokens, pieces), strict=True):
        write_shard(folder / f"{name}.bin", piece)
    if encoded.original_bytes is not None:
        for name, piece in zip(names, np.array_split(encoded.original_bytes, pieces), strict=True):
            write_shard(folder / f"{name}.bytes", piece)
    return [f"{name}.bin" for name in names]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A data set without and one with case folding, to be copied and damaged."""
    root = tmp_path_factory.mktemp("verified")
    return {folding: _prepared(root / f"folding-{folding}", case_folding=folding) for folding in (False, True)}


@pytest.fixture
def plain(originals: dict[bool, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[False], tmp_path / "plain"))


@pytest.fixture
def folded(originals: dict[bool, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[True], tmp_path / "folded"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    change(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def _reseal(folder: Path) -> None:
    """Make the manifest agree with the sizes and hashes of changed files, so that only other checks can tell."""

    def change(manifest: dict[str, Any]) -> None:
        shards = [*manifest["train"], *manifest["val"]]
        sidecars = [shard["original_bytes"] for shard in shards if shard["original_bytes"]]
        for entry in (manifest["tokenizer"], manifest["val_sources"], *shards, *sidecars):
            path = folder / entry["file"]
            entry["sha256"] = sha256_of(path)
            if "bytes" in entry:
                entry["bytes"] = path.stat().st_size

    _edit(folder, change)


def _put(folder: Path, name: str, index: int, token: int) -> int:
    """Change one token, reseal, and return its byte offset."""
    tokens = open_shard(folder / name).copy()
    index %= tokens.size
    tokens[index] = token
    write_shard(folder / name, tokens)
    _reseal(folder)
    return HEADER_BYTES + 2 * index


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def _inside(tokens: Tokens) -> int:
    """An index well inside a document."""
    return int(np.flatnonzero(tokens == BOS)[1]) + 5


def _found(report: VerifyReport) -> set[tuple[str, int | None]]:
    return {(fault.file, fault.offset) for fault in report.faults}


def _the(report: VerifyReport, word: str) -> Fault:
    """The one fault that says this word."""
    [fault] = [fault for fault in report.faults if word in fault.what]
    assert fault.remedy
    return fault


@pytest.mark.parametrize("folding", [False, True])
def test_a_good_data_set_has_no_fault(originals: dict[bool, Path], folding: bool) -> None:
    folder = originals[folding]
    report = verify(folder)
    assert report.ok
    assert report.faults == report.unchecked == ()
    assert (report.train_documents, report.val_documents) == (30, 10)
    assert report.files == len(list(folder.iterdir())) == (13 if folding else 8)
    assert report.bytes_read == sum(p.stat().st_size for p in folder.iterdir() if p.name != MANIFEST_NAME)
    assert report.tokens == sum(open_shard(path).size for path in folder.glob("*.bin"))
    assert json.loads(json.dumps(asdict(report)))["folder"] == folder.name


def test_worker_processes_find_the_same(folded: Path) -> None:
    _put(folded, "train_000002.bin", -1, 2)
    alone, together = verify(folded, workers=1), verify(folded, workers=2)
    assert alone.faults == together.faults != ()
    assert alone.unchecked == together.unchecked


@pytest.mark.parametrize(
    ("content", "offset", "what"),
    [
        (None, None, "cannot be read"),
        (b'{"version": 2, \xff', 15, "is not UTF-8"),
        ('{"split": "é" oops'.encode(), 15, "is not JSON"),
        (b"[" * 200_000, None, "nested too deeply"),
        (b'{"version": 1}', None, "has version 1; this reader knows version 2"),
        (b"[]", None, "has version None"),
        (b'{"version": 2}', None, "vocab_size: Field required"),
    ],
)
def test_manifest_that_cannot_be_read(plain: Path, content: bytes | None, offset: int | None, what: str) -> None:
    if content is None:
        (plain / MANIFEST_NAME).unlink()
    else:
        (plain / MANIFEST_NAME).write_bytes(content)
    report = verify(plain)
    assert _found(report) == {(MANIFEST_NAME, offset)}
    assert what in report.faults[0].what
    assert "data adopt" in report.faults[0].remedy
    assert report.unchecked == ("everything but the manifest",)


def test_manifest_whose_sums_do_not_fit(plain: Path) -> None:
    _edit(plain, lambda manifest: manifest.update(train_tokens=7))
    assert _the(verify(plain), "train_tokens is not the sum").file == MANIFEST_NAME


@pytest.mark.parametrize(
    "name", ["train_000001.bin", "val_000001.bin", "tokenizer.model", "val_sources.json", "val_000000.bytes"]
)
def test_a_missing_file(folded: Path, name: str) -> None:
    (folded / name).unlink()
    fault = _the(verify(folded), "missing")
    assert (fault.file, fault.offset) == (name, None)


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin", "val_000001.bytes", "train_000002.bytes"])
def test_a_file_cut_or_extended(folded: Path, name: str) -> None:
    path = folded / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-6])
    assert {(name, len(whole) - 6), (name, 8)} <= _found(verify(folded))
    path.write_bytes(whole + b"xx")
    assert {(name, len(whole)), (name, 8)} <= _found(verify(folded))
    path.write_bytes(whole[:100])
    assert {(name, 100), (name, 0)} <= _found(verify(folded))
    assert _the(verify(folded), "cannot hold the 1024-byte header").file == name


@pytest.mark.parametrize(
    ("offset", "value", "what"), [(0, 7, "instead of the magic"), (4, 9, "format version 9"), (8, 5, "announces 5")]
)
@pytest.mark.parametrize("name", ["train_000000.bin", "val_000001.bytes"])
def test_a_header_that_is_none(folded: Path, name: str, offset: int, value: int, what: str) -> None:
    _overwrite(folded / name, offset, value.to_bytes(4, "little"))
    _reseal(folded)
    fault = _the(verify(folded), what)
    assert (fault.file, fault.offset) == (name, offset)


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000001.bin", "val_000000.bytes", "tokenizer.model"])
def test_a_changed_byte(folded: Path, name: str) -> None:
    content = (folded / name).read_bytes()
    _overwrite(folded / name, len(content) - 2, bytes([content[-2] ^ 1]))
    [fault] = [fault for fault in verify(folded).faults if fault.what.startswith("sha256 ")]
    assert (fault.file, fault.offset) == (name, None)


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin"])
@pytest.mark.parametrize(
    ("token", "what"),
    [
        (300, "outside the vocabulary of 300"),
        (65535, "outside the vocabulary"),
        (0, "pad (0) inside"),
        (2, "eos (2) inside"),
        (3, "unk (3) inside"),
    ],
)
def test_a_token_that_must_not_be(plain: Path, name: str, token: int, what: str) -> None:
    offset = _put(plain, name, _inside(open_shard(plain / name)), token)
    fault = _the(verify(plain), what)
    assert (fault.file, fault.offset) == (name, offset)


def test_a_token_out_of_range_leaves_the_text_unchecked(plain: Path) -> None:
    _put(plain, "val_000001.bin", 9, 400)
    report = verify(plain)
    assert len(report.faults) == 1
    assert {"val_sha256", "val_bytes"} <= set(report.unchecked)


def test_an_empty_document(plain: Path) -> None:
    tokens = open_shard(plain / "train_000001.bin")
    beginning = int(np.flatnonzero(tokens == BOS)[1])
    _put(plain, "train_000001.bin", beginning + 1, BOS)
    report = verify(plain)
    fault = _the(report, "an empty document: BOS directly before BOS")
    assert (fault.file, fault.offset) == ("train_000001.bin", HEADER_BYTES + 2 * beginning)
    count = int(np.count_nonzero(tokens == BOS))
    fault = _the(report, f"{count + 1} BOS, but the manifest counts {count} documents")
    assert (fault.file, fault.offset) == ("train_000001.bin", None)


def test_an_empty_document_across_shards(plain: Path) -> None:
    _put(plain, "train_000001.bin", 0, BOS)
    offset = _put(plain, "train_000000.bin", -1, BOS)
    fault = _the(verify(plain), "BOS of the next shard")
    assert (fault.file, fault.offset) == ("train_000000.bin", offset)


@pytest.mark.parametrize("name", ["train_000002.bin", "val_000001.bin"])
def test_an_empty_last_document(plain: Path, name: str) -> None:
    offset = _put(plain, name, -1, BOS)
    fault = _the(verify(plain), "the last document is empty")
    assert (fault.file, fault.offset) == (name, offset)


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
def test_a_stream_that_begins_within_a_document(plain: Path, name: str) -> None:
    _put(plain, name, 0, 50)
    fault = _the(verify(plain), "the stream begins with token 50 instead of BOS (1)")
    assert (fault.file, fault.offset) == (name, HEADER_BYTES)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_wrong_count_of_documents(plain: Path, split: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest[split][1]["documents"] += 1
        manifest[f"{split}_documents"] += 1

    _edit(plain, change)
    assert _the(verify(plain), "BOS, but the manifest counts").file == f"{split}_000001.bin"


@pytest.mark.parametrize("name", ["train_bytes", "val_bytes"])
@pytest.mark.parametrize("folding", [False, True])
def test_a_wrong_count_of_bytes(originals: dict[bool, Path], tmp_path: Path, folding: bool, name: str) -> None:
    folder = Path(shutil.copytree(originals[folding], tmp_path / "copy"))
    _edit(folder, lambda manifest: manifest.update({name: manifest[name] + 1}))
    report = verify(folder)
    assert _found(report) == {(MANIFEST_NAME, None)}
    assert f"{name} is" in report.faults[0].what


@pytest.mark.parametrize("folding", [False, True])
def test_a_wrong_hash_of_the_validation_text(originals: dict[bool, Path], tmp_path: Path, folding: bool) -> None:
    folder = Path(shutil.copytree(originals[folding], tmp_path / "copy"))
    _edit(folder, lambda manifest: manifest.update(val_sha256="0" * 64))
    report = verify(folder)
    assert _found(report) == {(MANIFEST_NAME, None)}
    assert "val_sha256 is 0000" in report.faults[0].what


def test_validation_text_that_cannot_be_decoded(folded: Path) -> None:
    marks = MarkIds.of(open_tokenizer(folded / "tokenizer.model"), "it")
    _put(folded, "val_000001.bin", -1, int(marks.all[0]))
    assert _the(verify(folded), "the validation text cannot be decoded").file == MANIFEST_NAME


@pytest.mark.parametrize(
    ("content", "offset", "what"),
    [
        ('["a", oops]', 6, "is not JSON"),
        ('{"a": 1}', None, "not a JSON list of strings"),
        ("[1, 2]", None, "not a JSON list of strings"),
        ('["a"]', None, "1 sources for 10 validation documents"),
    ],
)
def test_sources_that_are_none(plain: Path, content: str, offset: int | None, what: str) -> None:
    (plain / "val_sources.json").write_text(content)
    _reseal(plain)
    report = verify(plain)
    assert _found(report) == {("val_sources.json", offset)}
    assert what in report.faults[0].what


def test_a_tokenizer_that_is_none(plain: Path) -> None:
    (plain / "tokenizer.model").write_bytes(b"junk")
    _reseal(plain)
    report = verify(plain)
    assert _the(report, "is not a SentencePiece model").file == "tokenizer.model"
    assert set(report.unchecked) == {"the bytes of the tokens", "val_sha256", "val_bytes", "train_bytes"}


def test_a_tokenizer_of_another_size(plain: Path) -> None:
    (plain / "tokenizer.model").write_bytes(train_tokenizer(iter(_texts()), vocab_size=310))
    _reseal(plain)
    assert _the(verify(plain), "310 pieces; the manifest has vocab_size 300").file == "tokenizer.model"


def test_a_tokenizer_without_the_marks_of_case(folded: Path, originals: dict[bool, Path]) -> None:
    shutil.copy(originals[False] / "tokenizer.model", folded)
    _reseal(folded)
    assert _the(verify(folded), "case mark").file == "tokenizer.model"


@pytest.mark.parametrize("name", ["train_000001.bytes", "val_000001.bytes"])
@pytest.mark.parametrize("index", [0, 3, -1])
def test_a_sidecar_that_counts_wrong(folded: Path, name: str, index: int) -> None:
    original = open_shard(folded / name)
    offset = _put(folded, name, index, int(original[index]) + 1)
    report = verify(folded)
    fault = _the(report, "another number of bytes than its token stands for")
    assert (fault.file, fault.offset) == (name, offset)
    assert _the(report, "_bytes is").file == MANIFEST_NAME


def test_an_escape_at_the_end_of_a_shard_counts_in_the_next(folded: Path) -> None:
    """A cut between an escape and its mark must not make the mark worth nothing."""
    tokens = np.concatenate([open_shard(folded / f"train_00000{number}.bin") for number in range(3)])
    original = np.concatenate([open_shard(folded / f"train_00000{number}.bytes") for number in range(3)])
    marks = MarkIds.of(open_tokenizer(folded / "tokenizer.model"), "it")
    cut = int(np.flatnonzero(tokens == marks.escape)[0]) + 1
    assert original[cut] == 3
    for suffix, stream in ((".bin", tokens), (".bytes", original)):
        for number, piece in enumerate((stream[:cut], stream[cut:-9], stream[-9:])):
            write_shard(folded / f"train_00000{number}{suffix}", piece)

    def change(manifest: dict[str, Any]) -> None:
        for number, shard in enumerate(manifest["train"]):
            piece = open_shard(folded / f"train_00000{number}.bin")
            shard.update(tokens=int(piece.size), documents=int(np.count_nonzero(piece == BOS)))

    _edit(folded, change)
    _reseal(folded)
    assert verify(folded).faults == ()


@pytest.mark.parametrize("chunk", [1, 4_000_000])
def test_a_shard_of_escapes_alone_decides_what_the_next_begins_with(
    folded: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Of a row of escapes every second is text itself, however many shards and chunks the row goes through."""
    monkeypatch.setattr(shard_checks, "_CHUNK_TOKENS", chunk)
    encoder = Encoder(EncoderSettings(tokenizer=folded / "tokenizer.model", case_folding=True))
    marks = MarkIds.of(open_tokenizer(folded / "tokenizer.model"), "it")
    for escapes in (1, 2):
        encoded = encoder.encode([*_texts()[:29], "it" + "\uecf3" * escapes + "\uecf0 was"])
        assert encoded.original_bytes is not None
        begin = int(np.flatnonzero(encoded.tokens == marks.escape)[-1 - 2 * escapes])
        cuts = [begin + 1, begin + 1 + escapes]  # all of the middle one are escapes
        for suffix, stream in ((".bin", encoded.tokens), (".bytes", encoded.original_bytes)):
            for number, piece in enumerate(np.split(stream, cuts)):
                write_shard(folded / f"train_00000{number}{suffix}", piece)
        assert set(open_shard(folded / "train_000001.bin").tolist()) == {marks.escape}
        describe(
            folded,
            tokenizer="tokenizer.model",
            train=[f"train_00000{number}.bin" for number in range(3)],
            val=["val_000000.bin", "val_000001.bin"],
            provenance=Provenance(split="the last ten", case_folding=True),
        ).save()
        assert verify(folded).faults == ()


def _replaced(folder: Path, document: int, leak: Tokens) -> int:
    """Replace a train document by other tokens, in all shards and counts; returns the index of its BOS."""
    names = [f"train_00000{number}.bin" for number in range(3)]
    stream = np.concatenate([open_shard(folder / name) for name in names])
    begins = [*np.flatnonzero(stream == BOS).tolist(), stream.size]
    stream = np.concatenate([stream[: begins[document] + 1], leak, stream[begins[document + 1] :]])
    sizes = [open_shard(folder / name).size for name in names[:2]]
    for name, piece in zip(names, np.split(stream, np.cumsum(sizes)), strict=True):
        write_shard(folder / name, piece)

    def change(manifest: dict[str, Any]) -> None:
        for shard in manifest["train"]:
            piece = open_shard(folder / shard["file"])
            shard.update(tokens=int(piece.size), documents=int(np.count_nonzero(piece == BOS)))
        manifest["train_tokens"] = int(stream.size)

    _edit(folder, change)
    _reseal(folder)
    return int(begins[document])


@pytest.mark.parametrize("where", ["first", "across", "last"])
@pytest.mark.parametrize("leaked", [0, 5, 9])
def test_a_training_document_that_is_a_validation_document(plain: Path, where: str, leaked: int) -> None:
    size = open_shard(plain / "train_000000.bin").size
    stream = np.concatenate([open_shard(plain / f"train_00000{number}.bin") for number in range(3)])
    begins = np.flatnonzero(stream == BOS)
    document = {"first": 0, "across": int(np.flatnonzero(begins < size)[-1]), "last": 29}[where]
    val = np.concatenate([open_shard(plain / f"val_00000{number}.bin") for number in range(2)])
    leak = np.split(val, np.flatnonzero(val == BOS))[leaked + 1][1:]
    at = _replaced(plain, document, leak)
    fault = _the(verify(plain), "a training document that is a validation document")
    sizes = [open_shard(plain / f"train_00000{number}.bin").size for number in range(3)]
    shard = next(number for number in range(3) if at < sum(sizes[: number + 1]))
    assert (fault.file, fault.offset) == (f"train_00000{shard}.bin", HEADER_BYTES + 2 * (at - sum(sizes[:shard])))
    assert (where == "across") == (shard == 0 and at + leak.size > sizes[0])


def test_a_document_that_only_begins_like_one_of_validation_is_none(plain: Path) -> None:
    val = open_shard(plain / "val_000000.bin")
    leak = val[1 : np.flatnonzero(val == BOS)[1]]
    _replaced(plain, 4, leak[:-1])
    assert not [fault for fault in verify(plain).faults if "validation document" in fault.what]


def test_all_faults_are_told_at_once(plain: Path) -> None:
    (plain / "val_sources.json").unlink()
    _overwrite(plain / "train_000000.bin", 4, b"\7")
    _overwrite(plain / "train_000001.bin", HEADER_BYTES + 20, b"\xff\xff")
    _overwrite(plain / "train_000001.bin", HEADER_BYTES + 30, b"\x02\x00")
    (plain / "train_000002.bin").write_bytes(b"")
    assert _found(verify(plain)) == {
        ("val_sources.json", None),
        ("train_000000.bin", None),
        ("train_000000.bin", 4),
        ("train_000001.bin", None),
        ("train_000001.bin", HEADER_BYTES + 20),
        ("train_000001.bin", HEADER_BYTES + 30),
        ("train_000002.bin", 0),
    }


def test_a_thousand_like_faults_are_counted(plain: Path) -> None:
    tokens = open_shard(plain / "train_000001.bin").copy()
    tokens[10:510] = 0
    write_shard(plain / "train_000001.bin", tokens)
    pads = [fault for fault in verify(plain).faults if "pad (0)" in fault.what]
    assert [fault.offset for fault in pads[:100]] == [HEADER_BYTES + 2 * index for index in range(10, 110)]
    assert pads[100:] == [
        Fault(file="train_000001.bin", what="400 more: pad (0) inside a document", remedy=pads[0].remedy)
    ]
