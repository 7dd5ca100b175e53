from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.adapters.log_formats import (
    UNREADABLE,
    JsonlFormat,
    LineReading,
    LogFormat,
    ParameterGolfFormat,
    RegexFormat,
    Unreadable,
    format_for,
)
from agent.adapters.log_tail import MAX_LINE_BYTES, read_log
from agent.domain.errors import ProbeError, SpecError
from agent.domain.observations import LogEvent, LogHeader, LogPoint, LogReading
from agent.domain.specs import Spec
from trainer.config import LimitsConfig, TrainConfig
from trainer.report import Event, Header, TrainPoint, ValPoint

TRAIN = TrainPoint(step=10, planned_steps=100, train_loss=5.5, elapsed_seconds=1.25, tokens_per_second=1000)
VAL = ValPoint(step=20, planned_steps=100, val_loss=4.5, val_bpb=2.25, elapsed_seconds=2.5)
GOLF = ParameterGolfFormat()


def read(path: Path, offset: int = 0, reader: LogFormat = GOLF, **options: object) -> LogReading:
    return read_log(path, run_uuid="u1", offset=offset, reader=reader, **options)  # type: ignore[arg-type]


def line(step: int) -> bytes:
    return TrainPoint(step=step, planned_steps=10**6, train_loss=1.0, elapsed_seconds=1.0).line().encode() + b"\n"


def steps(reading: LogReading) -> list[int]:
    return [point.step for point in reading.points]


def test_only_complete_lines_are_consumed(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert read(path) == LogReading(run_uuid="u1", offset=0), "no file yet"
    path.write_bytes(line(1) + line(2)[:-5])
    first = read(path)
    assert (steps(first), first.offset, first.start_offset) == ([1], len(line(1)), 0)
    assert read(path, first.offset).offset == first.offset
    with path.open("ab") as file:
        file.write(line(2)[-5:] + line(3))
    second = read(path, first.offset)
    assert (steps(second), second.start_offset, second.restarted) == ([2, 3], first.offset, False)
    assert second.offset == path.stat().st_size


def test_the_last_half_line_counts_once_the_run_is_over(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(line(1) + line(2).rstrip(b"\n"))
    assert steps(read(path)) == [1]
    over = read(path, over=True)
    assert (steps(over), over.offset) == ([1, 2], path.stat().st_size)


def test_progress_bars_are_split_at_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b" 10%|#\r 20%|##\r" + line(1).rstrip() + b"\r\n" + line(2) + b" 30%|###")
    assert steps(read(path)) == [1, 2]


def test_other_encodings_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"\xff\xfe\x00 gr\xf6\xdfer\n" + line(1))
    assert steps(read(path)) == [1]


def test_truncation_restarts_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(line(1) + line(2))
    before = read(path)
    path.write_bytes(line(7))
    after = read(path, before.offset)
    assert (steps(after), after.restarted, after.start_offset, after.offset) == ([7], True, 0, len(line(7)))


def test_a_line_that_is_too_long_is_skipped_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(line(1) + b"x" * 3 * MAX_LINE_BYTES + b"\n" + line(2))
    reading = read(path)
    assert (steps(reading), reading.unreadable_lines, reading.offset) == ([1, 2], 1, path.stat().st_size)


def test_a_huge_line_is_skipped_in_bounded_memory_over_many_calls(tmp_path: Path) -> None:
    """A stand-in for a program that prints 100 MB without a line's end, and then a point-like tail."""
    path, limit = tmp_path / "log.txt", 1 << 20
    with path.open("wb") as file:
        file.write(line(1))
        file.seek(20 * limit, os.SEEK_CUR)
        file.write(line(666) + line(2))
    offset, unreadable, found = 0, 0, []
    tracemalloc.start()
    while offset < path.stat().st_size:
        reading = read(path, offset, max_bytes=limit)
        assert reading.offset > offset
        offset, unreadable = reading.offset, unreadable + reading.unreadable_lines
        found += steps(reading)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found, unreadable) == ([1, 2], 1), "the end of the long line is no line of its own"
    assert peak < 8 * limit


