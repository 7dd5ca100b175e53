"""Work done ahead of whoever needs it, by one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `produce` in a thread of its own, up to `depth` results ahead of `get`.

    An error of `produce` ends the thread and is raised, as itself, by the `get` that would have had its result and
    by all later ones. `close` waits for the call under way; what was produced and not taken is dropped.
    """

    def __init__(self, produce: Callable[[], T], depth: int) -> None:
        self._produce, self._depth = produce, depth
        self._changed = Condition()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = Thread(target=self._run, name="caddie-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> T:
        with self._changed:
            while not self._ready:
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise ValueError("this prefetcher is closed")
                self._changed.wait()
            result = self._ready.popleft()
            self._changed.notify_all()
            return result

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while len(self._ready) >= self._depth and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
            try:
                result = self._produce()
            except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the thread that asks
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if not self._closed:
                    self._ready.append(result)
                    self._changed.notify_all()
