"""Adapters by document: none is learnt from before it is scored, none from another document, each scored once."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from score_first import (
    ALL,
    PLAIN,
    SHAPES,
    Losses,
    Options,
    Recorded,
    code_sums,
    documents_of,
    moved_by_the_future,
    tiny_model,
    validation_of,
)
from trainer.data.shards import BOS, Tokens
from trainer.document_adaptation import _BETAS, _SEED, DocumentAdaptation
from trainer.errors import InputError
from trainer.evaluation import OnScored, Score, ScoredBatch, UnusableWeightsError
from trainer.model.adapters import Adapters, fresh_adapters
from trainer.model.gpt import GPT
from trainer.ranks import ALONE, Ranks
from trainer.test_time_settings import AdaptationSettings, adaptation_settings

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

CHUNK, CONTEXT = 3, 8  # windows of one or two chunks, and two tokens of the context to spare
LENGTHS = [9, 1, 14, 5, 11]
STREAM = documents_of(LENGTHS)
SHORT = documents_of([5, 12, 1, 5])  # for checks that score it dozens of times


def settings_of(**more: Any) -> AdaptationSettings:
    made = adaptation_settings("lora", **{"lr": 0.1, "epochs": 2, "chunk_tokens": CHUNK, "rank": 2} | more)
    assert made is not None
    return made


def adaptation(
    model: GPT,
    settings: AdaptationSettings,
    *,
    context: int = CONTEXT,
    batch_tokens: int = 3 * CONTEXT,
    method: type[DocumentAdaptation] = DocumentAdaptation,
    compiled: bool = False,
) -> DocumentAdaptation:
    return method(model, settings, context=context, batch_tokens=batch_tokens, device="cpu", compiled=compiled)


def losses_of(
    tokens: Tokens, *, model: GPT, settings: AdaptationSettings, on_scored: tuple[OnScored, ...] = (), **more: Any
) -> Losses:
    """The losses `(positions,)`, in which their sum agrees too."""
    recorded = Recorded(tokens.size - 1)
    found = adaptation(model, settings, **more).score(validation_of(tokens), on_scored=[recorded, *on_scored])
    losses = recorded.whole()
    assert found.loss == pytest.approx(losses.mean(dtype=np.float64), rel=1e-6)
    return losses


class Ahead(DocumentAdaptation):
    """A cheat: it learns from a chunk before it scores it."""

    def _losses(self, chunk: Any, adapters: Adapters) -> Tensor:
        with torch.enable_grad():
            loss = torch.where(chunk.valid, super()._losses(chunk, adapters), 0.0).sum()
        gradients = torch.autograd.grad(loss, list(adapters.tensors()))
        with torch.no_grad():
            for tensor, gradient in zip(adapters.tensors(), gradients, strict=True):
                tensor.sub_(0.05 * gradient)
        return super()._losses(chunk, adapters)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("chunk", "context", "epochs"), [(3, 8, 2), (1, 4, 1), (4, 4, 1)])
def test_what_is_scored_does_not_move_with_what_comes_later(
    options: Options, chunk: int, context: int, epochs: int
) -> None:
    run = partial(
        losses_of,
        model=tiny_model(options),
        settings=settings_of(chunk_tokens=chunk, epochs=epochs),
        context=context,
    )
    assert moved_by_the_future(run, SHORT, [1, 2, 3, 4, 6, 8, 9, 11, 13, 15, 18, 19]) == []


@pytest.mark.parametrize(("options", "chunk"), [(PLAIN, 3), (ALL, 2)])
def test_every_loss_says_a_probability(options: Options, chunk: int) -> None:
    run = partial(losses_of, model=tiny_model(options), settings=settings_of(chunk_tokens=chunk, epochs=1), context=6)
    # In the first and in the second chunk of a document, and the BOS that ends one.
    assert code_sums(run, SHORT, [2, 8, 16]) == pytest.approx([1.0] * 3, abs=1e-5)


def test_the_checks_catch_one_who_looks_ahead() -> None:
    run = partial(losses_of, model=tiny_model(), settings=settings_of(), method=Ahead)
    # Chunks are positions 0 to 2 and 3 to 4 of the first document; with the last target of a chunk all is known.
    assert moved_by_the_future(run, SHORT, [1, 2, 3, 4, 6, 7, 8, 9, 11]) == [1, 2, 6, 7, 9]
    assert code_sums(run, SHORT, [2])[0] > 1.01


def test_a_future_of_other_documents_changes_nothing_either() -> None:
    """As above, but where BOS comes and goes, and with it the batches; so up to rounding."""
    run = partial(losses_of, model=tiny_model(ALL), settings=settings_of())
    before = run(STREAM)
    for place in (8, 15, 23):
        planted = STREAM.copy()
        planted[place + 1 :: 3] = BOS
        np.testing.assert_allclose(run(planted)[:place], before[:place], atol=1e-4)


class Merged(nn.Module):
    """A model whose weights may be replaced for a pass."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.token_losses(inputs, targets)[0]


