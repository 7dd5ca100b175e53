"""The records in a run's folder: what was ordered, who claimed it, what was asked, how it ended.

Values with their JSON, side by side; reading and writing the files is the business of the runner and the
executors. Standard library only, because the runner must start fast and outlive any upgrade of the rest:
unknown keys of a newer version are ignored, missing ones are a `RunFileError`.

    order.json     written by the daemon before the spawn (after the intent was committed to the ledger)
    claim.json     created with O_EXCL by the runner: of two runners only one goes on. Or by the daemon, which
                   voids a run that nobody claimed, so that a late runner can never start it
    process.json   the trainer's own process
    control.json   written by the daemon: stop, with cause and grace
    exit.json      written by the runner at the very end
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from agent.domain.errors import RunFileError
from agent.domain.trials import StopCause

ORDER, CLAIM, PROCESS, CONTROL, EXIT = "order.json", "claim.json", "process.json", "control.json", "exit.json"
LOG = "log.txt"
RESULT = "result.json"

VOIDED = "voided"
"""`Claim.claimant` of a run that the daemon voided before any runner claimed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process beyond doubt: a PID alone is reused and does not survive a boot."""

    pid: int
    start_ticks: int
    """Kernel clock ticks since boot at which it started."""
    boot_id: str


class _Record:
    __slots__ = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"  # type: ignore[call-overload]  # every child is a dataclass

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Raises RunFileError naming `where` if the text is not such a record."""
        try:
            data = json.loads(text)
            names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
            return cls(**cls._revive({key: value for key, value in data.items() if key in names}))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise RunFileError(f"{where} is not a {cls.__name__} record: {error}") from error

    @classmethod
    def _revive(cls, data: dict[str, Any]) -> dict[str, Any]:
        if isinstance(identity := data.get("identity"), Mapping):
            data["identity"] = ProcessIdentity(**identity)
        if "cause" in data and data["cause"] is not None:
            data["cause"] = StopCause(data["cause"])
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Order(_Record):
    """What the runner shall start. `argv` is a list of arguments; no shell ever sees it."""

    run_uuid: str
    argv: list[str]
    cwd: str
    env: dict[str, str] = field(default_factory=dict)
    """Added to the runner's own environment."""
    grace_seconds: float = 30.0
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(_Record):
    run_uuid: str
    claimant: str
    """`runner`, or VOIDED."""
    identity: ProcessIdentity
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord(_Record):
    """The trainer's process: leader of its own process group, whose id is its pid."""

    run_uuid: str
    identity: ProcessIdentity
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Control(_Record):
    """A request to end: TERM to the whole group now, KILL after the grace."""

    run_uuid: str
    cause: StopCause
    grace_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord(_Record):
    """How the trainer ended. `returncode` is negative for a signal, None if it never started."""

    run_uuid: str
    returncode: int | None
    started_at: str | None
    ended_at: str
    cause: StopCause | None = None
    """The stop that was asked for; INTERRUPTED if the runner was told to end without one."""
    killed: bool = False
    """The grace ran out and KILL was sent."""
    error: str = ""
    """Why it could not be started."""
    errno: int | None = None
    """The system's number for that, where it gave one."""
