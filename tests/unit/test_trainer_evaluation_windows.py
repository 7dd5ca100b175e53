"""Every position scored once, with the context that was promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation_windows import Window, WindowError, WindowPlan, plain, sliding

lengths = st.integers(1, 300)


@st.composite
def sliding_plans(draw: st.DrawFn) -> tuple[int, int, int]:
    context = draw(st.integers(1, 60))
    return draw(lengths), context, draw(st.integers(1, context))


def _scored(plan: WindowPlan) -> list[int]:
    return [position for window in plan for position in range(window.score_from, window.end)]


@given(lengths, st.integers(1, 400))
def test_plain_windows_lie_side_by_side(positions: int, seq_len: int) -> None:
    plan = plain(positions, seq_len=seq_len)
    assert _scored(plan) == list(range(positions))
    assert plan.scored == positions
    for window in plan:
        assert window.start == window.score_from
        assert window.start % seq_len == 0
        assert 1 <= window.end - window.start <= plan.context <= seq_len


@given(sliding_plans())
def test_sliding_windows_score_each_position_once_with_the_promised_context(case: tuple[int, int, int]) -> None:
    positions, context, stride = case
    plan = sliding(positions, context=context, stride=stride)
    assert _scored(plan) == list(range(positions))  # none dropped, none twice, the tail neither
    first, *others = plan
    assert first == Window(start=0, score_from=0, end=min(context, positions))
    before = first
    for window in others:
        assert window.end - window.start == context == plan.context
        assert window.start - before.start == stride or window is others[-1]
        assert 0 < window.end - window.score_from <= stride
        assert window.score_from == before.end
        before = window
    assert before.end == positions
    seen = plan.context_lengths(np.arange(positions))
    for position, length in enumerate(seen):
        # The position itself, and at least context - stride before it, or all there are.
        assert length >= min(context - stride, position) + 1
        assert length <= min(context, position + 1)


@given(sliding_plans(), st.integers(1, 5))
def test_shares_are_the_plan_cut_and_groups_are_the_share_cut(case: tuple[int, int, int], world_size: int) -> None:
    positions, context, stride = case
    plan = sliding(positions, context=context, stride=stride)
    parts = [plan.share(rank, world_size) for rank in range(world_size)]
    assert [window for part in parts for window in part] == list(plan)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        groups = part.groups()
        assert [window for _, group in groups for window in group] == list(part)
        assert len(groups) <= 2
        for needed, group in groups:
            for window in group:
                whole = window.start == window.score_from
                assert needed == (plan.context if whole else plan.stride)
                assert whole or window.end - window.start == plan.context


@pytest.mark.parametrize(
    ("positions", "context", "stride", "named"),
    [
        (0, 8, 4, "1 tokens"),
        (-1, 8, 4, "0 tokens"),
        (9, 8, 0, "stride of 0"),
        (9, 8, 9, "stride of 9"),
        (9, 0, 1, "of 0"),
    ],
)
def test_windows_that_cannot_be_laid_are_named(positions: int, context: int, stride: int, named: str) -> None:
    with pytest.raises(WindowError, match=named):
        sliding(positions, context=context, stride=stride)


def test_plain_windows_of_nothing_are_named() -> None:
    with pytest.raises(WindowError, match="nothing to score"):
        plain(0, seq_len=8)
    with pytest.raises(WindowError, match="at least 1"):
        plain(5, seq_len=0)
