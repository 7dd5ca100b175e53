"""How far a long verb is: bars on a terminal, a plain line now and then in a log, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

Unit = Literal["bytes", "documents", "tokens", "files"]
Advance = Callable[[int], None]

LINE_SECONDS = 10.0
_BAR_COLUMNS = 24


class Progress(Protocol):
    def stage(self, name: str, *, total: int | None = None, unit: Unit = "bytes") -> AbstractContextManager[Advance]:
        """A stage of the work; call what is given with each amount that is done. No total: not known."""
        ...


class Silent:
    """Says nothing."""

    @contextmanager
    def stage(self, name: str, *, total: int | None = None, unit: Unit = "bytes") -> Iterator[Advance]:  # noqa: ARG002
        yield lambda _: None


class Lines:
    """A line through `say` every ten seconds or so, and one at the end of each stage with its rate."""

    def __init__(self, say: Callable[[str], None], *, every_seconds: float = LINE_SECONDS) -> None:
        self._say, self._every_seconds = say, every_seconds

    @contextmanager
    def stage(self, name: str, *, total: int | None = None, unit: Unit = "bytes") -> Iterator[Advance]:
        begun = said = time.monotonic()
        done = 0

        def advance(amount: int) -> None:
            nonlocal done, said
            done += amount
            now = time.monotonic()
            if now - said >= self._every_seconds:
                said = now
                share = f" of {_amount(total, unit)} ({100 * done / total:.0f}%)" if total else ""
                self._say(f"{name}: {_amount(done, unit)}{share}, {_rate(done, now - begun, unit)}")

        yield advance
        self._say(_ended(name, done, time.monotonic() - begun, unit))


class Bars:
    """A bar on stderr while a stage lasts, and a line for it afterwards."""

    @contextmanager
    def stage(self, name: str, *, total: int | None = None, unit: Unit = "bytes") -> Iterator[Advance]:
        from rich.console import Console  # noqa: PLC0415 - only where somebody looks at it
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        begun, done = time.monotonic(), 0
        columns = (TextColumn("{task.description}"), BarColumn(_BAR_COLUMNS), TextColumn("{task.fields[rate]}"))
        console = Console(stderr=True)
        with RichProgress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
            task = bars.add_task(name, total=total, rate="")

            def advance(amount: int) -> None:
                nonlocal done
                done += amount
                bars.update(task, advance=amount, rate=_rate(done, time.monotonic() - begun, unit))

            yield advance
        console.print(_ended(name, done, time.monotonic() - begun, unit), highlight=False)


class Timed:
    """Passes everything on to another, and keeps the wall seconds of each stage in `seconds`, in order."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, *, total: int | None = None, unit: Unit = "bytes") -> Iterator[Advance]:
        begun = time.perf_counter()
        with self._progress.stage(name, total=total, unit=unit) as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - begun


def shown_to(say: Callable[[str], None]) -> Progress:
    """Bars where stderr is a terminal, else lines through `say`."""
    return Bars() if sys.stderr.isatty() else Lines(say)


def _ended(name: str, done: int, seconds: float, unit: Unit) -> str:
    if not done:  # a stage in one piece
        return f"{name}: {seconds:.1f} s"
    return f"{name}: {_amount(done, unit)} in {seconds:.1f} s, {_rate(done, seconds, unit)}"


def _amount(done: int, unit: Unit) -> str:
    return f"{done / 1e6:.1f} MB" if unit == "bytes" else f"{done:,} {unit}"


def _rate(done: int, seconds: float, unit: Unit) -> str:
    per_second = done / max(seconds, 1e-9)
    return f"{per_second / 1e6:.1f} MB/s" if unit == "bytes" else f"{per_second:,.0f} {unit}/s"
