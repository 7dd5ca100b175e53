"""Shards to another vocabulary without the text: the tokens that the text gives, and every document proved."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from trainer.data import reencode as reencode_module
from trainer.data.decoding import Decoder, validation_documents
from trainer.data.describing import Provenance, describe
from trainer.data.documents import Document, write_documents
from trainer.data.manifest import DataSet, DataSetError
from trainer.data.prepare import prepare
from trainer.data.prose import gather
from trainer.data.reencode import ReencodingError, reencode
from trainer.data.shards import BOS, write_shard
from trainer.data.splitting import SeededBytes
from trainer.data.tokenizer import EOS, UNK, TokenizerError, open_tokenizer, train_tokenizer

RULE = SeededBytes(val_bytes=5000, seed=7)


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose of the standard library, a paragraph a document, and some documents that are hard to carry over."""
    prose = [document.text for document in gather([Path(logging.__file__).parent], processes=1)]
    hard = ["ﬁ ① ＡＢＣ", "\ue000\uecf0\uecf3 NASA iPod", "漢字 🙂 \x7f ЖЖж", "x", "tabs\t\tand  spaces ", "Öß" * 30]
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    texts = [*hard, *(part for text in prose for part in text.split("\n\n"))]
    write_documents(path, [Document(text=text, src=f"place {number}") for number, text in enumerate(texts)])
    return path


