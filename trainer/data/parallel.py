"""One function over many tasks in worker processes, its results in the order of the tasks, in bounded memory."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.errors import InputError

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")


class WorkerLostError(InputError):
    """A worker process ended without a result, as when the kernel kills it for lack of memory."""


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    work: Callable[[T], R], tasks: Iterable[T], *, workers: int | None = None, ahead: int = 4
) -> Iterator[R]:
    """`work(task)` for each task, in the order of the tasks; at most `workers * ahead` are in flight.

    `work` is pickled once for each worker: a module-level function, or a value with `__call__` that opens its tools
    when they are first needed. `workers` defaults to all usable cores; 1 runs everything in this process. Tasks are
    drawn in this process while the workers work, so a slow source of tasks overlaps with them. An exception of
    `work` is raised here as itself. Raises WorkerLostError if a worker dies, ValueError for counts below 1.
    """
    count = usable_cores() if workers is None else workers
    if count < 1 or ahead < 1:
        raise ValueError(f"workers {count} and ahead {ahead} must be at least 1")
    if count == 1:
        return map(work, tasks)
    return _across_processes(work, iter(tasks), count, count * ahead)


def _across_processes(work: Callable[[T], R], tasks: Iterator[T], workers: int, in_flight: int) -> Iterator[R]:
    # Most callers never start a process: these imports are for those who do.
    import multiprocessing  # noqa: PLC0415
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415
    from concurrent.futures.process import BrokenProcessPool  # noqa: PLC0415

    # Spawned, not forked: the caller may have threads, and a fork would copy its memory.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work,))
    pending: deque[Future[Any]] = deque()
    try:
        for task in itertools.islice(tasks, in_flight):
            pending.append(pool.submit(_call, task))
        while pending:
            result: R = pending.popleft().result()
            for task in itertools.islice(tasks, 1):
                pending.append(pool.submit(_call, task))
            yield result
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a worker process died without a word, most likely killed for lack of memory; "
            "start again with fewer --workers, or on a machine with more memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_work: Callable[[Any], Any] | None = None


def _begin(work: Callable[[Any], Any]) -> None:
    """In a fresh worker: keep the work, leave Ctrl-C to the parent, and end when the parent is gone."""
    import signal  # noqa: PLC0415 - only workers need these
    import threading  # noqa: PLC0415

    global _work  # noqa: PLW0603 - the one place where a worker can keep what it was started with
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers hold both ends of the task queue, so a killed parent would leave them waiting for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    from multiprocessing import connection, parent_process  # noqa: PLC0415

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _call(task: Any) -> Any:
    if _work is None:
        raise RuntimeError("this process was not started by ordered_map")
    return _work(task)
