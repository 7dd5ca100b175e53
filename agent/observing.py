"""Looking: devices, processes, new log lines, new YAML, commands. Facts, no opinions.

Each look stands alone: one that fails is told as a problem, and what it would have found is unknown, never
"none" or "dead". The others go on.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeVar

from agent.adapters.command_inbox import CommandInbox
from agent.adapters.executors.local import LocalExecutor
from agent.adapters.gpus import GpuReader
from agent.adapters.log_formats import format_for
from agent.adapters.log_tail import read_log
from agent.adapters.spec_queue import SpecQueue
from agent.adapters.workspace import Workspace
from agent.domain.errors import CaddieError
from agent.domain.observations import Devices, LogReading, Observation, ProbeState, RunProbe
from agent.domain.runfiles import EXIT, LOG
from agent.domain.views import LedgerView, RunView, TrialView

T = TypeVar("T")
log = logging.getLogger(__name__)

_LOG_SECONDS_PER_BEAT = 20.0
"""A flood of log lines is taken in over several beats; a beat must not wait for it."""


@dataclass(slots=True, kw_only=True)
class Observer:
    workspace: Workspace
    gpus: GpuReader
    executor: LocalExecutor
    specs: SpecQueue
    inbox: CommandInbox

    def look(self, now: datetime, view: LedgerView) -> Observation:
        """`view` tells which runs are live and how far their logs are known."""
        looks = _Looks()
        self.executor.reap()
        unknown = Devices(gpus=None, cpu_slots=0, note="the devices could not be looked at")
        devices = looks.guarded("the devices", self.gpus.read, unknown)
        probes, readings = [], []
        logs_until = time.monotonic() + _LOG_SECONDS_PER_BEAT
        for trial in view.trials:
            for run in trial.runs:
                if run.live:
                    # The process before the log: the log of a run that is seen to be over is complete when it is read.
                    probe = self._probe(run, looks)
                    added, whole = self._read_log(trial, run, probe, looks, logs_until)
                    readings += added
                    if _over(probe) and not whole:
                        # Its last lines decide how it is judged, so it is not over for us before they are read.
                        probe = replace(probe, state=ProbeState.ALIVE, pid=None, detail="over; its log is still read")
                    probes.append(probe)
        nothing: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
        arrivals, refusals = looks.guarded("the queue", lambda: self.specs.arrivals(now), nothing)
        commands, faults = looks.guarded("the command inbox", self.inbox.pending, nothing)
        free = looks.guarded("the disk", lambda: shutil.disk_usage(self.workspace.root).free, None)
        return Observation(
            at=now,
            devices=devices,
            probes=tuple(probes),
            readings=tuple(readings),
            arrivals=tuple(arrivals),
            refusals=tuple(refusals),
            commands=tuple(commands),
            disk_free_bytes=free,
            problems=(*looks.problems, *faults, *self.specs.faults),
        )

    def news(self, watched: tuple[RunView, ...]) -> frozenset[str]:
        """What a beat would find new, as names: waiting files, ends of the watched runs. Cheap; raises OSError."""
        ended = {run.run_uuid for run in watched if (self.workspace.root / run.directory / EXIT).exists()}
        return self.specs.waiting() | self.inbox.waiting() | frozenset(ended)

    def _probe(self, run: RunView, looks: _Looks) -> RunProbe:
        directory = self.workspace.root / run.directory
        unknown = RunProbe(
            run_uuid=run.run_uuid, state=ProbeState.UNKNOWN, detail=f"{directory} could not be looked at"
        )
        return looks.guarded(f"the run in {directory}", lambda: self.executor.probe(run.run_uuid, directory), unknown)

    def _read_log(
        self, trial: TrialView, run: RunView, probe: RunProbe, looks: _Looks, until: float
    ) -> tuple[list[LogReading], bool]:
        """New readings of one log, and whether its end was reached. A log that cannot be read counts as read."""
        readings: list[LogReading] = []
        offset, path, reader = run.log_offset, self.workspace.root / run.directory / LOG, format_for(trial.spec)
        while True:
            try:
                reading = read_log(path, run_uuid=run.run_uuid, offset=offset, reader=reader, over=_over(probe))
            except (CaddieError, OSError) as error:
                looks.problems.append(f"log {path} of {trial.key} could not be read: {error}")
                return readings, True
            if reading.offset == offset and not reading.restarted:
                return readings, True
            readings.append(reading)
            offset = reading.offset
            if time.monotonic() >= until:
                looks.problems.append(f"log {path} of {trial.key} is long: the rest is read by the next beats")
                return readings, False


@dataclass(slots=True)
class _Looks:
    problems: list[str] = field(default_factory=list)

    def guarded(self, what: str, look: Callable[[], T], otherwise: T) -> T:
        try:
            return look()
        except (CaddieError, OSError) as error:
            log.warning("could not look at %s", what, exc_info=True)
            self.problems.append(f"could not look at {what}: {error}")
            return otherwise


def _over(probe: RunProbe) -> bool:
    return probe.state in {ProbeState.EXITED, ProbeState.GONE}
