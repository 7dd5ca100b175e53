"""How far the power law is off on real curves, and how often the divergence rule would have stopped a good run.

    python benchmarks/curves.py CURVES.jsonl[.xz]

One JSON object a line: `points` (each with `step` and `val_bpb` or `train_loss`), `true_final_step`, and optionally
`duplicate_of`. The horizon is the true final step, which is kinder than extrapolating a clock. Runs that end
with fewer than six validation points, or without one at their last step, are left out of the first table.
"""

from __future__ import annotations

import json
import lzma
import statistics
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.decisions.divergence import judge_divergence
from agent.decisions.projection.laws import Curve, LawFit
from agent.decisions.projection.power_law import PowerLaw
from agent.decisions.thresholds import DivergencePolicy
from agent.domain.actions import Assignment
from agent.domain.observations import LogPoint
from agent.domain.specs import Spec, track_of
from agent.domain.trials import RunKind, RunState, TrialState
from agent.domain.views import RunView, TrialView

PREFIXES = (0.3, 0.5, 0.7)
MINIMUM_POINTS = 6
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def main() -> None:
    runs = list(read(Path(sys.argv[1])))
    projection_errors(runs)
    false_stops(runs)


def read(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        for line in file:
            run = json.loads(line)
            if run["points"] and not run.get("duplicate_of"):
                yield run


def projection_errors(runs: list[dict[str, Any]]) -> None:
    print("prefix  runs  median error  median |error|  relative  in 90% interval  last value's error")
    for prefix in PREFIXES:
        errors, relative, inside, last = [], [], [], []
        for run in runs:
            horizon = run.get("true_final_step")
            points = [(p["step"], p["val_bpb"]) for p in run["points"] if p.get("val_bpb") and p["step"] > 0]
            final = dict(points).get(horizon)
            seen = [(float(step), bpb) for step, bpb in points if horizon and step <= prefix * horizon]
            if final is None or len(points) < MINIMUM_POINTS:
                continue
            fit = PowerLaw().fit(Curve.of(seen), float(horizon))
            if isinstance(fit, LawFit):
                errors.append(fit.final_bpb - final)
                relative.append(abs(fit.final_bpb - final) / final)
                inside.append(fit.low90 <= final <= fit.high90)
                last.append(seen[-1][1] - final)
        if errors:
            print(
                f"{prefix:5.0%} {len(errors):6d} {statistics.median(errors):+13.4f} "
                f"{statistics.median(map(abs, errors)):15.4f} {statistics.median(relative):9.2%} "
                f"{statistics.mean(inside):16.2f} {statistics.median(last):19.4f}"
            )


def false_stops(runs: list[dict[str, Any]]) -> None:
    """Replay each run's losses, all of them below 400 points and every 20th prefix above."""
    stopped, prefixes = [], 0
    for run in runs:
        points = [
            LogPoint(step=p["step"], train_loss=p.get("train_loss"), val_bpb=p.get("val_bpb")) for p in run["points"]
        ]
        losses = [point for point in points if point.train_loss is not None]
        scores = [point for point in points if point.val_bpb is not None]
        for count in range(1, len(losses) + 1, 1 if len(losses) < 400 else 20):
            prefixes += 1
            here = losses[count - 1].step
            verdict = judge_divergence(
                _trial(losses[max(0, count - 200) : count], [p for p in scores if p.step <= here]), DivergencePolicy()
            )
            if verdict is not None:
                stopped.append((run["id"], verdict.reason))
                break
    print(f"divergence: {len(stopped)} of {len(runs)} runs stopped, {prefixes} prefixes judged")
    for name, reason in stopped:
        print(f"  {name}: {reason}")


def _trial(losses: list[LogPoint], scores: list[LogPoint]) -> TrialView:
    spec = Spec.model_validate({"name": "replayed", "trainer": {}, "limits": {"steps": 1_000_000}})
    run = RunView(
        run_uuid="replayed",
        trial_id=1,
        kind=RunKind.TRAIN,
        attempt=1,
        state=RunState.RUNNING,
        directory="",
        assignment=Assignment(cpu_slots=1),
        intended_at=NOW,
    )
    return TrialView(
        trial_id=1,
        name=spec.name,
        seed=1,
        spec=spec,
        track=track_of(spec, "00" * 32),
        state=TrialState.RUNNING,
        state_since=NOW,
        enqueued_at=NOW,
        runs=(run,),
        val_curve=tuple(scores),
        train_curve=tuple(losses),
    )


if __name__ == "__main__":
    main()
