"""`caddie demo`: the main job on an embedded default, from text to a scored artifact.

It only composes what users have: gathers and prepares text with the trainer's own verbs, drops the specs of
`studies/demo` into the queue, runs the ordinary daemon until the queue is drained, and prints the answers of
the ordinary verbs. Nothing else in Caddie knows that it is the demo.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from agent import foreground, tables
from agent.adapters.data_sets import MANIFEST
from agent.adapters.workspace import Workspace
from agent.atomic_files import write_text
from agent.domain.errors import CaddieError, WorkspaceError

STUDY = Path(__file__).resolve().parent.parent / "studies" / "demo"

_TEXT_BYTES = 10_000_000
_VAL_BYTES = 150_000
_VOCABULARY = 1024
_BEAT_SECONDS = 3.0


def run(workspace: Workspace, *, view: foreground.View, study: Path = STUDY) -> None:
    """Raises CaddieError when a step fails; what was done by then is kept, and the next call goes on from there.

    With the view `quiet` the leaderboard is printed as JSON and everything else goes to stderr.
    """
    specs = sorted(study.glob("*.yaml"))
    if not specs:
        raise WorkspaceError(f"no specs in {study}. Run the demo from a clone of the repository")
    with redirect_stdout(sys.stderr) if view == "quiet" else nullcontext():
        workspace.create()
        _prepare(workspace)
        _drop(specs, workspace)
        report = foreground.run_daemon(workspace, until_drained=True, view=view, interval_seconds=_BEAT_SECONDS)
        if report is None or not report.drained:
            tables.say(f"stopped before the queue was drained. Go on with: caddie up --workspace {workspace.root}")
            raise SystemExit(130)
    _answers(workspace, as_json=view == "quiet")


def _drop(specs: Sequence[Path], workspace: Workspace) -> None:
    """Straight into the queue, as a person would: the daemon is the one who accepts or refuses, and each only once."""
    known = (workspace.queue, workspace.accepted, workspace.rejected)
    fresh = [spec for spec in specs if not any((folder / spec.name).exists() for folder in known)]
    for spec in fresh:
        write_text(workspace.queue / spec.name, spec.read_text(encoding="utf-8"))
    tables.say(f"{len(fresh)} specs dropped into {workspace.queue}; starting the daemon, Ctrl-C leaves its runs alive")


def _prepare(workspace: Workspace) -> None:
    data = workspace.root / "data"
    if (data / MANIFEST).exists():
        tables.say(f"data set at {data} is there already")
        return
    text = workspace.root / "text" / "prose.jsonl"
    text.parent.mkdir(exist_ok=True)
    if not text.exists():
        _trainer(
            "gathering English prose of this machine's Python", "gather", str(text), "--max-bytes", str(_TEXT_BYTES)
        )
    _trainer(
        "training a tokenizer and writing shards",
        *("prepare", str(text), "--out", str(data)),
        *("--vocab-size", str(_VOCABULARY), "--val-bytes", str(_VAL_BYTES)),
    )


def _trainer(what: str, *arguments: str) -> None:
    tables.say(f"{what} ...")
    argv = [sys.executable, "-m", "trainer", "data", *arguments]
    code = subprocess.run(argv, check=False, stdout=sys.stderr).returncode
    if code:
        raise CaddieError(f"{what} failed with exit code {code}: {' '.join(argv)}. Its own words stand above")


def _answers(workspace: Workspace, *, as_json: bool) -> None:
    from agent.ledger.queries import LedgerReader  # noqa: PLC0415 - SQLAlchemy, only needed at the end

    with LedgerReader.open(workspace.database) as reader:
        if as_json:
            tables.print_json(reader.best(limit=20))
            return
        tables.leaderboard(reader.best(limit=20))
        tables.rejected(workspace.rejected)
        tables.heartbeats(reader.heartbeats(3))
    where = f" --workspace {workspace.root}"
    tables.say("\nnext:")
    for verb, why in (
        (f"caddie best{where}", "the leaderboard of each track; add --json for programs"),
        (f"caddie show plain{where}", "one trial: runs, projections, decisions with their numbers"),
        (f"caddie logs plain{where}", "the trainer's own log"),
        (f"caddie heartbeats{where}", "what the daemon saw and decided"),
        (f"caddie enqueue my.yaml{where}", "queue your own; caddie schema tells what a spec may hold"),
        (f"caddie up{where}", "and let it work"),
    ):
        tables.say(f"  {verb:<60} {why}")
