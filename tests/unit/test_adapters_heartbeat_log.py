from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.adapters.heartbeat_log import HeartbeatLog


def test_each_beat_is_one_line_of_text_and_one_of_json(tmp_path: Path) -> None:
    log = HeartbeatLog(tmp_path)
    at = datetime(2026, 1, 2, tzinfo=UTC)
    log.append("first\nbeat", {"at": at, "losses": [1.5, math.nan, math.inf], "where": tmp_path})
    log.append("second", {"n": 2})
    assert (tmp_path / "heartbeat.log").read_text() == "first\n    beat\nsecond\n"
    first, second = map(json.loads, (tmp_path / "heartbeat.jsonl").read_text().splitlines())
    assert first == {"at": str(at), "losses": [1.5, "nan", "inf"], "where": str(tmp_path)}
    assert second == {"n": 2}


def test_rotation_bounds_every_file_and_their_number(tmp_path: Path) -> None:
    log = HeartbeatLog(tmp_path, max_bytes=100, keep=2)
    for number in range(100):
        log.append(f"beat {number:03}", {"n": number})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"heartbeat.{kind}{end}" for kind in ("jsonl", "log") for end in ("", ".1", ".2")]
    assert all(path.stat().st_size <= 100 for path in tmp_path.iterdir())
    lines = [line for end in (".2", ".1", "") for line in (tmp_path / f"heartbeat.log{end}").read_text().splitlines()]
    assert lines == [f"beat {number:03}" for number in range(100 - len(lines), 100)], "the newest, in order, none lost"


def test_a_line_larger_than_the_limit_is_kept_whole(tmp_path: Path) -> None:
    log = HeartbeatLog(tmp_path, max_bytes=10, keep=0)
    log.append("x" * 50, {})
    log.append("y" * 50, {})
    assert (tmp_path / "heartbeat.log").read_text() == "y" * 50 + "\n"


def test_a_reopened_log_goes_on(tmp_path: Path) -> None:
    HeartbeatLog(tmp_path).append("one", {})
    HeartbeatLog(tmp_path).append("two", {})
    assert (tmp_path / "heartbeat.log").read_text() == "one\ntwo\n"


def test_limits_without_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        HeartbeatLog(tmp_path, max_bytes=0)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"heartbeat\.log"):
        HeartbeatLog(tmp_path / "nowhere").append("one", {})
