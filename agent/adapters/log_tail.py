"""Reads what is new in a run's log: by byte offset, complete lines only, in bounded time and memory.

All that is remembered between calls is the offset, which the ledger stores in the same transaction as the
points. It stands behind a line's end, or inside a line that is too long to be read: then the byte before it
is no line end, and everything up to the next one is skipped.
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path
from typing import BinaryIO

from agent.adapters.log_formats import UNREADABLE, LogFormat
from agent.domain.errors import ProbeError
from agent.domain.observations import LogEvent, LogHeader, LogPoint, LogReading

MAX_LINE_BYTES = 64 << 10
MAX_BYTES_PER_CALL = 8 << 20
_MAX_SECONDS_PER_CALL = 2.0
"""For the format's work, such as a slow pattern on many lines; the rest is read by the next call."""

# A carriage return ends a line as well: progress bars overwrite themselves and may never print a line feed.
_LINE_END = re.compile(rb"[\r\n]")


class _Findings:
    def __init__(self) -> None:
        self.header: LogHeader | None = None
        self.points: list[LogPoint] = []
        self.events: list[LogEvent] = []
        self.unreadable = 0

    def read(self, line: bytes, reader: LogFormat) -> None:
        match reader.read_line(line.decode("utf-8", errors="replace")):
            case LogHeader() as header:
                self.header = header
            case LogPoint() as point:
                self.points.append(point)
            case LogEvent() as event:
                self.events.append(event)
            case outcome if outcome is UNREADABLE:
                self.unreadable += 1


def read_log(
    path: Path,
    *,
    run_uuid: str,
    offset: int,
    reader: LogFormat,
    over: bool = False,
    max_bytes: int = MAX_BYTES_PER_CALL,
    max_seconds: float = _MAX_SECONDS_PER_CALL,
) -> LogReading:
    """New complete lines since `offset`, at most `max_bytes` of them; no file is an empty reading.

    `over`: the run has ended, so that a last line without its end is complete too. A file that is shorter
    than `offset` was truncated or replaced: it is read from its start and the reading says `restarted`.
    Raises ProbeError if the log is there and cannot be read.
    """
    if max_bytes <= MAX_LINE_BYTES:
        raise ValueError(f"max_bytes {max_bytes} must hold a whole line of {MAX_LINE_BYTES} bytes")
    try:
        # Not blocking, in case a program put a pipe in its log's place.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            details = os.fstat(file.fileno())
            if not stat.S_ISREG(details.st_mode):
                raise ProbeError(f"{path} is not a regular file: the run's log cannot be read")
            restarted = details.st_size < offset
            start = 0 if restarted else offset
            skipping = _stands_inside_a_line(file, start)
            file.seek(start)
            data = file.read(max_bytes)
            at_end = file.tell() >= details.st_size
    except FileNotFoundError:
        return LogReading(run_uuid=run_uuid, offset=offset, start_offset=offset)
    except OSError as error:
        raise ProbeError(f"cannot read the log {path}: {error}") from error
    findings = _Findings()
    used = _read_lines(data, findings, reader, skipping=skipping, over=over and at_end, max_seconds=max_seconds)
    return LogReading(
        run_uuid=run_uuid,
        offset=start + used,
        header=findings.header,
        points=tuple(findings.points),
        events=tuple(findings.events),
        unreadable_lines=findings.unreadable,
        start_offset=start,
        restarted=restarted,
    )


def _stands_inside_a_line(file: BinaryIO, offset: int) -> bool:
    if offset == 0:
        return False
    file.seek(offset - 1)
    return _LINE_END.match(file.read(1)) is None


def _read_lines(
    data: bytes, findings: _Findings, reader: LogFormat, *, skipping: bool, over: bool, max_seconds: float
) -> int:
    """Feed complete lines to the reader. Returns how many bytes are done with."""
    deadline = time.monotonic() + max_seconds
    used = 0
    for end in _LINE_END.finditer(data):
        line = data[used : end.start()] if end.start() - used <= MAX_LINE_BYTES else None
        used = end.end()
        if skipping:  # the rest of a line that was given up, and counted, by an earlier call
            skipping = False
        elif line is None:
            findings.unreadable += 1
        elif line:
            findings.read(line, reader)
        if time.monotonic() >= deadline:
            return used
    rest = len(data) - used
    if rest > MAX_LINE_BYTES or (skipping and rest):
        findings.unreadable += not skipping
        return len(data)
    if over and rest:
        findings.read(data[used:], reader)
        return len(data)
    return used
