"""Curves of a trial out of the points of its runs: a resumed run's points replace those that were lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Subquery, func, select, union_all
from sqlalchemy.orm import Session

from agent.domain.observations import LogPoint
from agent.domain.trials import RunKind
from agent.ledger.tables import PointRow, RunRow, has_val

TRAIN_TAIL = 200
"""Training points of an unfinished trial that a view carries: what divergence and a report look at."""

_TAILS_PER_QUERY = 100
"""SQLite takes at most 500 SELECTs in one UNION."""

_POINT = (
    PointRow.run_id,
    PointRow.step,
    PointRow.tokens,
    PointRow.elapsed_seconds,
    PointRow.train_loss,
    PointRow.val_loss,
    PointRow.val_bpb,
)
_PointValues = Sequence[Any]
"""The values of `_POINT`, as the driver gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPoints:
    """One training run's points as they were read, and the step after which its own begin."""

    points: tuple[LogPoint, ...]
    kept_until: int | None
    """Earlier runs' points are valid up to this step; None if the run has said nothing yet."""


def merge(runs: Iterable[RunPoints]) -> tuple[LogPoint, ...]:
    """Points over all runs by step; of two at one step the later one counts."""
    by_step: dict[int, LogPoint] = {}
    for run in runs:
        if run.kept_until is not None:
            by_step = {step: point for step, point in by_step.items() if step <= run.kept_until}
        by_step.update((point.step, point) for point in run.points)
    return tuple(by_step[step] for step in sorted(by_step))


def val_curves(session: Session, runs: Sequence[RunRow]) -> dict[int, tuple[LogPoint, ...]]:
    """Validation curves by trial id, over all training runs given (oldest first)."""
    query = select(*_POINT).where(PointRow.run_id.in_([run.id for run in _training(runs)]), has_val())
    return _curves(session, runs, session.execute(query.order_by(PointRow.id)))


def train_tails(session: Session, runs: Sequence[RunRow]) -> dict[int, tuple[LogPoint, ...]]:
    """The last training points by trial id. One index search per run, many runs a query."""
    wanted = [run.id for run in _training(runs)]
    rows: list[_PointValues] = []
    for start in range(0, len(wanted), _TAILS_PER_QUERY):
        tails = [select(*_tail(run_id).c) for run_id in wanted[start : start + _TAILS_PER_QUERY]]
        rows += session.execute(union_all(*tails)).all()
    rows.reverse()
    return {trial_id: curve[-TRAIN_TAIL:] for trial_id, curve in _curves(session, runs, rows).items()}


def _tail(run_id: int) -> Subquery:
    newest_first = select(*_POINT).where(PointRow.run_id == run_id, PointRow.train_loss.is_not(None))
    return newest_first.order_by(PointRow.step.desc(), PointRow.id.desc()).limit(TRAIN_TAIL).subquery()


def _training(runs: Sequence[RunRow]) -> list[RunRow]:
    return [run for run in runs if run.kind is RunKind.TRAIN]


def _curves(session: Session, runs: Sequence[RunRow], rows: Iterable[_PointValues]) -> dict[int, tuple[LogPoint, ...]]:
    by_run: dict[int, list[LogPoint]] = {}
    for run_id, step, tokens, seconds, train_loss, val_loss, val_bpb in rows:
        point = LogPoint(
            step=step,
            tokens=tokens,
            elapsed_seconds=seconds,
            train_loss=train_loss,
            val_loss=val_loss,
            val_bpb=val_bpb,
        )
        by_run.setdefault(run_id, []).append(point)
    by_trial: dict[int, list[RunRow]] = {}
    for run in _training(runs):
        by_trial.setdefault(run.trial_id, []).append(run)
    firsts = _first_steps(session, [run for trial in by_trial.values() for run in trial[1:] if _resumed(run) is None])
    return {
        trial_id: merge(
            RunPoints(points=tuple(by_run.get(run.id, ())), kept_until=_kept_until(run, firsts)) for run in trial
        )
        for trial_id, trial in by_trial.items()
    }


def _resumed(run: RunRow) -> int | None:
    """The step that a run says it went on from, in its header."""
    resumed = (run.header or {}).get("resumed_step")
    return resumed if isinstance(resumed, int) else None


def _kept_until(run: RunRow, first_steps: Mapping[int, int]) -> int | None:
    if (resumed := _resumed(run)) is not None:
        return resumed
    first = first_steps.get(run.id)
    return None if first is None else first - 1


def _first_steps(session: Session, runs: Sequence[RunRow]) -> dict[int, int]:
    """First logged step of resumed runs that do not say from where they went on. Few, so searched one by one."""
    if not runs:
        return {}
    first = select(func.min(PointRow.step)).where(PointRow.run_id == RunRow.id).correlate(RunRow).scalar_subquery()
    query = select(RunRow.id, first).where(RunRow.id.in_([run.id for run in runs]))
    return {run_id: step for run_id, step in session.execute(query) if step is not None}
