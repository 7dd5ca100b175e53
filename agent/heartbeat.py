"""One pass of the daemon: observe -> record -> project -> decide -> act -> report.

Looking collects facts and has no opinions; one transaction stores them; projecting and deciding are pure;
acting commits each intent before it touches a process, and the outcome after. A phase that fails is caught
once, at its edge, and the next beat goes on. If the facts could not be stored, nothing is decided: a decision
that the ledger does not know would be lost, and a launch on stale facts could run a trial twice.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from agent import beat_report
from agent.adapters.command_inbox import CommandInbox
from agent.adapters.executors.local import LocalExecutor
from agent.adapters.gpus import GpuReader
from agent.adapters.heartbeat_log import HeartbeatLog
from agent.adapters.log_formats import format_for
from agent.adapters.log_tail import read_log
from agent.adapters.run_orders import CONFIG, build_order, run_directory
from agent.adapters.spec_queue import SpecQueue
from agent.adapters.workspace import Workspace
from agent.atomic_files import write_text
from agent.decisions.policy import Decisions, Policy, decide
from agent.decisions.projection.project import project, sentence
from agent.domain.actions import Action, Finish, Keep, Kill, Launch, MarkPaused, Requeue, Resume, Stop, Void, Wait
from agent.domain.beats import BeatReport
from agent.domain.budget import BudgetVerdict
from agent.domain.errors import CaddieError
from agent.domain.observations import Devices, LogReading, Observation, ProbeState, RunProbe
from agent.domain.projections import Projection
from agent.domain.runfiles import EXIT, LOG, Control
from agent.domain.specs import Metric
from agent.domain.trials import LIVE_TRIAL_STATES
from agent.domain.views import LedgerView, RunView, TrialView
from agent.ledger.ledger import Ledger, Recorded

log = logging.getLogger(__name__)

_REST_SECONDS = 3.0
_READINGS_PER_RUN = 64
"""Readings of one log in one beat; with bounded bytes each, a flood is taken in over several beats."""


@dataclass(slots=True)
class _Pass:
    """What one beat gathers on its way; every field has a value even when its phase failed."""

    at: datetime
    devices: Devices
    recorded: Recorded | None = None
    view: LedgerView | None = None
    projections: dict[int, Projection] = field(default_factory=dict)
    decisions: Decisions | None = None
    errors: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """The parts that a beat is made of, wired in `bootstrap`."""

    workspace: Workspace
    ledger: Ledger
    gpus: GpuReader
    executor: LocalExecutor
    specs: SpecQueue
    inbox: CommandInbox
    journal: HeartbeatLog
    policy: Policy
    size_of: Callable[[TrialView], BudgetVerdict | None]
    reference_bpb: float | None
    disk_floor_bytes: int
    _watched: tuple[Path, ...] = ()
    """Folders of the runs that were live after the last beat."""

    def news(self) -> frozenset[str]:
        """What a beat would find new, as names: files waiting in the queue, and exit records of live runs.

        Cheap enough for every second. A file's name comes with its time and whether it has rested, because the
        queue leaves a file alone while it may still be half-written.
        """
        now = time.time()
        waiting = {
            f"{entry.name}:{entry.stat().st_mtime_ns}:{now - entry.stat().st_mtime > _REST_SECONDS}"
            for folder in (self.workspace.queue, self.workspace.commands)
            for entry in os.scandir(folder)
            if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False)
        }
        return frozenset(waiting | {str(folder) for folder in self._watched if (folder / EXIT).exists()})

    def beat(self, now: datetime, number: int) -> BeatReport:
        """One whole pass. Never raises for what a phase did; its report says what went wrong."""
        this = _Pass(at=now, devices=Devices(gpus=None, cpu_slots=0, note="not looked at"))
        observation: Observation | None = None
        with self._phase(this, "observe"):
            observation = self._observe(this)
        if observation is not None:
            with self._phase(this, "record"):
                self._record(this, observation)
        if this.recorded is not None:
            with self._phase(this, "project"):
                this.view = self.ledger.view(now)
                self._project(this, this.view)
        if this.view is not None:
            with self._phase(this, "decide"):
                this.decisions = decide(now, this.view, this.devices, this.projections, self.policy, self.size_of)
        if this.view is not None and this.decisions is not None:
            with self._phase(this, "act"):
                self._act(this, this.view, this.decisions, observation)
        return self._report(this, number)

    @contextmanager
    def _phase(self, this: _Pass, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            # The edge of a phase: whatever broke in it is told once, and the daemon lives on to the next beat.
            log.exception("phase %s of the beat at %s failed", name, this.at.isoformat())
            this.problems.append(f"phase {name} failed: {type(error).__name__}: {error}")
        finally:
            this.seconds[name] = time.monotonic() - started

    def _observe(self, this: _Pass) -> Observation:
        self.executor.reap()
        this.devices = self.gpus.read()
        live = [(trial, run) for trial in self.ledger.view(this.at).trials for run in trial.runs if run.live]
        # Processes before logs: the log of a run that is seen to be over is complete when it is read.
        probes = [self.executor.probe(run.run_uuid, self.workspace.root / run.directory) for _, run in live]
        readings = [
            reading
            for (trial, run), probe in zip(live, probes, strict=True)
            for reading in self._read_log(this, trial, run, probe)
        ]
        arrivals, refusals = self.specs.arrivals(this.at)
        commands, faults = self.inbox.pending()
        this.problems += faults
        return Observation(
            at=this.at,
            devices=this.devices,
            probes=tuple(probes),
            readings=tuple(readings),
            arrivals=tuple(arrivals),
            refusals=tuple(refusals),
            commands=tuple(commands),
            disk_free_bytes=shutil.disk_usage(self.workspace.root).free,
            problems=tuple(this.problems),
        )

    def _read_log(self, this: _Pass, trial: TrialView, run: RunView, probe: RunProbe) -> Iterator[LogReading]:
        offset = run.log_offset
        over = probe.state in {ProbeState.EXITED, ProbeState.GONE}
        path = self.workspace.root / run.directory / LOG
        for _ in range(_READINGS_PER_RUN):
            try:
                reading = read_log(path, run_uuid=run.run_uuid, offset=offset, reader=format_for(trial.spec), over=over)
            except (CaddieError, OSError) as error:
                this.problems.append(f"log {path} of {trial.key} could not be read: {error}")
                return
            if reading.offset == offset and not reading.restarted:
                return
            yield reading
            offset = reading.offset
        this.problems.append(
            f"log {path} of {trial.key} is longer than one beat reads: the rest waits, or is left unread"
        )

    def _record(self, this: _Pass, observation: Observation) -> None:
        recorded = self.ledger.record(observation)
        this.recorded = recorded
        this.problems += recorded.problems
        # Only now, with the facts committed, do the files move on; a crash before this line repeats harmlessly.
        for path, refusal in recorded.settled_specs:
            self.specs.settle(path, refusal)
            if refusal is not None:
                this.refused.append(refusal)
        for refused in observation.refusals:
            self.specs.settle(refused.claimed_path, refused.message)
            this.refused.append(refused.message)
        for path in recorded.settled_commands:
            self.inbox.settle(path)

    def _project(self, this: _Pass, view: LedgerView) -> None:
        best = beat_report.incumbents(view)
        for trial in view.trials:
            if trial.state not in LIVE_TRIAL_STATES or trial.live_run is None:
                continue
            held = best.get(trial.track.key)
            reference = self.reference_bpb or (held.scores[Metric.RAW] if held else None)
            projection = project(trial, reference)
            if projection is not None:
                this.projections[trial.trial_id] = projection
        self.ledger.save_projections(tuple(this.projections.values()), this.at)

    def _act(self, this: _Pass, view: LedgerView, decisions: Decisions, observation: Observation | None) -> None:
        free = observation.disk_free_bytes if observation else None
        for position, action in enumerate(decisions.actions):
            if isinstance(action, Launch) and free is not None and free < self.disk_floor_bytes:
                this.errors[position] = (
                    f"only {free:,} bytes of disk are free, launches are held below {self.disk_floor_bytes:,}"
                )
                continue
            try:
                self._carry_out(action, view, this.at)
            except Exception as error:
                # One action that fails must not keep the others from being done; it is told with its trial.
                log.exception("could not carry out %s", action)
                this.errors[position] = f"{type(error).__name__}: {error}"
        for command_id, done, outcome in decisions.command_outcomes:
            self.ledger.settle_command(command_id, done=done, outcome=outcome, at=this.at)

    def _carry_out(self, action: Action, view: LedgerView, at: datetime) -> None:
        match action:
            case Launch():
                self._launch(action, view.trial(action.trial_id), at)
            case Stop(run_uuid=run_uuid, cause=cause):
                trial = view.trial(action.trial_id)
                self.ledger.apply(action, at)
                control = Control(run_uuid=run_uuid, cause=cause, grace_seconds=trial.spec.grace_seconds)
                self.executor.request_stop(self._directory(trial, run_uuid), control)
            case Kill(run_uuid=run_uuid):
                self.ledger.apply(action, at)
                self.executor.kill(self._directory(view.trial(action.trial_id), run_uuid))
            case Void(run_uuid=run_uuid):
                # The claim first: only a run that no runner can start any more may be called lost. If this dies
                # in between, the next probe sees the voided claim.
                if self.executor.void(run_uuid, self._directory(view.trial(action.trial_id), run_uuid)):
                    self.ledger.apply(action, at)
            case Finish() | Requeue() | MarkPaused() | Resume() | Keep():
                self.ledger.apply(action, at)
            case Wait():
                pass

    def _launch(self, action: Launch, trial: TrialView, at: datetime) -> None:
        run_uuid = str(uuid.uuid4())
        directory = run_directory(trial, action.kind, run_uuid)
        self.ledger.intend(action, run_uuid=run_uuid, directory=directory, at=at)
        folder = self.workspace.root / directory
        try:
            order, config = build_order(self.workspace.root, trial, action, run_uuid=run_uuid, directory=directory)
            folder.mkdir(parents=True, exist_ok=True)
            if config is not None:
                write_text(folder / CONFIG, config)
            self.executor.launch(folder, order)
        except Exception as error:
            # The spawn may have happened or not: void first, and only a run that nobody can claim any more is over.
            if self.executor.void(run_uuid, folder):
                self.ledger.launch_failed(run_uuid, f"{type(error).__name__}: {error}", at)
            raise

    def _directory(self, trial: TrialView, run_uuid: str) -> Path:
        run = next(run for run in trial.runs if run.run_uuid == run_uuid)
        return self.workspace.root / run.directory

    def _report(self, this: _Pass, number: int) -> BeatReport:
        view = before = this.view or LedgerView(at=this.at)
        with self._phase(this, "look again"):
            # What the actions made of it: a run just launched belongs to this report and to the watch.
            view = self.ledger.view(this.at)
            self._watched = tuple(
                self.workspace.root / run.directory for trial in view.trials for run in trial.runs if run.live
            )
        actions: Sequence[Action] = this.decisions.actions if this.decisions else ()
        gpus = this.devices.gpus
        best: Mapping[str, TrialView] = beat_report.incumbents(view)
        report = BeatReport(
            at=this.at,
            number=number,
            gpus=gpus,
            cpu_slots=this.devices.cpu_slots,
            devices_note=this.devices.note,
            runs=beat_report.run_lines(view, this.projections, gpus or (), sentence),
            decisions=beat_report.decision_lines(before, actions, this.errors),
            commands=beat_report.command_lines(before, this.decisions.command_outcomes if this.decisions else ()),
            enqueued=this.recorded.enqueued if this.recorded else (),
            refused=tuple(this.refused),
            counts=beat_report.state_counts(view),
            best=tuple((track, trial.key, trial.scores[Metric.RAW]) for track, trial in best.items()),
            problems=tuple(this.problems),
            phase_seconds=this.seconds,
            again=any(isinstance(action, Finish | Requeue | Resume) for action in actions) and not this.errors,
            drained=this.decisions is not None and beat_report.is_drained(view, actions),
            ok=this.recorded is not None,
        )
        # The report itself must never stop a beat: a full disk is told on the next one that can write.
        with self._phase(this, "report"):
            record = report.to_record()
            self.journal.append(report.to_line(), record)
            self.ledger.save_heartbeat(this.at, json.dumps(record), sum(this.seconds.values()))
        return report
