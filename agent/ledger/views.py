"""From rows to the frozen views that decisions and the CLI see: a handful of queries, however many trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from agent.domain.actions import Assignment
from agent.domain.specs import Metric, Spec, Track
from agent.domain.trials import RunKind, TrialState
from agent.domain.views import ArtifactView, LedgerView, PendingCommand, RunView, TrialView
from agent.ledger.curves import train_tails, val_curves
from agent.ledger.tables import (
    ArtifactRow,
    CommandRow,
    CommandState,
    ExperimentRow,
    PointRow,
    RunRow,
    ScoreRow,
    TrialRow,
)

_TRIALS_PER_QUERY = 1000


class ViewBuilder:
    """Builds views, and remembers the trials that are finished.

    Whoever writes about a trial calls `forget`; only the one writer may therefore keep a builder over
    transactions. A reader makes a new one for each look.
    """

    def __init__(self) -> None:
        self._specs: dict[int, Spec] = {}
        self._finished: dict[int, TrialView] = {}

    def forget(self, trial_id: int) -> None:
        self._finished.pop(trial_id, None)

    def view(self, session: Session, at: datetime) -> LedgerView:
        """Every trial, by id, and the commands that wait."""
        ids = list(session.scalars(select(TrialRow.id).order_by(TrialRow.id)))
        views = {trial_id: self._finished[trial_id] for trial_id in ids if trial_id in self._finished}
        for trial in self.trials(session, [trial_id for trial_id in ids if trial_id not in views]):
            views[trial.trial_id] = trial
            if trial.state is TrialState.FINISHED:
                self._finished[trial.trial_id] = trial
        waiting = select(CommandRow).where(CommandRow.state == CommandState.PENDING).order_by(CommandRow.id)
        commands = tuple(
            PendingCommand(command_id=row.command_id, verb=row.verb, trial_id=row.trial_id)
            for row in session.scalars(waiting)
        )
        return LedgerView(at=at, trials=tuple(views[trial_id] for trial_id in ids), commands=commands)

    def trials(self, session: Session, ids: Sequence[int]) -> Iterator[TrialView]:
        """Views of these trials, in the order given."""
        for start in range(0, len(ids), _TRIALS_PER_QUERY):
            yield from self._chunk(session, ids[start : start + _TRIALS_PER_QUERY])

    def _chunk(self, session: Session, ids: Sequence[int]) -> Iterator[TrialView]:
        self._load_specs(session, ids)
        query = (
            select(TrialRow, ExperimentRow.name, ExperimentRow.enqueued_at)
            .join(ExperimentRow, ExperimentRow.id == TrialRow.experiment_id)
            .where(TrialRow.id.in_(ids))
        )
        found = {row.id: (row, name, enqueued_at) for row, name, enqueued_at in session.execute(query)}
        runs = list(session.scalars(select(RunRow).where(RunRow.trial_id.in_(ids)).order_by(RunRow.id)))
        runs_of: dict[int, list[RunRow]] = {}
        for run in runs:
            runs_of.setdefault(run.trial_id, []).append(run)
        scores: dict[int, dict[Metric, float]] = {}
        for trial_id, metric, bpb in session.execute(
            select(ScoreRow.trial_id, ScoreRow.metric, ScoreRow.val_bpb).where(ScoreRow.trial_id.in_(ids))
        ):
            scores.setdefault(trial_id, {})[metric] = bpb
        artifacts = {
            row.trial_id: artifact_view(row, uuid)
            for row, uuid in session.execute(
                select(ArtifactRow, RunRow.uuid)
                .join(RunRow, RunRow.id == ArtifactRow.run_id)
                .where(ArtifactRow.trial_id.in_(ids))
                .order_by(ArtifactRow.id)
            )
        }
        open_runs = [run for run in runs if found[run.trial_id][0].state is not TrialState.FINISHED]
        val, train = val_curves(session, runs), train_tails(session, open_runs)
        furthest = _last_steps(session, [run.id for run in open_runs])
        for trial_id in ids:
            row, name, enqueued_at = found[trial_id]
            own = runs_of.get(trial_id, [])
            trained = [run for run in reversed(own) if run.kind is RunKind.TRAIN]
            yield TrialView(
                trial_id=trial_id,
                name=name,
                seed=row.seed,
                spec=self._specs[row.experiment_id],
                track=Track.from_key(row.track_key),
                state=row.state,
                state_since=row.state_since,
                enqueued_at=enqueued_at,
                result=row.result,
                reason=row.reason,
                runs=tuple(run_view(run, furthest.get(run.id)) for run in own),
                val_curve=val.get(trial_id, ()),
                train_curve=train.get(trial_id, ()),
                tokens_per_step=next((run.header["tokens_per_step"] for run in trained if run.header), None),
                scores=scores.get(trial_id, {}),
                artifact=artifacts.get(trial_id),
                model_path=next((run.model_path for run in trained if run.model_path), None),
                suspect_step=row.suspect_step,
                given_up=row.given_up,
            )

    def _load_specs(self, session: Session, trial_ids: Sequence[int]) -> None:
        """Specs never change, so each is parsed once."""
        wanted = set(session.scalars(select(TrialRow.experiment_id).where(TrialRow.id.in_(trial_ids))))
        missing = sorted(wanted - self._specs.keys())
        query = select(ExperimentRow.id, ExperimentRow.spec_json).where(ExperimentRow.id.in_(missing))
        for experiment_id, text in session.execute(query) if missing else ():
            self._specs[experiment_id] = Spec.model_validate_json(text)


def _last_steps(session: Session, run_ids: Sequence[int]) -> dict[int, int | None]:
    """The highest step of each run's own points: one look into the index a run, however many points it has."""
    highest = select(func.max(PointRow.step)).where(PointRow.run_id == RunRow.id).scalar_subquery()
    found = session.execute(select(RunRow.id, highest).where(RunRow.id.in_(run_ids)))
    return {run_id: step for run_id, step in found}  # noqa: C416  # rows are no pairs to a type checker


def run_view(row: RunRow, last_step: int | None = None) -> RunView:
    return RunView(
        run_uuid=row.uuid,
        trial_id=row.trial_id,
        kind=row.kind,
        attempt=row.attempt,
        state=row.state,
        directory=row.directory,
        assignment=Assignment(gpu_uuids=tuple(row.assignment["gpu_uuids"]), cpu_slots=int(row.assignment["cpu_slots"])),
        intended_at=row.intended_at,
        pid=row.pid,
        stop_cause=row.stop_cause,
        stop_asked_at=row.stop_asked_at,
        returncode=row.returncode,
        killed=row.killed,
        ended_at=row.ended_at,
        error=row.error,
        errno=row.errno,
        last_lines=tuple(row.last_lines),
        claimed=row.claimed,
        has_result=row.has_result,
        last_progress_at=row.last_progress_at,
        log_offset=row.log_offset,
        last_step=last_step,
    )


def artifact_view(row: ArtifactRow, run_uuid: str) -> ArtifactView:
    return ArtifactView(
        run_uuid=run_uuid,
        path=row.path,
        sha256=row.sha256,
        artifact_bytes=row.artifact_bytes,
        weights_bytes=row.weights_bytes,
        code_bytes=row.code_bytes,
        tokenizer_bytes=row.tokenizer_bytes,
        scheme=row.scheme,
    )
