"""What a run's wall time goes into beside its training clock: starting, compiling, scoring, saving."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_STAT = Path("/proc/self/stat")


class WallTime:
    """Seconds by name. Phases follow one another (`lap`) or lie within others, whose seconds they then lessen
    (`spent`)."""

    def __init__(self, now: Callable[[], float] = time.monotonic, age: float = 0.0) -> None:
        """`age` in seconds: what the process lived before, which counts to the first phase."""
        self._now = now
        self._since = now() - age
        self._seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What has passed since the last phase ended was `name`."""
        now = self._now()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """What passes within is `name`, and no part of the phase around it. Not to be nested."""
        began = self._now()
        try:
            yield
        finally:
            passed = self._now() - began
            self._seconds[name] = self._seconds.get(name, 0.0) + passed
            self._since += passed

    @property
    def seconds(self) -> dict[str, float]:
        """By name, in the order in which they first ended."""
        return dict(self._seconds)

    def line(self) -> str:
        """`start:4.1s plan:2.0s ...`"""
        return " ".join(f"{name}:{seconds:.1f}s" for name, seconds in self._seconds.items())


def process_age() -> float:
    """Seconds that this process has lived, its imports included; 0 where there is no Linux to tell."""
    try:
        fields = _STAT.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
