"""Facts at an instant: devices, processes, log lines, queue. No opinions."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from agent.domain.runfiles import ExitRecord
from agent.domain.specs import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProcess:
    """A process on a GPU, Caddie's or anybody's. `memory_bytes` is None where the driver does not tell."""

    pid: int
    name: str
    memory_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU at an instant. Fields that the card or driver does not report are None, never zero."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilization_percent: int | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    throttle_reasons: tuple[str, ...] = ()
    ecc_uncorrected: int | None = None
    processes: tuple[DeviceProcess, ...] = ()
    error: str = ""
    """Why the card could not be read; a card with an error takes no new run."""

    @property
    def memory_free_bytes(self) -> int:
        return max(0, self.memory_total_bytes - self.memory_used_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What the machine has. `gpus` is None when the driver exists but could not be asked: unknown, not none."""

    gpus: tuple[Device, ...] | None
    cpu_slots: int
    note: str = ""
    """Said plainly to the user, such as why there are no GPUs."""


class ProbeState(StrEnum):
    UNCLAIMED = "unclaimed"
    """Nobody has claimed the run."""
    ALIVE = "alive"
    EXITED = "exited"
    """The exit record is there."""
    GONE = "gone"
    """Proved over without an exit record, or voided."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProbe:
    """What a look at one run found."""

    run_uuid: str
    state: ProbeState
    pid: int | None = None
    """The trainer's process, while it is alive."""
    exit: ExitRecord | None = None
    detail: str = ""
    log_tail: tuple[str, ...] = ()
    """Last lines of the log of a run that is over."""
    result_text: str | None = None
    """`result.json` of a run that is over, if it wrote one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPoint:
    """One measurement read from a log. At least one of the three scores is given."""

    step: int
    tokens: int | None = None
    elapsed_seconds: float | None = None
    """Training clock where the log tells it."""
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEvent:
    kind: str
    step: int | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHeader:
    """What a log says about its run before the first point."""

    params: int
    tokens_per_step: int
    val_sha256: str
    device: str
    text: str
    """The whole header line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogReading:
    """New complete lines of one run's log, and the offset to go on from: stored in the same transaction."""

    run_uuid: str
    offset: int
    header: LogHeader | None = None
    points: tuple[LogPoint, ...] = ()
    events: tuple[LogEvent, ...] = ()
    unreadable_lines: int = 0
    start_offset: int = 0
    """Where this reading began; it counts only if the ledger stands just there, so that none is stored twice."""
    restarted: bool = False
    """The log had shrunk (rotated or truncated) and was read from its start again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecArrival:
    """A claimed, valid spec file. `claimed_path` is moved on only after the ledger has committed it."""

    spec: Spec
    source_text: str
    source_name: str
    claimed_path: str
    val_sha256: str | None
    """Of the spec's data set; None for commands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecRefusal:
    """A claimed file that is no usable spec; `message` names line, field and remedy."""

    source_name: str
    claimed_path: str
    message: str


class CommandVerb(StrEnum):
    STOP = "stop"
    PAUSE = "pause"
    RESUME = "resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a user asked of the daemon through `queue/commands/`."""

    command_id: str
    verb: CommandVerb
    trial_id: int
    claimed_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    at: datetime
    devices: Devices
    probes: tuple[RunProbe, ...] = ()
    readings: tuple[LogReading, ...] = ()
    arrivals: tuple[SpecArrival, ...] = ()
    refusals: tuple[SpecRefusal, ...] = ()
    commands: tuple[Command, ...] = ()
    disk_free_bytes: int | None = None
    problems: tuple[str, ...] = field(default=())
    """Looks that failed, with what was being looked at."""
