"""When the daemon beats: at once, each interval, early for news, and until when. With a real heartbeat."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import bootstrap
from agent.adapters.executors.local import LocalExecutor
from agent.adapters.workspace import Workspace
from agent.daemon import Daemon
from agent.domain.beats import BeatReport
from agent.domain.observations import CommandVerb, Devices
from agent.settings import Settings

DEADLINE_SECONDS = 15.0
NEVER = 3600.0


class NoGpu:
    """Stands in for the driver."""

    def read(self) -> Devices:
        return Devices(gpus=(), cpu_slots=2, note="no NVIDIA GPU")

    def close(self) -> None:
        """Nothing to end."""


class Bench:
    """A daemon that would beat once an hour, unless something wakes it; a guard ends it if nothing does."""

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root / "workspace")
        self.workspace.create()
        self._heartbeat = bootstrap.heartbeat(self.workspace, Settings(disk_floor_bytes=0))
        self.heart = self._heartbeat.__enter__()
        self.executor: LocalExecutor = self.heart.observer.executor
        self.heart.observer.gpus = NoGpu()  # type: ignore[assignment]  # the outside
        self.reports: list[BeatReport] = []
        self.ran_out = False

    def run(
        self,
        on_beat: Callable[[Daemon, BeatReport], object] = lambda *_: None,
        *,
        interval: float = NEVER,
        until_drained: bool = False,
    ) -> list[BeatReport]:
        """Run until `on_beat` stops it, or the queue is drained."""

        def tell(report: BeatReport) -> None:
            self.reports.append(report)
            on_beat(daemon, report)

        daemon = Daemon(
            self.heart, interval_seconds=interval, watch_seconds=0.05, on_beat=tell, until_drained=until_drained
        )

        def give_up() -> None:
            self.ran_out = True
            daemon.stop()

        guard = threading.Timer(DEADLINE_SECONDS, give_up)
        guard.start()
        try:
            daemon.run()
        finally:
            guard.cancel()
            guard.join()
        assert not self.ran_out, f"nothing woke the daemon after {len(self.reports)} beats"
        return self.reports

    def command(self, name: str, script: str = "", extra: str = "") -> None:
        path = self.workspace.queue / f"{name}.yaml"
        argv = json.dumps([sys.executable, "-S", "-c", script])
        path.write_text(f"name: {name}\ncommand: {argv}\n{extra}", encoding="utf-8")
        os.utime(path, (time.time() - 10, time.time() - 10))

    def close(self) -> None:
        for folder in self.workspace.runs.glob("*/*"):
            self.executor.void("no-run-of-a-test", folder)
            self.executor.kill(folder)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.executor.reap():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self._heartbeat.__exit__(None, None, None)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def stop_at(number: int, also: Callable[[BeatReport], object] = lambda _: None) -> Callable[[Daemon, BeatReport], None]:
    def on_beat(daemon: Daemon, report: BeatReport) -> None:
        also(report)
        if report.number >= number:
            daemon.stop()

    return on_beat


def test_the_first_beat_comes_at_once_and_beats_are_counted(bench: Bench) -> None:
    assert [report.number for report in bench.run(stop_at(1))] == [1]


def test_the_interval_is_kept_without_news(bench: Bench) -> None:
    assert [report.number for report in bench.run(stop_at(3), interval=0.1)] == [1, 2, 3]


def test_a_spec_that_arrives_wakes_it(bench: Bench) -> None:
    def drop(report: BeatReport) -> None:
        if report.number == 1:
            threading.Timer(0.2, bench.command, ("one", "", "after: [nobody]\n")).start()

    first, second = bench.run(stop_at(2, drop))
    assert first.enqueued == ()
    assert second.enqueued == ("one@1337",)


def test_a_command_wakes_it(bench: Bench) -> None:
    bench.command("one", extra="after: [nobody]\n")

    def send(report: BeatReport) -> None:
        if report.number == 1:
            threading.Timer(0.2, bench.heart.observer.inbox.send, (CommandVerb.PAUSE, 1)).start()

    assert bench.run(stop_at(2, send))[1].commands == ("pause one@1337: held back in the queue",)


def test_news_that_come_while_a_beat_works_are_not_missed(bench: Bench) -> None:
    """The watch may well see them while the beat still goes on: that must not be the end of it."""

    def drop(report: BeatReport) -> None:
        if report.number == 1:
            bench.command("one", extra="after: [nobody]\n")
            time.sleep(0.5)  # many looks of a watch

    assert bench.run(stop_at(2, drop))[1].enqueued == ("one@1337",)


def test_a_run_that_ends_wakes_it_and_a_drained_queue_ends_it(bench: Bench) -> None:
    bench.command("one", "import time\ntime.sleep(1)")
    reports = bench.run(until_drained=True)
    assert reports[-1].counts == {"finished": 1}
    assert [report.drained for report in reports] == [False] * (len(reports) - 1) + [True]


def test_an_empty_queue_is_drained_at_once(bench: Bench) -> None:
    assert len(bench.run(until_drained=True)) == 1


def test_one_that_shall_not_end_goes_on_when_drained(bench: Bench) -> None:
    assert [report.drained for report in bench.run(stop_at(2), interval=0.1)] == [True, True]


def test_what_can_never_be_taken_in_does_not_keep_it_from_ending(bench: Bench) -> None:
    (bench.workspace.queue / "notes.txt").write_text("mine", encoding="utf-8")
    (bench.workspace.queue / "one.yaml~").write_text("an editor's copy", encoding="utf-8")
    assert bench.run(until_drained=True)[-1].drained


def test_a_paused_trial_does_not_keep_it_from_ending(bench: Bench) -> None:
    bench.command("one", extra="after: [nobody]\n")
    bench.run(stop_at(1))
    bench.heart.observer.inbox.send(CommandVerb.PAUSE, 1)
    reports = bench.run(until_drained=True, interval=0.1)
    assert reports[-1].counts == {"paused": 1}


def test_stop_during_a_beat_lets_it_end_and_begins_no_other(bench: Bench) -> None:
    bench.command("one", "import time\ntime.sleep(600)")
    (report,) = bench.run(lambda daemon, _: daemon.stop(), interval=0.05)
    assert [decision.kind for decision in report.decisions] == ["launch"]
    (folder,) = bench.workspace.runs.glob("*/*")
    assert (folder / "order.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_the_handlers_as_they_were(bench: Bench, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    bench.run(lambda *_: os.kill(os.getpid(), number))
    assert signal.getsignal(number) is before


def test_a_queue_that_is_gone_is_told_and_the_daemon_lives(bench: Bench) -> None:
    def away(report: BeatReport) -> None:
        if report.number == 1:
            bench.workspace.claimed.rmdir()

    reports = bench.run(stop_at(3, away), interval=0.1)
    assert reports[0].problems == ()
    assert all(any("claimed" in problem for problem in report.problems) for report in reports[1:])


def test_once_is_one_beat(bench: Bench) -> None:
    told: list[BeatReport] = []
    daemon = Daemon(bench.heart, interval_seconds=NEVER, watch_seconds=1, on_beat=told.append)
    report = daemon.once()
    assert told == [report]
    assert (report.number, report.ok) == (1, True)
