"""Which weighting has the gradient of bits per byte, and that the graph counts bytes as the score does."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import LossConfig, ModelConfig
from trainer.data.byte_table import ByteTable
from trainer.data.casing import MARKS
from trainer.data.describing import Provenance, describe
from trainer.data.encoding import Encoder, EncoderSettings
from trainer.data.manifest import DataSet
from trainer.data.shards import BOS, write_shard
from trainer.data.tokenizer import open_tokenizer, train_tokenizer
from trainer.loss_weighting import ByteWeightedLoss, byte_weighting
from trainer.model.gpt import GPT
from trainer.model.head import CHUNK_ROWS, PLAIN, LossTerms, capped_logits, objective
from trainer.warmup import build_passes

VOCAB = 50
SHAPE = ModelConfig(vocab_size=VOCAB, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, logit_softcap=8.0)
MEAN_BYTES = 2.5


pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


@pytest.fixture
def model() -> GPT:
    model = GPT(SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture
def table() -> ByteTable:
    """Tokens of 0 to 12 bytes; the first four are boundaries, as control tokens are."""
    choose = np.random.default_rng(0)
    base, boundary = choose.integers(1, 12, VOCAB), np.arange(VOCAB) < 4
    base[boundary] = 0
    return ByteTable(base_bytes=base, leading_space=(choose.random(VOCAB) < 0.5) & ~boundary, boundary=boundary)


def batch(rows: int = 6, time: int = 40) -> tuple[Tensor, Tensor]:
    window = torch.randint(VOCAB, (rows, time + 1))
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def gradient(model: GPT, loss: Tensor) -> Tensor:
    """All of it as one vector, in float64."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))]).double()


def bits_per_byte(model: GPT, table: ByteTable, inputs: Tensor, targets: Tensor) -> Tensor:
    """As the score is defined."""
    counted = int(table.count(inputs.flatten().numpy(), targets.flatten().numpy()).sum())
    return model.token_losses(inputs, targets).sum() / (math.log(2) * counted)


def angle(one: Tensor, other: Tensor) -> float:
    """Distance of the two directions: 0 if one is a positive multiple of the other."""
    return float((one / one.norm() - other / other.norm()).norm())


def test_the_gradient_of_bits_per_byte_is_that_of_tokens_and_of_bpb_and_not_of_bytes(
    model: GPT, table: ByteTable
) -> None:
    inputs, targets = batch()
    score = bits_per_byte(model, table, inputs, targets)
    wanted = gradient(model, score)
    counted = int(table.count(inputs.flatten().numpy(), targets.flatten().numpy()).sum())
    by_tokens = gradient(model, model(inputs, targets))
    assert angle(by_tokens, wanted) < 1e-6
    assert float(by_tokens.norm() / wanted.norm()) == pytest.approx(math.log(2) * counted / inputs.numel(), rel=1e-6)

    objective, nats = ByteWeightedLoss(model, table, "bpb", bytes_per_token=MEAN_BYTES)(inputs, targets)
    assert float(objective.detach()) == pytest.approx(float(score.detach()) * math.log(2) * MEAN_BYTES, rel=1e-6)
    by_bpb = gradient(model, objective)
    assert angle(by_bpb, wanted) < 1e-6
    assert float(by_bpb.norm() / wanted.norm()) == pytest.approx(math.log(2) * MEAN_BYTES, rel=1e-6)

    weighted, same_nats = ByteWeightedLoss(model, table, "bytes", bytes_per_token=MEAN_BYTES)(inputs, targets)
    bytes_of = torch.from_numpy(table.count(inputs.flatten().numpy(), targets.flatten().numpy()))
    by_hand = (model.token_losses(inputs, targets).flatten() * bytes_of).sum() / bytes_of.sum()
    torch.testing.assert_close(weighted, by_hand)
    assert angle(gradient(model, weighted), wanted) > 0.05
    assert float(nats) == float(same_nats) == pytest.approx(float(model(inputs, targets).detach()), rel=1e-6)
    assert not nats.requires_grad


def test_micro_batches_of_tokens_add_up_to_the_full_batch_and_those_of_bpb_only_nearly(
    model: GPT, table: ByteTable
) -> None:
    inputs, targets = batch(8, 12)
    wanted = gradient(model, bits_per_byte(model, table, inputs, targets))
    parts = list(zip(inputs.split(1), targets.split(1), strict=True))
    by_tokens = gradient(model, torch.stack([model(*part) for part in parts]).mean())
    assert angle(by_tokens, wanted) < 1e-5
    ratio = ByteWeightedLoss(model, table, "bpb", bytes_per_token=MEAN_BYTES)
    by_bpb = gradient(model, torch.stack([ratio(*part)[0] for part in parts]).mean())
    assert 1e-3 < angle(by_bpb, wanted) < 0.3


def test_the_graph_counts_the_bytes_of_the_table(model: GPT, table: ByteTable) -> None:
    inputs, targets = batch()
    counted = ByteWeightedLoss(model, table, "bpb", bytes_per_token=MEAN_BYTES).target_bytes(inputs, targets)
    expected = table.count(inputs.flatten().numpy(), targets.flatten().numpy())
    np.testing.assert_array_equal(counted.flatten().numpy(), expected)


