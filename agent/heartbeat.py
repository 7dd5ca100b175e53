"""One pass of the daemon: observe -> record -> project -> decide -> act -> report.

Looking collects facts and has no opinions; one transaction stores them; projecting and deciding are pure;
acting commits each intent before it touches a process, and the outcome after. A phase that fails is caught
once, at its edge, and the next beat goes on. If the facts could not be stored, nothing is decided: a decision
that the ledger does not know would be lost, and a launch on stale facts could run a trial twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime

from agent import beat_report
from agent.acting import Acted, Hands
from agent.adapters.heartbeat_log import HeartbeatLog
from agent.adapters.spec_queue import MAX_FILES_PER_LOOK
from agent.decisions.policy import Decisions, Policy, decide
from agent.decisions.projection.project import project
from agent.domain.actions import Finish, Launch, Requeue, Resume, Wait
from agent.domain.beats import BeatReport
from agent.domain.budget import BudgetVerdict
from agent.domain.observations import Devices, Observation
from agent.domain.projections import Projection
from agent.domain.specs import Metric
from agent.domain.trials import LIVE_TRIAL_STATES
from agent.domain.views import LedgerView, RunView, TrialView
from agent.ledger.ledger import Ledger, Recorded
from agent.observing import Observer

log = logging.getLogger(__name__)

_NOT_LOOKED = Devices(gpus=None, cpu_slots=0, note="not looked at")


@dataclass(slots=True)
class Pass:
    """What one beat gathers on its way; every field has a value even when its phase failed."""

    at: datetime
    number: int
    observation: Observation | None = None
    recorded: Recorded | None = None
    view: LedgerView | None = None
    projections: dict[int, Projection] = field(default_factory=dict)
    decisions: Decisions | None = None
    acted: Acted = field(default_factory=Acted)
    refused: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def devices(self) -> Devices:
        return self.observation.devices if self.observation else _NOT_LOOKED

    @property
    def again(self) -> bool:
        """Something changed that the next beat can act on at once, or more files wait than one look takes."""
        observation, actions = self.observation, self.decisions.actions if self.decisions else ()
        more = observation and len(observation.arrivals) + len(observation.refusals) >= MAX_FILES_PER_LOOK
        return bool(more) or any(
            isinstance(action, Finish | Requeue | Resume) and position not in self.acted.errors
            for position, action in enumerate(actions)
        )


@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """The parts that a beat is made of, wired in `bootstrap`."""

    ledger: Ledger
    observer: Observer
    hands: Hands
    journal: HeartbeatLog
    policy: Policy
    size_of: Callable[[TrialView], BudgetVerdict | None]
    reference_bpb: float | None
    disk_floor_bytes: int
    _watched: tuple[RunView, ...] = ()
    """Runs that were live after the last beat."""
    _untold: tuple[str, ...] = ()
    """Problems of the last report itself: the next one that can be written tells them."""

    def news(self) -> frozenset[str]:
        """What a beat would find new, as names. Cheap enough for every second. Raises OSError."""
        return self.observer.news(self._watched)

    def beat(self, now: datetime, number: int) -> BeatReport:
        """One whole pass. Never raises for what a phase did; its report says what went wrong."""
        this = Pass(at=now, number=number, problems=list(self._untold))
        with self._phase(this, "observe"):
            this.observation = self.observer.look(now, self.ledger.view(now))
            this.problems += this.observation.problems
        if this.observation is not None:
            with self._phase(this, "record"):
                self._record(this, this.observation)
        if this.recorded is not None:
            with self._phase(this, "project"):
                this.view = self.ledger.view(now)
                self._project(this, this.view)
        if this.view is not None:
            with self._phase(this, "decide"):
                decisions = decide(now, this.view, this.devices, this.projections, self.policy, self.size_of)
                this.decisions = self._mind_the_disk(this, decisions)
        if this.view is not None and this.decisions is not None:
            with self._phase(this, "act"):
                this.acted = self.hands.act(this.view, this.decisions, now)
        return self._report(this)

    @contextmanager
    def _phase(self, this: Pass, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            # The edge of a phase: whatever broke in it is told once, and the daemon lives on to the next beat.
            log.exception("phase %s of the beat at %s failed", name, this.at.isoformat())
            this.problems.append(f"phase {name} failed: {type(error).__name__}: {error}")
        finally:
            this.seconds[name] = time.monotonic() - started

    def _record(self, this: Pass, observation: Observation) -> None:
        recorded = self.ledger.record(observation)
        this.recorded = recorded
        this.problems += recorded.problems
        # Only now, with the facts committed, do the files move on; a crash before this line repeats harmlessly.
        specs, inbox = self.observer.specs, self.observer.inbox
        for path, refusal in recorded.settled_specs:
            specs.settle(path, refusal)
            if refusal is not None:
                this.refused.append(refusal)
        for refused in observation.refusals:
            specs.settle(refused.claimed_path, refused.message)
            this.refused.append(refused.message)
        for path in recorded.settled_commands:
            inbox.settle(path)

    def _project(self, this: Pass, view: LedgerView) -> None:
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

    def _mind_the_disk(self, this: Pass, decisions: Decisions) -> Decisions:
        """Below the floor nothing is launched: a run that cannot write its checkpoint loses its work."""
        free = this.observation.disk_free_bytes if this.observation else None
        if free is None or free >= self.disk_floor_bytes:
            return decisions
        why = f"only {free:,} bytes of disk are free; nothing is launched below {self.disk_floor_bytes:,}"
        this.problems.append(why)
        return replace(
            decisions,
            actions=tuple(
                Wait(trial_id=action.trial_id, reason=why) if isinstance(action, Launch) else action
                for action in decisions.actions
            ),
        )

    def _report(self, this: Pass) -> BeatReport:
        before = this.view or LedgerView(at=this.at)
        after = before
        with self._phase(this, "look again"):
            # What the actions made of it: a run just launched belongs to this report and to the watch.
            after = self.ledger.view(this.at)
            self._watched = tuple(run for trial in after.trials for run in trial.runs if run.live)
        report = beat_report.compose(
            at=this.at,
            number=this.number,
            before=before,
            after=after,
            devices=this.devices,
            recorded=this.recorded,
            refused=this.refused,
            projections=this.projections,
            decisions=this.decisions,
            acted=this.acted,
            problems=this.problems,
            seconds=this.seconds,
            again=this.again,
        )
        # The report itself must never stop a beat: a full disk is told on the next one that can write.
        told = len(this.problems)
        with self._phase(this, "report"):
            record = report.to_record()
            self.journal.append(report.to_line(), record)
            self.ledger.save_heartbeat(this.at, json.dumps(record), sum(this.seconds.values()))
        self._untold = tuple(this.problems[told:])
        return report
