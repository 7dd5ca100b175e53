"""logs/heartbeat.log for people and logs/heartbeat.jsonl for programs: one line a beat, bounded by rotation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class HeartbeatLog:
    """Appends; at `max_bytes` a file becomes `.1`, `.1` becomes `.2`, and at most `keep` old ones stay."""

    def __init__(self, logs_dir: Path, max_bytes: int = 10_000_000, keep: int = 5) -> None:
        if max_bytes <= 0 or keep < 0:
            raise ValueError(f"max_bytes {max_bytes} must be positive and keep {keep} not negative")
        self._text, self._json = logs_dir / "heartbeat.log", logs_dir / "heartbeat.jsonl"
        self._max_bytes, self._keep = max_bytes, keep

    def append(self, line: str, record: Mapping[str, Any]) -> None:
        """Write one line into each file, each whole by a single write. Raises OSError, such as for a full disk."""
        # A line break inside would look like another beat.
        text = line.rstrip("\n").replace("\r", " ").replace("\n", "\n    ")
        self._append(self._text, text)
        self._append(self._json, json.dumps(_finite(record), separators=(",", ":"), default=str, allow_nan=False))

    def _append(self, path: Path, line: str) -> None:
        data = (line + "\n").encode("utf-8", errors="replace")
        if _size(path) + len(data) > self._max_bytes and _size(path):
            self._rotate(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written < len(data):
            raise OSError(f"only {written} of {len(data)} bytes fitted into {path}: is the disk full?")

    def _rotate(self, path: Path) -> None:
        if self._keep == 0:
            path.unlink()
            return
        for number in range(self._keep - 1, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{number + 1}"))
        path.replace(path.with_name(f"{path.name}.1"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finite(item) for item in value]
    return value
