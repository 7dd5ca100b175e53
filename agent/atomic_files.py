"""Files that are either whole or not there: written aside, fsync'd, then put in place by one system call.

Standard library only: the runner uses it too. Names of files being written start with a dot and end in
`.tmp`, so that every reader of a folder can tell and ignore them.
"""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def write_text(path: Path, text: str) -> None:
    """Replace the file: readers see the old text or the new one, also after a power cut. Raises OSError."""
    aside = _write_aside(path, text)
    try:
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, text: str) -> None:
    """Create the file, whole from its first instant; of several callers exactly one succeeds.

    Raises FileExistsError for the others, and OSError. A hard link from a finished file is as exclusive as
    O_EXCL, and unlike it leaves no empty file behind when its writer dies half-way. File systems without
    hard links get O_EXCL, where that gap exists.
    """
    aside = _write_aside(path, text)
    try:
        os.link(aside, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _write_exclusively(path, text)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in the folder survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_aside(path: Path, text: str) -> Path:
    aside = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        _write_exclusively(aside, text)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return aside


def _write_exclusively(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
