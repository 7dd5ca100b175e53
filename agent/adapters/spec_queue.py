"""The queue folder: specs come in, are claimed by a rename, and end in accepted/ or rejected/.

A claimed file stays in claimed/ until the ledger has committed it and says so (`settle`); after a crash in
between it is found there and offered again.
"""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from agent.adapters.spec_yaml import MAX_SPEC_BYTES, decode_spec, load_spec_text, parse_spec
from agent.adapters.workspace import Workspace
from agent.atomic_files import sync_folder, write_new, write_text
from agent.domain.errors import SpecError
from agent.domain.observations import SpecArrival, SpecRefusal
from agent.domain.specs import Spec, track_of

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
        self.faults: tuple[str, ...] = ()
        """What the last `arrivals` could not do, for people: files that could not be claimed or read."""

    def arrivals(self, now: datetime | None = None) -> tuple[tuple[SpecArrival, ...], tuple[SpecRefusal, ...]]:
        """Claim what lies in the queue, leftovers of an earlier beat first, at most MAX_FILES_PER_LOOK files.

        A file that cannot be claimed or read is told in `faults` and offered again by the next look. Raises OSError
        if the queue itself cannot be read.
        """
        faults: list[str] = []
        claimed = _oldest_first(self._workspace.claimed)[:MAX_FILES_PER_LOOK]
        for path in _oldest_first(self._workspace.queue):
            if len(claimed) >= MAX_FILES_PER_LOOK:
                break
            if self._may_be_half_written(path, _moment(now)):
                continue
            target = self._workspace.claimed / f"{uuid.uuid4().hex[:8]}-{path.name}"
            try:
                path.rename(target)
            except FileNotFoundError:  # its owner took it back
                continue
            except OSError as error:
                faults.append(f"{path.name} cannot be taken out of the queue: {error.strerror}. Check its rights")
                continue
            claimed.append(target)
        arrivals, refusals = [], []
        for path in claimed:
            try:
                judged = self._judge(path)
            except OSError as error:
                # Could not look is not "bad": it stays claimed and is offered again by the next look.
                faults.append(f"{_source_name(path)} or its data set cannot be read now: {error}")
                continue
            if isinstance(judged, SpecArrival):
                arrivals.append(judged)
            else:
                refusals.append(judged)
        self.faults = tuple(faults)
        return tuple(arrivals), tuple(refusals)

    def waiting(self) -> frozenset[str]:
        """Files that the next look would take or judge, as names that change when a file does.

        A file that may still be half-written has another name once it has rested. Raises OSError if the queue
        itself cannot be read; cheap enough for every second.
        """
        moment = _moment(None)
        found: set[str] = set()
        for path in _oldest_first(self._workspace.queue):
            try:
                details = path.lstat()
            except OSError:
                continue
            rested = "" if _is_young(details, moment) else ":rested"
            found.add(f"{path.name}:{details.st_mtime_ns}{rested}")
        return frozenset(found)

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
        _check_track(spec, self._load_val_sha(spec), str(path))
        return text, spec

    def _may_be_half_written(self, path: Path, now: float) -> bool:
        """A young file that is no spec, or stops in the middle of a line, is left for the next look."""
        try:
            details = path.lstat()
            if not _is_young(details, now):
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

    def _judge(self, path: Path) -> SpecArrival | SpecRefusal:
        """Raises OSError if the file or its data set cannot be read now."""
        name = _source_name(path)
        try:
            if path.is_symlink():
                raise SpecError("a symbolic link", source=name, remedy="put a copy of the file into the queue")  # noqa: TRY301  # one way out for every refusal
            text = _read(path, name)
            spec = parse_spec(text, name)
            val_sha256 = self._load_val_sha(spec)
            _check_track(spec, val_sha256, name)
        except SpecError as error:
            return SpecRefusal(source_name=name, claimed_path=str(path), message=str(error))
        return SpecArrival(spec=spec, source_text=text, source_name=name, claimed_path=str(path), val_sha256=val_sha256)


def _check_track(spec: Spec, val_sha256: str | None, source: str) -> None:
    """Every trial belongs to a track; a spec whose limits make none is refused here, not later in the ledger."""
    try:
        track_of(spec, val_sha256)
    except (ValueError, ArithmeticError) as error:
        raise SpecError(
            f"its track cannot be computed: {error}", source=source, field="limits", remedy="give limits in bounds"
        ) from error


def _moment(now: datetime | None) -> float:
    """The later of the beat's time and the clock: files are looked at some time after the beat began."""
    clock = time.time()
    return clock if now is None else max(clock, now.timestamp())


def _is_young(details: os.stat_result, now: float) -> bool:
    """Whether a regular file may be one that is being written. Its owner may have dated it into the future."""
    changed = details.st_mtime if details.st_mtime <= now else details.st_ctime
    return stat.S_ISREG(details.st_mode) and abs(now - changed) < _HALF_WRITTEN_SECONDS


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
            except OSError:  # gone again, or not to be looked at
                continue
    return [path for _, _, path in sorted(found)]


def _free_name(folder: Path, name: str) -> Path:
    candidate, number = folder / name, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = folder / f"{Path(name).stem}.{number}{Path(name).suffix}"
    return candidate
