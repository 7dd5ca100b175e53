"""The live view, drawn onto a recorded console."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from agent.domain.beats import BeatReport, DecisionLine, RunLine
from agent.domain.observations import Device, DeviceProcess
from agent.live import LiveView, devices_table, runs_table

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
GPU = Device(
    index=0,
    uuid="GPU-a",
    name="NVIDIA H100",
    memory_total_bytes=80_000_000_000,
    memory_used_bytes=4_200_000_000,
    utilization_percent=93,
    temperature_celsius=61,
    power_watts=411.6,
    processes=(DeviceProcess(pid=1, name="python", memory_bytes=None),),
)
BARE = Device(index=1, uuid="GPU-b", name="old card", memory_total_bytes=8_000_000_000, memory_used_bytes=0)
RUN = RunLine(
    trial_id=1,
    trial="plain@1337",
    kind="train",
    state="running",
    device="gpu0",
    pid=4711,
    step=1234,
    progress=0.42,
    val_bpb=1.2345,
    projected_bpb=1.1,
    low90=1.05,
    high90=1.15,
    projection="",
)


def report(**fields: Any) -> BeatReport:
    given: dict[str, Any] = {
        "at": NOW,
        "number": 7,
        "gpus": (),
        "cpu_slots": 2,
        "devices_note": "no NVIDIA GPU: runs use 2 CPU slots",
        "runs": (),
        "decisions": (),
        "commands": (),
        "enqueued": (),
        "refused": (),
        "counts": {},
        "best": (),
        "problems": (),
        "phase_seconds": {},
        "again": False,
        "restless": False,
        "waiting": 0,
        "drained": False,
        "ok": True,
    }
    return BeatReport(**(given | fields))


def recorded() -> Console:
    return Console(file=io.StringIO(), record=True, width=160, height=60, force_terminal=True)


def drawn(*reports: BeatReport, workspace: str = "place") -> str:
    """The last picture of a view that was shown these reports."""
    console = recorded()
    with LiveView(console, workspace=workspace, interval_seconds=180) as view:
        for shown in reports:
            view.show(shown)
        console.export_text()
    return console.export_text()


def printed(renderable: Any) -> str:
    console = recorded()
    console.print(renderable)
    return console.export_text()


def test_before_the_first_beat_it_says_so() -> None:
    text = drawn()
    assert "first heartbeat under way" in text
    assert "caddie up  place" in text


def test_without_gpus_it_tells_what_runs_use_and_that_nothing_runs() -> None:
    text = drawn(report(counts={"queued": 2}))
    assert "no NVIDIA GPU: runs use 2 CPU slots" in text
    assert "no run is live" in text
    assert "beat 7" in text
    assert "every 180 s" in text
    assert "queued 2" in text


def test_an_empty_queue_is_said() -> None:
    assert "queue empty" in drawn(report())


def test_each_gpu_with_what_it_reports_and_dashes_for_the_rest() -> None:
    full, bare = printed(devices_table(report(gpus=(GPU, BARE)))).splitlines()[1:]
    assert full.split() == ["gpu0", "NVIDIA", "H100", "4.2/80.0", "93%", "61", "C", "412", "W", "1", "ok"]
    assert bare.split() == ["gpu1", "old", "card", "0.0/8.0", "-", "-", "-", "0", "ok"]


def test_a_sick_or_throttled_card_says_why() -> None:
    sick = replace(GPU, error="GPU is lost")
    hot = replace(BARE, throttle_reasons=("thermal", "power"))
    text = printed(devices_table(report(gpus=(sick, hot))))
    assert "GPU is lost" in text
    assert "thermal, power" in text


def test_unknown_gpus_are_not_told_as_none() -> None:
    assert "NVML hangs" in drawn(report(gpus=None, devices_note="GPUs unknown: NVML hangs"))


def test_a_run_with_everything_and_one_with_nothing() -> None:
    bare = replace(
        RUN,
        trial="export@1",
        kind="export",
        state="unknown",
        step=None,
        progress=None,
        val_bpb=None,
        projected_bpb=None,
        low90=None,
        high90=None,
    )
    full, empty = printed(runs_table(report(runs=(RUN, bare)))).splitlines()[1:]
    for part in ("plain@1337", "train", "gpu0", "42%", "1234", "1.2345", "1.1000 (1.0500 to 1.1500)"):
        assert part in full
    assert "export (unknown)" in empty
    assert empty.split()[-4:] == ["-", "-", "-", "-"]


def test_decisions_stay_on_the_screen_when_later_beats_have_none() -> None:
    pruned = DecisionLine(trial="hopeless@1", kind="prune", reason="no way [to win]", numbers={})
    failed = DecisionLine(trial="plain@1", kind="launch", reason="starts", numbers={}, error="no space left")
    routine = DecisionLine(trial="plain@2", kind="keep", reason="goes on", numbers={}, routine=True)
    text = drawn(report(decisions=(pruned, failed, routine)), report(number=8))
    assert "12:00:00 prune hopeless@1: no way [to win]" in text
    assert "launch plain@1: starts FAILED: no space left" in text
    assert "goes on" not in text
    assert "beat 8" in text


def test_only_the_newest_decisions_are_kept() -> None:
    lines = tuple(DecisionLine(trial=f"t{n}@1", kind="launch", reason="starts", numbers={}) for n in range(20))
    text = drawn(report(decisions=lines))
    assert "t19@1" in text
    assert "t8@1" in text
    assert "t7@1" not in text


def test_problems_refusals_and_answers_are_shown() -> None:
    text = drawn(
        report(problems=("the disk is [/full]",), refused=("bad.yaml:3: no",), commands=("stop t@1: stopping",))
    )
    assert "problem: the disk is [/full]" in text
    assert "refused: bad.yaml:3: no" in text
    assert "stop t@1: stopping" in text


def test_the_best_so_far() -> None:
    assert "best raw BPB so far: plain@1337 1.2345" in drawn(report(best=(("track", "plain@1337", 1.23451),)))


@pytest.mark.parametrize("error", ["[not supported] by the driver", "driver said [/usr/lib] is gone"])
def test_the_words_of_a_driver_are_shown_as_they_are(error: str) -> None:
    assert error in printed(devices_table(report(gpus=(replace(GPU, error=error),))))


def test_the_workspaces_path_is_shown_as_it_is() -> None:
    assert "runs [old]" in drawn(report(), workspace="/home/me/runs [old]")