def test_targets_without_bytes_count_in_bpb_and_not_in_bytes(model: GPT, table: ByteTable) -> None:
    inputs, targets = batch()
    # The same targets but for one that stands for bytes and becomes a BOS: zero weight in `bytes`.
    weight = torch.zeros_like(targets[:, :1]).expand_as(targets).float()
    only_bos = torch.full_like(targets, BOS)
    nothing, nats = ByteWeightedLoss(model, table, "bytes", bytes_per_token=MEAN_BYTES)(inputs, only_bos)
    assert float(nothing.detach()) == 0.0
    assert float(nats) > 0
    torch.testing.assert_close(model.train_loss(inputs, only_bos, weights=weight)[0], nothing)
    something, _ = ByteWeightedLoss(model, table, "bpb", bytes_per_token=MEAN_BYTES)(inputs, only_bos)
    assert math.isfinite(float(something.detach()))
    assert float(something.detach()) > 0


def test_the_chunked_weighted_loss_has_the_value_and_gradients_of_the_plain_formula() -> None:
    rows = 2 * CHUNK_ROWS + 88
    x, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets, row_weights = torch.randint(30, (rows,)), torch.rand(rows) / rows
    losses = functional.cross_entropy(capped_logits(x, weight, 4.0), targets, reduction="none")
    plain = (losses * row_weights).sum()
    expected = torch.autograd.grad(plain * 3.0, (x, weight))
    chunked, mean = objective(x, weight, targets, 4.0, terms=PLAIN, row_weights=row_weights)
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(mean, losses.mean().detach())
    for found, wanted in zip(torch.autograd.grad(chunked * 3.0, (x, weight)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        found = objective(x, weight, targets, 4.0, terms=PLAIN, row_weights=row_weights)
        torch.testing.assert_close(found, (plain, losses.mean()))


def test_weighted_passes_compile_to_one_graph_with_the_values_of_plain_ones(model: GPT, table: ByteTable) -> None:
    inputs, targets = batch(2, 16)
    torch.compiler.reset()
    for weighting in ("bpb", "bytes"):
        weighted = ByteWeightedLoss(model, table, weighting, bytes_per_token=MEAN_BYTES)
        passes = build_passes(model, compiled=True, weighting=weighted, backend="aot_eager")
        compiled, plain = passes.loss(inputs, targets), weighted(inputs, targets)
        torch.testing.assert_close(compiled, plain)
        assert not compiled[1].requires_grad
        torch.testing.assert_close(gradient(model, compiled[0]), gradient(model, plain[0]), rtol=1e-4, atol=1e-6)


def test_other_terms_of_the_loss_act_on_weighted_nats(model: GPT, table: ByteTable) -> None:
    inputs, targets = batch()
    weighting = ByteWeightedLoss(model, table, "bytes", bytes_per_token=MEAN_BYTES, terms=LossTerms(2.0, 0.0))
    bytes_of = torch.from_numpy(table.count(inputs.flatten().numpy(), targets.flatten().numpy()))
    nats = model.token_losses(inputs, targets).flatten()
    by_hand = (nats * (1 - torch.exp(-nats)) ** 2 * bytes_of).sum() / bytes_of.sum()
    found, mean = weighting(inputs, targets)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(gradient(model, found), gradient(model, by_hand), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean, nats.mean().detach())


def data_set(folder: Path, *, case_folding: bool) -> DataSet:
    texts = [f"The NASA {n} and the iPod of Tom {n * n}, THE of the Queen" for n in range(60)]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, vocab_size=310, case_folding=case_folding))
    encoder = Encoder(EncoderSettings(tokenizer=folder / "tokenizer.model", case_folding=case_folding))
    for name, part in (("val", texts[:6]), ("train", texts[6:])):
        encoded = encoder.encode(part)
        write_shard(folder / f"{name}.bin", encoded.tokens)
        if encoded.original_bytes is not None:
            write_shard(folder / f"{name}.bytes", encoded.original_bytes)
    provenance = Provenance(split="the first six", case_folding=case_folding)
    return describe(folder, tokenizer="tokenizer.model", train=["train.bin"], val=["val.bin"], provenance=provenance)


def test_the_plain_mean_needs_no_bytes(tmp_path: Path, model: GPT) -> None:
    assert byte_weighting(LossConfig(), model, data_set(tmp_path, case_folding=False)) is None


@pytest.mark.parametrize("case_folding", [False, True])
def test_the_bytes_of_a_data_set_are_those_of_its_manifest(tmp_path: Path, case_folding: bool) -> None:
    dataset = data_set(tmp_path, case_folding=case_folding)
    model = GPT(SHAPE.model_copy(update={"vocab_size": dataset.manifest.vocab_size}))
    weighting = byte_weighting(LossConfig(weighting="bpb"), model, dataset)
    assert weighting is not None
    focal = byte_weighting(LossConfig(weighting="bpb", focal_gamma=1.5, z_loss=0.1), model, dataset)
    assert focal is not None
    tokens = torch.from_numpy(np.fromfile(dataset.train_shards[0], dtype="<u2", offset=1024).astype(np.int64))
    assert int(weighting.target_bytes(tokens[:-1], tokens[1:]).sum()) == dataset.manifest.train_bytes
    value, nats = weighting(tokens[None, :-1], tokens[None, 1:])
    torch.testing.assert_close(value.detach(), nats, rtol=1e-2, atol=0)  # the whole data: but for the first token
    assert float(focal(tokens[None, :-1], tokens[None, 1:])[0].detach()) != float(value.detach())
    marks = torch.tensor([open_tokenizer(dataset.tokenizer_path).piece_to_id(mark) for mark in MARKS])
    assert bool(torch.isin(tokens, marks).any()) == case_folding
