"""Changes of state: every one goes through the domain's tables, and every decision leaves its row.

All functions work inside the caller's transaction and raise TransitionError for what a table does not allow,
NotFoundError for what is not there; the caller's transaction then stores nothing.
"""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from agent.domain.actions import (
    Action,
    Finish,
    Keep,
    Kill,
    Launch,
    MarkPaused,
    Requeue,
    Resume,
    Stop,
    Void,
    Wait,
    name_of,
)
from agent.domain.errors import LedgerError, NotFoundError, TransitionError
from agent.domain.specs import Metric
from agent.domain.trials import (
    LIVE_RUN_STATES,
    Result,
    RunEvent,
    RunKind,
    RunState,
    StopCause,
    TrialEvent,
    TrialState,
    next_run_state,
    next_trial_state,
)
from agent.ledger.column_types import clean_numbers
from agent.ledger.tables import DecisionRow, PointRow, RunRow, ScoreRow, TrialRow, has_val


def trial_row(session: Session, trial_id: int) -> TrialRow:
    row = session.get(TrialRow, trial_id)
    if row is None:
        raise NotFoundError(f"the ledger has no trial {trial_id}")
    return row


def run_row(session: Session, run_uuid: str) -> RunRow:
    row = session.scalar(select(RunRow).where(RunRow.uuid == run_uuid))
    if row is None:
        raise NotFoundError(f"the ledger has no run {run_uuid}")
    return row


def move_trial(trial: TrialRow, event: TrialEvent, at: datetime, reason: str | None = None) -> None:
    trial.state = next_trial_state(trial.state, event)
    trial.state_since = at
    if reason is not None:
        trial.reason = reason


def move_run(run: RunRow, event: RunEvent, at: datetime) -> None:
    run.state = next_run_state(run.state, event)
    if run.state not in LIVE_RUN_STATES and run.ended_at is None:
        run.ended_at = at


def intend(session: Session, action: Launch, *, run_uuid: str, directory: str, at: datetime) -> RunRow:
    """Store the intent of a run, before any process may exist."""
    trial = trial_row(session, action.trial_id)
    _refuse_live(session, trial, action.kind, "launch")
    if action.kind is RunKind.TRAIN:
        move_trial(trial, TrialEvent.LAUNCH, at, action.reason)
    elif trial.state is not TrialState.FINISHED or trial.result is not Result.COMPLETED:
        raise TransitionError(
            f"{action.kind} of trial {trial.id}, which is {trial.result or trial.state}: complete it first"
        )
    earlier = select(func.count()).select_from(RunRow).where(RunRow.trial_id == trial.id, RunRow.kind == action.kind)
    run = RunRow(
        uuid=run_uuid,
        trial_id=trial.id,
        kind=action.kind,
        attempt=(session.scalar(earlier) or 0) + 1,
        state=RunState.INTENDED,
        directory=directory,
        assignment=dataclasses.asdict(action.assignment),
        intended_at=at,
        killed=False,
        error="",
        last_lines=[],
        has_result=False,
        log_offset=0,
        log_problems=0,
    )
    session.add(run)
    decided(session, action, at, run_uuid)
    session.flush()
    return run


def launch_failed(session: Session, run_uuid: str, error: str, at: datetime) -> int:
    """The run was never started. Its trial's fate is the policy's. Returns the trial's id."""
    run = run_row(session, run_uuid)
    move_run(run, RunEvent.VANISH, at)
    run.error, run.claimed = error, False
    return run.trial_id


def stop_asked(session: Session, run_uuid: str, at: datetime) -> int:
    """The request of a stop reached the run only now. Returns the trial's id."""
    run = run_row(session, run_uuid)
    move_run(run, RunEvent.STOP, at)
    run.stop_asked_at = at
    return run.trial_id


