"""A machine of random beats with crashes between any two statements: nothing committed is lost, nothing is half-done.

A crash is what `kill -9` leaves: the database's files, copied in the middle of a transaction, opened anew.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, event

from agent.domain.actions import (
    Action,
    Assignment,
    Finish,
    Keep,
    Kill,
    Launch,
    MarkPaused,
    Requeue,
    Resume,
    Stop,
    Void,
)
from agent.domain.errors import LedgerError, TransitionError
from agent.domain.observations import (
    Devices,
    LogPoint,
    LogReading,
    Observation,
    ProbeState,
    RunProbe,
    SpecArrival,
)
from agent.domain.runfiles import ExitRecord
from agent.domain.specs import Spec
from agent.domain.trials import (
    LIVE_TRIAL_STATES,
    RUN_TRANSITIONS,
    TRIAL_TRANSITIONS,
    Result,
    RunKind,
    StopCause,
    TrialState,
)
from agent.domain.views import LedgerView, RunView
from agent.ledger.ledger import Ledger

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
TRIALS = st.integers(1, 3)
CRASH = st.none() | st.integers(0, 12)


class Crash(BaseException):
    """Not an Exception: nothing on the way may catch it and clean up."""


def closure(table: Any) -> set[tuple[Any, Any]]:
    """Which states can be reached from which, by any number of events."""
    pairs = {(state, state) for key in table for state in (key[0], table[key])}
    while True:
        more = pairs | {(a, table[key]) for a, b in pairs for key in table if key[0] is b}
        if more == pairs:
            return pairs
        pairs = more


TRIAL_PATHS, RUN_PATHS = closure(TRIAL_TRANSITIONS), closure(RUN_TRANSITIONS)


class Machine(RuleBasedStateMachine):
    template: Path
    folder: Path
    ledger: Ledger

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ledger-"))
        self.lives = 0
        self.clock = 0
        self.uuids = 0
        self.folder = self.root / "0"
        shutil.copytree(self.template, self.folder)
        self.ledger = Ledger.open(self.folder / "e.db")
        self.before = self.ledger.view(NOW)

    def teardown(self) -> None:
        if hasattr(self, "root"):
            self.ledger.close()
            shutil.rmtree(self.root)

    def do(self, work: Callable[[Ledger], object], crash_at: int | None) -> None:
        """One operation, or as much of it as there is before the crash, and then the whole of it."""
        before = self.ledger.view(NOW)
        if crash_at is not None and self._crashed(work, crash_at):
            assert self.ledger.view(NOW) == before, "a crash left half a transaction, or lost a whole one"
        elif crash_at is not None:
            return  # It was over before the crash could come.
        try:
            work(self.ledger)
        except (TransitionError, LedgerError):
            assert self.ledger.view(NOW) == before

    def _crashed(self, work: Callable[[Ledger], object], crash_at: int) -> bool:
        left = crash_at
        wreck = self.root / str(self.lives + 1)

        def strike() -> None:
            nonlocal left
            if left == 0:
                wreck.mkdir()
                for file in self.folder.glob("e.db*"):
                    if not file.name.endswith("-shm"):
                        shutil.copy(file, wreck)
                left = -1
                raise Crash
            left -= 1

        def on_statement(*_: object) -> None:
            strike()

        event.listen(Engine, "before_cursor_execute", on_statement)
        event.listen(Engine, "commit", on_statement)
        try:
            work(self.ledger)
        except Crash:
            self.ledger.close()
            self.lives += 1
            self.folder = wreck
            self.ledger = Ledger.open(wreck / "e.db")
            return True
        except (TransitionError, LedgerError):
            pass  # Refused before the crash could come; `do` has its look at refusals.
        finally:
            event.remove(Engine, "before_cursor_execute", on_statement)
            event.remove(Engine, "commit", on_statement)
        return False

    def now(self) -> datetime:
        self.clock += 1
        return NOW + timedelta(seconds=self.clock)

    def run(self, trial_id: int) -> RunView | None:
        return next((t.last_train_run for t in self.ledger.view(NOW).trials if t.trial_id == trial_id), None)

    @rule(crash=CRASH)
    def enqueue(self, crash: int | None) -> None:
        spec = Spec(name="a", command=("x",), resumable=True, seeds=(1, 2, 3))
        arrival = SpecArrival(spec=spec, source_text="", source_name="a", claimed_path="p", val_sha256=None)
        observation = Observation(at=self.now(), devices=Devices(gpus=(), cpu_slots=1), arrivals=(arrival,))
        self.do(lambda ledger: ledger.record(observation), crash)

    @rule(trial=TRIALS, crash=CRASH, kind=st.sampled_from(RunKind))
    def launch(self, trial: int, crash: int | None, kind: RunKind) -> None:
        self.uuids += 1
        uuid = f"u{self.uuids}"
        action = Launch(trial_id=trial, reason="r", kind=kind, assignment=Assignment(cpu_slots=1))
        at = self.now()
        self.do(lambda ledger: ledger.intend(action, run_uuid=uuid, directory=f"d/{uuid}", at=at), crash)

    @rule(trial=TRIALS, crash=CRASH, state=st.sampled_from(ProbeState))
    def look(self, trial: int, crash: int | None, state: ProbeState) -> None:
        run = self.run(trial)
        if run is not None:
            record = ExitRecord(run_uuid=run.run_uuid, returncode=1, started_at=None, ended_at=NOW.isoformat())
            probe = RunProbe(run_uuid=run.run_uuid, state=state, pid=1, exit=record if state == "exited" else None)
            observation = Observation(at=self.now(), devices=Devices(gpus=(), cpu_slots=1), probes=(probe,))
            self.do(lambda ledger: ledger.record(observation), crash)

    @rule(trial=TRIALS, crash=CRASH, count=st.integers(1, 3), repeat=st.booleans())
    def read(self, trial: int, crash: int | None, count: int, repeat: bool) -> None:
        """One byte of log is one point: offset and points must never part."""
        run = self.run(trial)
        if run is not None:
            start = run.log_offset
            log = LogReading(
                run_uuid=run.run_uuid,
                start_offset=start,
                offset=start + count,
                points=tuple(LogPoint(step=step, val_bpb=2.0) for step in range(start, start + count)),
            )
            readings = (log, log) if repeat else (log,)
            observation = Observation(at=self.now(), devices=Devices(gpus=(), cpu_slots=1), readings=readings)
            self.do(lambda ledger: ledger.record(observation), crash)

    @rule(trial=TRIALS, crash=CRASH, which=st.integers(0, 8), cause=st.sampled_from(StopCause))
    def act(self, trial: int, crash: int | None, which: int, cause: StopCause) -> None:
        run = self.run(trial)
        uuid = run.run_uuid if run else "none"
        actions: tuple[Action, ...] = (
            Stop(trial_id=trial, reason="r", run_uuid=uuid, cause=cause),
            Stop(trial_id=trial, reason="r", run_uuid=uuid, cause=StopCause.PAUSE),
            Kill(trial_id=trial, reason="r", run_uuid=uuid),
            Void(trial_id=trial, reason="r", run_uuid=uuid),
            Requeue(trial_id=trial, reason="r"),
            MarkPaused(trial_id=trial, reason="r"),
            Resume(trial_id=trial, reason="r"),
            Keep(trial_id=trial, reason="r", suspect=True),
            Finish(trial_id=trial, reason="r", result=Result.COMPLETED),
        )
        at = self.now()
        self.do(lambda ledger: ledger.apply(actions[which], at), crash)

    @invariant()
    def states_are_those_of_the_tables(self) -> None:
        if not hasattr(self, "ledger"):
            return
        view: LedgerView = self.ledger.view(NOW)
        old = {trial.trial_id: trial for trial in self.before.trials}
        assert len(view.trials) >= len(old)
        for trial in view.trials:
            was = old.get(trial.trial_id)
            if was is not None:
                assert (was.state, trial.state) in TRIAL_PATHS
                assert was.result in {None, trial.result}
                for run, earlier in zip(trial.runs, was.runs, strict=False):
                    assert (earlier.state, run.state) in RUN_PATHS
                assert len(trial.runs) >= len(was.runs)
            assert (trial.state is TrialState.FINISHED) == (trial.result is not None)
            live = [run for run in trial.runs if run.live and run.kind is RunKind.TRAIN]
            assert len(live) <= 1
            assert not live or trial.state in LIVE_TRIAL_STATES
        with closing(sqlite3.connect(self.folder / "e.db")) as raw:
            (points,) = raw.execute("SELECT count(*) FROM points").fetchone()
        assert points == sum(run.log_offset for trial in view.trials for run in trial.runs)
        self.before = view


def test_no_crash_between_any_two_statements_loses_or_halves_anything(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    Ledger.open(template / "e.db").close()
    Machine.template = template
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.reuse, Phase.generate),  # Shrinking writes thousands of databases.
        ),
    )
