"""Analysing a file: score it with every token's loss kept, and write down what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.analysis.findings import ANALYSIS_NAME, AnalysisError
from trainer.analysis.measuring import LossCollector
from trainer.analysis.measuring import analyse as measure
from trainer.durable import write_whole
from trainer.ranks import Ranks
from trainer.scoring import Scoring, ScoringRequest


def analyse(request: ScoringRequest, out: Path, *, say: Callable[[str], None]) -> Path:
    """Score and write `out/analysis.json`; returns its path. Raises OSError, InputError, or OutOfMemoryError."""
    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        raise AnalysisError(f"an analysis is one process, not {ranks.world_size}: start it without torchrun")
    scoring = Scoring.open(request)
    collector = LossCollector(scoring.validation.positions, scoring.device)
    result = scoring.run(on_scored=[collector], say=say)
    found = measure(
        result, collector.losses(), plan=scoring.plan, validation=scoring.validation, dataset=scoring.dataset
    )
    path = out / ANALYSIS_NAME
    write_whole(path, found.to_json().encode("utf-8"))
    return path
