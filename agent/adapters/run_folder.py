"""One run's folder: its records as typed values, the tail of its log, and its result. Contents: `domain/runfiles`."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from agent.atomic_files import write_new, write_text
from agent.domain.errors import ProbeError, RunFileError
from agent.domain.runfiles import (
    CLAIM,
    CONTROL,
    EXIT,
    LOG,
    ORDER,
    PROCESS,
    RESULT,
    VOIDED,
    Claim,
    Control,
    ExitRecord,
    Order,
    ProcessRecord,
)
from agent.process_identity import own_identity

RUNNER_LOG = "runner.log"
"""What the runner itself had to say; the trainer's words are in `log.txt`."""

_MAX_RECORD_BYTES = 1 << 20
_MAX_RESULT_BYTES = 1 << 20
_TAIL_BYTES = 64 << 10
_TAIL_LINES = 50
_TAIL_LINE_CHARACTERS = 2000

_R = TypeVar("_R", Claim, ProcessRecord, ExitRecord)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A record that is missing is None. Raises RunFileError where it is there but cannot be understood, and
    ProbeError where it could not be read, which says nothing about it.
    """

    path: Path

    @property
    def log(self) -> Path:
        return self.path / LOG

    def claim(self) -> Claim | None:
        return self._read(CLAIM, Claim)

    def process(self) -> ProcessRecord | None:
        return self._read(PROCESS, ProcessRecord)

    def exit(self) -> ExitRecord | None:
        return self._read(EXIT, ExitRecord)

    def claim_is_empty(self) -> bool:
        """A claimant died between creating and writing it: possible only without hard links."""
        try:
            return (self.path / CLAIM).stat().st_size == 0
        except OSError:
            return False

    def give_order(self, order: Order) -> None:
        """Make the folder and write the order. Raises FileExistsError if it has one, and OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_new(self.path / ORDER, order.to_json())

    def ask(self, control: Control) -> None:
        """Raises OSError."""
        write_text(self.path / CONTROL, control.to_json())

    def void(self, run_uuid: str) -> bool:
        """Claim it as voided. False if anybody claimed it first. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        claim = Claim(run_uuid=run_uuid, claimant=VOIDED, identity=own_identity(), at=datetime.now(UTC).isoformat())
        try:
            write_new(self.path / CLAIM, claim.to_json())
        except FileExistsError:
            return False
        return True

    def log_tail(self) -> tuple[str, ...]:
        """The last lines of the log; of the runner's own log where the trainer said nothing."""
        return _last_lines(self.log) or _last_lines(self.path / RUNNER_LOG)

    def result_text(self) -> str | None:
        """The text of `result.json`, None without one. Raises RunFileError if it is absurdly large or no text."""
        return self._text(RESULT, _MAX_RESULT_BYTES)

    def _read(self, name: str, kind: type[_R]) -> _R | None:
        text = self._text(name, _MAX_RECORD_BYTES)
        return None if text is None else kind.from_json(text, str(self.path / name))

    def _text(self, name: str, limit: int) -> str | None:
        path = self.path / name
        try:
            # Not blocking, in case a program put a pipe there.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise RunFileError(f"{path} is not a regular file: not a record of a run")
                data = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError as error:
            raise RunFileError(f"{path} is a folder: not a record of a run") from error
        except OSError as error:
            raise ProbeError(f"cannot read {path}: {error.strerror}") from error
        if len(data) > limit:
            raise RunFileError(f"{path} is larger than {limit} bytes: not a record of a run")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RunFileError(f"{path} is not UTF-8 text: {error}") from error


def _last_lines(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - _TAIL_BYTES)
            file.seek(start)
            data = file.read(_TAIL_BYTES)
    except OSError:
        return ()
    lines = data.decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
    if start:
        lines = lines[1:] or lines  # the first one is cut
    return tuple(line[:_TAIL_LINE_CHARACTERS] for line in lines if line.strip())[-_TAIL_LINES:]
