"""`caddie up`: the daemon in the foreground, with its lock, its log file and a view of what it does."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console

from agent import bootstrap
from agent.adapters.workspace import Workspace
from agent.daemon import Daemon
from agent.domain.beats import BeatReport
from agent.live import LiveView
from agent.settings import load_settings

View = Literal["live", "plain", "json", "quiet"]
"""live: drawn in a terminal, lines elsewhere; plain: lines; json: one record a beat; quiet: lines on stderr."""


def run_daemon(
    workspace: Workspace,
    *,
    once: bool = False,
    until_drained: bool = False,
    view: View = "live",
    interval_seconds: float | None = None,
    cpu_slots: int | None = None,
) -> BeatReport | None:
    """Run until told to stop; returns the last report.

    Raises LockHeldError if another daemon owns the workspace, WorkspaceError on settings that cannot be used,
    LedgerError if the ledger cannot be opened.
    """
    workspace.create()
    settings = load_settings(workspace.settings_file, interval_seconds=interval_seconds, cpu_slots=cpu_slots)
    console = Console()
    screen: LiveView | None = None
    last: BeatReport | None = None

    def tell(report: BeatReport) -> None:
        nonlocal last
        last = report
        if screen is not None:
            screen.show(report)
        else:
            _print(report, view)

    with workspace.lock(), _log_file(workspace), bootstrap.heartbeat(workspace, settings) as heartbeat:
        daemon = Daemon(
            heartbeat,
            interval_seconds=settings.interval_seconds,
            watch_seconds=settings.watch_seconds,
            on_beat=tell,
            until_drained=until_drained,
        )
        if once:
            daemon.once()
        elif view == "live" and console.is_terminal:
            with LiveView(console, workspace=str(workspace.root), interval_seconds=settings.interval_seconds) as screen:
                daemon.run()
        else:
            daemon.run()
    return last


def _print(report: BeatReport, view: View) -> None:
    stream = sys.stderr if view == "quiet" else sys.stdout
    text = json.dumps(report.to_record(), default=str) if view == "json" else report.to_line()
    try:
        stream.write(text + "\n")
        stream.flush()
    except OSError:
        # Whoever read this has gone (`caddie up | head`); the beats, and the journal, go on.
        logging.getLogger(__name__).warning("nobody reads this daemon's output any more")


@contextmanager
def _log_file(workspace: Workspace) -> Iterator[None]:
    """What the modules log goes to `logs/daemon.log`, rotated; the heartbeat's own lines have their own files."""
    handler = logging.handlers.RotatingFileHandler(
        workspace.logs / "daemon.log", maxBytes=10_000_000, backupCount=3, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    # APScheduler tells of every start of a job at INFO: one line a second from the watch alone.
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
