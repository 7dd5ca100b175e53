"""The two transition tables, and the records in a run's folder."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.errors import RunFileError, TransitionError
from agent.domain.runfiles import Claim, Control, ExitRecord, Order, ProcessIdentity, ProcessRecord
from agent.domain.trials import (
    LIVE_RUN_STATES,
    RUN_TRANSITIONS,
    TRIAL_TRANSITIONS,
    RunEvent,
    RunState,
    StopCause,
    TrialEvent,
    TrialState,
    next_run_state,
    next_trial_state,
)
from agent.process_identity import Liveness, identify, liveness, own_identity


def test_finished_is_final() -> None:
    assert not [pair for pair in TRIAL_TRANSITIONS if pair[0] is TrialState.FINISHED]
    assert not [pair for pair in RUN_TRANSITIONS if pair[0] in {RunState.EXITED, RunState.LOST}]


def test_what_is_not_in_the_table_is_an_error() -> None:
    for state, event in itertools.product(TrialState, TrialEvent):
        if (state, event) not in TRIAL_TRANSITIONS:
            with pytest.raises(TransitionError, match=f"{state}.*{event}"):
                next_trial_state(state, event)
    for run_state, run_event in itertools.product(RunState, RunEvent):
        if (run_state, run_event) not in RUN_TRANSITIONS:
            with pytest.raises(TransitionError, match=f"{run_state}.*{run_event}"):
                next_run_state(run_state, run_event)


def test_every_trial_state_is_reachable_and_can_finish() -> None:
    def reach(start: TrialState) -> set[TrialState]:
        seen, frontier = {start}, [start]
        while frontier:
            here = frontier.pop()
            for (state, _), then in TRIAL_TRANSITIONS.items():
                if state is here and then not in seen:
                    seen.add(then)
                    frontier.append(then)
        return seen

    assert reach(TrialState.QUEUED) == set(TrialState)
    assert all(TrialState.FINISHED in reach(state) for state in TrialState)


def test_every_live_run_can_end_and_a_lost_sight_is_not_an_end() -> None:
    for state in LIVE_RUN_STATES:
        assert next_run_state(state, RunEvent.EXIT) is RunState.EXITED
        assert next_run_state(state, RunEvent.VANISH) is RunState.LOST
        assert next_run_state(state, RunEvent.LOSE_SIGHT) in LIVE_RUN_STATES


IDENTITY = ProcessIdentity(pid=7, start_ticks=99, boot_id="boot")


@pytest.mark.parametrize(
    "record",
    [
        Order(run_uuid="u", argv=["python", "x y"], cwd="/tmp", env={"A": "é"}, timeout_seconds=1.5),
        Claim(run_uuid="u", claimant="runner", identity=IDENTITY, at="now"),
        ProcessRecord(run_uuid="u", identity=IDENTITY, at="now"),
        Control(run_uuid="u", cause=StopCause.PRUNE, grace_seconds=3.0),
        ExitRecord(run_uuid="u", returncode=-9, started_at="a", ended_at="b", cause=StopCause.PAUSE, killed=True),
        ExitRecord(run_uuid="u", returncode=None, started_at=None, ended_at="b", error="no such file"),
    ],
)
def test_run_records_read_back(record: Order | Claim | ProcessRecord | Control | ExitRecord) -> None:
    assert type(record).from_json(record.to_json(), "here") == record


def test_a_newer_record_is_read_without_its_new_keys() -> None:
    text = Control(run_uuid="u", cause=StopCause.USER, grace_seconds=1.0).to_json().replace("{", '{"novel": 1,', 1)
    assert Control.from_json(text, "here").cause is StopCause.USER


@given(st.one_of(st.text(), st.sampled_from(["{}", "[]", "null", '{"run_uuid": 1}', '{"cause": "no"}'])))
def test_rubbish_is_a_run_file_error_that_names_the_place(text: str) -> None:
    with pytest.raises(RunFileError, match="here"):
        ExitRecord.from_json(text, "here")


def test_this_process_is_alive_and_another_of_its_pid_is_not() -> None:
    me = own_identity()
    assert me.pid == os.getpid()
    assert liveness(me) is Liveness.ALIVE
    assert liveness(ProcessIdentity(pid=me.pid, start_ticks=me.start_ticks + 1, boot_id=me.boot_id)) is Liveness.GONE
    assert liveness(ProcessIdentity(pid=me.pid, start_ticks=me.start_ticks, boot_id="another")) is Liveness.GONE


def test_a_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify(child.pid)
    assert identity is not None
    assert liveness(identity) is Liveness.ALIVE
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    assert liveness(identity) is Liveness.GONE
    child.communicate()
