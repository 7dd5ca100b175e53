"""Every line that a trainer writes is read back; nothing else is taken for one of its lines."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.adapters.log_formats import ParameterGolfFormat
from trainer.config import LimitsConfig, TrainConfig
from trainer.report import (
    EvaluateResult,
    Event,
    EventKind,
    ExportResult,
    FinalPoint,
    Header,
    Reporter,
    Result,
    TrainPoint,
    TrainResult,
    ValPoint,
    parse_line,
    read_result,
    result_json,
)

steps = st.integers(0, 10**7)
losses = st.integers(0, 10**6).map(lambda n: n / 10000)
seconds = st.integers(0, 10**8).map(lambda n: n / 1000)
details = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=30).filter(
    lambda text: "step:" not in text
)

HEADER = Header(
    config=TrainConfig(limits=LimitsConfig(steps=3)),
    params=5,
    tokens_per_step=8,
    val_sha256="ab",
    val_tokens=2,
    val_bytes=5,
    vocab_size=1024,
    device="cpu",
    torch_version="2",
)
RESULTS: list[Result] = [
    TrainResult(
        stop_reason="finished", steps=1, tokens=2, training_seconds=0.5, wall_seconds=1.0, val_loss=2.0, val_bpb=1.0,
        val_sha256="a", params=3, model_path="model.pt", model_sha256="b",
    ),
    ExportResult(
        artifact_path="a", artifact_sha256="b", artifact_bytes=3, weights_bytes=2, code_bytes=1, tokenizer_bytes=9,
        scheme="int6+zlib", params=4, max_abs_error=0.1,
    ),
    EvaluateResult(
        source_path="a", source_sha256="b", source_kind="artifact", val_loss=2.0, val_bpb=1.0, val_sha256="c",
        val_tokens=4, val_bytes=8, wall_seconds=0.5, device="NVIDIA H100", compute_dtype="bfloat16",
    ),
]  # fmt: skip


@given(
    step=steps,
    planned=steps,
    loss=losses,
    clock=seconds,
    rate=st.none() | st.integers(1, 10**8).map(float),
    waited=st.none() | st.integers(0, 10**4).map(lambda n: n / 10**4),
    mfu=st.none() | st.integers(0, 2000).map(lambda n: n / 1000),
    memory=st.none() | st.integers(0, 10**5).map(lambda n: n * 10**7),
    epoch=st.none() | st.integers(0, 10**7).map(lambda n: n / 1000),
)
def test_train_lines_round_trip(
    *,
    step: int,
    planned: int,
    loss: float,
    clock: float,
    rate: float | None,
    waited: float | None,
    mfu: float | None,
    memory: int | None,
    epoch: float | None,
) -> None:
    point = TrainPoint(
        step=step,
        planned_steps=planned,
        train_loss=loss,
        elapsed_seconds=clock,
        tokens_per_second=rate,
        data_wait_share=waited,
        mfu=mfu,
        peak_memory_bytes=memory,
        epoch=epoch,
    )
    assert parse_line(point.line()) == point


@given(step=steps, planned=steps, loss=losses, bpb=losses, clock=seconds)
def test_val_lines_round_trip(step: int, planned: int, loss: float, bpb: float, clock: float) -> None:
    point = ValPoint(step=step, planned_steps=planned, val_loss=loss, val_bpb=bpb, elapsed_seconds=clock)
    assert parse_line(point.line()) == point


@given(
    kind=st.sampled_from(get_args(EventKind)),
    step=steps,
    detail=details,
)
def test_events_round_trip(kind: str, step: int, detail: str) -> None:
    event = Event.model_validate({"kind": kind, "step": step, "detail": detail})
    assert parse_line(event.line()) == event


def test_the_wallclock_cap_reads_like_the_public_scripts() -> None:
    line = "stopping_early: wallclock_cap train_time:180023ms step:812/900"
    event = Event(kind="stopping_early", step=812, detail="wallclock_cap train_time:180023ms", planned_steps=900)
    assert event.line() == line
    assert parse_line(line) == event


def test_the_tail_of_a_train_line_and_lines_of_before_it() -> None:
    old = "step:3/9 train_loss:1.0000 train_time:12ms step_avg:4.00ms tok/s:512"
    point = TrainPoint(step=3, planned_steps=9, train_loss=1.0, elapsed_seconds=0.012, tokens_per_second=512.0)
    assert point.line() == old
    assert parse_line(old) == point
    waited = point.model_copy(update={"data_wait_share": 0.0003})
    assert waited.line() == old + " data:0.03%"
    assert parse_line(waited.line()) == waited
    assert parse_line(old + " data:much") is None


def test_a_whole_train_line() -> None:
    point = TrainPoint(
        step=3,
        planned_steps=9,
        train_loss=1.0,
        elapsed_seconds=0.012,
        tokens_per_second=512.0,
        data_wait_share=0.0003,
        mfu=0.382,
        peak_memory_bytes=12_340_000_000,
        epoch=0.523,
    )
    line = (
        "step:3/9 train_loss:1.0000 train_time:12ms step_avg:4.00ms tok/s:512 data:0.03% mfu:38.2% mem:12.34GB "
        "epoch:0.523"
    )
    assert point.line() == line
    assert parse_line(line) == point
    assert parse_line(line.replace("GB", "TB")) is None


@given(averaging=st.sampled_from(["ema", "swa"]), loss=losses, bpb=losses)
def test_the_final_of_an_average_is_read_and_is_no_point(averaging: Any, loss: float, bpb: float) -> None:
    final = FinalPoint(averaging=averaging, val_loss=loss, val_bpb=bpb)
    assert parse_line(final.line()) == final
    assert ParameterGolfFormat().read_line(final.line()) is None
    assert parse_line(" " + final.line()) is None


def test_an_epoch_that_begins() -> None:
    event = Event(kind="epoch", step=812, detail="2 windows:31234")
    assert event.line() == "epoch:2 windows:31234 step:812"
    assert parse_line(event.line()) == event


def test_counts_that_no_run_has_are_no_lines_of_ours() -> None:
    assert parse_line(f"step:{'9' * 5000}/9 train_loss:1.0 train_time:12ms step_avg:4.00ms") is None


@pytest.mark.parametrize("detail", ["", " x", "a step:3", "two\nlines"])
def test_an_event_that_could_not_be_read_back_is_refused(detail: str) -> None:
    with pytest.raises(ValidationError):
        Event(kind="checkpoint", step=1, detail=detail)


def test_a_loss_that_is_not_a_number_is_still_a_point() -> None:
    point = parse_line("step:3/9 train_loss:nan train_time:12ms step_avg:4.00ms")
    assert isinstance(point, TrainPoint)
    assert point.train_loss != point.train_loss


def test_header_round_trip() -> None:
    assert parse_line(HEADER.line()) == HEADER
    assert "\n" not in HEADER.line()


@given(st.text())
def test_parsing_never_raises(text: str) -> None:
    parse_line(text)
    parse_line("step:" + text)
    parse_line('{"caddie":' + text)


@pytest.mark.parametrize(
    "line",
    [
        "",
        " step:1/2 train_loss:1.0 train_time:3ms step_avg:1.0ms",
        'print(f"step:{step}/{n} train_loss:{loss:.4f} train_time:{t}ms step_avg:{a}ms")',
        "step:{step}/{n} val_loss:{loss}",
        "warmup_step:1/20",
        '{"caddie":2}',
    ],
)
def test_what_is_not_a_line_of_ours_is_none(line: str) -> None:
    assert parse_line(line) is None


def test_the_reporter_writes_whole_lines() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.say(HEADER)
    reporter.note("hello\n")
    assert stream.getvalue() == HEADER.line() + "\nhello\n"
    Reporter(stream, speaks=False).say(HEADER)
    assert stream.getvalue() == HEADER.line() + "\nhello\n"


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.kind)
def test_results_round_trip(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(result_json(result), encoding="utf-8")
    assert read_result(path) == result


def test_a_result_of_before_epochs_were_counted_is_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert isinstance(RESULTS[0], TrainResult)
    new = RESULTS[0].model_copy(update={"epochs": 1.5, "data_wait_share": 0.01})
    path.write_text(result_json(new), encoding="utf-8")
    assert read_result(path) == new
    old = {key: value for key, value in new.model_dump().items() if key not in {"epochs", "data_wait_share"}}
    path.write_text(json.dumps({"result": old}), encoding="utf-8")
    assert read_result(path) == RESULTS[0]


def test_a_result_of_before_devices_were_named_is_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    old = {key: value for key, value in RESULTS[2].model_dump().items() if key not in {"device", "compute_dtype"}}
    path.write_text(json.dumps({"result": old}), encoding="utf-8")
    assert read_result(path) == RESULTS[2].model_copy(update={"device": None, "compute_dtype": None})


def test_results_that_are_not_finite_or_not_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_bpb"):
        result_json(RESULTS[0].model_copy(update={"val_bpb": float("nan")}))
    path = tmp_path / "result.json"
    path.write_text('{"result": {"kind": "lunch"}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"result\.json is not a result"):
        read_result(path)