def reference(tokens: Tokens, model: GPT, settings: AdaptationSettings, context: int) -> list[float]:
    """Document after document, with adapters that are multiplied into the matrices, and Adam from its formula.

    An untied head only.
    """
    stream = torch.from_numpy(tokens.astype(np.int64))
    state = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    head, merged = state["model.lm_head.weight"], Merged(model)

    def losses(pairs: list[tuple[Tensor, Tensor]], start: int, end: int) -> Tensor:
        changed = dict(state)
        products = [up @ down for down, up in pairs]
        for layer in range(model.config.num_layers):
            for name, product in zip("qv", products[2 * layer :], strict=False):
                key = f"model.blocks.{layer}.attn.{name}.weight"
                changed[key] = state[key] + product
        changed["model.lm_head.weight"] = head + head @ products[-1]
        found: Tensor = torch.func.functional_call(
            merged, changed, (stream[None, start:end], stream[None, start + 1 : end + 1])
        )
        return found

    scored: list[float] = []
    starts = [0, *(at for at in range(1, tokens.size - 1) if tokens[at] == BOS)]
    chunk = settings.chunk_tokens
    for start, end in zip(starts, [*starts[1:], tokens.size - 1], strict=True):
        rank = settings.rank or 0
        fresh = fresh_adapters(
            model.config, rows=1, rank=rank, device="cpu", generator=torch.Generator().manual_seed(_SEED)
        )
        flat = [tensor[0].detach().clone().requires_grad_() for tensor in fresh.tensors()]
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        means = [torch.zeros_like(tensor) for tensor in flat]
        squares = [torch.zeros_like(tensor) for tensor in flat]
        steps = 0
        for begin in range(start, end, chunk):
            last = min(begin + chunk, end)
            first = max(start, begin + chunk - context // chunk * chunk)
            scored += losses(pairs, first, last)[begin - first :].tolist()
            for _ in range(settings.epochs):
                loss = losses(pairs, first, last)[begin - first :].mean()
                steps += 1
                for at, gradient in enumerate(torch.autograd.grad(loss, flat)):
                    means[at] = _BETAS[0] * means[at] + (1 - _BETAS[0]) * gradient
                    squares[at] = _BETAS[1] * squares[at] + (1 - _BETAS[1]) * gradient**2
                    mean = means[at] / (1 - _BETAS[0] ** steps)
                    with torch.no_grad():
                        flat[at] -= settings.lr * mean / ((squares[at] / (1 - _BETAS[1] ** steps)).sqrt() + 1e-8)
    return scored


@pytest.mark.parametrize("options", [{"tie_embeddings": False}, ALL], ids=SHAPES)
@pytest.mark.parametrize(("chunk", "context", "epochs"), [(3, 8, 2), (2, 4, 1), (4, 4, 3), (5, 40, 1)])
def test_losses_are_those_of_the_slow_reference(options: Options, chunk: int, context: int, epochs: int) -> None:
    model, settings = tiny_model(options), settings_of(chunk_tokens=chunk, epochs=epochs, lr=0.03)
    found = losses_of(STREAM, model=model, settings=settings, context=context)
    without = losses_of(
        STREAM, model=model, settings=settings_of(chunk_tokens=chunk, epochs=epochs, lr=0.0), context=context
    )
    assert np.abs(found - without).max() > 0.05
    np.testing.assert_allclose(found, reference(STREAM, model, settings, context), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("first", [BOS, 7])
def test_a_learning_rate_of_zero_is_the_plain_score_within_documents(options: Options, first: int) -> None:
    model, tokens = tiny_model(options), documents_of(LENGTHS, first=first)
    stream = torch.from_numpy(tokens.astype(np.int64))
    expected: list[float] = []
    bounds = np.cumsum([0, *LENGTHS]).tolist()
    for start, end in zip(bounds, [*bounds[1:-1], tokens.size - 1], strict=False):
        for begin in range(start, end, CHUNK):
            window = slice(max(start, begin - CHUNK), min(begin + CHUNK, end))
            targets = stream[None, window.start + 1 : window.stop + 1]
            with torch.no_grad():
                losses = model.token_losses(stream[None, window], targets)[0]
            expected += losses[begin - window.start :].tolist()
    found = losses_of(tokens, model=model, settings=settings_of(lr=0.0))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_a_document_repeats_is_learnt() -> None:
    """And not by looking back: the period is longer than a window."""
    tokens = np.append(np.tile(np.append(BOS, np.tile(documents_of([13])[1:], 12)), 3), BOS).astype(np.uint16)
    model = tiny_model(scale=0.1)
    trained = losses_of(tokens, model=model, settings=settings_of(lr=0.03, rank=8)).reshape(3, -1)
    without = losses_of(tokens, model=model, settings=settings_of(lr=0.0)).reshape(3, -1)
    assert trained.mean() < without.mean() - 0.3
    assert trained[:, -24:].mean() < trained[:, :12].mean() - 0.6


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_documents_know_nothing_of_each_other(options: Options) -> None:
    """Whatever their order, whoever they go side by side with, and alone."""
    run = partial(losses_of, model=tiny_model(options), settings=settings_of())
    texts = [documents_of([length], seed=seed) for seed, length in enumerate(LENGTHS)]
    alone = [run(np.append(text, np.uint16(BOS))) for text in texts]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        stream = np.concatenate([*(texts[at] for at in order), [BOS]]).astype(np.uint16)
        for batch_tokens in (1, 2 * CONTEXT, 1000):
            expected = np.concatenate([alone[at] for at in order])
            np.testing.assert_allclose(run(stream, batch_tokens=batch_tokens), expected, atol=1e-4)


class Meeting:
    """Processes that are threads of this one: what they add up meets here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._told: dict[int, list[float]] = {}
        self._barrier = threading.Barrier(size, timeout=60)

    def ranks(self) -> list[Ranks]:
        meeting = self

        class Met(Ranks):
            __slots__ = ()

            def sum_float64(self, values: Any) -> list[float]:
                meeting._told[self.rank] = list(values)
                meeting._barrier.wait()
                return [math.fsum(each) for each in zip(*meeting._told.values(), strict=True)]

        return [Met(rank=rank, world_size=self.size) for rank in range(self.size)]


@pytest.mark.parametrize(("processes", "batch_tokens"), [(2, CONTEXT), (3, 1000), (7, 1000)])
def test_processes_share_the_documents(processes: int, batch_tokens: int) -> None:
    """The last case has more processes than documents."""
    model, settings = tiny_model(), settings_of()
    whole = losses_of(STREAM, model=model, settings=settings)
    recorded = Recorded(STREAM.size - 1)
    counts: dict[int, list[tuple[int, int]]] = {}

    def work(ranks: Ranks) -> Score:
        def count(batch: ScoredBatch) -> None:
            counts.setdefault(ranks.rank, []).append((batch.number, batch.batches))

        own = adaptation(copy.deepcopy(model), settings, batch_tokens=batch_tokens)
        return own.score(validation_of(STREAM), on_scored=[recorded, count], ranks=ranks)

    with ThreadPoolExecutor(processes) as pool:
        scores = list(pool.map(work, Meeting(processes).ranks()))
    np.testing.assert_allclose(recorded.whole(), whole, atol=1e-4)
    assert len(set(scores)) == 1
    assert scores[0].loss == pytest.approx(whole.mean(dtype=np.float64), abs=1e-5)
    assert len(counts) == min(processes, len(LENGTHS))
    for told in counts.values():
        assert told == [(number, len(told)) for number in range(len(told))]


def test_a_share_that_is_lost_is_no_score() -> None:
    class Alone(Ranks):
        __slots__ = ()

        def sum_float64(self, values: Any) -> list[float]:
            return list(values)

    with pytest.raises(RuntimeError, match="of 39 positions were scored"):
        adaptation(tiny_model(), settings_of()).score(validation_of(STREAM), ranks=Alone(rank=1, world_size=2))


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_as_it_was(failing: bool) -> None:
    model = tiny_model(ALL)
    model.smear_scale.requires_grad_(requires_grad=False)
    before = {name: (weight.detach().clone(), weight.requires_grad) for name, weight in model.named_parameters()}

    def fail(batch: ScoredBatch) -> None:
        assert not model.tok_emb.weight.requires_grad
        if failing and batch.number == 2:
            raise InterruptedError

    def run() -> Losses:
        return losses_of(STREAM, model=model, settings=settings_of(), on_scored=(fail,))

    if failing:
        with pytest.raises(InterruptedError):
            run()
    else:
        assert np.array_equal(run(), run())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0]), name
        assert weight.requires_grad == before[name][1], name
        assert weight.grad is None, name


def test_weights_that_are_not_finite_are_said_to_be() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.tok_emb.weight[5] = math.nan
    with pytest.raises(UnusableWeightsError, match="validation loss is nan"):
        adaptation(model, settings_of()).score(validation_of(STREAM), ranks=ALONE)
    assert model.tok_emb.weight.requires_grad


def test_a_chunk_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=rf"--ttt-chunk 9 .* {CONTEXT} tokens; give at most {CONTEXT}"):
        adaptation(tiny_model(), settings_of(chunk_tokens=CONTEXT + 1))
    adaptation(tiny_model(), settings_of(chunk_tokens=CONTEXT))


def test_a_compiled_pass_has_as_many_graphs_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And more than the compiler allows unless told."""
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(module)
        return module

    real = torch.compile
    monkeypatch.setattr(torch, "compile", partial(real, backend=backend))
    torch.compiler.reset()
    model, settings = tiny_model({"num_layers": 1}), settings_of(chunk_tokens=2, epochs=1)
    tokens = documents_of([14, 3])
    with torch._dynamo.config.patch(recompile_limit=4):
        fast = losses_of(tokens, model=model, settings=settings, context=10, compiled=True)
    assert len(graphs) == 5 + 1  # five widths, and that of the last chunk without gradients too
    np.testing.assert_allclose(fast, losses_of(tokens, model=model, settings=settings, context=10), atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=2, max_size=30),
    st.integers(1, 4),
    st.integers(0, 5),
    st.data(),
)
def test_any_stream_is_scored_once_and_sees_its_own_document_only(
    tokens: list[int], chunk: int, more: int, data: st.DataObject
) -> None:
    stream = np.array(tokens, dtype=np.uint16)

    def look(batch: ScoredBatch) -> None:
        width = batch.inputs.shape[1]
        assert width <= chunk + more
        for inputs, targets, positions, valid in zip(
            batch.inputs, batch.targets, batch.positions, batch.valid, strict=True
        ):
            for column in np.flatnonzero(valid):
                at, place = int(positions[column]), width - chunk + int(column)
                start = max(0, *(begin for begin in range(at + 1) if begin == 0 or tokens[begin] == BOS))
                seen = inputs[max(0, place - (at - start)) : place + 1].tolist()
                assert seen == tokens[at + 1 - len(seen) : at + 1]
                assert int(targets[place]) == tokens[at + 1]
                assert len(seen) in {at - start + 1, place + 1}

    rows = data.draw(st.integers(1, 4))
    losses_of(
        stream,
        model=tiny_model({"num_layers": 1}),
        settings=settings_of(chunk_tokens=chunk, epochs=1),
        context=chunk + more,
        batch_tokens=rows * (chunk + more),
        on_scored=(look,),
    )
