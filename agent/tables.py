"""Answers as tables for people and as JSON for programs. The only module besides the verbs that prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.domain.budget import BudgetVerdict
from agent.domain.specs import Metric
from agent.domain.views import TrialView

if TYPE_CHECKING:
    from agent.doctor import Check
    from agent.domain.beats import BeatReport
    from agent.ledger.queries import (
        BoardRow,
        CommandRecord,
        DecisionRecord,
        EventRecord,
        HeartbeatRecord,
        Leaderboard,
        ProjectionRecord,
    )
    from trainer.sizing import SizeEstimate


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        _reader_has_gone()


def _reader_has_gone() -> NoReturn:
    """`caddie runs | head` is no error. What Python still wants to flush at its end goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _console() -> Console:
    """Not on a terminal there is no width to respect: a table in a file or a pipe is never cut."""
    return _Terminal() if sys.stdout.isatty() else _Terminal(width=240)


def say(text: str) -> None:
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Dataclasses and pydantic values become objects, times ISO 8601 in UTC. NaN and infinity become null."""
    # pydantic's own writer is the one that turns numbers which JSON does not know into null, at any depth.
    try:
        print(to_json(value, indent=2, inf_nan_mode="null").decode(), flush=True)  # noqa: T201
    except BrokenPipeError:
        _reader_has_gone()


class _Cells:
    """A table whose cells are taken literally: a reason may hold what Rich would read as markup."""

    def __init__(self, *columns: str, title: str = "") -> None:
        self._table = Table(
            *columns, title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold"
        )

    def add(self, *cells: str, style: str = "") -> None:
        self._table.add_row(*(Text(cell, style=style) for cell in cells))

    def show(self) -> None:
        _console().print(self._table)


def _bpb(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def summary(trial: TrialView, record: ProjectionRecord | None = None) -> dict[str, Any]:
    """A trial in a few flat fields, the JSON of `runs` and `queue`."""
    projection = record.projection if record else None
    run = trial.runs[-1] if trial.runs else None
    return {
        "trial_id": trial.trial_id,
        "trial": trial.key,
        "state": trial.state,
        "result": trial.result,
        "reason": trial.reason,
        "priority": trial.spec.priority,
        "track": trial.track.key,
        "progress": trial.progress,
        "step": trial.last_point.step if trial.last_point else None,
        "val_bpb": trial.val_curve[-1].val_bpb if trial.val_curve else None,
        "scores": trial.scores,
        "projected_bpb": projection.final_bpb if projection else None,
        "projected_90": [projection.low90, projection.high90] if projection else None,
        "pid": run.pid if run else None,
        "run": run.run_uuid if run else None,
        "train_runs": len([r for r in trial.runs if r.kind == "train"]),
        "directory": run.directory if run else None,
    }


def queue(waiting: Sequence[TrialView], reasons: Mapping[str, str], files: Sequence[str]) -> None:
    """`reasons`: by trial, what the last heartbeat said that it waits for."""
    table = _Cells("id", "trial", "state", "priority", "after", "waiting because")
    for trial in waiting:
        after = ", ".join(trial.spec.after) or "-"
        table.add(
            str(trial.trial_id), trial.key, trial.state, str(trial.spec.priority), after, reasons.get(trial.key, "-")
        )
    table.show() if waiting else say("nothing is queued")
    for name in files:
        say(f"not yet taken in: {name}")


def runs(trials: Sequence[TrialView], projections: Mapping[int, ProjectionRecord | None]) -> None:
    table = _Cells("id", "trial", "state", "progress", "step", "BPB", "projected (90%)", "artifact BPB", "reason")
    for trial in trials:
        record = projections.get(trial.trial_id)
        interval = "-"
        if record and trial.result is None:
            projection = record.projection
            interval = f"{projection.final_bpb:.4f} ({projection.low90:.4f} to {projection.high90:.4f})"
        raw = trial.scores.get(Metric.RAW) or (trial.val_curve[-1].val_bpb if trial.val_curve else None)
        table.add(
            str(trial.trial_id),
            trial.key,
            trial.result or trial.state,
            "-" if trial.progress is None else f"{trial.progress:.0%}",
            str(trial.last_point.step) if trial.last_point else "-",
            _bpb(raw),
            interval,
            _bpb(trial.scores.get(Metric.ARTIFACT)),
            _short(trial.reason),
        )
    table.show() if trials else say("no trials yet: caddie enqueue FILE, or drop one into queue/")


def leaderboard(boards: Sequence[Leaderboard]) -> None:
    """One table per track. BPB in columns that are never compared with one another."""
    if not boards:
        say("no finished scores yet")
    for board in boards:
        shown = [metric for metric in Metric if any(_score(row, metric) is not None for row in board.rows)]
        table = _Cells(
            *(
                "",
                "trial",
                *(f"{metric.value} BPB" for metric in shown),
                "artifact bytes",
                "budget",
                "params",
                "result",
            ),
            title=f"track {board.track.key}, ranked by {board.metric.value} BPB",
        )
        for row in board.rows:
            table.add(
                str(row.place or "-"),
                row.key,
                *(_bpb(_score(row, metric)) for metric in shown),
                _bytes(row.artifact_bytes),
                _budget_use(row),
                _bytes(row.params),
                row.result or row.state,
            )
        table.show()


def _score(row: BoardRow, metric: Metric) -> float | None:
    scores = {
        Metric.RAW: row.raw_bpb,
        Metric.EMA: row.ema_bpb,
        Metric.ARTIFACT: row.artifact_bpb,
        Metric.SLIDING: row.sliding_bpb,
        Metric.TTT: row.ttt_bpb,
    }
    return scores[metric]


def _budget_use(row: BoardRow) -> str:
    if row.artifact_bytes is None:
        return f"of {row.budget_bytes:,}"
    share = f"{row.artifact_bytes / row.budget_bytes:.1%} of {row.budget_bytes:,}"
    return f"OVER: {share}" if row.over_budget else share


@dataclass(frozen=True, slots=True, kw_only=True)
class Dossier:
    """Everything that `show` tells of one trial; its JSON too."""

    trial: TrialView
    decisions: Sequence[DecisionRecord]
    projections: Sequence[ProjectionRecord]
    events: Sequence[EventRecord]
    commands: Sequence[CommandRecord]


def trial(found: Dossier) -> None:
    facts = _Cells("", "")
    for name, value in _facts(found.trial):
        facts.add(name, value)
    facts.show()
    runs_of = _Cells("run", "state", "device", "pid", "exit", "started", "folder", title="\nruns")
    for run in found.trial.runs:
        code = "-" if run.returncode is None else str(run.returncode)
        began = f"{run.intended_at:%m-%d %H:%M:%S}"
        runs_of.add(
            f"{run.kind} {run.attempt}", run.state, str(run.assignment), str(run.pid or "-"), code, began, run.directory
        )
    runs_of.show()
    if found.projections:
        from agent.beat_report import with_caveat  # noqa: PLC0415 - scipy, only needed here

        say("\nprojections (newest last)")
        for record in found.projections[-5:]:
            made = record.projection
            say(f"  at {made.progress:.0%}, step {made.step}: {with_caveat(made, found.trial.tokens_per_step)}")
    if found.decisions:
        say("\ndecisions")
        for decision in found.decisions:
            say(f"  {decision.at:%m-%d %H:%M:%S} {decision.kind}: {decision.reason}")
            if decision.numbers:
                say("      " + ", ".join(f"{name} {_number(value)}" for name, value in decision.numbers.items()))
    if found.events:
        say("\nevents")
        for event in found.events:
            step = "" if event.step is None else f" at step {event.step}"
            say(f"  {event.kind}{step}: {event.detail}")
    if found.commands:
        say("\ncommands")
        for command in found.commands:
            say(
                f"  {command.at:%m-%d %H:%M:%S} {command.verb} {command.state}: {command.outcome or 'not yet answered'}"
            )
    say("\nspec")
    spec = found.trial.spec.model_dump(mode="json", exclude_unset=True)
    say(yaml.safe_dump(spec, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True).rstrip())


def _number(value: float | str | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(found: TrialView) -> list[tuple[str, str]]:
    artifact = found.artifact
    scores = ", ".join(f"{metric.value} {bpb:.4f}" for metric, bpb in found.scores.items())
    facts = [
        ("trial", f"{found.trial_id}  {found.key}"),
        ("hypothesis", found.spec.hypothesis or "-"),
        ("state", f"{found.state}" + (f", {found.result}" if found.result else "")),
        ("reason", found.reason or "-"),
        ("track", found.track.key),
        ("progress", "-" if found.progress is None else f"{found.progress:.0%}"),
        ("final BPB", scores or "-"),
    ]
    if artifact is not None:
        share = artifact.artifact_bytes / found.spec.budget_bytes
        facts += [
            ("artifact", artifact.path),
            (
                "artifact bytes",
                f"{artifact.artifact_bytes:,} = {artifact.weights_bytes:,} weights ({artifact.scheme}) "
                f"+ {artifact.code_bytes:,} code; {share:.1%} of {found.spec.budget_bytes:,}; "
                f"tokenizer apart: {artifact.tokenizer_bytes:,}",
            ),
        ]
    return facts


def heartbeats(beats: Sequence[HeartbeatRecord]) -> None:
    """Newest last, as in the log."""
    for beat in reversed(beats):
        say(str(json.loads(beat.report_json)["line"]))


def wait_reasons(beats: Sequence[HeartbeatRecord]) -> dict[str, str]:
    """By trial, why it did not start in the last of these heartbeats."""
    if not beats:
        return {}
    decisions = json.loads(beats[0].report_json)["decisions"]
    return {decision["trial"]: decision["reason"] for decision in decisions if decision["kind"] == "wait"}


def left_over(report: BeatReport) -> list[str]:
    """What a drained queue still holds, each with why it cannot start as things are; nothing if it is empty."""
    if not report.drained or not report.waiting:
        return []
    told = [line for line in report.decisions if line.kind == "wait"]
    more = report.waiting - len(told)
    return [
        f"caddie: {report.waiting} left that cannot start as things are:",
        *(f"  {line.trial}: {line.reason}" for line in told),
        *([f"  and {more} more: caddie queue shows them"] if more else []),
    ]


def heartbeat_values(beats: Sequence[HeartbeatRecord]) -> list[Any]:
    """The records as objects, oldest first, for --json."""
    return [json.loads(beat.report_json) for beat in reversed(beats)]


def rejected(folder: Path) -> None:
    """The specs that were refused, each with the reason that lies beside it."""
    for text in sorted(folder.glob("*.txt")):
        say(f"refused {text.stem}: {text.read_text(encoding='utf-8').strip()}")


def budget(estimate: SizeEstimate, verdict: BudgetVerdict) -> None:
    table = _Cells("module", "parameters", "bytes")
    for name, params, size in estimate.by_module:
        table.add(name, f"{params:,}", f"{size:,}")
    table.add("code as shipped", "", f"{estimate.code_bytes:,}")
    table.show()
    word = "fits" if verdict.fits else "cannot fit" if verdict.hopeless else "may not fit"
    say(f"{word}: {verdict} ({estimate.scheme})")


def checks(found: Sequence[Check]) -> None:
    styles = {"ok": "green", "warning": "yellow", "fault": "bold red"}
    table = _Cells("check", "", "finding")
    for check in found:
        table.add(check.name, check.verdict, check.finding, style=styles[check.verdict])
    table.show()


def _short(text: str, width: int = 70) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