@pytest.fixture(scope="module")
def source(paragraphs: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    out = tmp_path_factory.mktemp("source") / "data"
    return prepare([paragraphs], out, rule=RULE, vocab_size=350, shard_tokens=5000, workers=1).dataset


@pytest.fixture(scope="module")
def larger(paragraphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("larger") / "b.model"
    path.write_bytes(train_tokenizer(_texts(paragraphs), vocab_size=700))
    return path


@pytest.fixture(scope="module")
def folding(paragraphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folding") / "f.model"
    path.write_bytes(train_tokenizer(_texts(paragraphs), vocab_size=400, case_folding=True))
    return path


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_re_encoded_shards_are_those_that_the_text_gives(
    paragraphs: Path, source: DataSet, larger: Path, tmp_path: Path
) -> None:
    from_text = prepare([paragraphs], tmp_path / "text", rule=RULE, tokenizer=larger, shard_tokens=4000, workers=1)
    report = reencode(source, tmp_path / "shards", tokenizer=larger, shard_tokens=4000)
    expected, made = from_text.dataset.manifest, report.dataset.manifest
    assert made == expected
    assert len(made.train) > 3
    assert made.val_sha256 == source.manifest.val_sha256
    assert (made.val_bytes, made.train_bytes) == (source.manifest.val_bytes, source.manifest.train_bytes)
    assert report.documents == source.manifest.documents
    assert report.text_bytes == source.manifest.train_bytes + source.manifest.val_bytes
    assert report.ratio == (made.train_tokens + made.val_tokens + 1) / report.tokens_before < 0.9
    assert DataSet.load(tmp_path / "shards") == report.dataset
    assert not (tmp_path / "shards" / ".unfinished").exists()


def test_case_folding_comes_and_goes_without_the_text(
    paragraphs: Path, source: DataSet, folding: Path, tmp_path: Path
) -> None:
    from_text = prepare(
        [paragraphs], tmp_path / "text", rule=RULE, tokenizer=folding, case_folding=True, shard_tokens=5000, workers=1
    )
    folded = reencode(source, tmp_path / "on", tokenizer=folding, case_folding=True, shard_tokens=5000).dataset
    assert folded.manifest == from_text.dataset.manifest
    assert folded.manifest.val_bytes == source.manifest.val_bytes
    assert folded.manifest.val_sha256 == source.manifest.val_sha256
    again = reencode(
        folded, tmp_path / "off", tokenizer=source.tokenizer_path, case_folding=False, shard_tokens=5000
    ).dataset
    assert again.manifest == source.manifest
    kept = reencode(folded, tmp_path / "kept", tokenizer=folding, shard_tokens=5000).dataset
    assert kept.manifest == folded.manifest


def test_a_vocabulary_is_trained_on_a_seeded_sample_of_train_documents(source: DataSet, tmp_path: Path) -> None:
    made = [
        reencode(source, tmp_path / name, vocab_size=400, seed=seed, sample_bytes=8000, shard_tokens=5000).dataset
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    hashes = [dataset.manifest.tokenizer.sha256 for dataset in made]
    assert hashes[0] == hashes[1] != hashes[2]
    assert made[0].manifest.vocab_size == 400
    decoder = Decoder(source.tokenizer_path, case_folding=False)
    train = list(validation_documents(source.train_shards, decoder))
    sample = list(reencode_module._sample(source, 1, 8000))
    assert set(sample) < {text.decode("utf-8") for text in train}
    assert 4000 < sum(len(text.encode("utf-8")) for text in sample) < 16000


def test_worker_processes_change_nothing(source: DataSet, larger: Path, tmp_path: Path) -> None:
    alone = reencode(source, tmp_path / "alone", tokenizer=larger, workers=1).dataset
    assert reencode(source, tmp_path / "two", tokenizer=larger, workers=2).dataset.manifest == alone.manifest


def test_a_run_that_was_stopped_goes_on(
    source: DataSet, larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reencode_module, "_BATCH_TOKENS", 2000)
    whole = reencode(source, tmp_path / "whole", tokenizer=larger, shard_tokens=3000).dataset

    class PowerCut:
        """A progress whose third batch of train documents is its last."""

        def __init__(self) -> None:
            self.calls = 0

        def stage(self, name: str, *, total: int | None = None, unit: str = "bytes") -> PowerCut:
            self.calls = 0
            return self

        def __enter__(self) -> PowerCut:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def __call__(self, amount: int) -> None:
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt

    arguments = {"tokenizer": larger, "shard_tokens": 3000, "flush_bytes": 1000}
    with pytest.raises(KeyboardInterrupt):
        reencode(source, tmp_path / "cut", **arguments, progress=PowerCut())
    with pytest.raises(DataSetError, match="begun with shard_tokens 3000"):
        reencode(source, tmp_path / "cut", tokenizer=larger, shard_tokens=2000)
    report = reencode(source, tmp_path / "cut", **arguments)
    assert source.manifest.val_documents < report.resumed_documents < report.documents
    assert report.dataset.manifest == whole.manifest
    with pytest.raises(DataSetError, match="already holds a data set"):
        reencode(source, tmp_path / "cut", **arguments)


def with_train_tokens(source: DataSet, folder: Path, *shards: list[int]) -> DataSet:
    """The source with other train shards."""
    folder.mkdir()
    for path in (source.tokenizer_path, *source.val_shards):
        (folder / path.name).write_bytes(path.read_bytes())
    names = [f"train_{number:06d}.bin" for number in range(len(shards))]
    for name, tokens in zip(names, shards, strict=True):
        write_shard(folder / name, np.array(tokens, dtype=np.uint16))
    val = [path.name for path in source.val_shards]
    provenance = Provenance(split="x")
    dataset = describe(folder, tokenizer=source.tokenizer_path.name, train=names, val=val, provenance=provenance)
    dataset.save()
    return dataset


def pieces(source: DataSet, *names: str) -> list[int]:
    return [open_tokenizer(source.tokenizer_path).piece_to_id(name) for name in names]


def test_what_cannot_be_carried_over_names_shard_and_token(source: DataSet, larger: Path, tmp_path: Path) -> None:
    letters = pieces(source, "a", "b")
    unknown = with_train_tokens(source, tmp_path / "unknown", [BOS, *letters], [*letters, BOS, *letters, UNK])
    with pytest.raises(
        ReencodingError, match=r"train_000001.bin: the document at token 3 \(offset 1030\).*its token 2"
    ):
        reencode(unknown, tmp_path / "a", tokenizer=larger)
    with pytest.raises(ReencodingError, match=r"train_000001.bin: the document at token 3"):
        reencode(unknown, tmp_path / "sampled", vocab_size=400)
    cut_short = with_train_tokens(source, tmp_path / "cut", [BOS, *letters, BOS, *letters, *pieces(source, "<0xE6>")])
    with pytest.raises(ReencodingError, match=r"train_000000.bin: the document at token 4 .*no UTF-8 at byte 2"):
        reencode(cut_short, tmp_path / "b", tokenizer=larger)
    spelled = pieces(source, "<0xE2>", "<0x96>", "<0x81>")
    block = with_train_tokens(source, tmp_path / "block", [BOS, *letters, *spelled])
    with pytest.raises(ReencodingError, match=r"document at token 1 .*does not survive"):
        reencode(block, tmp_path / "c", tokenizer=larger)


def test_documents_over_several_shards_and_tokens_without_text(source: DataSet, larger: Path, tmp_path: Path) -> None:
    letters = pieces(source, "a", "b")
    odd = with_train_tokens(source, tmp_path / "odd", [*letters], [*letters, EOS, BOS, BOS], [*letters, BOS])
    report = reencode(odd, tmp_path / "out", tokenizer=larger)
    decoder = Decoder(larger, case_folding=False)
    assert list(validation_documents(report.dataset.train_shards, decoder)) == [b"abab", b"", b"ab", b""]
    assert report.documents == 4 + source.manifest.val_documents


def test_a_manifest_that_names_another_validation_text_is_refused(
    source: DataSet, larger: Path, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(source, manifest=source.manifest.model_copy(update={"val_sha256": "0" * 64}))
    with pytest.raises(DataSetError, match="validation text that its shards do not hold"):
        reencode(wrong, tmp_path / "out", tokenizer=larger)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_arguments_that_do_not_fit_leave_nothing_behind(source: DataSet, larger: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="case mark"):
        reencode(source, tmp_path / "out", tokenizer=larger, case_folding=True)
    with pytest.raises(ValueError, match="exactly one"):
        reencode(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_validation_sources_come_along(source: DataSet, larger: Path, tmp_path: Path) -> None:
    report = reencode(source, tmp_path / "out", tokenizer=larger)
    entry = report.dataset.manifest.val_sources
    assert entry is not None
    sources = json.loads((tmp_path / "out" / entry.file).read_bytes())
    assert len(sources) == report.dataset.manifest.val_documents
    assert all(name.startswith("place ") for name in sources)
