"""`caddie up`: the daemon in the foreground, with its lock, its log file and a view of what it does."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from agent import bootstrap
from agent.adapters.workspace import Workspace
from agent.daemon import Daemon
from agent.domain.beats import BeatReport
from agent.live import LiveView
from agent.settings import load_settings


def run_daemon(
    workspace: Workspace,
    *,
    once: bool = False,
    until_drained: bool = False,
    plain: bool = False,
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
    live = console.is_terminal and not (plain or once)
    view: LiveView | None = None
    last: BeatReport | None = None

    def tell(report: BeatReport) -> None:
        nonlocal last
        last = report
        if view is not None:
            view.show(report)
        else:
            sys.stdout.write(report.to_line() + "\n")
            sys.stdout.flush()

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
        elif live:
            with LiveView(console, workspace=str(workspace.root), interval_seconds=settings.interval_seconds) as view:
                daemon.run()
        else:
            daemon.run()
    return last


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
