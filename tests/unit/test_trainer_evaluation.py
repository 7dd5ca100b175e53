"""Bits per byte against a slow reference that decodes the text and counts."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from small_data_set import make_data_set, make_model
from trainer import evaluation
from trainer.data.byte_table import ByteTable
from trainer.data.decoding import Decoder, validation_documents
from trainer.data.manifest import DataSet, DataSetError
from trainer.data.shards import Tokens, open_shard, write_shard
from trainer.errors import InputError
from trainer.evaluation import ScoredBatch, ValidationStream, evaluate, score
from trainer.evaluation_windows import plain, sliding
from trainer.model.gpt import GPT


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_data_set(tmp_path_factory.mktemp("evaluation") / "data")


@pytest.fixture(scope="module")
def model(dataset: DataSet) -> GPT:
    return make_model(dataset.path / "model.pt", dataset)


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


def _stream(tokens: Tokens) -> ValidationStream:
    """Each token one byte."""
    size = np.ones(tokens.size - 1, dtype=np.uint16)
    return ValidationStream(tokens=tokens, bytes=size.size, target_bytes=size)


def _last(losses: Callable[[Tensor, Tensor], Tensor]) -> evaluation.TokenLosses:
    return lambda inputs, targets, scored: losses(inputs, targets)[:, -scored:]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(1, 40), st.data(), st.integers(1, 300))
def test_sliding_windows_score_what_they_say(tokens: int, context: int, data: st.DataObject, batch: int) -> None:
    stride = data.draw(st.integers(1, context))
    stream = np.random.default_rng(tokens).integers(0, 300, tokens).astype(np.uint16)
    expected = math.fsum(float(_nats(torch.tensor(int(a)), torch.tensor(int(b)))) for a, b in pairwise(stream))
    plan = sliding(tokens - 1, context=context, stride=stride)
    shapes: set[tuple[int, ...]] = set()
    seen: list[int] = []
    numbers: list[int] = []

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        shapes.add(tuple(inputs.shape))
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        return _nats(inputs, targets)

    def observe(scored: ScoredBatch) -> None:
        assert scored.number == len(numbers)
        numbers.append(scored.batches)
        at = scored.positions[scored.valid].numpy()
        previous, targets = (torch.from_numpy(stream[at + k].astype(np.int64)) for k in (0, 1))
        assert torch.equal(scored.losses[scored.valid], _nats(previous, targets))
        seen.extend(at.tolist())

    found = score(plan, _last(losses), _stream(stream), batch_tokens=batch, device="cpu", on_scored=[observe])
    assert seen == list(range(tokens - 1))
    assert set(numbers) == {len(numbers)}
    assert found.loss * found.tokens == pytest.approx(expected, rel=1e-9)
    assert len(shapes) <= 2
    assert all(rows * width <= max(batch, width) for rows, width in shapes)


def test_the_reduction_agrees_to_1e9_whatever_the_batch() -> None:
    stream = np.random.default_rng(0).integers(0, 300, 20_001).astype(np.uint16)
    found = [
        score(plan, _last(_nats), _stream(stream), batch_tokens=batch_tokens, device="cpu").loss
        for plan in (plain(20_000, seq_len=64), sliding(20_000, context=64, stride=16))
        for batch_tokens in (1, 64 * 7, 64 * 100, 1 << 20)
    ]
    assert found == pytest.approx([found[0]] * len(found), abs=1e-9, rel=0)


def test_sliding_scores_of_a_model_are_those_of_each_window_run_alone(dataset: DataSet, model: GPT) -> None:
    validation = ValidationStream.load(dataset)
    plan = sliding(validation.positions, context=24, stride=7)
    stream = torch.from_numpy(validation.tokens.astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for window in plan:
            cut = slice(window.start, window.end), slice(window.start + 1, window.end + 1)
            losses = model.token_losses(stream[cut[0]][None], stream[cut[1]][None])[0]
            nats += float(losses[window.score_from - window.start :].double().sum())
    found = [
        score(plan, model.token_losses, validation, batch_tokens=batch_tokens, device="cpu").loss
        for batch_tokens in (24, 24 * 5, 24 * 64)
    ]
    assert found == pytest.approx([nats / validation.positions] * 3, abs=1e-6)
    assert max(found) - min(found) < 1e-6


@pytest.mark.parametrize("scored", [1, 3, 8])
def test_the_head_runs_only_where_it_is_asked_for(dataset: DataSet, model: GPT, scored: int) -> None:
    tokens = torch.randint(330, (3, 9), generator=torch.Generator().manual_seed(0))
    rows: list[int] = []
    plain_losses = torch.nn.functional.linear

    def counting(x: Tensor, weight: Tensor) -> Tensor:
        if weight.shape[0] == 330:
            rows.append(x.shape[0])
        return plain_losses(x, weight)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", counting)
        some = model.token_losses(tokens[:, :-1], tokens[:, 1:], scored)
        assert sum(rows) == 3 * scored
        every = model.token_losses(tokens[:, :-1], tokens[:, 1:])
    assert some.shape == (3, scored)
    torch.testing.assert_close(some, every[:, -scored:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scored", [0, 9, -1])
def test_the_head_refuses_positions_that_there_are_not(model: GPT, scored: int) -> None:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="positions of a window of 8"):
        model.token_losses(tokens, tokens, scored)


def test_an_observer_may_train_on_what_was_scored_and_is_seen_by_the_next_batch_only() -> None:
    stream = np.arange(41, dtype=np.uint16)
    weight = torch.zeros((), requires_grad=True)

    def losses(inputs: Tensor, targets: Tensor, scored: int) -> Tensor:
        assert not torch.is_grad_enabled()
        return (weight + torch.zeros(inputs.shape))[:, -scored:]

    levels = []

    def learn(batch: ScoredBatch) -> None:
        assert torch.is_grad_enabled()
        levels.append(set(batch.losses[batch.valid].tolist()))
        torch.autograd.backward((weight * batch.targets).sum())
        with torch.no_grad():
            weight.add_(1.0)

    plan = plain(40, seq_len=4)
    found = score(plan, losses, _stream(stream), batch_tokens=8, device="cpu", on_scored=[learn])
    assert levels == [{0.0}, {1.0}, {2.0}, {3.0}, {4.0}]
    assert found.loss == 2.0


def test_a_plan_of_another_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="plan scores 9 positions of a stream that has 8"):
        score(plain(9, seq_len=4), _last(_nats), _stream(np.zeros(9, dtype=np.uint16)), batch_tokens=8, device="cpu")


def test_case_folding_counts_the_bytes_of_the_sidecar(tmp_path: Path) -> None:
    folded = make_data_set(tmp_path / "data", case_folding=True)
    validation = ValidationStream.load(folded)
    documents = list(validation_documents(folded.val_shards, Decoder(folded.tokenizer_path, case_folding=True)))
    assert validation.bytes == sum(map(len, documents)) == int(validation.target_bytes.sum())
    assert validation.target_bytes.size == validation.positions
    by_table = ByteTable.load(folded.tokenizer_path).count(validation.tokens[:-1], validation.tokens[1:])
    assert int(by_table.sum()) > validation.bytes  # the table would count the marks
    # A sidecar that counts otherwise, whatever the manifest's hash says.
    sidecar = open_shard(folded.val_original_bytes[0]).copy()
    sidecar[5] += 1
    write_shard(folded.val_original_bytes[0], sidecar)
    with pytest.raises(DataSetError, match="the manifest says"):
        ValidationStream.load(folded)
    write_shard(folded.val_original_bytes[0], sidecar[:-1])
    with pytest.raises(DataSetError, match="byte sidecars"):
        ValidationStream.load(folded)


def test_bytes_are_counted_in_chunks(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ByteTable.load(dataset.tokenizer_path)
    stream = np.random.default_rng(0).integers(0, table.vocab_size, 2_000_001).astype(np.uint16)
    whole = table.count(stream[:-1], stream[1:])
    monkeypatch.setattr(evaluation, "_CHUNK_TOKENS", 50_003)
    tracemalloc.start()
    counted = evaluation._table_bytes(table, stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(counted, whole)
    assert peak < counted.nbytes + 50 * 50_003


def test_an_empty_validation_stream_is_an_error(dataset: DataSet, tmp_path: Path) -> None:
    entry = dataset.manifest.val[0].model_copy(update={"tokens": 1})
    write_shard(tmp_path / entry.file, np.ones(1, dtype=np.uint16))
    manifest = dataset.manifest.model_copy(update={"val": (entry,), "val_tokens": 0})
    with pytest.raises(DataSetError, match="nothing to score"):
        ValidationStream.load(DataSet(path=tmp_path, manifest=manifest))
    with pytest.raises(DataSetError, match="0 tokens"):
        ValidationStream.load(DataSet(path=tmp_path, manifest=manifest.model_copy(update={"val": ()})))
