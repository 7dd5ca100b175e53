"""A run's log for people: its last lines, and following it until the run is over."""

from __future__ import annotations

import codecs
import os
import sys
import time
from pathlib import Path

from agent.domain.errors import NotFoundError
from agent.domain.runfiles import EXIT, LOG

_TAIL_BYTES = 1 << 20
_POLL_SECONDS = 0.3


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file, from its last mebibyte. Raises NotFoundError if there is no file."""
    text, _ = _read_tail(path)
    return text.splitlines()[-lines:]


def show(folder: Path, *, lines: int, follow: bool) -> None:
    """Print the end of a run's log; with `follow`, what is added to it, until the run's exit record is there."""
    path = folder / LOG
    text, offset = _read_tail(path)
    for line in text.splitlines(keepends=True)[-lines:]:
        sys.stdout.write(line)
    sys.stdout.flush()
    # Incremental: a character may be written in two pieces, on both sides of a look.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while follow:
        # Looked at before reading: what was written before the exit record is then still printed.
        over = (folder / EXIT).exists()
        with path.open("rb") as file:
            file.seek(offset)
            added = file.read()
        offset += len(added)
        sys.stdout.write(decoder.decode(added))
        sys.stdout.flush()
        if over:
            return
        time.sleep(_POLL_SECONDS)


def _read_tail(path: Path) -> tuple[str, int]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
            return text, file.tell()
    except FileNotFoundError:
        raise NotFoundError(f"there is no log at {path} yet; the run has not written a line") from None
