"""The daemon: one instance per workspace, a beat every interval, awake early when there is news.

Beats run in the main thread, one after the other. APScheduler keeps the cadence and only says that a beat is
due; between beats a cheap watch looks for new files in the queue and new exit records, so that no GPU idles
until the next beat. A wait on the monotonic clock stands behind both: a wall clock that is set back by an hour
would make the scheduler sleep for that hour.

Signals stop the daemon and leave its runs alive; the next `caddie up` adopts them.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType

from apscheduler.schedulers.background import BackgroundScheduler

from agent.domain.beats import BeatReport
from agent.heartbeat import Heartbeat

log = logging.getLogger(__name__)

_RESTLESS_SECONDS = 10.0
"""The next beat at the latest, while something must be followed closely: a stop, a start, a retry."""


class Daemon:
    """Runs beats until it is told to stop, or until the queue is drained if that was asked for.

    The caller holds the workspace's lock. `on_beat` is called with each report.
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
        self._stopped = threading.Event()
        self._due = threading.Event()
        self._number = 0
        self._seen: frozenset[str] = frozenset()
        self._next_at = 0.0

    def run(self) -> None:
        """Beat until SIGTERM, SIGINT, `stop()`, or a drained queue. Call from the main thread."""
        scheduler = BackgroundScheduler(
            timezone=UTC, job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )
        scheduler.add_job(self._due.set, "interval", seconds=self._interval, id="beat")
        with self._signals():
            scheduler.start()
            try:
                while not self._stopped.is_set():
                    self._beat()
                    self._wait()
            finally:
                # A beat in progress has been finished by now: it may have committed an intent to act on.
                scheduler.shutdown(wait=False)

    def once(self) -> BeatReport:
        """A single beat, without a scheduler."""
        self._number += 1
        # What lies there before the beat looks is this beat's; what comes while it works is news for the next.
        self._seen = self._news()
        report = self._heartbeat.beat(datetime.now(UTC), self._number)
        self._on_beat(report)
        return report

    def stop(self) -> None:
        """May be called from any thread, and from a signal handler."""
        self._stopped.set()
        self._due.set()

    def _beat(self) -> None:
        self._due.clear()
        report = self.once()
        if self._until_drained and report.drained and not self._news():
            self.stop()
        wait = min(self._interval, _RESTLESS_SECONDS) if report.restless else self._interval
        self._next_at = time.monotonic() + (0.0 if report.again else wait)

    def _wait(self) -> None:
        """Until the next beat is due: by the scheduler, by news, or by the monotonic clock."""
        while not self._due.is_set() and time.monotonic() < self._next_at:
            left = self._next_at - time.monotonic()
            if not self._due.wait(max(0.0, min(self._watch_seconds, left))) and (fresh := self._news() - self._seen):
                log.debug("waking early for %s", ", ".join(sorted(fresh)))
                return

    def _news(self) -> frozenset[str]:
        try:
            return self._heartbeat.news()
        except OSError:
            log.exception("could not look for news; the next beat will tell what is wrong")
            return self._seen

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(number: int, _frame: FrameType | None) -> None:
            log.info("%s: stopping; runs go on without the daemon", signal.Signals(number).name)
            self.stop()

        held = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)
