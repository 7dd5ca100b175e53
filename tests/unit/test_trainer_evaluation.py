"""Bits per byte against a slow reference that decodes the text and counts."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from trainer.data.documents import Document, write_documents
from trainer.data.manifest import DataSet, DataSetError
from trainer.data.shards import open_shard
from trainer.data.verbs import prepare
from trainer.errors import InputError
from trainer.evaluation import ValidationStream, evaluate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("evaluation")
    words = ["the", "cat", "sat", "on", "it", "for", "naïve", "漢字", "12", "a"]
    rng = np.random.default_rng(0)
    write_documents(folder / "a.jsonl", (Document(text=" ".join(rng.choice(words, 30)) + f" {i}") for i in range(80)))
    return prepare([folder / "a.jsonl"], folder / "data", vocab_size=300, val_bytes=1500, seed=1, shard_tokens=200)


def _nats(previous: Tensor, targets: Tensor) -> Tensor:
    """A loss that depends on where it is asked, so that a shift, a repeat or a dropped tail shows."""
    return ((previous * 31 + targets * 17) % 97).to(torch.float32) / 10 + 0.1


def _reference(dataset: DataSet) -> tuple[float, int, int]:
    tokenizer = SentencePieceProcessor(model_proto=dataset.tokenizer_path.read_bytes())
    stream = [int(token) for path in dataset.val_shards for token in open_shard(path)]
    nats = math.fsum(float(_nats(torch.tensor(a), torch.tensor(b))) for a, b in pairwise(stream))
    documents: list[list[int]] = []
    for token in stream:
        if token == 1:
            documents.append([])
        else:
            documents[-1].append(token)
    counted = sum(len(tokenizer.decode(document).encode("utf-8")) for document in documents)
    return nats, counted, len(stream) - 1


@pytest.mark.parametrize(("seq_len", "batch_tokens"), [(1, 1), (7, 21), (16, 64), (64, 10), (10_000, 1 << 20)])
def test_scores_every_token_once_whatever_the_window(dataset: DataSet, seq_len: int, batch_tokens: int) -> None:
    shapes = set()

    def token_losses(inputs: Tensor, targets: Tensor) -> Tensor:
        shapes.add(tuple(inputs.shape))
        assert inputs.dtype == targets.dtype == torch.int64
        return _nats(inputs, targets)

    assert len(dataset.val_shards) > 1
    score = evaluate(
        token_losses, ValidationStream.load(dataset), seq_len=seq_len, batch_tokens=batch_tokens, device="cpu"
    )
    nats, counted, tokens = _reference(dataset)
    assert (score.bytes, score.tokens) == (counted, tokens)
    assert score.loss == pytest.approx(nats / tokens, abs=1e-9, rel=1e-9)
    assert score.bpb == pytest.approx(nats / math.log(2) / counted, abs=1e-9, rel=1e-9)
    assert len(shapes) == 1


def test_a_model_that_knows_nothing_scores_log_vocabulary(dataset: DataSet) -> None:
    vocab_size = dataset.manifest.vocab_size
    uniform = math.log(vocab_size)
    score = evaluate(
        lambda inputs, _: torch.full(inputs.shape, uniform, dtype=torch.float64),
        ValidationStream.load(dataset),
        seq_len=32,
        batch_tokens=256,
        device="cpu",
    )
    assert score.loss == pytest.approx(uniform, rel=1e-12)
    assert score.bpb == pytest.approx(math.log2(vocab_size) / dataset.manifest.bytes_per_token, rel=1e-12)


def test_a_loss_that_is_not_finite_is_an_error(dataset: DataSet) -> None:
    validation = ValidationStream.load(dataset)
    with pytest.raises(InputError, match="validation loss is nan"):
        evaluate(
            lambda inputs, _: torch.full(inputs.shape, math.nan), validation, seq_len=8, batch_tokens=64, device="cpu"
        )


def test_a_manifest_that_counts_otherwise_is_an_error(dataset: DataSet) -> None:
    manifest = dataset.manifest.model_copy(update={"val_bytes": dataset.manifest.val_bytes + 1})
    with pytest.raises(DataSetError, match="validation stream"):
        ValidationStream.load(DataSet(path=dataset.path, manifest=manifest))
