"""What the policy decided: typed actions, each with its reason and the numbers that it stood on."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.domain.trials import Result, RunKind, StopCause

Numbers = dict[str, float | int | str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The devices of one run: GPU UUIDs, or CPU slots."""

    gpu_uuids: tuple[str, ...] = ()
    cpu_slots: int = 0

    def __str__(self) -> str:
        return f"GPU {', '.join(self.gpu_uuids)}" if self.gpu_uuids else f"{self.cpu_slots} CPU slot(s)"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    trial_id: int
    reason: str
    numbers: Numbers = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch(_Decision):
    """Start a run. `source` is the file that an export or evaluation reads; None for training."""

    kind: RunKind
    assignment: Assignment
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(_Decision):
    """Tell a run to end: TERM, grace, KILL. Its trial moves to pausing or stopping."""

    run_uuid: str
    cause: StopCause


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill(_Decision):
    """A stop whose deadline has passed: KILL the group from here, whatever the runner does."""

    run_uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish(_Decision):
    """End the trial for good."""

    result: Result
    raw_bpb: float | None = None
    """The raw final of a command's run, read from its log; trainer runs bring theirs in `result.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue(_Decision):
    """The trial goes back to the queue; from its last checkpoint if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkPaused(_Decision):
    """The run that was asked to pause is over with its progress kept; or a queued trial is held back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(_Decision):
    """A paused trial goes back to the queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Void(_Decision):
    """Claim an unclaimed run, so that a late runner can never start it."""

    run_uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep(_Decision):
    """Go on. `suspect` marks a first condemnation that the next check must confirm before anything is done.

    For a finished trial: nothing more is tried, which is said, and stored, once.
    """

    suspect: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait(_Decision):
    """A trial that waits for its turn, a device or another trial, and why."""

    hopeless: bool = False
    """As things stand it can never start: it asks for more than the machine has, or waits for what will not come."""


Action = Launch | Stop | Kill | Finish | Requeue | MarkPaused | Resume | Void | Keep | Wait


def name_of(action: Action) -> str:
    """The word of the vocabulary for an action, as ledger and heartbeat log show it."""
    match action:
        case Launch(kind=RunKind.TRAIN):
            return "launch"
        case Launch(kind=kind):
            return str(kind)
        case Stop(cause=cause):
            return {StopCause.PAUSE: "pause", StopCause.PRUNE: "prune"}.get(cause, "stop")
        case Finish(result=result):
            return "reject" if result.value.startswith("rejected") else "finish"
        case Requeue():
            return "retry"
        case MarkPaused():
            return "paused"
        case Kill() | Resume() | Void() | Keep() | Wait():
            return type(action).__name__.lower()
