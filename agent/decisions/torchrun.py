"""What torchrun's last words say of the trainer that it ran: torchrun itself ends with 1, whatever happened.

Its report names the process that failed first with its exit code; above it stands what the processes said.
"""

from __future__ import annotations

import dataclasses
import re
import signal

from agent.domain.views import RunView, TrialView
from trainer.report import ExitCode

_EXIT_CODE = re.compile(r"^\s*exitcode\s*: (-?\d+) \(pid: \d+\)")
_ROOT_CAUSE = "Root Cause (first observed failure):"
_REPORT = re.compile(
    r"torch/distributed/elastic/.*\] (?:failed \(exitcode: |Sending process|Received)|^Traceback \(most"
)
_TOLD_TO_END = "elastic.multiprocessing.api.SignalException"
_FORCED = "forcefully exiting via"
# What a process says that lost another one, which is never the cause.
_LOST_ANOTHER = re.compile(r"rank \d+ of \d+ lost another one while")


def seen_through(trial: TrialView, run: RunView) -> RunView:
    """The run as its trainer ended, where torchrun stands between; any other run as it is."""
    if trial.spec.processes == 1 or run.returncode != 1:
        return run
    lines = run.last_lines
    told = lines[: next((at for at, line in enumerate(lines) if _REPORT.search(line)), len(lines))]
    code = _told_code(run)
    causes = tuple(line for line in told if not _LOST_ANOTHER.search(line))
    return run if code is None else dataclasses.replace(run, returncode=code, last_lines=causes or told)


def _told_code(run: RunView) -> int | None:
    lines = run.last_lines
    if any(_TOLD_TO_END in line for line in lines):
        if any(_FORCED in line for line in lines):
            return -signal.SIGKILL  # its patience was over before they had written a checkpoint
        if run.has_result:
            return -signal.SIGTERM  # they were done before it came
        return int(ExitCode.INTERRUPTED)  # it passes the signal on, and its processes write their checkpoint
    start = next((at for at, line in enumerate(lines) if line.startswith(_ROOT_CAUSE)), len(lines))
    found = (_EXIT_CODE.match(line) for line in lines[start:])
    return next((int(match[1]) for match in found if match), None)
