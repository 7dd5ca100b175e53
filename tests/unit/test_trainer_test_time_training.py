"""SGD along the stream: no token is learnt from before it is scored, and the rest against a slow reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
from trainer.errors import InputError
from trainer.evaluation import OnScored, ScoredBatch, score
from trainer.evaluation_windows import WindowPlan, plain, sliding
from trainer.model.gpt import GPT
from trainer.parameters import parameters
from trainer.test_time_settings import AdaptationSettings, Moved, adaptation_settings
from trainer.test_time_training import StreamTraining, put_back

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

CONTEXT = 6
STREAM = documents_of([9, 1, 14, 5, 11])
SHORT = STREAM[:22]  # for checks that score it dozens of times


def plan_of(tokens: Tokens, stride: int | None, context: int = CONTEXT) -> WindowPlan:
    if stride is None:
        return plain(tokens.size - 1, seq_len=context)
    return sliding(tokens.size - 1, context=context, stride=stride)


def settings_of(chunk: int, **more: Any) -> AdaptationSettings:
    made = adaptation_settings("sgd", **{"lr": 0.3, "epochs": 2, "chunk_tokens": chunk} | more)
    assert made is not None
    return made


def losses_of(
    tokens: Tokens,
    *,
    model: GPT,
    settings: AdaptationSettings,
    stride: int | None = None,
    batch_tokens: int = 2 * CONTEXT,
    micro_tokens: int = 2 * CONTEXT,
    method: type[StreamTraining] = StreamTraining,
    on_scored: tuple[OnScored, ...] = (),
) -> Losses:
    """The losses `(positions,)`, in which their sum agrees too."""
    validation, plan = validation_of(tokens), plan_of(tokens, stride)
    recorded = Recorded(validation.positions)
    with put_back(model):
        training = method(
            model,
            settings,
            plan=plan,
            validation=validation,
            batch_tokens=batch_tokens,
            micro_tokens=micro_tokens,
            device="cpu",
        )
        assert training.batch_tokens <= max(batch_tokens, plan.context)
        found = score(
            plan,
            model.token_losses,
            validation,
            batch_tokens=training.batch_tokens,
            device="cpu",
            on_scored=[recorded, *on_scored, training],
        )
    losses = recorded.whole()
    assert found.loss == pytest.approx(losses.mean(dtype=np.float64), rel=1e-6)
    return losses


def untrained(tokens: Tokens, model: GPT, stride: int | None = None, batch_tokens: int = 2 * CONTEXT) -> Losses:
    validation = validation_of(tokens)
    recorded = Recorded(validation.positions)
    plan = plan_of(tokens, stride)
    score(plan, model.token_losses, validation, batch_tokens=batch_tokens, device="cpu", on_scored=[recorded])
    return recorded.whole()


class Peeking(StreamTraining):
    """A cheat: what it trains on ends one token behind what was scored."""

    def _passes(self, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return super()._passes(begin, end + 1)


class Ahead(StreamTraining):
    """A cheat: it trains on the chunk that is scored next."""

    def _passes(self, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return super()._passes(end, min(2 * end - begin, self._stream.numel() - 1))


@pytest.mark.parametrize(
    ("options", "stride", "chunk"), [(PLAIN, None, 6), (ALL, None, 13), (ALL, 2, 4), (PLAIN, 4, 9), (PLAIN, 3, 3)]
)
def test_what_is_scored_does_not_move_with_what_comes_later(options: Options, stride: int | None, chunk: int) -> None:
    run = partial(losses_of, model=tiny_model(options), settings=settings_of(chunk), stride=stride)
    assert moved_by_the_future(run, SHORT, [1, 5, 6, 7, 8, 10, 12, 13, 14, 17, 19]) == []


@pytest.mark.parametrize(("options", "stride", "chunk"), [(PLAIN, None, 6), (ALL, 2, 4)])
def test_every_loss_says_a_probability(options: Options, stride: int | None, chunk: int) -> None:
    run = partial(losses_of, model=tiny_model(options), settings=settings_of(chunk, epochs=1), stride=stride)
    # The last of a first chunk, the first of the next one, and one near the end.
    assert code_sums(run, SHORT, [5, 6, 20]) == pytest.approx([1.0] * 3, abs=1e-5)


def test_the_two_checks_catch_those_who_look_ahead() -> None:
    model, settings = tiny_model(), settings_of(6, epochs=1)
    ahead = partial(losses_of, model=model, settings=settings, method=Ahead)
    places = [5, 6, 7, 8, 10, 12, 13, 14]
    assert moved_by_the_future(ahead, SHORT, places) == [7, 8, 10, 13, 14]
    peeking = partial(losses_of, model=model, settings=settings, method=Peeking)
    assert moved_by_the_future(peeking, SHORT, places) == []
    first_unscored, later = code_sums(peeking, SHORT, [6, 7])
    assert first_unscored > 1.01
    assert later == pytest.approx(1.0, abs=1e-5)


def test_a_future_of_other_documents_changes_nothing_either() -> None:
    """As above, but where BOS comes and goes."""
    run = partial(losses_of, model=tiny_model(ALL), settings=settings_of(4), stride=2)
    before = run(STREAM)
    for place in (8, 15, 23):
        planted = STREAM.copy()
        planted[place + 1 :: 3] = BOS
        assert np.array_equal(run(planted)[:place], before[:place])


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("stride", "chunk"), [(None, 13), (4, 9)])
def test_a_learning_rate_of_zero_is_the_score_without(options: Options, stride: int | None, chunk: int) -> None:
    model = tiny_model(options)
    # The width of a batch is rounding, and here it is one window both times.
    found = losses_of(STREAM, model=model, settings=settings_of(chunk, lr=0.0), stride=stride, batch_tokens=1)
    assert np.array_equal(found, untrained(STREAM, model, stride, batch_tokens=1))


def test_what_repeats_itself_is_learnt() -> None:
    """Along the stream, and not by looking back: the period is longer than a window."""
    stream = np.tile(documents_of([18]), 12)
    model = tiny_model(scale=0.1)
    trained = losses_of(stream, model=model, settings=settings_of(18, lr=0.1))
    plain_losses = untrained(stream, model)
    assert np.array_equal(trained[:18], plain_losses[:18])
    assert trained.mean() < plain_losses.mean() - 0.3
    assert trained[-18:].mean() < trained[:18].mean() - 0.6


@pytest.mark.parametrize(("stride", "chunk"), [(None, 13), (None, 18), (2, 9)])
def test_batches_and_training_passes_are_a_matter_of_speed(stride: int | None, chunk: int) -> None:
    run = partial(losses_of, STREAM, model=tiny_model(), settings=settings_of(chunk), stride=stride)
    found = [run(batch_tokens=batch, micro_tokens=micro) for batch, micro in ((1, 1), (12, 18), (1000, 6), (18, 1000))]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4)


def reference(
    tokens: Tokens, model: GPT, settings: AdaptationSettings, plan: WindowPlan, moved: set[str]
) -> list[float]:
    """One window after the other, one position's loss after the other, and SGD from its formula."""
    stream = torch.from_numpy(tokens.astype(np.int64))

    def window(start: int, end: int) -> Tensor:
        return model.token_losses(stream[None, start:end], stream[None, start + 1 : end + 1])[0]

    weights = {name: weight for name, weight in model.named_parameters() if name in moved}
    speed: dict[str, Tensor] = {}

    def train(begin: int, end: int) -> None:
        losses = []
        for first in range(begin, end, plan.context):
            last = min(first + plan.context, end)
            start = max(last - plan.context, 0)
            losses.append(window(start, last)[first - start :])
        mean = torch.cat(losses).mean()
        gradients = dict(zip(weights, torch.autograd.grad(mean, list(weights.values())), strict=True))
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        if settings.grad_clip_norm and norm > settings.grad_clip_norm:
            gradients = {name: gradient * settings.grad_clip_norm / norm for name, gradient in gradients.items()}
        with torch.no_grad():
            for name, gradient in gradients.items():
                speed[name] = gradient + (settings.momentum or 0.0) * speed.get(name, torch.zeros_like(gradient))
                weights[name] -= settings.lr * speed[name]

    scored: list[float] = []
    for _, group in plan.groups():
        windows = list(group)
        size = settings.chunk_tokens // plan.stride
        for chunk in (windows[first : first + size] for first in range(0, len(windows), size)):
            with torch.no_grad():
                for one in chunk:
                    scored += window(one.start, one.end)[one.score_from - one.start :].tolist()
            for _ in range(settings.epochs):
                train(chunk[0].score_from, chunk[-1].end)
    return scored


