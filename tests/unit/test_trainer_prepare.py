"""From documents to a data set: what comes out, what is refused, and what an interrupted call leaves to do."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from odd_tokenizers import bpe_model
from trainer.data import prepare as preparing
from trainer.data.decoding import Decoder, documents_in, validation_documents
from trainer.data.documents import Document, DocumentError, RawDocuments, TextRule, write_documents
from trainer.data.encoding import Encoded
from trainer.data.encoding_rate import Spread, bare_rate
from trainer.data.manifest import DataSet, DataSetError
from trainer.data.prepare import PrepareReport, prepare
from trainer.data.progress import Lines
from trainer.data.shard_stream import UNFINISHED, ShardStream
from trainer.data.shards import open_shard
from trainer.data.splitting import FirstDocuments, OwnFile, SeededBytes, SeededDocuments, SplitRule
from trainer.data.tokenizer import TokenizerError
from trainer.data.verification import verify
from trainer.durable import sha256_of
from trainer.errors import InputError

WORDS = tuple("the reader of this module is told what it does and why it is that way in few words".split())  # noqa: SIM905
RULE = SeededBytes(val_bytes=2000, seed=5)


def _texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 60)) + f" {number} ü" for number in range(count)]


def _decoded(dataset: DataSet, split: str) -> list[str]:
    decoder = Decoder(dataset.tokenizer_path, case_folding=dataset.manifest.case_folding)
    shards = dataset.train_shards if split == "train" else dataset.val_shards
    return [decoder.decode(tokens).decode() for tokens in documents_in(map(open_shard, shards))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> PrepareReport:
    folder = tmp_path_factory.mktemp("prepared")
    write_documents(folder / "a.jsonl", (Document(text=text, src=text[-5:]) for text in _texts(120)))
    return prepare([folder / "a.jsonl"], folder / "data", vocab_size=320, rule=RULE, shard_tokens=2000)


@pytest.fixture(scope="module")
def dataset(report: PrepareReport) -> DataSet:
    return report.dataset


@pytest.fixture(scope="module")
def source(dataset: DataSet) -> Path:
    return dataset.path.parent / "a.jsonl"


def test_prepare_makes_a_data_set_of_every_document(report: PrepareReport, source: Path) -> None:
    loaded = DataSet.load(report.dataset.path)
    assert loaded == report.dataset
    manifest = loaded.manifest
    assert len(manifest.train) > 1
    train, val = _decoded(loaded, "train"), _decoded(loaded, "val")
    texts = _texts(120)
    assert sorted([*train, *val]) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in the order of the input
    assert 1900 - 400 < sum(len(text.encode()) for text in val) <= 2000
    assert manifest.val_sources is not None
    sources = json.loads((loaded.path / manifest.val_sources.file).read_text())
    assert sources == [text[-5:] for text in val]
    (entry,) = manifest.inputs
    assert (entry.name, entry.bytes, entry.documents) == ("a.jsonl", source.stat().st_size, 120)
    assert (entry.sha256, manifest.split, manifest.duplicates) == (sha256_of(source), RULE.words, 0)
    assert not (loaded.path / UNFINISHED).exists()


def test_the_report_counts_what_was_encoded(report: PrepareReport) -> None:
    manifest = report.dataset.manifest
    assert report.documents == manifest.documents == 120
    assert report.tokens == manifest.train_tokens + manifest.val_tokens + 1
    assert report.text_bytes == sum(len(text.encode()) for text in _texts(120))
    stages = ["index", "split", "draw", "tokenizer", "encode", "describe"]
    assert list(report.stage_seconds) == stages
    assert report.encode_bytes_per_second == pytest.approx(report.text_bytes / report.encode_seconds)
    assert report.bare is None


def test_the_bytes_do_not_depend_on_the_workers_or_the_compression(dataset: DataSet, tmp_path: Path) -> None:
    texts = [json.dumps({"text": text, "src": text[-5:]}) for text in _texts(120)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    again = prepare(
        [tmp_path / "a.jsonl.gz"], tmp_path / "data", vocab_size=320, rule=RULE, shard_tokens=2000, workers=2
    ).dataset
    same = {"inputs": ()}
    assert again.manifest.model_copy(update=same) == dataset.manifest.model_copy(update=same)


def test_a_finished_data_set_is_never_overwritten(dataset: DataSet, source: Path) -> None:
    with pytest.raises(DataSetError, match="already holds"):
        prepare([source], dataset.path, vocab_size=320, rule=RULE)
    assert DataSet.load(dataset.path) == dataset


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize(
    "rule", [FirstDocuments(count=12), SeededDocuments(count=12), SeededBytes(val_bytes=4000), "own file"]
)
def test_validation_shares_no_text_with_training(
    dataset: DataSet, tmp_path: Path, rule: SplitRule | str, dedup: bool
) -> None:
    texts = _texts(60)
    own = tmp_path / "own.jsonl"
    write_documents(own, map(_document, [*texts[:9], "", *texts[5:12]]))
    write_documents(tmp_path / "a.jsonl", map(_document, [*texts[:40], *texts[10:50], ""]))
    write_documents(tmp_path / "b.jsonl", map(_document, texts))
    chosen = OwnFile(paths=(own,)) if isinstance(rule, str) else rule
    made = prepare(
        [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
        tmp_path / "data",
        tokenizer=dataset.tokenizer_path,
        rule=chosen,
        dedup=dedup,
    ).dataset
    train, val = _decoded(made, "train"), _decoded(made, "val")
    assert set(train) | set(val) == set(texts)
    assert not set(train) & set(val)
    assert (len(set(train)) == len(train)) == dedup
    if isinstance(rule, str):
        assert val == (texts[:12] if dedup else [*texts[:9], *texts[5:12]])
    if isinstance(rule, FirstDocuments):
        assert val == texts[:12]
    given = 140 + 16 * isinstance(rule, str)
    assert made.manifest.duplicates == given - len(train) - len(val)
    assert sum(entry.documents for entry in made.manifest.inputs) == given


def _document(text: str) -> Document:
    return Document(text=text)


def test_text_files_are_cut_and_small_ones_share_a_task(dataset: DataSet, tmp_path: Path) -> None:
    texts = _texts(30)
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    (tmp_path / "one.txt").write_text("<|endoftext|>".join(texts))
    tokenizer, rule = dataset.tokenizer_path, SeededDocuments(count=5)
    whole = prepare(sorted(tmp_path.glob("[0-9]*.txt")), tmp_path / "w", tokenizer=tokenizer, rule=rule).dataset
    cut = prepare(
        [tmp_path / "one.txt"],
        tmp_path / "c",
        tokenizer=tokenizer,
        rule=rule,
        text_rule=TextRule.parse("<|endoftext|>"),
    ).dataset
    assert whole.manifest.train == cut.manifest.train
    assert whole.manifest.val_sha256 == cut.manifest.val_sha256
    assert json.loads((whole.path / "val_sources.json").read_text())[0].endswith(".txt")
    assert set(json.loads((cut.path / "val_sources.json").read_text())) == {"one.txt"}


def test_case_folding_leaves_the_text_as_it_was(tmp_path: Path) -> None:
    texts = [text.title() if number % 2 else text for number, text in enumerate(_texts(80))]
    write_documents(tmp_path / "a.jsonl", map(_document, texts))
    rule = SeededDocuments(count=9)
    sets = [
        prepare([tmp_path / "a.jsonl"], tmp_path / str(fold), vocab_size=330, rule=rule, case_folding=fold).dataset
        for fold in (True, False)
    ]
    assert sets[0].manifest.val_sha256 == sets[1].manifest.val_sha256
    assert sets[0].manifest.val_bytes == sets[1].manifest.val_bytes
    assert sets[0].val_original_bytes
    assert _decoded(sets[0], "train") == _decoded(sets[1], "train")
    tokenizer = sets[1].tokenizer_path
    with pytest.raises(TokenizerError, match="mark"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "x", tokenizer=tokenizer, rule=rule, case_folding=True)
    assert not (tmp_path / "x").exists()


class _KilledError(Exception):
    """Stands for the end of the process."""


def _die(*_: object, **__: object) -> None:
    raise _KilledError


def _die_in_train(patch: pytest.MonkeyPatch) -> None:
    append, counts = ShardStream.append, {"train": 0}

    def dying(self: ShardStream, encoded: Encoded) -> None:
        counts["train"] += self._name == "train"
        if counts["train"] == 3:
            raise _KilledError
        append(self, encoded)

    patch.setattr(ShardStream, "append", dying)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "split": lambda patch: patch.setattr("trainer.data.corpus.split_documents", _die),
    "draw": lambda patch: patch.setattr("trainer.data.corpus._drawn", _die),
    "tokenizer": lambda patch: patch.setattr(preparing, "train_tokenizer", _die),
    "encode train": _die_in_train,
    "describe": lambda patch: patch.setattr(preparing, "describe", _die),
    "end": lambda patch: patch.setattr(preparing, "remove_unfinished", _die),
}


def test_a_killed_call_goes_on_with_the_stage_it_was_in(
    dataset: DataSet, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.document_files.BLOCK_BYTES", 4000)
    monkeypatch.setattr("trainer.data.indexing.BLOCK_BYTES", 4000)

    def call() -> PrepareReport:
        return prepare([source], tmp_path / "data", vocab_size=320, rule=RULE, shard_tokens=2000, flush_bytes=1)

    for stage, kill in KILLS.items():
        with monkeypatch.context() as patch:
            kill(patch)
            with pytest.raises(_KilledError):
                call()
        if stage == "end":
            break
        assert not (tmp_path / "data" / "manifest.json").exists()
    assert DataSet.load(tmp_path / "data").manifest == dataset.manifest
    with pytest.raises(DataSetError, match="already holds"):
        call()
    assert not (tmp_path / "data" / UNFINISHED).exists()


def test_going_on_does_only_what_is_left(
    source: Path, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.document_files.BLOCK_BYTES", 4000)
    monkeypatch.setattr("trainer.data.indexing.BLOCK_BYTES", 4000)
    tokenizer = dataset.tokenizer_path
    with monkeypatch.context() as patch:
        _die_in_train(patch)
        with pytest.raises(_KilledError):
            prepare([source], tmp_path / "data", tokenizer=tokenizer, rule=RULE, shard_tokens=2000, flush_bytes=1)
    journal = json.loads((tmp_path / "data" / UNFINISHED / "train.journal.json").read_text())
    assert journal["documents"] > 10
    said: list[str] = []
    report = prepare(
        [source], tmp_path / "data", tokenizer=tokenizer, rule=RULE, shard_tokens=2000, progress=Lines(said.append)
    )
    assert list(report.stage_seconds) == ["encode", "describe"]
    assert [line.split(":")[0] for line in said] == list(report.stage_seconds)
    assert report.documents == report.dataset.manifest.train_documents - journal["documents"]
    assert report.dataset.manifest == dataset.manifest


def test_other_arguments_and_changed_inputs_are_not_mixed(
    dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "data"
    write_documents(source, map(_document, _texts(50)))
    tokenizer = dataset.tokenizer_path
    with monkeypatch.context() as patch:
        KILLS["draw"](patch)
        with pytest.raises(_KilledError):
            prepare([source], out, tokenizer=tokenizer, rule=RULE)
    with pytest.raises(DataSetError, match=r"begun with dedup True instead of False.*or remove"):
        prepare([source], out, tokenizer=tokenizer, rule=RULE, dedup=False)
    with pytest.raises(DataSetError, match="begun with rule"):
        prepare([source], out, tokenizer=tokenizer, rule=FirstDocuments(count=3))
    with pytest.raises(DataSetError, match="begun with other inputs"):
        prepare([source, source], out, tokenizer=tokenizer, rule=RULE)
    write_documents(source, map(_document, _texts(51)))
    with pytest.raises(DataSetError, match="changed since"):
        prepare([source], out, tokenizer=tokenizer, rule=RULE)


def test_a_refused_input_that_was_repaired_is_taken(dataset: DataSet, tmp_path: Path) -> None:
    source, out = tmp_path / os.fsdecode(b"caf\xe9.jsonl"), tmp_path / "data"
    source.write_text("not JSON\n")
    with pytest.raises(DocumentError, match="line 1"):
        prepare([source], out, tokenizer=dataset.tokenizer_path, rule=RULE)
    write_documents(source, map(_document, _texts(50)))
    prepare([source], out, tokenizer=dataset.tokenizer_path, rule=RULE)
    assert DataSet.load(out).manifest.inputs[0].name == "caf\ufffd.jsonl"


def test_an_input_that_changes_meanwhile_is_noticed(
    dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.jsonl"
    real = preparing.draw
    for fewer, message in ((40, "lost documents"), (60, "has changed since")):
        write_documents(source, map(_document, _texts(50)))

        def draw(*arguments: object, count: int = fewer, **named: object) -> bool:
            done = real(*arguments, **named)  # type: ignore[arg-type]
            write_documents(source, map(_document, _texts(count)))
            return done

        monkeypatch.setattr(preparing, "draw", draw)
        with pytest.raises(InputError, match=message):
            prepare([source], tmp_path / message, tokenizer=dataset.tokenizer_path, rule=RULE)
        assert not (tmp_path / message / "manifest.json").exists()


def test_two_calls_at_once_are_refused(
    source: Path, dataset: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = dataset.tokenizer_path
    said: list[str] = []

    def second(line: str) -> None:
        with pytest.raises(DataSetError, match="another process"):
            prepare([source], tmp_path / "data", tokenizer=tokenizer, rule=RULE)
        said.append(line)

    prepare([source], tmp_path / "data", tokenizer=tokenizer, rule=RULE, progress=Lines(second))
    assert [line.split(":")[0] for line in said][:2] == ["index", "split"]
    assert len(said) == 6


def test_files_that_are_there_already_are_left_alone(source: Path, dataset: DataSet, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "val_sources.json", "train_000000.bin"):
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text("somebody's")
        with pytest.raises(DataSetError, match=f"{name} is there already"):
            prepare([source], out, tokenizer=dataset.tokenizer_path, rule=RULE)
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == "somebody's"
    out = tmp_path / "tokenizer"
    (out / "tokenizer.model").write_bytes(dataset.tokenizer_path.read_bytes())
    made = prepare([source], out, tokenizer=out / "tokenizer.model", rule=RULE, shard_tokens=2000).dataset
    assert made.manifest == dataset.manifest


def test_what_cannot_be_made_is_told_before_anything_is_written(dataset: DataSet, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    write_documents(source, map(_document, _texts(5)))
    (tmp_path / "a.csv").write_text("text\n")
    tokenizer, out = dataset.tokenizer_path, tmp_path / "data"
    with pytest.raises(DocumentError, match=r"a\.csv"):
        prepare([source, tmp_path / "a.csv"], out, tokenizer=tokenizer, rule=RULE)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        prepare([source, tmp_path / "absent.jsonl"], out, tokenizer=tokenizer, rule=RULE)
    with pytest.raises(TokenizerError, match=r"a\.csv"):
        prepare([source], out, tokenizer=tmp_path / "a.csv", rule=RULE)
    with pytest.raises(InputError, match="--max-document-bytes"):
        prepare([source], out, tokenizer=tokenizer, rule=RULE, max_document_bytes=0)
    for arguments in ({}, {"tokenizer": tokenizer, "vocab_size": 300}):
        with pytest.raises(ValueError, match="exactly one"):
            prepare([source], out, rule=RULE, **arguments)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, what in (("pipe.jsonl", "a pipe"), ("folder.jsonl", "a directory")):
        with pytest.raises(DataSetError, match=f"{name} is {what}.*regular files"):
            prepare([source, tmp_path / name], out, tokenizer=tokenizer, rule=RULE)
    assert not out.exists()
    for impossible in (SeededBytes(val_bytes=3), SeededDocuments(count=5), FirstDocuments(count=9)):
        with pytest.raises(DocumentError, match=f"leave nothing for .*{impossible.option}"):
            prepare([source], tmp_path / impossible.words[:9], tokenizer=tokenizer, rule=impossible)


def test_the_rate_is_measured_beside_sentencepiece_alone(source: Path, dataset: DataSet, tmp_path: Path) -> None:
    report = prepare([source], tmp_path / "d", tokenizer=dataset.tokenizer_path, rule=RULE, measure_bare_rate=True)
    assert report.bare is not None
    assert min(report.bare.lists, report.bare.arrays) > 0
    assert bare_rate(dataset.tokenizer_path, _texts(3), threads=1).lists > 0


def test_the_text_for_the_rate_is_spread_over_the_input() -> None:
    batches = [
        RawDocuments(file="f", form="text", payloads=[b"%05d" % i * 20], lines=[i], offsets=[0]) for i in range(1000)
    ]
    spread = Spread(100_000, sample_bytes=5_000)
    assert list(spread.through(batches)) == batches
    kept = [int(text[:5]) for text in spread.texts()]
    assert 50 <= len(kept) <= 51
    assert all(15 <= b - a <= 25 for a, b in pairwise(kept))


def test_the_validation_hash_is_that_of_the_text(dataset: DataSet) -> None:
    decoder = Decoder(dataset.tokenizer_path, case_folding=False)
    texts = [text.decode() for text in validation_documents(dataset.val_shards, decoder)]
    assert texts == _decoded(dataset, "val")


def test_a_changed_data_set_is_refused(dataset: DataSet, tmp_path: Path) -> None:
    def copy() -> Path:
        for file in dataset.path.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    for scored in (dataset.manifest.val[0].file, dataset.manifest.tokenizer.file):
        flip(copy() / scored)
        with pytest.raises(DataSetError, match=f"{scored} has changed"):
            DataSet.load(tmp_path)
    (copy() / dataset.manifest.train[0].file).unlink()
    with pytest.raises(DataSetError, match="is missing"):
        DataSet.load(tmp_path)
    (copy() / "manifest.json").write_text(dataset.manifest.model_dump_json().replace("train_000000", "../train"))
    with pytest.raises(DataSetError, match="plain file name"):
        DataSet.load(tmp_path)


def test_texts_that_normalise_to_the_same_are_the_same(tmp_path: Path, dataset: DataSet) -> None:
    texts = [f"document {number} about things" for number in range(30)]
    odd = ["  ", "\u200b", "", *(text.replace(" ", "  ") + "\n" for text in texts)]
    odd += ["\u2581", *("\u2581" + text.replace(" ", "\u2581", 2) for text in texts)]
    write_documents(tmp_path / "a.jsonl", (Document(text=text) for text in [*odd, *texts]))
    for dedup in (True, False):
        out = tmp_path / f"dedup-{dedup}"
        rule = SeededDocuments(count=6)
        made = prepare([tmp_path / "a.jsonl"], out, tokenizer=dataset.tokenizer_path, rule=rule, dedup=dedup).dataset
        assert made.manifest.inputs[0].documents == 90
        assert verify(out).faults == ()
        sides = [set(_decoded(made, side)) for side in ("train", "val")]
        assert sides[0] | sides[1] == set(texts)
        assert not sides[0] & sides[1]
        assert made.manifest.documents == 90 - made.manifest.duplicates
        assert (made.manifest.duplicates == 60) == dedup


def test_texts_are_the_same_as_the_given_tokenizer_sees_them(tmp_path: Path) -> None:
    words = [f"{word} {number}" for word in ("Reader", "Module", "THE") for number in range(40)]
    model = bpe_model(
        words * 3, 300, normalization_rule_name="nmt_nfkc_cf", required_chars="\u2581", hard_vocab_limit=False
    )
    (tmp_path / "folding.model").write_bytes(model)
    texts = [text for word in words for text in (word, word.lower(), word.upper())]
    write_documents(tmp_path / "a.jsonl", (Document(text=text) for text in texts))
    rule = SeededDocuments(count=40)
    made = prepare([tmp_path / "a.jsonl"], tmp_path / "d", tokenizer=tmp_path / "folding.model", rule=rule).dataset
    assert made.manifest.documents == len(words)
    assert verify(made.path).faults == ()
