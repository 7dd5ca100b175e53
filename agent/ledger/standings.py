"""Leaderboards: the best trials of each track, on one metric. Over budget is listed, and is never best.

Scores are compared within a track only. A track ranks on ARTIFACT as soon as one of its trials has an artifact
score, because the artifact is what counts in the end; trials without one follow, by RAW.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import exists, func, not_, or_, select
from sqlalchemy.orm import Session, aliased

from agent.domain.specs import Metric, Track
from agent.domain.trials import Result, RunKind, TrialState
from agent.ledger.tables import ArtifactRow, ExperimentRow, RunRow, ScoreRow, TrialRow

_IDS_PER_QUERY = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardRow:
    """One line of a leaderboard. BPB values are finals on the validation set of the track."""

    place: int | None
    """Counts from 1; None for a trial that cannot be best: over budget, not completed, or without the metric."""
    trial_id: int
    name: str
    seed: int
    raw_bpb: float | None
    ema_bpb: float | None
    artifact_bpb: float | None
    sliding_bpb: float | None
    ttt_bpb: float | None
    artifact_bytes: int | None
    budget_bytes: int
    over_budget: bool
    params: int | None
    state: TrialState
    result: Result | None

    @property
    def key(self) -> str:
        return f"{self.name}@{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    track: Track
    metric: Metric
    """What `place` goes by."""
    rows: tuple[BoardRow, ...]


def leaderboards(session: Session, limit: int, metric: Metric | None, track: str | None) -> tuple[Leaderboard, ...]:
    """Boards by track key, of at most `limit` rows each.

    Each board is a walk along the index of its track and metric that ends after `limit` rows, so that ten rows out
    of ten thousand trials cost ten rows.
    """
    keys = session.scalars(select(ScoreRow.track_key).distinct().order_by(ScoreRow.track_key)).all()
    boards: list[Leaderboard] = []
    for key in (key for key in keys if track in {None, key}):
        own = Track.from_key(key)
        ranking = metric or _ranking(session, key)
        placed = _pick(session, own, ranking, limit, eligible=True)
        others: list[int] = []
        if ranking is not Metric.RAW and len(placed) < limit:
            others += _pick(session, own, Metric.RAW, limit - len(placed), eligible=True, lacking=ranking)
        if (room := limit - len(placed) - len(others)) > 0:
            others += _pick(session, own, Metric.RAW, room, eligible=False)
        boards.append(Leaderboard(track=own, metric=ranking, rows=_board_rows(session, own, placed, others)))
    return tuple(boards)


def _ranking(session: Session, key: str) -> Metric:
    scored = select(ScoreRow.id).where(ScoreRow.track_key == key, ScoreRow.metric == Metric.ARTIFACT).limit(1)
    return Metric.RAW if session.scalar(scored) is None else Metric.ARTIFACT


def _pick(
    session: Session, track: Track, metric: Metric, limit: int, *, eligible: bool, lacking: Metric | None = None
) -> list[int]:
    """Trials by their final of one metric. Eligible: completed, and not known to be over budget."""
    newest_size = (
        select(ArtifactRow.artifact_bytes)
        .where(ArtifactRow.trial_id == ScoreRow.trial_id)
        .order_by(ArtifactRow.id.desc())
        .limit(1)
        .correlate(ScoreRow)
        .scalar_subquery()
    )
    size = func.coalesce(newest_size, 0)
    completed = TrialRow.result == Result.COMPLETED
    query = (
        select(ScoreRow.trial_id)
        .join(TrialRow, TrialRow.id == ScoreRow.trial_id)
        .where(ScoreRow.track_key == track.key, ScoreRow.metric == metric)
        # Equals in order of arrival; the score's own id, because the index ends with it.
        .order_by(ScoreRow.val_bpb, ScoreRow.id)
        .limit(limit)
    )
    if eligible:
        query = query.where(completed, size <= track.budget_bytes)
    else:
        query = query.where(or_(TrialRow.result.is_(None), not_(completed), size > track.budget_bytes))
    if lacking is not None:
        other = aliased(ScoreRow)
        query = query.where(~exists().where(other.trial_id == ScoreRow.trial_id, other.metric == lacking))
    return list(session.scalars(query))


def _board_rows(session: Session, track: Track, placed: list[int], others: list[int]) -> tuple[BoardRow, ...]:
    """The rows to show, with everything that a board tells."""
    ids = placed + others
    bpb: dict[tuple[int, Metric], float] = {}
    sizes: dict[int, int] = {}
    params: dict[int, int | None] = {}
    trials: dict[int, tuple[str, int, TrialState, Result | None]] = {}
    for start in range(0, len(ids), _IDS_PER_QUERY):
        some = ids[start : start + _IDS_PER_QUERY]
        scores = select(ScoreRow.trial_id, ScoreRow.metric, ScoreRow.val_bpb).where(ScoreRow.trial_id.in_(some))
        bpb |= {(trial_id, metric): value for trial_id, metric, value in session.execute(scores)}
        made = select(ArtifactRow.trial_id, ArtifactRow.artifact_bytes).where(ArtifactRow.trial_id.in_(some))
        sizes |= dict(session.execute(made.order_by(ArtifactRow.id)).all())
        trained = select(RunRow.trial_id, RunRow.params).where(
            RunRow.trial_id.in_(some), RunRow.kind == RunKind.TRAIN, RunRow.params.is_not(None)
        )
        params |= dict(session.execute(trained.order_by(RunRow.id)).all())
        named = select(TrialRow.id, ExperimentRow.name, TrialRow.seed, TrialRow.state, TrialRow.result).join(
            ExperimentRow, ExperimentRow.id == TrialRow.experiment_id
        )
        for trial_id, name, seed, state, result in session.execute(named.where(TrialRow.id.in_(some))):
            trials[trial_id] = (name, seed, state, result)
    rows: list[BoardRow] = []
    for position, trial_id in enumerate(ids, start=1):
        name, seed, state, result = trials[trial_id]
        artifact_bytes = sizes.get(trial_id)
        rows.append(
            BoardRow(
                place=position if position <= len(placed) else None,
                trial_id=trial_id,
                name=name,
                seed=seed,
                raw_bpb=bpb.get((trial_id, Metric.RAW)),
                ema_bpb=bpb.get((trial_id, Metric.EMA)),
                artifact_bpb=bpb.get((trial_id, Metric.ARTIFACT)),
                sliding_bpb=bpb.get((trial_id, Metric.SLIDING)),
                ttt_bpb=bpb.get((trial_id, Metric.TTT)),
                artifact_bytes=artifact_bytes,
                budget_bytes=track.budget_bytes,
                over_budget=artifact_bytes is not None and artifact_bytes > track.budget_bytes,
                params=params.get(trial_id),
                state=state,
                result=result,
            )
        )
    return tuple(rows)
