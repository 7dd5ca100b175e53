"""Work for worker processes, in a module that they can import."""

from __future__ import annotations

import os
import signal
import time

from trainer.errors import InputError


class Square:
    """Opens its tool once per process, and is late with even numbers."""

    def __init__(self) -> None:
        self._opened = 0

    def __call__(self, number: int) -> tuple[int, int, int]:
        self._opened += not self._opened
        if number == 13:
            raise InputError("13 cannot be squared")
        if number == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02 * (number % 2 == 0))
        return number * number, os.getpid(), self._opened
