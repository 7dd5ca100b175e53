"""Wall seconds by what they went into."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer import wall_time
from trainer.wall_time import WallTime, process_age


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_follow_one_another_and_what_lies_within_is_no_part_of_them() -> None:
    clock = Clock()
    wall = WallTime(clock, age=2.0)
    clock.now += 1.0
    wall.lap("start")
    clock.now += 10.0
    with wall.spent("scoring"):
        clock.now += 4.0
    clock.now += 1.0
    wall.lap("training")
    with wall.spent("scoring"):
        clock.now += 0.5
    clock.now += 0.25
    wall.lap("ending")
    assert wall.seconds == {"start": 3.0, "scoring": 4.5, "training": 11.0, "ending": 0.25}
    assert sum(wall.seconds.values()) == clock.now - 100.0 + 2.0
    assert wall.line() == "start:3.0s scoring:4.5s training:11.0s ending:0.2s"


def test_what_an_error_ends_is_counted() -> None:
    clock = Clock()
    wall = WallTime(clock)

    def fail() -> None:
        with wall.spent("saving"):
            clock.now += 3.0
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    wall.lap("training")
    assert wall.seconds == {"saving": 3.0, "training": 0.0}


def test_the_age_of_a_process_begins_before_its_imports() -> None:
    code = "import time; time.sleep(.3); from trainer.wall_time import process_age; print(process_age())"
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= told < 600
    assert process_age() > told


def test_a_system_that_does_not_tell_counts_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wall_time, "_STAT", tmp_path / "stat")
    assert process_age() == 0.0
    (tmp_path / "stat").write_text("1 (python) S 1 1")  # fewer fields
    assert process_age() == 0.0
