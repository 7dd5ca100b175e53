"""Every error that Caddie raises on purpose.

CaddieError
├── SpecError            a spec cannot be used: file, line, field, remedy
├── CommandError         a command for the daemon cannot be read or applied
├── TransitionError      an event that a state does not allow
├── WorkspaceError       the working folder is missing, unwritable or of another kind
├── LockHeldError        another daemon owns this workspace
├── RunFileError         a record in a run's folder is unreadable: the run's fate is unknown, not over
├── ProbeError           a device or process could not be looked at: unknown, never "dead"
├── ExecutionError       a run could not be started or signalled
└── LedgerError
    ├── LedgerCorruptError     the database failed its integrity check
    ├── LedgerSchemaError      the database was written by another version
    ├── DuplicateNameError     an experiment of that name exists with other contents
    └── NotFoundError          no such trial, experiment or run

A message says what is wrong, where, and what to do.
"""

from __future__ import annotations

from pathlib import PurePath


class CaddieError(Exception):
    """Base of all errors that are Caddie's own."""


class SpecError(CaddieError):
    """A spec that cannot be used. `line` counts from 1; 0 means the file as a whole."""

    def __init__(
        self, problem: str, *, source: PurePath | str, line: int = 0, field: str = "", remedy: str = ""
    ) -> None:
        self.problem, self.source, self.line, self.field, self.remedy = problem, str(source), line, field, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        field = f" field '{self.field}':" if self.field else ""
        remedy = f" Remedy: {self.remedy}" if self.remedy else ""
        return f"{place}:{field} {self.problem}.{remedy}"


class CommandError(CaddieError):
    """A command in `queue/commands/` cannot be read or applied."""


class TransitionError(CaddieError):
    """An event that the present state does not allow."""


class WorkspaceError(CaddieError):
    """The working folder is missing, unwritable or of another kind."""


class LockHeldError(CaddieError):
    """Another daemon owns this workspace."""


class RunFileError(CaddieError):
    """A record in a run's folder is unreadable. The run's fate is unknown, not over."""


class ProbeError(CaddieError):
    """A device or process could not be looked at. That is unknown, never "dead"."""


class ExecutionError(CaddieError):
    """A run could not be started or signalled."""


class LedgerError(CaddieError):
    """The ledger could not do what was asked."""


class LedgerCorruptError(LedgerError):
    """The database failed its integrity check."""


class LedgerSchemaError(LedgerError):
    """The database was written by another version of Caddie."""


class DuplicateNameError(LedgerError):
    """An experiment of that name exists with other contents."""


class NotFoundError(LedgerError):
    """No such trial, experiment or run."""