@pytest.mark.parametrize(
    ("options", "stride", "more"),
    [
        (PLAIN, None, {"chunk_tokens": 13, "grad_clip_norm": 0.0}),
        (PLAIN, None, {"chunk_tokens": 18}),  # three windows, trained on in passes of two
        (PLAIN, 4, {"chunk_tokens": 9, "momentum": 0.0, "epochs": 1}),
        (PLAIN, 2, {"chunk_tokens": 2, "moved": "matrices", "grad_clip_norm": 0.1}),
        (ALL, None, {"chunk_tokens": 12, "moved": "controls", "epochs": 3}),
        (ALL, 5, {"chunk_tokens": 20}),
    ],
)
def test_losses_are_those_of_the_slow_reference(options: Options, stride: int | None, more: dict[str, Any]) -> None:
    settings = settings_of(**{"chunk": more["chunk_tokens"], "lr": 0.05} | more)
    model = tiny_model(options)
    found = losses_of(STREAM, model=model, settings=settings, stride=stride)
    assert np.abs(found - untrained(STREAM, model, stride)).max() > 0.01
    kinds = parameters(model.config)
    moved = {
        name
        for name, kind in kinds.items()
        if settings.moved == "all" or (kind.kind == "control") == (settings.moved == "controls")
    }
    with put_back(model):
        expected = reference(STREAM, model, settings, plan_of(STREAM, stride), moved)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("which", ["all", "matrices", "controls"])
