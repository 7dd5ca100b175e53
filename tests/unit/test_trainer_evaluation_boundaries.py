"""Where documents begin within batches of windows, by a slow loop, and scores that do not change for being told."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trainer.config import ModelConfig
from trainer.data.shards import Tokens
from trainer.evaluation import ValidationStream, rehearse, score
from trainer.evaluation_boundaries import batch_boundaries, beginnings
from trainer.evaluation_windows import WindowPlan, plain, sliding
from trainer.model import attention_backends
from trainer.model.gpt import GPT
from trainer.ranks import Ranks

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

VOCAB, BOS = 24, 1


def stream(size: int, *, ends_with_bos: bool = False) -> Tokens:
    """Tokens of which one in six begins a document."""
    rng = np.random.default_rng(size)
    tokens = np.where(rng.random(size) < 1 / 6, BOS, rng.integers(2, VOCAB, size)).astype(np.uint16)
    tokens[0], tokens[-1] = BOS, BOS if ends_with_bos else 5
    return tokens


def validation(tokens: Tokens) -> ValidationStream:
    """Each token one byte."""
    size = np.ones(tokens.size - 1, dtype=np.uint16)
    return ValidationStream(tokens=tokens, bytes=size.size, target_bytes=size)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 3), st.data())
def test_boundaries_are_those_of_a_slow_loop(begin: list[bool], context: int, rows: int, data: st.DataObject) -> None:
    """Windows anywhere in the stream, which may reach beyond its end."""
    tokens = np.where(begin, BOS, 7).astype(np.uint16)
    batches = data.draw(st.integers(1, 4))
    count = batches * rows
    starts = np.array(data.draw(st.lists(st.integers(0, len(begin) - 1), min_size=count, max_size=count)))
    wanted = []
    for batch in range(batches):
        found = []
        for row in range(rows):
            for column in range(context):
                at = int(starts[batch * rows + row]) + column
                if column == 0 or (at < len(begin) and begin[at]):
                    found.append(row * context + column)
        wanted.append(found)
    width = max(map(len, wanted)) + 1
    bounds = batch_boundaries(beginnings(tokens), starts, context=context, rows=rows)
    assert bounds.dtype == np.int32
    assert bounds.tolist() == [found + [rows * context] * (width - len(found)) for found in wanted]


@pytest.fixture(scope="module")
def model() -> GPT:
    """One whose losses depend on which document a token is in."""
    torch.manual_seed(0)
    made = GPT(
        ModelConfig(
            vocab_size=VOCAB,
            num_layers=2,
            model_dim=16,
            num_heads=2,
            num_kv_heads=1,
            document_attention=True,
            smear_gate=True,
        )
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.7)
    return made.eval()


def varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, most: int, __: int, *, causal: bool) -> Tensor:
    """Document by document, as the boundaries alone say."""
    parts = []
    for start, stop in pairwise(starts.tolist()):
        assert stop - start <= most
        own = (part[start:stop].transpose(0, 1)[None] for part in (q, k, v))
        if stop > start:
            parts.append(functional.scaled_dot_product_attention(*own, is_causal=causal, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).transpose(0, 1).contiguous()


@pytest.mark.parametrize("ends_with_bos", [False, True])
@pytest.mark.parametrize(
    "plan",
    [
        plain(96, seq_len=16),
        plain(93, seq_len=16),  # a short last window
        plain(97, seq_len=16),  # one of a single position
        sliding(93, context=16, stride=5),
        sliding(93, context=16, stride=16),
        sliding(9, context=16, stride=4),  # shorter than the context
    ],
)
def test_a_score_is_the_same_for_being_told(
    model: GPT, monkeypatch: pytest.MonkeyPatch, plan: WindowPlan, ends_with_bos: bool
) -> None:
    """Of a kernel that takes ids and of one that takes starts, which would go wrong if one were missing."""
    monkeypatch.setattr(attention_backends, "_FLASH3", SimpleNamespace(flash_attn_varlen_func=varlen))
    whole = validation(stream(plan.scored + 1, ends_with_bos=ends_with_bos))
    found = {}
    for backend in ("plain", "flash3"):
        monkeypatch.setattr(model, "attention_backend", backend)
        for told in (False, True):
            scored = score(plan, model.token_losses, whole, batch_tokens=48, device="cpu", boundaries=told)
            found[backend, told] = scored.loss
    assert list(found.values()) == pytest.approx([found["plain", False]] * 4, abs=1e-5)


def test_documents_matter_to_that_score(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tokens = plain(93, seq_len=16), stream(94)
    apart = score(plan, model.token_losses, validation(tokens), batch_tokens=48, device="cpu", boundaries=True)
    monkeypatch.setattr(model, "config", model.config.model_copy(update={"document_attention": False}))
    joined = score(plan, model.token_losses, validation(tokens), batch_tokens=48, device="cpu")
    assert abs(joined.loss - apart.loss) > 1e-3


class Calls:
    """Stands for a model, and keeps what it was asked: inputs, positions to score, and boundaries."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, int, Tensor | None]] = []

    def __call__(self, inputs: Tensor, targets: Tensor, scored: int, cu_seqlens: Tensor | None = None) -> Tensor:
        assert inputs.shape == targets.shape
        self.seen.append((inputs.clone(), scored, cu_seqlens))
        return torch.ones(inputs.shape)[:, -scored:]

    def shapes(self) -> list[Any]:
        return [
            (tuple(inputs.shape), scored, None if starts is None else tuple(starts.shape))
            for inputs, scored, starts in self.seen
        ]


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize(
    "plan",
    [
        plain(96, seq_len=16),
        plain(93, seq_len=16),
        sliding(93, context=16, stride=5),
        sliding(93, context=16, stride=16),
    ],
)
def test_a_rehearsal_is_the_first_batch_of_the_commonest_shape(plan: WindowPlan, boundaries: bool) -> None:
    whole = validation(stream(plan.scored + 1))
    rehearsed, scored = Calls(), Calls()
    how: dict[str, Any] = {"batch_tokens": 48, "device": "cpu", "boundaries": boundaries}
    rehearse(plan, rehearsed, whole, **how)
    score(plan, scored, whole, **how)
    shapes = scored.shapes()
    commonest = max(shapes, key=shapes.count)
    assert rehearsed.shapes() == [commonest]
    inputs, _, starts = rehearsed.seen[0]
    wanted, _, wanted_starts = scored.seen[shapes.index(commonest)]
    assert torch.equal(inputs, wanted)
    assert (starts is None) == (not boundaries)
    if starts is not None and wanted_starts is not None:
        assert torch.equal(starts, wanted_starts)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_rehearses_its_own_windows(rank: int) -> None:
    """Of 12 windows, the first of which alone is scored as a whole, each of two processes has 6."""
    tokens = np.arange(2, 2 + 93, dtype=np.uint16)
    plan = sliding(92, context=16, stride=7)
    assert len(plan) == 12
    calls = Calls()
    rehearse(plan, calls, validation(tokens), batch_tokens=16, device="cpu", ranks=Ranks(rank=rank, world_size=2))
    own = plan.share(rank, 2)
    first = next(window for window in own if window.score_from != window.start)
    ((inputs, scored, _),) = calls.seen
    assert scored == 7
    assert inputs[0].tolist() == tokens[first.start : first.end].tolist()


def test_a_stream_of_one_window_has_nothing_to_rehearse() -> None:
    calls = Calls()
    rehearse(sliding(9, context=16, stride=4), calls, validation(stream(10)), batch_tokens=48, device="cpu")
    assert calls.seen == []
