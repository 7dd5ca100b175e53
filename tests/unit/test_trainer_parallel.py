"""Work across processes: its order, its bounds, and its failures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel_work import Square
from trainer.data.parallel import WorkerLostError, ordered_map, usable_cores
from trainer.errors import InputError


def test_results_come_in_order_with_few_tasks_ahead() -> None:
    drawn = 0

    def tasks() -> Iterator[int]:
        nonlocal drawn
        for number in range(14, 40):
            drawn += 1
            yield number

    found = []
    for square, process, opened in ordered_map(Square(), tasks(), workers=2, ahead=2):
        found.append(square)
        assert drawn <= len(found) + 4
        assert process != os.getpid()
        assert opened == 1
    assert found == [number * number for number in range(14, 40)]


def test_one_worker_is_this_process() -> None:
    results = list(ordered_map(Square(), range(5), workers=1))
    assert [square for square, _, _ in results] == [0, 1, 4, 9, 16]
    assert {process for _, process, _ in results} == {os.getpid()}


def test_an_error_is_raised_as_itself_and_a_lost_worker_is_told() -> None:
    results = ordered_map(Square(), [1, 13, 2], workers=2)
    assert next(results)[0] == 1
    with pytest.raises(InputError, match="13 cannot be squared"):
        next(results)
    with pytest.raises(WorkerLostError, match="--workers"):
        list(ordered_map(Square(), [99], workers=2))


def test_an_error_of_the_source_of_tasks_ends_the_workers() -> None:
    def tasks() -> Iterator[int]:
        yield from range(8)
        raise InputError("the source broke")

    with pytest.raises(InputError, match="the source broke"):
        list(ordered_map(Square(), tasks(), workers=2))


@pytest.mark.parametrize(("workers", "ahead"), [(0, 2), (2, 0)])
def test_counts_below_one_are_refused(workers: int, ahead: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ordered_map(Square(), [1], workers=workers, ahead=ahead)
    assert usable_cores() >= 1


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\nfrom trainer.data.parallel import ordered_map\n"
        # In one call, so that lines of two workers do not mix.
        "def work(n):\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(600 * (n > 1))\n"
        "if __name__ == '__main__':\n    list(ordered_map(work, range(4), workers=2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(4)}
        parent.kill()
        # The pipe is closed only when the last process that holds it has ended.
        assert parent.stdout.read() == ""
    assert workers
    assert not any(Path(f"/proc/{worker}/cmdline").exists() and _is_ours(worker) for worker in workers)


def _is_ours(process: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