def test_only_what_is_said_to_move_moves(options: Options, which: Moved) -> None:
    model = tiny_model(options)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    validation, plan = validation_of(STREAM), plan_of(STREAM, None)
    settings = settings_of(6, moved=which)
    training = StreamTraining(
        model, settings, plan=plan, validation=validation, batch_tokens=6, micro_tokens=6, device="cpu"
    )
    score(plan, model.token_losses, validation, batch_tokens=6, device="cpu", on_scored=[training])
    for name, weight in model.named_parameters():
        # Gains, gates, scales and mixes have no name that ends in `weight`, but for the attention gate.
        control = not name.endswith(".weight") or "gate" in name
        moves = which == "all" or control == (which == "controls")
        assert torch.equal(weight, before[name]) != moves, name
        assert weight.requires_grad == moves, name


def test_nothing_is_trained_behind_the_last_chunk() -> None:
    model = tiny_model()
    levels: list[Tensor] = []

    def watch(_: ScoredBatch) -> None:
        levels.append(model.tok_emb.weight.detach().clone())

    validation, plan = validation_of(STREAM), plan_of(STREAM, None)
    training = StreamTraining(
        model, settings_of(12), plan=plan, validation=validation, batch_tokens=12, micro_tokens=6, device="cpu"
    )
    score(plan, model.token_losses, validation, batch_tokens=12, device="cpu", on_scored=[training, watch])
    assert [torch.equal(one, other) for one, other in pairwise(levels)] == [False, False, True]


def test_a_chunk_as_long_as_the_stream_learns_nothing() -> None:
    model = tiny_model()
    found = losses_of(STREAM, model=model, settings=settings_of(42), batch_tokens=1)
    assert np.array_equal(found, untrained(STREAM, model, batch_tokens=1))


@pytest.mark.parametrize(("stride", "least"), [(None, 6), (4, 4)])
def test_a_chunk_below_what_a_window_scores_is_refused(stride: int | None, least: int) -> None:
    with pytest.raises(InputError, match=rf"--ttt-chunk {least - 1} .* at least {least}"):
        losses_of(STREAM, model=tiny_model(), settings=settings_of(least - 1), stride=stride)
    losses_of(STREAM, model=tiny_model(), settings=settings_of(least), stride=stride)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_put_back(failing: bool) -> None:
    model = tiny_model(ALL)
    model.smear_scale.requires_grad_(requires_grad=False)
    before = {name: (weight.detach().clone(), weight.requires_grad) for name, weight in model.named_parameters()}

    def fail(batch: ScoredBatch) -> None:
        if batch.number == 2:
            assert not torch.equal(model.tok_emb.weight, before["tok_emb.weight"][0])
            if failing:
                raise InterruptedError

    def run() -> Losses:
        return losses_of(STREAM, model=model, settings=settings_of(6, moved="matrices"), on_scored=(fail,))

    if failing:
        with pytest.raises(InterruptedError):
            run()
    else:
        assert np.array_equal(run(), run())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0]), name
        assert weight.requires_grad == before[name][1], name
        assert weight.grad is None, name


def test_a_gradient_that_no_step_took_is_not_left_behind() -> None:
    model = tiny_model()
    inputs = torch.zeros(1, 3, dtype=torch.int64)

    def fail() -> None:
        with put_back(model):
            torch.autograd.backward(model(inputs, inputs))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert all(weight.grad is None for weight in model.parameters())
