"""Being asked to stop: SIGTERM and SIGINT become a flag that the loop reads between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopAskedError(Exception):
    """A stop signal came where the work in hand can be dropped."""


class StopRequest:
    """Set once by a signal; never unset."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def check(self) -> None:
        """Raise StopAskedError if a stop was asked for."""
        if self:
            raise StopAskedError(self.signal_name)

    @contextmanager
    def explains_errors(self) -> Iterator[None]:
        """Work that can be dropped, not begun after a stop. An error in it while a stop is asked for is the stop's
        doing: a signal to the whole process group also ends the compiler's workers. Raises StopAskedError."""
        self.check()
        try:
            yield
        except Exception as error:
            if self:
                raise StopAskedError(self.signal_name) from error
            raise

    def receive(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Catch the stop signals inside the block and put the former handlers back after it.

    Python delivers signals to the main thread alone; anywhere else the request simply stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
