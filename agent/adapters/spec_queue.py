"""The queue folder: specs come in, are claimed by a rename, and end in accepted/ or rejected/.

A claimed file stays in claimed/ until the ledger has committed it and says so (`settle`); after a crash in
between it is found there and offered again.
"""

from __future__ import annotations

import logging
import os
import stat
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from agent.adapters.spec_yaml import MAX_SPEC_BYTES, decode_spec, load_spec_text, parse_spec
from agent.adapters.workspace import Workspace
from agent.atomic_files import sync_folder, write_new, write_text
from agent.domain.errors import SpecError
from agent.domain.observations import SpecArrival, SpecRefusal
from agent.domain.specs import Spec

_log = logging.getLogger(__name__)

MAX_FILES_PER_LOOK = 100
_HALF_WRITTEN_SECONDS = 2.0
"""How long a file that cannot be read as a spec may still be one that is being written."""
_SUFFIXES = (".yaml", ".yml")


class SpecQueue:
    """`load_val_sha(spec)` gives the hash of the spec's validation set, None for commands; it raises SpecError if
    the data set is missing or does not fit."""

    def __init__(self, workspace: Workspace, load_val_sha: Callable[[Spec], str | None]) -> None:
        self._workspace = workspace
        self._load_val_sha = load_val_sha

    def arrivals(self, now: datetime | None = None) -> tuple[tuple[SpecArrival, ...], tuple[SpecRefusal, ...]]:
        """Claim what lies in the queue, leftovers of an earlier beat first, at most MAX_FILES_PER_LOOK files.

        Raises OSError if the queue itself cannot be read.
        """
        moment = (now or datetime.now(UTC)).timestamp()
        claimed = _oldest_first(self._workspace.claimed)[:MAX_FILES_PER_LOOK]
        room = MAX_FILES_PER_LOOK - len(claimed)
        fresh = [path for path in _oldest_first(self._workspace.queue) if not self._may_be_half_written(path, moment)]
        for path in fresh[:room]:
            target = self._workspace.claimed / f"{uuid.uuid4().hex[:8]}-{path.name}"
            try:
                path.rename(target)
            except FileNotFoundError:  # its owner took it back
                continue
            claimed.append(target)
        arrivals, refusals = [], []
        for path in claimed:
            match self._judge(path):
                case SpecArrival() as arrival:
                    arrivals.append(arrival)
                case SpecRefusal() as refusal:
                    refusals.append(refusal)
        return tuple(arrivals), tuple(refusals)

    def settle(self, claimed_path: str | Path, refusal: str | None) -> None:
        """Move a claimed file on, after the ledger committed its fate. Repeating it does no harm. Raises OSError."""
        path = Path(claimed_path)
        if not path.is_symlink() and not path.exists():
            return
        folder = self._workspace.accepted if refusal is None else self._workspace.rejected
        target = _free_name(folder, _source_name(path))
        if refusal is not None:
            write_text(target.with_name(target.name + ".txt"), refusal.rstrip("\n") + "\n")
        path.rename(target)
        sync_folder(folder)

    def check(self, path: Path) -> Spec:
        """Validate a spec file and its data set without queueing it. Raises SpecError."""
        return self._checked(path)[1]

    def enqueue(self, path: Path) -> Path:
        """Validate a spec file and put a copy into the queue, whole from its first instant. For the CLI.

        Returns the copy's path. Raises SpecError, also when the file cannot be read.
        """
        text, spec = self._checked(path)
        name = path.name if path.suffix in _SUFFIXES and not path.name.startswith(".") else f"{spec.name}.yaml"
        while True:
            target = _free_name(self._workspace.queue, name)
            try:
                write_new(target, text)
            except FileExistsError:  # another one came in between
                continue
            except OSError as error:
                remedy = "is this a workspace that you may write to?"
                raise SpecError(
                    f"cannot be put into {target.parent}: {error.strerror}", source=path, remedy=remedy
                ) from error
            return target

    def _checked(self, path: Path) -> tuple[str, Spec]:
        text, spec = load_spec_text(path)
        self._load_val_sha(spec)
        return text, spec

    def _may_be_half_written(self, path: Path, now: float) -> bool:
        """A young file that is no spec, or stops in the middle of a line, is left for the next look."""
        try:
            details = path.lstat()
            if not stat.S_ISREG(details.st_mode) or now - details.st_mtime >= _HALF_WRITTEN_SECONDS:
                return False
            text = _read(path, path.name)
            if not text.endswith("\n"):
                return True
            parse_spec(text, path.name)
        except SpecError:
            return True
        except OSError:  # gone again, or not ours to read: claiming it will tell
            return False
        return False

    def _judge(self, path: Path) -> SpecArrival | SpecRefusal | None:
        name = _source_name(path)
        try:
            if path.is_symlink():
                raise SpecError("a symbolic link", source=name, remedy="put a copy of the file into the queue")  # noqa: TRY301  # one way out for every refusal
            text = _read(path, name)
            spec = parse_spec(text, name)
            val_sha256 = self._load_val_sha(spec)
        except SpecError as error:
            return SpecRefusal(source_name=name, claimed_path=str(path), message=str(error))
        except OSError as error:
            # Could not look is not "bad": it stays claimed and is offered again by the next look.
            _log.warning("cannot read the claimed spec %s, left for the next look: %s", path, error)
            return None
        return SpecArrival(spec=spec, source_text=text, source_name=name, claimed_path=str(path), val_sha256=val_sha256)


def _read(path: Path, name: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        return decode_spec(file.read(MAX_SPEC_BYTES + 1), name)


def _source_name(claimed: Path) -> str:
    """What the user called it: the name without the claim's prefix."""
    return claimed.name.partition("-")[2] or claimed.name


def _oldest_first(folder: Path) -> list[Path]:
    """Spec files and symbolic links of a folder by time of change. Hidden and temporary names are left alone."""
    found: list[tuple[int, str, Path]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.endswith(_SUFFIXES):
                continue
            try:
                if entry.is_file(follow_symlinks=False) or entry.is_symlink():
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name, Path(entry.path)))
            except FileNotFoundError:
                continue
    return [path for _, _, path in sorted(found)]


def _free_name(folder: Path, name: str) -> Path:
    candidate, number = folder / name, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = folder / f"{Path(name).stem}.{number}{Path(name).suffix}"
    return candidate
