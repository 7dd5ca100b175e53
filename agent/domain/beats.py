"""What one heartbeat saw, projected, decided and did: the value behind the log line, the JSON record and the view."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic_core import from_json, to_json

from agent.domain.observations import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One live run as a person wants to see it. BPB values are raw validation scores."""

    trial_id: int
    trial: str
    kind: str
    state: str
    device: str
    pid: int | None
    step: int | None
    progress: float | None
    val_bpb: float | None
    projected_bpb: float | None
    low90: float | None
    high90: float | None
    projection: str
    """The projection in one sentence, with its caveat; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionLine:
    """One decision and what came of it."""

    trial: str
    kind: str
    reason: str
    numbers: dict[str, float | int | str | None]
    error: str = ""
    """Why it could not be carried out."""
    routine: bool = False
    """Keep and wait: said in the records, not worth a line of their own in the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatReport:
    at: datetime
    number: int
    gpus: tuple[Device, ...] | None
    cpu_slots: int
    devices_note: str
    runs: tuple[RunLine, ...]
    decisions: tuple[DecisionLine, ...]
    waiting: int
    """How many waits there were; `decisions` holds the first of them."""
    commands: tuple[str, ...]
    """What the user asked for, and what came of it."""
    enqueued: tuple[str, ...]
    refused: tuple[str, ...]
    counts: dict[str, int]
    """Trials by state."""
    best: tuple[tuple[str, str, float], ...]
    """(track, trial, raw BPB) of each track's incumbent."""
    problems: tuple[str, ...]
    phase_seconds: dict[str, float]
    again: bool
    """Something changed that the next beat can act on at once."""
    restless: bool
    """A start, a stop or a lost sight is under way: look again within seconds."""
    drained: bool
    """Nothing is running or to be followed up, and nothing that is left can start as things are."""
    ok: bool
    """The facts were recorded; False means that nothing was decided."""

    def to_record(self) -> dict[str, Any]:
        """The JSON record of `logs/heartbeat.jsonl` and of the ledger."""
        record = dataclasses.asdict(self) | {"line": self.to_line()}
        # A diverged run has losses that JSON does not know: they become null, at any depth.
        plain: dict[str, Any] = from_json(to_json(record, inf_nan_mode="null"))
        return plain | {"at": self.at.isoformat()}

    def to_line(self) -> str:
        """The readable line of `logs/heartbeat.log`, with one indented line per event worth reading."""
        parts = [f"{self.at:%Y-%m-%d %H:%M:%SZ} beat {self.number}", self._devices()]
        parts.append(" ".join(f"{state} {count}" for state, count in sorted(self.counts.items())) or "no trials")
        parts += [_run_text(run) for run in self.runs]
        parts.append(f"{sum(self.phase_seconds.values()):.2f} s")
        lines = [" | ".join(parts)]
        lines += [f"    asked {outcome}" for outcome in self.commands]
        lines += [f"    enqueued {key}" for key in self.enqueued]
        lines += [f"    refused {message}" for message in self.refused]
        lines += [f"    {decision_text(decision)}" for decision in self.decisions if not decision.routine]
        lines += [f"    PROBLEM {problem}" for problem in self.problems]
        return "\n".join(lines)

    def _devices(self) -> str:
        if self.gpus is None:
            return f"GPUs unknown: {self.devices_note}"
        if not self.gpus:
            return f"{self.cpu_slots} CPU slots"
        return ", ".join(
            f"gpu{gpu.index} "
            + (gpu.error or f"{gpu.memory_used_bytes / 1e9:.1f}/{gpu.memory_total_bytes / 1e9:.0f} GB")
            + (f" {gpu.utilization_percent}%" if gpu.utilization_percent is not None else "")
            for gpu in self.gpus
        )


def decision_text(decision: DecisionLine) -> str:
    error = f" FAILED: {decision.error}" if decision.error else ""
    return f"{decision.kind} {decision.trial}: {decision.reason}{error}"


def _run_text(run: RunLine) -> str:
    text = f"{run.trial} {run.kind}"
    if run.progress is not None:
        text += f" {run.progress:.0%}"
    if run.val_bpb is not None:
        text += f" bpb {run.val_bpb:.4f}"
    if run.projected_bpb is not None and run.low90 is not None and run.high90 is not None:
        text += f" -> {run.projected_bpb:.4f} [{run.low90:.4f}, {run.high90:.4f}]"
    return text if run.state == "running" else f"{text} ({run.state})"
