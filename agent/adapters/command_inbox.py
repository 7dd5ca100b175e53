"""Commands of users for the daemon: small JSON files in queue/commands/. Writer and reader side by side."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import uuid
from pathlib import Path

from agent.adapters.workspace import Workspace
from agent.atomic_files import write_new, write_text
from agent.domain.errors import CommandError
from agent.domain.observations import Command, CommandVerb

MAX_COMMAND_BYTES = 64 << 10
_MAX_PER_LOOK = 1000
_SENT = re.compile("[0-9a-f]{32}")
"""Names that `send` gives: unique, so they serve as ids."""


class CommandInbox:
    """Commands are claimed by a rename and stay claimed until the ledger settled them (`settle`).

    A claimed file's name begins with the command's id. `send` gives the id; what users drop by hand gets a new one,
    because a name that was used before would be taken for a command that is known.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def send(self, verb: CommandVerb, trial_id: int) -> Path:
        """Drop a command for the daemon. Returns its file. Raises CommandError."""
        path = self._workspace.commands / f"{uuid.uuid4().hex}.json"
        try:
            write_new(path, json.dumps({"verb": str(verb), "trial_id": trial_id}) + "\n")
        except OSError as error:
            raise CommandError(
                f"cannot write {path}: {error.strerror}. Is {self._workspace.root} a workspace that you may write to?"
            ) from error
        return path

    def pending(self) -> tuple[tuple[Command, ...], tuple[str, ...]]:
        """Claim what lies there, and offer again what was claimed but not settled; oldest first.

        Files that are no command go to rejected/ with a text; each is also a problem in words, as is each file that
        could not be claimed, read or moved, which is offered again. Raises OSError if the folders cannot be read.
        """
        problems: list[str] = []
        claimed = _oldest_first(self._workspace.claimed_commands)[:_MAX_PER_LOOK]
        for path in _oldest_first(self._workspace.commands):
            if len(claimed) >= _MAX_PER_LOOK:
                break
            command_id = path.stem if _SENT.fullmatch(path.stem) else uuid.uuid4().hex
            target = self._workspace.claimed_commands / f"{command_id}-{path.name}"
            if os.path.lexists(target):  # another file of that name is not settled yet
                continue
            try:
                path.rename(target)
            except FileNotFoundError:
                continue
            except OSError as error:
                problems.append(f"command {path.name} cannot be taken: {error.strerror}. Check its rights")
                continue
            claimed.append(target)
        commands: list[Command] = []
        for path in claimed:
            try:
                commands.append(_read(path))
            except CommandError as error:
                problems.append(str(error))
                problems += self._reject(path, str(error))
            except OSError as error:  # could not look is not "bad"
                problems.append(f"command {_source_name(path)} cannot be read now: {error.strerror}")
        return tuple(commands), tuple(problems)

    def waiting(self) -> frozenset[str]:
        """Files that the next look would take, as names that change when a file does. Raises OSError."""
        found: set[str] = set()
        for path in _oldest_first(self._workspace.commands):
            with contextlib.suppress(OSError):
                found.add(f"{path.name}:{path.lstat().st_mtime_ns}")
        return frozenset(found)

    def settle(self, claimed_path: str | Path) -> None:
        """Remove a command that the ledger has settled. Repeating it does no harm. Raises OSError."""
        Path(claimed_path).unlink(missing_ok=True)

    def _reject(self, path: Path, message: str) -> tuple[str, ...]:
        """Move it away with the reason beside it. Returns the problem if that failed."""
        target = self._workspace.rejected / f"{Path(_source_name(path)).stem}.{uuid.uuid4().hex[:8]}.json"
        note = target.with_name(target.name + ".txt")
        try:
            path.rename(target)
            write_text(note, message + "\n")
        except OSError as error:
            return (f"command {_source_name(path)} cannot be moved to {target.parent}: {error.strerror}",)
        return ()


def _read(path: Path) -> Command:
    remedy = 'A command is {"verb": "stop" | "pause" | "resume", "trial_id": 12}; use the `caddie` verbs to send one'
    """Raises CommandError for what is no command, OSError for what cannot be read now."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("not a regular file")  # noqa: TRY301  # one way out for all that is wrong
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(MAX_COMMAND_BYTES + 1)
        if len(data) > MAX_COMMAND_BYTES:
            raise ValueError(f"larger than {MAX_COMMAND_BYTES} bytes")  # noqa: TRY301
        value = json.loads(data)
        if not isinstance(value, dict) or value.keys() != {"verb", "trial_id"}:
            raise ValueError("not an object of verb and trial_id")  # noqa: TRY301
        verb, trial_id = CommandVerb(value["verb"]), value["trial_id"]
        if type(trial_id) is not int or not 0 < trial_id < 2**63:
            raise ValueError(f"trial_id {str(trial_id)[:40]} is not a trial's number")  # noqa: TRY301
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{_source_name(path)} is not a command: {error}. {remedy}") from error
    return Command(command_id=path.name.partition("-")[0], verb=verb, trial_id=trial_id, claimed_path=str(path))


def _source_name(claimed: Path) -> str:
    """What its sender called it: the name without the command's id."""
    return claimed.name.partition("-")[2] or claimed.name


def _oldest_first(folder: Path) -> list[Path]:
    found: list[tuple[int, str, Path]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.endswith(".json") or entry.is_dir(follow_symlinks=False):
                continue
            try:
                found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name, Path(entry.path)))
            except OSError:  # gone again, or not to be looked at
                continue
    return [path for _, _, path in sorted(found)]
