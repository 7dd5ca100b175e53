"""What torchrun's last words say of the trainer that it ran: torchrun itself ends with 1, whatever happened.

Its report names the process that failed first with its exit code; above it stands what the processes said.
"""

from __future__ import annotations

import dataclasses
import re

from agent.domain.views import RunView, TrialView
from trainer.report import ExitCode

_EXIT_CODE = re.compile(r"^\s*exitcode\s*: (-?\d+) \(pid: \d+\)")
_ROOT_CAUSE = "Root Cause (first observed failure):"
_REPORT = re.compile(
    r"torch/distributed/elastic/.*\] (?:failed \(exitcode: |Sending process|Received)|^Traceback \(most"
)
_TOLD_TO_END = "elastic.multiprocessing.api.SignalException"


def seen_through(trial: TrialView, run: RunView) -> RunView:
    """The run as its trainer ended, where torchrun stands between; any other run as it is."""
    if trial.spec.processes == 1 or run.returncode != 1:
        return run
    lines = run.last_lines
    told = next((at for at, line in enumerate(lines) if _REPORT.search(line)), len(lines))
    code = _told_code(lines)
    return run if code is None else dataclasses.replace(run, returncode=code, last_lines=lines[:told])


def _told_code(lines: tuple[str, ...]) -> int | None:
    if any(_TOLD_TO_END in line for line in lines):
        return int(ExitCode.INTERRUPTED)  # it passes the signal on, and its processes write their checkpoint
    start = next((at for at, line in enumerate(lines) if line.startswith(_ROOT_CAUSE)), len(lines))
    found = (_EXIT_CODE.match(line) for line in lines[start:])
    return next((int(match[1]) for match in found if match), None)
