"""New log lines into the ledger: points, events and header, with the offset that they reach to."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from agent.domain.observations import LogHeader, LogPoint, LogReading
from agent.ledger.column_types import LARGEST_INTEGER, clean
from agent.ledger.tables import EventRow, PointRow, RunRow

_DETAIL_CHARACTERS = 2000


def take_reading(session: Session, run: RunRow, reading: LogReading, at: datetime) -> str | None:
    """Store a reading if it goes on where the ledger stands; returns a problem or None.

    A repeated one is passed over: it begins where the ledger no longer stands. One of a log that shrank counts
    if it ends before the place the ledger knew, which is what shrinking means; after that it is a repetition too.
    """
    goes_on = reading.start_offset == run.log_offset and reading.offset > run.log_offset
    begins_anew = reading.restarted and reading.offset < run.log_offset
    if not goes_on and not begins_anew:
        if reading.start_offset > run.log_offset:
            return (
                f"the log of run {run.uuid} was read from byte {reading.start_offset}, but the ledger stands at "
                f"{run.log_offset}; the reading was not stored and will be read again"
            )
        return None
    if reading.header is not None:
        run.header = header_json(reading.header)
        run.params = reading.header.params
    tokens_per_step = (run.header or {}).get("tokens_per_step")
    rows, odd, broken = _point_rows(run.id, reading.points, tokens_per_step)
    if rows:
        session.execute(insert(PointRow), rows)
    for event in reading.events:
        step = event.step if event.step is not None and 0 <= event.step <= LARGEST_INTEGER else None
        _event(session, run, at, kind=event.kind[:200], step=step, detail=event.detail)
    if odd:
        first = odd[0]
        more = f" (and {len(odd) - 1} more points)" if len(odd) > 1 else ""
        values = f"train_loss {first.train_loss}, val_loss {first.val_loss}, val_bpb {first.val_bpb}"
        _event(session, run, at, kind="non_finite", step=first.step, detail=f"{values} at step {first.step}{more}")
    run.log_problems += reading.unreadable_lines + broken
    run.log_offset = reading.offset
    run.last_progress_at = at
    return None


def header_json(header: LogHeader) -> dict[str, Any]:
    """The facts of a header; of its text only the step that a resumed run goes on from."""
    try:
        told = json.loads(header.text)
    except ValueError:
        told = None
    resumed = told.get("resumed_step") if isinstance(told, dict) else None
    return {
        "params": header.params,
        "tokens_per_step": header.tokens_per_step,
        "val_sha256": clean(header.val_sha256),
        "device": clean(header.device),
        "resumed_step": resumed if isinstance(resumed, int) else None,
        "text": clean(header.text),
    }


def _point_rows(
    run_id: int, points: tuple[LogPoint, ...], tokens_per_step: int | None
) -> tuple[list[dict[str, Any]], list[LogPoint], int]:
    """Rows to insert, the points with a value that is not finite, and how many points no table can hold."""
    rows: list[dict[str, Any]] = []
    odd: list[LogPoint] = []
    broken = 0
    for point in points:
        tokens = point.tokens
        if tokens is None and tokens_per_step is not None:
            tokens = point.step * tokens_per_step
        if not 0 <= point.step <= LARGEST_INTEGER or (tokens is not None and not 0 <= tokens <= LARGEST_INTEGER):
            broken += 1
            continue
        values = (point.train_loss, point.val_loss, point.val_bpb)
        if any(value is not None and not math.isfinite(value) for value in values):
            odd.append(point)
        train_loss, val_loss, val_bpb = (_storable(value) for value in values)
        elapsed = point.elapsed_seconds
        rows.append(
            {
                "run_id": run_id,
                "step": point.step,
                "tokens": tokens,
                "elapsed_seconds": elapsed if elapsed is None or math.isfinite(elapsed) else None,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_bpb": val_bpb,
            }
        )
    return rows, odd, broken


def _storable(value: float | None) -> float | None:
    """SQLite turns NaN into NULL without a word; infinity stays, and is just as far from any good loss."""
    return value if value is None or math.isfinite(value) else math.inf


def _event(session: Session, run: RunRow, at: datetime, *, kind: str, step: int | None, detail: str) -> None:
    session.add(
        EventRow(at=at, trial_id=run.trial_id, run_id=run.id, kind=kind, step=step, detail=detail[:_DETAIL_CHARACTERS])
    )
