"""The live view of `caddie up` in a terminal: devices, runs, decisions. Draws reports; reads nothing itself."""

from __future__ import annotations

import threading
from collections import deque
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent.domain.beats import BeatReport, DecisionLine, decision_text

_DECISIONS_SHOWN = 12
_STYLES = {
    "launch": "green",
    "export": "cyan",
    "evaluate": "cyan",
    "finish": "bold",
    "prune": "yellow",
    "stop": "red",
    "kill": "bold red",
    "reject": "red",
    "retry": "yellow",
}


class LiveView:
    """Redraws at each beat, and each second for the clock. Use as a context manager."""

    def __init__(self, console: Console, *, workspace: str, interval_seconds: float) -> None:
        self._title = Text(f"caddie up  {workspace}")
        self._interval = interval_seconds
        self._report: BeatReport | None = None
        self._decisions: deque[tuple[datetime, DecisionLine]] = deque(maxlen=_DECISIONS_SHOWN)
        self._notes: deque[tuple[datetime, str]] = deque(maxlen=4)
        self._lock = threading.Lock()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=1, transient=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, report: BeatReport) -> None:
        with self._lock:
            self._report = report
            self._decisions.extend((report.at, line) for line in report.decisions if not line.routine)
            self._notes.extend((report.at, outcome) for outcome in report.commands)
            self._notes.extend((report.at, f"refused: {message}") for message in report.refused)
            self._notes.extend((report.at, f"problem: {message}") for message in report.problems)
        self._live.refresh()

    def _render(self) -> RenderableType:
        with self._lock:
            report = self._report
            if report is None:
                return Panel("first heartbeat under way", title=self._title)
            parts: list[RenderableType] = [devices_table(report), runs_table(report)]
            if report.best:
                best = "   ".join(f"{trial} {bpb:.4f}" for _, trial, bpb in report.best)
                parts.append(Text(f"best raw BPB so far: {best}", style="bold"))
            for at, decision in self._decisions:
                parts.append(_decision(at, decision))
            parts += [Text(f"{at:%H:%M:%S} {note}", style="magenta") for at, note in self._notes]
            age = max(0, int((datetime.now(UTC) - report.at).total_seconds()))
            counts = "  ".join(f"{state} {count}" for state, count in sorted(report.counts.items())) or "queue empty"
            beat = f"beat {report.number}, {age} s ago, every {self._interval:g} s"
            subtitle = f"{beat}  |  {counts}  |  Ctrl-C leaves runs alive"
            return Panel(Group(*parts), title=self._title, subtitle=subtitle)


def devices_table(report: BeatReport) -> RenderableType:
    if not report.gpus:
        return Text(report.devices_note or f"{report.cpu_slots} CPU slots", style="dim")
    table = Table(
        "device", "name", "memory GB", "util", "temp", "power", "processes", "state", box=None, pad_edge=False
    )
    for gpu in report.gpus:
        table.add_row(
            f"gpu{gpu.index}",
            Text(gpu.name),
            f"{gpu.memory_used_bytes / 1e9:.1f}/{gpu.memory_total_bytes / 1e9:.1f}",
            _or_dash(gpu.utilization_percent, "%"),
            _or_dash(gpu.temperature_celsius, " C"),
            _or_dash(gpu.power_watts and round(gpu.power_watts), " W"),
            str(len(gpu.processes)),
            # Not ours, and it may hold what Rich would read as markup.
            Text(gpu.error or ", ".join(gpu.throttle_reasons) or "ok"),
        )
    return table


def runs_table(report: BeatReport) -> RenderableType:
    if not report.runs:
        return Text("no run is live", style="dim")
    table = Table(
        "run", "kind", "device", "progress", "", "step", "BPB", "projected final (90%)", box=None, pad_edge=False
    )
    for run in report.runs:
        projected = "-"
        if run.projected_bpb is not None and run.low90 is not None and run.high90 is not None:
            projected = f"{run.projected_bpb:.4f} ({run.low90:.4f} to {run.high90:.4f})"
        table.add_row(
            run.trial,
            run.kind if run.state == "running" else f"{run.kind} ({run.state})",
            run.device,
            ProgressBar(total=1.0, completed=run.progress or 0.0, width=16),
            "-" if run.progress is None else f"{run.progress:.0%}",
            _or_dash(run.step, ""),
            "-" if run.val_bpb is None else f"{run.val_bpb:.4f}",
            projected,
        )
    return table


def _decision(at: datetime, line: DecisionLine) -> Text:
    text = Text(f"{at:%H:%M:%S} ")
    return text.append(decision_text(line), style="bold red" if line.error else _STYLES.get(line.kind, ""))


def _or_dash(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value}{unit}"
