"""States of trials and runs, and the two transition tables. Everything that is not in a table is an error.

A trial is one spec with one seed, under judgement; a run is one process of a trial. Lifecycle (state) and
result are two things: a trial that is FINISHED has exactly one `Result`, and finished is final.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from agent.domain.errors import TransitionError


class TrialState(StrEnum):
    QUEUED = "queued"
    LAUNCHING = "launching"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    STOPPING = "stopping"
    FINISHED = "finished"


class TrialEvent(StrEnum):
    LAUNCH = "launch"
    """The intent to start a run was committed."""
    STARTED = "started"
    """The run's process was seen."""
    PAUSE = "pause"
    """Checkpoint and exit was asked for."""
    PAUSED = "paused"
    """The run ended with its progress kept."""
    RESUME = "resume"
    """Back to the queue."""
    STOP = "stop"
    """The run was told to end for good."""
    REQUEUE = "requeue"
    """The run is proved over without a result, and the trial may try again."""
    FINISH = "finish"


class Result(StrEnum):
    """How a finished trial ended."""

    COMPLETED = "completed"
    PRUNED = "pruned"
    STOPPED = "stopped"
    """By the user."""
    FAILED_OOM = "failed:oom"
    FAILED_DIVERGED = "failed:diverged"
    FAILED_STALLED = "failed:stalled"
    FAILED_CRASHED = "failed:crashed"
    FAILED_LOST = "failed:lost"
    REJECTED_OVER_BUDGET = "rejected:over_budget"


class RunKind(StrEnum):
    TRAIN = "train"
    EXPORT = "export"
    EVALUATE = "evaluate"


class RunState(StrEnum):
    INTENDED = "intended"
    """Committed to the ledger; a process may or may not exist yet."""
    RUNNING = "running"
    STOPPING = "stopping"
    UNKNOWN = "unknown"
    """Could not look. Not dead: nothing is relaunched and its devices stay taken."""
    EXITED = "exited"
    """The exit record was read."""
    LOST = "lost"
    """Proved gone without an exit record, or voided before it was claimed."""


class RunEvent(StrEnum):
    SEEN = "seen"
    STOP = "stop"
    LOSE_SIGHT = "lose_sight"
    EXIT = "exit"
    VANISH = "vanish"


class StopCause(StrEnum):
    """Why a run was told to end; kept with the run, so that its exit is judged by the purpose."""

    PAUSE = "pause"
    PRUNE = "prune"
    DIVERGED = "diverged"
    USER = "user"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"
    """Nobody asked: the runner itself was told to end, by a reboot or the stop of a service."""


_T, _E = TrialState, TrialEvent
TRIAL_TRANSITIONS: Mapping[tuple[TrialState, TrialEvent], TrialState] = {
    (_T.QUEUED, _E.LAUNCH): _T.LAUNCHING,
    (_T.QUEUED, _E.PAUSE): _T.PAUSED,
    (_T.QUEUED, _E.FINISH): _T.FINISHED,
    (_T.LAUNCHING, _E.STARTED): _T.RUNNING,
    (_T.LAUNCHING, _E.STOP): _T.STOPPING,
    (_T.LAUNCHING, _E.PAUSE): _T.PAUSING,
    (_T.LAUNCHING, _E.REQUEUE): _T.QUEUED,
    (_T.LAUNCHING, _E.FINISH): _T.FINISHED,
    (_T.RUNNING, _E.PAUSE): _T.PAUSING,
    (_T.RUNNING, _E.STOP): _T.STOPPING,
    (_T.RUNNING, _E.REQUEUE): _T.QUEUED,
    (_T.RUNNING, _E.FINISH): _T.FINISHED,
    (_T.PAUSING, _E.PAUSED): _T.PAUSED,
    (_T.PAUSING, _E.STOP): _T.STOPPING,
    (_T.PAUSING, _E.FINISH): _T.FINISHED,
    (_T.PAUSED, _E.RESUME): _T.QUEUED,
    (_T.PAUSED, _E.FINISH): _T.FINISHED,
    (_T.STOPPING, _E.FINISH): _T.FINISHED,
}

_R, _V = RunState, RunEvent
RUN_TRANSITIONS: Mapping[tuple[RunState, RunEvent], RunState] = {
    (_R.INTENDED, _V.SEEN): _R.RUNNING,
    (_R.INTENDED, _V.STOP): _R.STOPPING,
    (_R.INTENDED, _V.LOSE_SIGHT): _R.UNKNOWN,
    (_R.INTENDED, _V.EXIT): _R.EXITED,
    (_R.INTENDED, _V.VANISH): _R.LOST,
    (_R.RUNNING, _V.SEEN): _R.RUNNING,
    (_R.RUNNING, _V.STOP): _R.STOPPING,
    (_R.RUNNING, _V.LOSE_SIGHT): _R.UNKNOWN,
    (_R.RUNNING, _V.EXIT): _R.EXITED,
    (_R.RUNNING, _V.VANISH): _R.LOST,
    (_R.STOPPING, _V.SEEN): _R.STOPPING,
    (_R.STOPPING, _V.STOP): _R.STOPPING,
    (_R.STOPPING, _V.LOSE_SIGHT): _R.STOPPING,
    (_R.STOPPING, _V.EXIT): _R.EXITED,
    (_R.STOPPING, _V.VANISH): _R.LOST,
    (_R.UNKNOWN, _V.SEEN): _R.RUNNING,
    (_R.UNKNOWN, _V.STOP): _R.STOPPING,
    (_R.UNKNOWN, _V.LOSE_SIGHT): _R.UNKNOWN,
    (_R.UNKNOWN, _V.EXIT): _R.EXITED,
    (_R.UNKNOWN, _V.VANISH): _R.LOST,
}

LIVE_TRIAL_STATES = frozenset({_T.LAUNCHING, _T.RUNNING, _T.PAUSING, _T.STOPPING})
"""States in which a training run exists or may exist."""

LIVE_RUN_STATES = frozenset({_R.INTENDED, _R.RUNNING, _R.STOPPING, _R.UNKNOWN})
"""States in which a process may exist: its devices count as taken."""


def next_trial_state(state: TrialState, event: TrialEvent) -> TrialState:
    """Raises TransitionError on anything that the table does not hold."""
    try:
        return TRIAL_TRANSITIONS[state, event]
    except KeyError:
        raise TransitionError(f"a trial that is {state} does not allow '{event}'") from None


def next_run_state(state: RunState, event: RunEvent) -> RunState:
    """Raises TransitionError on anything that the table does not hold."""
    try:
        return RUN_TRANSITIONS[state, event]
    except KeyError:
        raise TransitionError(f"a run that is {state} does not allow '{event}'") from None
