"""Shapes of the schedules, and what they promise at their ends."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import LimitsConfig, OptimizerConfig, ScheduleConfig
from trainer.schedules import lr_multiplier, muon_momentum, planned_steps, progress

Shape = Literal["linear", "cosine", "sqrt"]
SHAPES: tuple[Shape, ...] = ("linear", "cosine", "sqrt")


def test_progress_is_the_largest_share_of_any_limit() -> None:
    limits = LimitsConfig(wallclock_seconds=100, tokens=1000, steps=10)
    assert progress(limits, elapsed_seconds=50, tokens=100, steps=1) == 0.5
    assert progress(limits, elapsed_seconds=5, tokens=700, steps=1) == 0.7
    assert progress(limits, elapsed_seconds=5, tokens=700, steps=8) == 0.8
    assert progress(limits, elapsed_seconds=500, tokens=0, steps=0) == 1.0
    assert progress(LimitsConfig(steps=4), elapsed_seconds=1e9, tokens=10**9, steps=1) == 0.25


def test_warmup_counts_steps_from_the_first() -> None:
    schedule = ScheduleConfig(warmup_steps=4, warmdown_fraction=0.0)
    assert [lr_multiplier(0.1, step, schedule) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "quarter", "middle"), [("linear", 0.75, 0.5), ("cosine", 0.853553, 0.5), ("sqrt", 0.5, 0.292893)]
)
def test_warmdown_shapes(shape: Shape, quarter: float, middle: float) -> None:
    schedule = ScheduleConfig(warmdown_fraction=0.4, warmdown_shape=shape)
    assert lr_multiplier(0.6, 1, schedule) == 1.0
    assert lr_multiplier(0.7, 1, schedule) == pytest.approx(quarter, abs=1e-6)
    assert lr_multiplier(0.8, 1, schedule) == pytest.approx(middle, abs=1e-6)
    assert lr_multiplier(1.0, 1, schedule) == pytest.approx(0.0, abs=1e-12)


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
    early, late = (lr_multiplier(done, 0, schedule) for done in sorted((first, second)))
    assert 1.0 >= early >= late >= floor - 1e-12
    if fraction > 0:
        assert lr_multiplier(1.0, 0, schedule) == pytest.approx(floor, abs=1e-9)


def test_momentum_warms_up_by_steps() -> None:
    optimizer = OptimizerConfig(muon_momentum=0.9, muon_momentum_warmup_start=0.5, muon_momentum_warmup_steps=4)
    assert [muon_momentum(step, optimizer) for step in (0, 2, 4, 99)] == pytest.approx([0.5, 0.7, 0.9, 0.9])
    assert muon_momentum(0, optimizer.model_copy(update={"muon_momentum_warmup_steps": 0})) == 0.9


def test_planned_steps() -> None:
    assert planned_steps(LimitsConfig(steps=7), 100, elapsed_seconds=3, steps=2) == 7
    assert planned_steps(LimitsConfig(tokens=250), 100, elapsed_seconds=3, steps=2) == 3
    assert planned_steps(LimitsConfig(wallclock_seconds=30), 100, elapsed_seconds=3, steps=2) == 20
    assert planned_steps(LimitsConfig(wallclock_seconds=30, steps=9), 100, elapsed_seconds=3, steps=2) == 9
    assert planned_steps(LimitsConfig(wallclock_seconds=30), 100, elapsed_seconds=0, steps=0) == 1
    assert planned_steps(LimitsConfig(wallclock_seconds=30), 100, elapsed_seconds=31, steps=5) == 5
