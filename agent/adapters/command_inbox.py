"""Commands of users for the daemon: small JSON files in queue/commands/. Writer and reader side by side."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from agent.adapters.workspace import Workspace
from agent.atomic_files import write_new, write_text
from agent.domain.errors import CommandError
from agent.domain.observations import Command, CommandVerb

MAX_COMMAND_BYTES = 64 << 10
_MAX_PER_LOOK = 1000


class CommandInbox:
    """Commands are claimed by a rename and stay claimed until the ledger settled them (`settle`)."""

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

        Files that are no command go to rejected/ with a text; each is also a problem in words.
        Raises OSError if the folders cannot be read.
        """
        claimed = _oldest_first(self._workspace.claimed_commands)[:_MAX_PER_LOOK]
        for path in _oldest_first(self._workspace.commands)[: _MAX_PER_LOOK - len(claimed)]:
            target = self._workspace.claimed_commands / path.name
            if os.path.lexists(target):  # another file of that name is not settled yet
                continue
            try:
                path.rename(target)
            except FileNotFoundError:
                continue
            claimed.append(target)
        commands: list[Command] = []
        problems: list[str] = []
        for path in claimed:
            try:
                commands.append(_read(path))
            except CommandError as error:
                problems.append(str(error))
                self._reject(path, str(error))
        return tuple(commands), tuple(problems)

    def settle(self, claimed_path: str | Path) -> None:
        """Remove a command that the ledger has settled. Repeating it does no harm. Raises OSError."""
        Path(claimed_path).unlink(missing_ok=True)

    def _reject(self, path: Path, message: str) -> None:
        target = self._workspace.rejected / f"{path.stem}.{uuid.uuid4().hex[:8]}.json"
        write_text(target.with_name(target.name + ".txt"), message + "\n")
        path.rename(target)


def _read(path: Path) -> Command:
    remedy = 'A command is {"verb": "stop" | "pause" | "resume", "trial_id": 12}; use the `caddie` verbs to send one'
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(MAX_COMMAND_BYTES + 1)
        if len(data) > MAX_COMMAND_BYTES:
            raise ValueError(f"larger than {MAX_COMMAND_BYTES} bytes")  # noqa: TRY301  # one way out for all that is wrong
        value = json.loads(data)
        if not isinstance(value, dict) or value.keys() != {"verb", "trial_id"}:
            raise ValueError("not an object of verb and trial_id")  # noqa: TRY301
        verb, trial_id = CommandVerb(value["verb"]), value["trial_id"]
        if type(trial_id) is not int or not 0 < trial_id < 2**63:
            raise ValueError(f"trial_id {str(trial_id)[:40]} is not a trial's number")  # noqa: TRY301
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(f"{path.name} is not a command: {error}. {remedy}") from error
    return Command(command_id=path.stem, verb=verb, trial_id=trial_id, claimed_path=str(path))


def _oldest_first(folder: Path) -> list[Path]:
    found: list[tuple[int, str, Path]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.endswith(".json") or entry.is_dir(follow_symlinks=False):
                continue
            try:
                found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name, Path(entry.path)))
            except FileNotFoundError:
                continue
    return [path for _, _, path in sorted(found)]
