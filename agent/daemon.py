"""The daemon: one instance per workspace, a beat every interval, awake early when there is news.

Signals stop the daemon and leave its runs alive; the next `caddie up` adopts them. APScheduler keeps the
cadence (coalesced, one beat at a time); a cheap watch between beats looks for new files in the queue and new
exit records, so that no GPU idles until the next beat.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

from agent.domain.beats import BeatReport
from agent.heartbeat import Heartbeat

log = logging.getLogger(__name__)

_BEAT, _WATCH = "beat", "watch"


class Daemon:
    """Runs beats until it is told to stop, or until the queue is drained if that was asked for.

    The caller holds the workspace's lock. `on_beat` is called with each report, in the beat's thread.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        *,
        interval_seconds: float,
        watch_seconds: float,
        on_beat: Callable[[BeatReport], None],
        until_drained: bool = False,
    ) -> None:
        self._heartbeat = heartbeat
        self._interval = interval_seconds
        self._watch_seconds = watch_seconds
        self._on_beat = on_beat
        self._until_drained = until_drained
        self._stop = threading.Event()
        self._number = 0
        self._news: frozenset[str] = frozenset()
        # One worker each: a beat that takes long must not hold up the watch, and two beats never overlap.
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            executors={_BEAT: ThreadPoolExecutor(1), _WATCH: ThreadPoolExecutor(1)},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    def run(self) -> None:
        """Beat until SIGTERM, SIGINT, `stop()`, or a drained queue. Call from the main thread."""
        with self._signals():
            self._scheduler.add_job(
                self._beat,
                "interval",
                seconds=self._interval,
                id=_BEAT,
                executor=_BEAT,
                next_run_time=datetime.now(UTC),
            )
            self._scheduler.add_job(self._watch, "interval", seconds=self._watch_seconds, id=_WATCH, executor=_WATCH)
            self._scheduler.start()
            try:
                self._stop.wait()
            finally:
                # A beat in progress is finished: it may have committed an intent that it is about to act on.
                self._scheduler.shutdown(wait=True)

    def once(self) -> BeatReport:
        """A single beat, without a scheduler."""
        return self._one_beat()

    def stop(self) -> None:
        self._stop.set()

    def _beat(self) -> None:
        if self._stop.is_set():
            return
        report = self._one_beat()
        if self._until_drained and report.drained and not self._heartbeat.news():
            self._stop.set()
        elif report.again:
            self._wake("the beat changed what the next one can do")

    def _one_beat(self) -> BeatReport:
        self._number += 1
        self._news = self._heartbeat.news()
        report = self._heartbeat.beat(datetime.now(UTC), self._number)
        self._on_beat(report)
        return report

    def _watch(self) -> None:
        """Wake the heartbeat for news that the last beat has not seen."""
        fresh = self._heartbeat.news() - self._news
        if fresh:
            self._news |= fresh
            self._wake(f"news: {', '.join(sorted(fresh))}")

    def _wake(self, why: str) -> None:
        log.debug("waking early: %s", why)
        if not self._stop.is_set():
            self._scheduler.modify_job(_BEAT, next_run_time=datetime.now(UTC))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(number: int, _frame: FrameType | None) -> None:
            log.info("%s: stopping; runs go on without the daemon", signal.Signals(number).name)
            self._stop.set()

        held = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)