def apply(session: Session, action: Action, at: datetime) -> None:  # noqa: PLR0912  # one branch per action
    """Store what an action changes, and the action itself as a decision."""
    trial = trial_row(session, action.trial_id)
    run_uuid: str | None = None
    match action:
        case Stop(run_uuid=run_uuid):
            _stop(trial, _own_run(session, trial, run_uuid), action, at)
        case Kill(run_uuid=run_uuid):
            run = _own_run(session, trial, run_uuid)
            if run.state not in LIVE_RUN_STATES:
                raise TransitionError(f"run {run_uuid} is {run.state}: there is nothing to kill")
        case Void(run_uuid=run_uuid):
            run = _own_run(session, trial, run_uuid)
            move_run(run, RunEvent.VANISH, at)
            run.error, run.claimed = action.reason, False
        case Finish(result=result, raw_bpb=raw_bpb):
            _refuse_live(session, trial, RunKind.TRAIN, "finish")
            move_trial(trial, TrialEvent.FINISH, at, action.reason)
            trial.result = result
            if raw_bpb is not None:
                _raw_score(session, trial, raw_bpb, at)
        case Requeue():
            _refuse_live(session, trial, RunKind.TRAIN, "requeue")
            move_trial(trial, TrialEvent.REQUEUE, at, action.reason)
        case MarkPaused():
            _refuse_live(session, trial, RunKind.TRAIN, "mark as paused")
            event = TrialEvent.PAUSE if trial.state is TrialState.QUEUED else TrialEvent.PAUSED
            move_trial(trial, event, at, action.reason)
        case Resume():
            move_trial(trial, TrialEvent.RESUME, at, action.reason)
        case Keep() if trial.state is TrialState.FINISHED:
            if trial.given_up:
                return
            trial.given_up = True
        case Keep(suspect=suspect):
            step = _last_val_step(session, trial) if suspect else None
            if step == trial.suspect_step:
                return  # Nothing new was said about the trial: not worth a row at every beat.
            trial.suspect_step = step
        case Wait():
            return
        case Launch():
            raise LedgerError("a launch is stored with intend(), which wants the run's uuid and folder")
    decided(session, action, at, run_uuid)


def decided(session: Session, action: Action, at: datetime, run_uuid: str | None) -> None:
    session.add(
        DecisionRow(
            trial_id=action.trial_id,
            run_uuid=run_uuid,
            at=at,
            kind=name_of(action),
            reason=action.reason,
            numbers=clean_numbers(action.numbers),
        )
    )


def _stop(trial: TrialRow, run: RunRow, action: Stop, at: datetime) -> None:
    move_run(run, RunEvent.STOP, at)
    run.stop_cause = action.cause
    # The deadline counts from the first request: the process has been told since then.
    run.stop_asked_at = run.stop_asked_at or at
    if run.kind is RunKind.TRAIN:
        event = TrialEvent.PAUSE if action.cause is StopCause.PAUSE else TrialEvent.STOP
        move_trial(trial, event, at, action.reason)


def _own_run(session: Session, trial: TrialRow, run_uuid: str) -> RunRow:
    run = run_row(session, run_uuid)
    if run.trial_id != trial.id:
        raise NotFoundError(f"run {run_uuid} belongs to trial {run.trial_id}, not to trial {trial.id}")
    return run


def _refuse_live(session: Session, trial: TrialRow, kind: RunKind, doing: str) -> None:
    live = session.scalar(
        select(RunRow).where(RunRow.trial_id == trial.id, RunRow.kind == kind, RunRow.state.in_(LIVE_RUN_STATES))
    )
    if live is not None:
        raise TransitionError(f"cannot {doing} trial {trial.id}: its {kind} run {live.uuid} is {live.state}, not over")


def _raw_score(session: Session, trial: TrialRow, bpb: float, at: datetime) -> None:
    if not math.isfinite(bpb):
        raise LedgerError(f"trial {trial.id}: a final of {bpb} BPB is no score")
    run_id = session.scalar(
        select(RunRow.id).where(RunRow.trial_id == trial.id, RunRow.kind == RunKind.TRAIN).order_by(RunRow.id.desc())
    )
    if run_id is None:
        raise TransitionError(f"trial {trial.id} has never run: it cannot have a score")
    add_score(session, trial, Metric.RAW, run_id=run_id, bpb=bpb, loss=None, at=at)


def add_score(
    session: Session, trial: TrialRow, metric: Metric, *, run_id: int, bpb: float, loss: float | None, at: datetime
) -> None:
    """Store a final. A later one of the same metric replaces the earlier: it belongs to the newer run."""
    row = session.scalar(select(ScoreRow).where(ScoreRow.trial_id == trial.id, ScoreRow.metric == metric))
    if row is None:
        row = ScoreRow(trial_id=trial.id, metric=metric)
        session.add(row)
    row.run_id, row.val_bpb, row.val_loss, row.track_key, row.recorded_at = run_id, bpb, loss, trial.track_key, at


def _last_val_step(session: Session, trial: TrialRow) -> int | None:
    query = (
        select(PointRow.step)
        .join(RunRow, RunRow.id == PointRow.run_id)
        .where(RunRow.trial_id == trial.id, RunRow.kind == RunKind.TRAIN, has_val())
    )
    return session.scalar(query.order_by(PointRow.run_id.desc(), PointRow.step.desc()).limit(1))
