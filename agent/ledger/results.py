"""What a run's `result.json` adds to the ledger: a score, an artifact, the weights' place; or a problem."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import PurePosixPath

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.domain.specs import Metric, Track
from agent.ledger.column_types import LARGEST_INTEGER
from agent.ledger.tables import ArtifactRow, RunRow, TrialRow
from agent.ledger.transitions import add_score
from trainer.report import EvaluateResult, ExportResult, TrainResult, parse_result

_FINAL_OF = {"plain": Metric.ARTIFACT, "sliding": Metric.SLIDING, "ttt": Metric.TTT}


def take_result(session: Session, trial: TrialRow, run: RunRow, text: str, at: datetime) -> str | None:
    """Store a result. Returns the problem if something about it could not be accepted, else None.

    A command's own `result.json` is not ours to read: its finals come from its log.
    """
    if Track.from_key(trial.track_key).val.startswith("name:"):
        return None
    try:
        result = parse_result(text, f"{run.directory}/result.json")
    except ValueError as error:
        return str(error)
    if result.kind != run.kind.value:
        return f"{run.directory}/result.json is a result of {result.kind}, but the run was to {run.kind}"
    match result:
        case TrainResult():
            run.has_result = True
            run.model_path = in_workspace(run.directory, result.model_path)
            run.params = result.params
            return _score(session, trial, run, result, at) or _averaged_score(session, trial, run, result, at)
        case ExportResult():
            return _artifact(session, trial, run, result)
        case EvaluateResult():
            run.has_result = True
            return _evaluation(session, trial, run, result, at)


def _artifact(session: Session, trial: TrialRow, run: RunRow, result: ExportResult) -> str | None:
    sizes = (result.artifact_bytes, result.weights_bytes, result.code_bytes, result.tokenizer_bytes)
    if any(not 0 <= size <= LARGEST_INTEGER for size in sizes) or not math.isfinite(result.max_abs_error):
        return f"{run.directory}/result.json tells sizes that no artifact can have: {sizes}"
    run.has_result = True
    session.add(
        ArtifactRow(
            trial_id=trial.id,
            run_id=run.id,
            path=in_workspace(run.directory, result.artifact_path),
            sha256=result.artifact_sha256,
            artifact_bytes=result.artifact_bytes,
            weights_bytes=result.weights_bytes,
            code_bytes=result.code_bytes,
            tokenizer_bytes=result.tokenizer_bytes,
            scheme=result.scheme,
            max_abs_error=result.max_abs_error,
        )
    )
    return None


def _evaluation(session: Session, trial: TrialRow, run: RunRow, result: EvaluateResult, at: datetime) -> str | None:
    if result.source_kind != "artifact":
        return f"{run.directory}/result.json scored {result.source_path}, which is no artifact; no score was stored"
    newest = select(ArtifactRow.sha256).where(ArtifactRow.trial_id == trial.id).order_by(ArtifactRow.id.desc()).limit(1)
    expected = session.scalar(newest)
    if result.source_sha256 != expected:
        return (
            f"{run.directory}/result.json scored bytes with hash {result.source_sha256}, but the artifact of trial "
            f"{trial.id} has {expected or 'not been made'}; no score was stored"
        )
    return _score(session, trial, run, result, at)


def _score(
    session: Session, trial: TrialRow, run: RunRow, result: TrainResult | EvaluateResult, at: datetime
) -> str | None:
    if not (math.isfinite(result.val_bpb) and math.isfinite(result.val_loss) and result.val_bpb > 0):
        return f"{run.directory}/result.json tells val_bpb {result.val_bpb}, val_loss {result.val_loss}: no score"
    track = Track.from_key(trial.track_key)
    if result.val_sha256[:12] != track.val:
        return (
            f"{run.directory}/result.json was scored on validation set {result.val_sha256[:12]}, but trial {trial.id} "
            f"belongs to track {track.key}; no score was stored. Was the data set changed after the spec was enqueued?"
        )
    add_score(session, trial, _final(result), run_id=run.id, bpb=result.val_bpb, loss=result.val_loss, at=at)
    return None


def _averaged_score(session: Session, trial: TrialRow, run: RunRow, result: TrainResult, at: datetime) -> str | None:
    """The final of the average of the weights, if there is one, once the raw one was accepted."""
    bpb, loss = result.averaged_val_bpb, result.averaged_val_loss
    if bpb is None or loss is None:
        return None
    if not (math.isfinite(bpb) and math.isfinite(loss) and bpb > 0):
        return f"{run.directory}/result.json tells averaged_val_bpb {bpb}, averaged_val_loss {loss}: no score"
    add_score(session, trial, Metric.EMA, run_id=run.id, bpb=bpb, loss=loss, at=at)
    return None


def _final(result: TrainResult | EvaluateResult) -> Metric:
    """Which of the finals a score is. A sliding score is never taken for the plain one of the artifact."""
    if isinstance(result, TrainResult):
        return Metric.RAW
    return _FINAL_OF[result.metric]


def in_workspace(directory: str, path: str) -> str:
    """A path that a run told, relative to the workspace where it can be; `directory` is the run's folder there.

    Trainers are given absolute paths, and a workspace may be moved: `/anywhere/runs/a-1/train-1-x/model.pt` becomes
    `runs/a-1/train-1-x/model.pt`. A path relative to the run's folder is set below it.
    """
    given, folder = PurePosixPath(path), PurePosixPath(directory)
    length = len(folder.parts)
    for start in range(len(given.parts) - length, -1, -1):
        if given.parts[start : start + length] == folder.parts:
            return str(PurePosixPath(*given.parts[start:]))
    return str(given if given.is_absolute() else folder / given)
