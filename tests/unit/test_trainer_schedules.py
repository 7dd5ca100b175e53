"""Shapes of the schedules, and what they promise at their ends."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import BatchConfig, LimitsConfig, OptimizerConfig, RecurrenceConfig, ScheduleConfig
from trainer.errors import InputError
from trainer.schedules import (
    batch_tokens,
    loop_gate,
    lr_multiplier,
    muon_momentum,
    planned_steps,
    progress,
    weight_decay_multiplier,
)

Shape = Literal["linear", "cosine", "sqrt"]
SHAPES: tuple[Shape, ...] = ("linear", "cosine", "sqrt")
HUNDRED = LimitsConfig(steps=100)


def multiplier(done: float, step: int, schedule: ScheduleConfig, limits: LimitsConfig = HUNDRED) -> float:
    return lr_multiplier(done, step, schedule, limits, batch_tokens=10)


def test_progress_is_the_largest_share_of_any_limit() -> None:
    limits = LimitsConfig(wallclock_seconds=100, tokens=1000, steps=10)
    assert progress(limits, elapsed_seconds=50, tokens=100, steps=1) == 0.5
    assert progress(limits, elapsed_seconds=5, tokens=700, steps=1) == 0.7
    assert progress(limits, elapsed_seconds=5, tokens=700, steps=8) == 0.8
    assert progress(limits, elapsed_seconds=500, tokens=0, steps=0) == 1.0
    assert progress(LimitsConfig(steps=4), elapsed_seconds=1e9, tokens=10**9, steps=1) == 0.25


def test_warmup_counts_steps_from_the_first() -> None:
    schedule = ScheduleConfig(warmup_steps=4, warmdown_fraction=0.0)
    assert [multiplier(0.1, step, schedule) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "quarter", "middle"), [("linear", 0.75, 0.5), ("cosine", 0.853553, 0.5), ("sqrt", 0.5, 0.292893)]
)
def test_warmdown_shapes(shape: Shape, quarter: float, middle: float) -> None:
    schedule = ScheduleConfig(warmdown_fraction=0.4, warmdown_shape=shape)
    assert multiplier(0.6, 1, schedule) == 1.0
    assert multiplier(0.7, 1, schedule) == pytest.approx(quarter, abs=1e-6)
    assert multiplier(0.8, 1, schedule) == pytest.approx(middle, abs=1e-6)
    assert multiplier(1.0, 1, schedule) == pytest.approx(0.0, abs=1e-12)


@given(
    shape=st.sampled_from(SHAPES),
    fraction=st.just(0.0) | st.floats(1e-3, 1),
    floor=st.floats(0, 1),
    first=st.floats(0, 1),
    second=st.floats(0, 1),
)
def test_the_multiplier_never_rises_after_warmup_and_stays_above_its_floor(
    shape: Shape, fraction: float, floor: float, first: float, second: float
) -> None:
    schedule = ScheduleConfig(warmdown_fraction=fraction, warmdown_shape=shape, min_lr_fraction=floor)
    early, late = (multiplier(done, 0, schedule) for done in sorted((first, second)))
    assert 1.0 >= early >= late >= floor - 1e-12
    if fraction > 0:
        assert multiplier(1.0, 0, schedule) == pytest.approx(floor, abs=1e-9)


def test_momentum_warms_up_by_steps() -> None:
    optimizer = OptimizerConfig(muon_momentum=0.9, muon_momentum_warmup_start=0.5, muon_momentum_warmup_steps=4)
    assert [muon_momentum(step, optimizer) for step in (0, 2, 4, 99)] == pytest.approx([0.5, 0.7, 0.9, 0.9])
    assert muon_momentum(0, optimizer.model_copy(update={"muon_momentum_warmup_steps": 0})) == 0.9


def test_a_warmdown_in_seconds_or_steps_is_the_share_that_they_are_of_the_run() -> None:
    clock = LimitsConfig(wallclock_seconds=200, steps=10**6)
    by_seconds = ScheduleConfig(warmdown_seconds=50)
    assert [multiplier(done, 0, by_seconds, clock) for done in (0.75, 0.875)] == [1.0, 0.5]
    by_steps = ScheduleConfig(warmdown_steps=20)
    assert [multiplier(done, 0, by_steps) for done in (0.8, 0.9)] == [1.0, pytest.approx(0.5)]
    # 500 tokens are 50 steps of 10, fewer than the 100 that are allowed.
    tokens = LimitsConfig(tokens=500, steps=100)
    assert [multiplier(done, 0, by_steps, tokens) for done in (0.6, 0.8)] == [1.0, pytest.approx(0.5)]
    assert multiplier(0.5, 0, ScheduleConfig(warmdown_steps=1000)) == pytest.approx(0.5)
    assert multiplier(1.0, 0, ScheduleConfig(warmdown_steps=0)) == 1.0


def test_a_warmdown_without_its_limit_is_refused() -> None:
    with pytest.raises(InputError, match=r"warmdown_seconds needs limits\.wallclock_seconds"):
        multiplier(0.5, 0, ScheduleConfig(warmdown_seconds=50))
    with pytest.raises(InputError, match=r"warmdown_steps needs limits\.steps or limits\.tokens"):
        multiplier(0.5, 0, ScheduleConfig(warmdown_steps=50), LimitsConfig(wallclock_seconds=10))


def test_weight_decay_tapers_at_the_end_or_stays() -> None:
    taper = OptimizerConfig(weight_decay_taper=0.25)
    assert [weight_decay_multiplier(done, taper) for done in (0.0, 0.75, 0.875, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    assert weight_decay_multiplier(1.0, OptimizerConfig()) == 1.0


GROWING = BatchConfig(train_batch_tokens=1024, train_seq_len=16, warmup_start_tokens=256, warmup_fraction=0.5)


def test_the_batch_grows_in_whole_passes_to_its_full_size() -> None:
    assert [batch_tokens(done, GROWING, 64) for done in (0.0, 0.04, 0.05, 0.25, 0.49, 0.5, 1.0)] == [
        *(256, 256, 320, 640, 960),
        *(1024, 1024),
    ]
    assert batch_tokens(0.0, GROWING, 512) == 512  # never less than one pass of all processes
    assert batch_tokens(0.0, BatchConfig(train_batch_tokens=1024), 1024) == 1024
    with pytest.raises(InputError, match="1024 is not a multiple of the 192 tokens"):
        batch_tokens(0.0, GROWING, 192)


def test_the_loop_gate_opens_linearly_after_the_loops_start() -> None:
    loop = RecurrenceConfig(first=0, last=1, start_fraction=0.5, gate_fraction=0.25)
    assert [loop_gate(done, loop) for done in (0.0, 0.5, 0.625, 0.75, 1.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert loop_gate(0.0, loop.model_copy(update={"gate_fraction": 0.0})) == 1.0
    assert loop_gate(0.0, None) == 1.0


def test_planned_steps() -> None:
    hundreds = BatchConfig(train_batch_tokens=100, train_seq_len=10)

    def planned(limits: LimitsConfig, seconds: float, steps: int) -> int:
        return planned_steps(limits, hundreds, elapsed_seconds=seconds, tokens=100 * steps, steps=steps)

    assert planned(LimitsConfig(steps=7), 3, 2) == 7
    assert planned(LimitsConfig(tokens=250), 3, 2) == 3
    assert planned(LimitsConfig(wallclock_seconds=30), 3, 2) == 20
    assert planned(LimitsConfig(wallclock_seconds=30, steps=9), 3, 2) == 9
    assert planned(LimitsConfig(wallclock_seconds=30), 0, 0) == 1
    assert planned(LimitsConfig(wallclock_seconds=30), 31, 5) == 5


@pytest.mark.parametrize("clock", [False, True])
def test_planned_steps_foresee_a_growing_batch(clock: bool) -> None:
    """Against the run itself, step by step, at a steady pace of 100 tokens a second."""
    total = 200_000
    limits = LimitsConfig(wallclock_seconds=total / 100) if clock else LimitsConfig(tokens=total)
    tokens, history = 0, []
    while tokens < total:
        history.append((tokens, len(history)))
        tokens += batch_tokens(tokens / total, GROWING, 16)
    for before, steps in history[1::20]:
        planned = planned_steps(limits, GROWING, elapsed_seconds=before / 100, tokens=before, steps=steps)
        assert planned == pytest.approx(len(history), abs=4)  # batches are rounded down to whole passes
    assert len(history) > total / 1024 * 1.3
