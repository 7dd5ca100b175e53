"""Merging the curves of a trial's runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.domain.observations import LogPoint
from agent.ledger.curves import RunPoints, merge


def points(*steps: int, bpb: float = 2.0) -> tuple[LogPoint, ...]:
    return tuple(LogPoint(step=step, val_bpb=bpb) for step in steps)


def steps(*runs: RunPoints) -> list[int]:
    return [point.step for point in merge(runs)]


def test_a_resumed_run_replaces_what_was_lost() -> None:
    assert steps(
        RunPoints(points=points(10, 20, 30), kept_until=0), RunPoints(points=points(25, 35), kept_until=20)
    ) == [10, 20, 25, 35]


def test_a_run_from_the_start_replaces_everything_at_once() -> None:
    assert steps(RunPoints(points=points(10, 20), kept_until=0), RunPoints(points=(), kept_until=0)) == []


def test_a_run_that_has_said_nothing_yet_replaces_nothing() -> None:
    assert steps(RunPoints(points=points(10), kept_until=0), RunPoints(points=(), kept_until=None)) == [10]


def test_of_two_points_at_one_step_the_later_counts() -> None:
    first = RunPoints(points=points(10, 20, bpb=2.0), kept_until=0)
    assert merge([first, RunPoints(points=points(20, bpb=1.0), kept_until=20)])[1].val_bpb == 1.0
    assert merge([RunPoints(points=points(5, bpb=2.0) + points(5, bpb=1.0), kept_until=None)])[0].val_bpb == 1.0


_STEPS = st.lists(st.integers(0, 100), max_size=10)


@given(st.lists(st.tuples(_STEPS, st.none() | st.integers(0, 100)), max_size=5))
def test_curves_rise_strictly_and_the_last_run_is_whole(runs: list[tuple[list[int], int | None]]) -> None:
    merged = steps(*(RunPoints(points=points(*own), kept_until=kept) for own, kept in runs))
    assert merged == sorted(set(merged))
    if runs:
        own, kept = runs[-1]
        assert set(own) <= set(merged)
        assert kept is None or all(step <= kept or step in own for step in merged)
