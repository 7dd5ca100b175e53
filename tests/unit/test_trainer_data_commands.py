"""The data verbs as a user meets them: what they print, what they leave, and how bad input ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from trainer.__main__ import app
from trainer.data.documents import Document, write_documents
from trainer.data.manifest import DataSet
from trainer.data.shards import HEADER_BYTES

WORDS = ["The", "reader", "of", "this", "module", "is", "told", "what", "it", "does", "and", "WHY", "so"]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *(str(argument) for argument in arguments)])


def _ok(*arguments: object) -> str:
    done = _run(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in `a.jsonl`, tokenizers in `tok`, and a data set of 300 pieces in `d`."""
    folder = tmp_path_factory.mktemp("commands")
    rng = np.random.default_rng(0)
    write_documents(
        folder / "a.jsonl", (Document(text=" ".join(rng.choice(WORDS, 40)) + f" {i}", src="s") for i in range(90))
    )
    said = _ok(
        *("tokenizer", folder / "a.jsonl", "--out", folder / "tok", "--val-documents", 9),
        *("--vocab-size", 300, "--vocab-size", 310),
    )
    assert re.search(r"sp300\.model: [\d.]+ bytes per token on 9 validation documents, [\d.]+% of the tokens", said)
    assert sorted(path.name for path in (folder / "tok").iterdir()) == ["sp300.model", "sp310.model"]
    _ok("prepare", folder / "a.jsonl", "--out", folder / "d", "--vocab-size", 300, "--val-documents", 9)
    return folder


def test_the_tokenizer_is_the_one_that_prepare_trains(folder: Path) -> None:
    assert (folder / "tok" / "sp300.model").read_bytes() == (folder / "d" / "tokenizer.model").read_bytes()


def test_tokenizer_reports_for_programs(folder: Path, tmp_path: Path) -> None:
    said = _ok(
        *("tokenizer", folder / "a.jsonl", "--out", tmp_path / "t", "--val-first", 5, "--vocab-size", 300),
        *("--case-folding", "--json"),
    )
    report = json.loads(said)["sp300_folded.model"]
    assert report["documents"] == 5
    assert report["mark_share"] > 0
    assert report["bytes_per_token"] == pytest.approx(report["bytes"] / report["tokens"])


def test_encode_prints_its_rate_beside_sentencepiece(folder: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", folder / "tok" / "sp310.model", "--val-documents", 9, "--rate")
    said = _ok("encode", folder / "a.jsonl", "--out", tmp_path / "e", *options)
    assert re.search(r"SentencePiece alone, all cores, text in memory: [\d.]+ MB/s into lists \(ratio [\d.]+\)", said)
    assert DataSet.load(tmp_path / "e").manifest.vocab_size == 310


def test_reencode_tells_the_ratio_and_keeps_the_text(folder: Path, tmp_path: Path) -> None:
    said = _ok("reencode", folder / "d", "--out", tmp_path / "r", "--tokenizer", folder / "tok" / "sp310.model")
    old, new = DataSet.load(folder / "d").manifest, DataSet.load(tmp_path / "r").manifest
    assert new.val_sha256 == old.val_sha256 in said
    tokens = re.search(r"(\d+) -> (\d+) tokens, ([\d.]+) new for each old one, ([\d.]+)x fewer", " ".join(said.split()))
    assert tokens is not None
    assert int(tokens[2]) == new.train_tokens + new.val_tokens + 1
    assert float(tokens[3]) == pytest.approx(int(tokens[2]) / int(tokens[1]), abs=1e-4)
    assert "re-encoded 90 documents, every one with equal bytes" in " ".join(said.split())


def test_shards_without_a_manifest_are_adopted(folder: Path, tmp_path: Path) -> None:
    for name in ("train_000000.bin", "val_000000.bin"):
        (tmp_path / f"fineweb_{name}").write_bytes((folder / "d" / name).read_bytes())
    _ok("adopt", tmp_path, "--tokenizer", folder / "d" / "tokenizer.model", "--split", "as published")
    adopted, made = DataSet.load(tmp_path).manifest, DataSet.load(folder / "d").manifest
    assert (adopted.val_sha256, adopted.train_bytes) == (made.val_sha256, made.train_bytes)
    assert adopted.split == "as published"


def test_verify_ends_well_or_names_file_and_offset(folder: Path, tmp_path: Path) -> None:
    assert "0 faults in 5 files, 81 train and 9 validation documents" in _ok("verify", folder / "d")
    for file in (folder / "d").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train_000000.bin"
    data = bytearray(shard.read_bytes())
    data[HEADER_BYTES + 20 : HEADER_BYTES + 22] = b"\xff\xff"
    shard.write_bytes(data)
    done = _run("verify", tmp_path)
    assert done.exit_code == 2
    assert re.search(
        rf"fault: train_000000\.bin, offset {HEADER_BYTES + 20}: a token outside the vocab.*; ", done.output
    )
    for_programs = _run("verify", tmp_path, "--json")
    assert for_programs.exit_code == 2
    assert {fault["file"] for fault in json.loads(for_programs.output)["faults"]} == {"train_000000.bin"}


def test_info_prints_the_manifest(folder: Path) -> None:
    said = _ok("info", folder / "d")
    facts = json.loads(said[: said.rindex("}") + 1])
    assert facts["val_documents"] == 9
    assert f"{facts['val_bytes'] / facts['val_tokens']:.4f} bytes per token" in said


@pytest.mark.parametrize("options", [[], ["--val-first", 3, "--val-bytes", 100]])
def test_validation_is_chosen_in_one_way(folder: Path, tmp_path: Path, options: list[object]) -> None:
    done = _run("prepare", folder / "a.jsonl", "--out", tmp_path / "x", "--vocab-size", 300, *options)
    assert done.exit_code == 2
    assert "exactly one of --val-bytes, --val-documents, --val-first and --val-file" in " ".join(done.output.split())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": "b\xff"}\n', r"a\.jsonl, line 2.*offset 28"),
        ("a.txt", b"fine\nb\xe4d\n", r"a\.txt.*offset 6"),
        ("a.jsonl", b'{"text": "fine"}\n{"txt": "b"}\n', r"a\.jsonl, line 2.*\"text\""),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz"),
        ("a.csv", b"a,b\n", r"a\.csv.*\.parquet"),
        ("a.jsonl", b"", r"leave nothing for|no documents|nothing"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    done = _run("prepare", tmp_path / name, "--out", tmp_path / "x", "--vocab-size", 300, "--val-documents", 1)
    assert done.exit_code == 2
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert "Traceback" not in done.output
    assert not list((tmp_path / "x").glob("*.bin"))


def test_exactly_one_tokenizer_to_reencode_with(folder: Path, tmp_path: Path) -> None:
    done = _run("reencode", folder / "d", "--out", tmp_path / "x")
    assert done.exit_code == 2
    assert "exactly one of --tokenizer and --vocab-size" in " ".join(done.output.split())