def test_the_bytes_of_a_call_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"".join(line(step) for step in range(5000)))
    found, offset, calls = [], 0, 0
    while offset < path.stat().st_size:
        reading = read(path, offset, max_bytes=MAX_LINE_BYTES + 1)
        found, offset, calls = found + steps(reading), reading.offset, calls + 1
    assert found == list(range(5000))
    assert calls > 2
    with pytest.raises(ValueError, match="whole line"):
        read(path, max_bytes=10)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([line(1), line(2), b"noise\r", b"\n", b"\r\n", b"x" * 40, b"step:broken\n"]), max_size=12),
    st.data(),
)
def test_however_a_log_grows_the_same_is_read(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.txt"
    whole = b"".join(pieces)
    path.write_bytes(whole)
    expected = read(path)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    found, unreadable, offset = [], 0, 0
    for cut in [*cuts, len(whole)]:
        path.write_bytes(whole[:cut])
        reading = read(path, offset)
        assert not reading.restarted
        found += steps(reading)
        unreadable += reading.unreadable_lines
        offset = reading.offset
    assert (found, unreadable, offset) == (steps(expected), expected.unreadable_lines, expected.offset)


def test_what_is_no_regular_file_is_a_probe_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ProbeError, match="not a regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(ProbeError, match="cannot read"):
        read(tmp_path / "pipe" / "below")


def test_the_trainers_own_lines(tmp_path: Path) -> None:
    header = Header(
        config=TrainConfig(limits=LimitsConfig(steps=5)),
        params=123,
        tokens_per_step=456,
        val_sha256="aa",
        val_tokens=1,
        val_bytes=2,
        vocab_size=3,
        device="cpu",
        torch_version="2",
    )
    event = Event(kind="stopping_early", step=30, detail="wallclock_cap")
    path = tmp_path / "log.txt"
    path.write_text("\n".join(["free text", header.line(), TRAIN.line(), VAL.line(), event.line(), ""]))
    reading = read(path)
    assert reading.header == LogHeader(
        params=123, tokens_per_step=456, val_sha256="aa", device="cpu", text=header.line()
    )
    assert reading.points == (
        LogPoint(step=10, train_loss=5.5, elapsed_seconds=1.25),
        LogPoint(step=20, val_loss=4.5, val_bpb=2.25, elapsed_seconds=2.5),
    )
    assert reading.events == (LogEvent(kind="stopping_early", step=30, detail="wallclock_cap"),)
    assert reading.unreadable_lines == 0


BPB = {"step": "s", "val_bpb": "m.bpb", "tokens": "m.tok", "seconds": "t"}
THOUSAND = LogPoint(step=1000, train_loss=2.0)
POINT = LogPoint(step=3, val_bpb=1.5, tokens=9, elapsed_seconds=2.0)


@pytest.mark.parametrize(
    ("reader", "text", "expected"),
    [
        (GOLF, "step:5/10 something new", UNREADABLE),
        (GOLF, '{"caddie":1}', UNREADABLE),
        (GOLF, f"step:{'9' * 5000}/1 train_loss:1.0 train_time:1ms step_avg:1.0ms", UNREADABLE),
        (GOLF, "step:99999999999999999999/1 train_loss:1.0 train_time:1ms step_avg:1.0ms", UNREADABLE),
        (RegexFormat(r"it (?P<step>\S+) loss (?P<train_loss>\S+)"), "it 1,000 loss 2", THOUSAND),
        (RegexFormat(r"it (?P<step>\S+) loss (?P<train_loss>\S+)"), "it 1.5 loss 2.5", UNREADABLE),
        (RegexFormat(r"it (?P<step>\S+) loss (?P<train_loss>\S+)"), "it 1 loss n/a", UNREADABLE),
        (RegexFormat(r"it (?P<step>\S+) loss (?P<train_loss>\S+)"), "hello", None),
        (RegexFormat(r"it (?P<step>\d+)( loss (?P<train_loss>\S+))?"), "it 5", None),
        (RegexFormat(r"(?P<step>(a|aa)+)$"), "a" * 5000 + "b", UNREADABLE),
        (JsonlFormat(BPB), '{"s": 3, "m": {"bpb": 1.5, "tok": 9}, "t": 2}', POINT),
        (JsonlFormat(BPB), '{"s": "3", "m.bpb": "1.5", "m": {"tok": 9.0}, "t": 2}', POINT),
        (JsonlFormat(BPB), '{"s": 3, "m": {"bpb": null}}', None),
        (JsonlFormat(BPB), '{"s": 3, "m": [1]}', None),
        (JsonlFormat(BPB), "text", None),
        (JsonlFormat(BPB), '{"s": 3, ', UNREADABLE),
        (JsonlFormat(BPB), '{"s": true, "m": {"bpb": 1}}', UNREADABLE),
        (JsonlFormat(BPB), '{"s": -1, "m": {"bpb": 1}}', UNREADABLE),
        (JsonlFormat(BPB), '{"s": 1e999, "m": {"bpb": 1}}', UNREADABLE),
        (JsonlFormat(BPB), '{"s": {"a": 1}, "m": {"bpb": 1}}', UNREADABLE),
        (JsonlFormat(BPB), '{"a":' * 20000, UNREADABLE),
        (JsonlFormat(BPB), json.dumps({"s": 1, "m": {"bpb": 2.0}, "t": float("nan")}), LogPoint(step=1, val_bpb=2.0)),
    ],
)  # fmt: skip
def test_lines_of_each_format(reader: LogFormat, text: str, expected: LineReading) -> None:
    assert reader.read_line(text) == expected


def test_a_diverged_loss_is_a_point_and_not_an_unreadable_line() -> None:
    point = GOLF.read_line("step:5/10 train_loss:nan train_time:1ms step_avg:1.0ms")
    assert isinstance(point, LogPoint)
    assert point.train_loss != point.train_loss


def test_a_slow_pattern_gives_the_beat_back_and_goes_on_later(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes((b"a" * 3000 + b"b\n") * 4)
    reader = RegexFormat(r"(?P<step>(a|aa)+)$")
    found, offset, calls = 0, 0, 0
    while offset < path.stat().st_size:
        reading = read(path, offset, reader, max_seconds=0.0)
        assert reading.offset > offset
        found, offset, calls = found + reading.unreadable_lines, reading.offset, calls + 1
    assert (found, calls) == (4, 4)


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=300)
    | st.from_regex(r'(step:\d+/\d+ (train|val)_loss:|\{"caddie":|\{"s": ).{0,60}', fullmatch=True)
)
def test_no_line_makes_a_reader_raise(text: str) -> None:
    for reader in (GOLF, RegexFormat(r"(?P<step>\S+) (?P<val_bpb>\S+)"), JsonlFormat(BPB)):
        reading = reader.read_line(text)
        assert reading is None or isinstance(reading, LogPoint | LogHeader | LogEvent | Unreadable)


def test_the_format_is_the_specs() -> None:
    def spec(log: dict[str, object] | None) -> Spec:
        return Spec.model_validate({"name": "a", "command": ["x"], "log": log})

    assert isinstance(format_for(spec(None)), ParameterGolfFormat)
    assert isinstance(format_for(spec({"format": "jsonl", "fields": {"step": "s"}})), JsonlFormat)
    assert isinstance(format_for(spec({"format": "regex", "pattern": "(?P<step>.)"})), RegexFormat)
    with pytest.raises(SpecError, match=r"log\.pattern"):
        format_for(spec({"format": "regex", "pattern": "("}))
