"""The training clock: monotonic seconds of training proper, with compiling, evaluation and checkpoints left out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class TrainingClock:
    """Runs between `start` and `pause`, and may be resumed from a checkpoint's seconds.

    A device works behind the host's back. On CUDA the clock is kept honest without emptying the device's queue:
    `tick`, called after each step, waits for the step *before* it, so the host is at most one step ahead and a
    reading is late by at most one step. `pause` waits for everything before it reads.
    """

    def __init__(
        self, device: torch.device, seconds: float = 0.0, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = device
        self._now = now
        self._banked = seconds
        self._since: float | None = None
        self._steps_in_flight: deque[torch.cuda.Event] = deque()

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else self._now() - self._since
        return self._banked + running

    def start(self) -> None:
        if self._since is None:
            self._since = self._now()

    def pause(self) -> None:
        """Wait for the device, then stop counting."""
        if self._since is None:
            return
        self.synchronize()
        self._banked, self._since = self.seconds, None

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._steps_in_flight.clear()

    def tick(self) -> None:
        """One step has been handed to the device."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.current_stream(self._device).record_event()
        self._steps_in_flight.append(event)
        while len(self._steps_in_flight) > 1:
            self._steps_in_flight.popleft().synchronize()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work that is not training: evaluation, checkpoints. A clock that stood still goes on standing."""
        running = self._since is not None
        self.pause()
        try:
            yield
        finally:  # also after an error that the run survives, such as a full disk
            if running:
                self.start()
