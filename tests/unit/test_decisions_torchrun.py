"""What torchrun's report says of the trainer it ran. The reports are torch 2.13's own, as it printed them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agent.decisions.exits import judge_exit
from agent.decisions.policy import Policy
from agent.decisions.torchrun import seen_through
from agent.domain.actions import Finish, Requeue
from agent.domain.trials import Result, RunKind, RunState, TrialState
from agent.domain.views import RunView
from placement_views import run, trial

REPORT = """\
{said}
E1124 05:10:27.800000 20043 venv/lib/python3.11/site-packages/torch/distributed/elastic/multiprocessing/api.py:1002] \
failed (exitcode: {code}) local_rank: 0 (pid: 20048) of binary: venv/bin/python
Traceback (most recent call last):
  File "venv/lib/python3.11/site-packages/torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
trainer FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-24_05:10:28
  rank      : 1 (local_rank: 1)
  exitcode  : -15 (pid: 20049)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_05:10:27
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : {code} (pid: 20048)
  error_file: <N/A>
============================================================"""
TWO = {"resources": {"gpus": 2}}


def over(code: int | None = 1, text: str = "") -> RunView:
    ended = run(RunKind.TRAIN, RunState.EXITED, 0, 1)
    return dataclasses.replace(ended, returncode=code, last_lines=tuple(text.split("\n")))


def judged(ended: RunView, spec: dict[str, Any]) -> object:
    return judge_exit(trial(spec=spec, state=TrialState.RUNNING, runs=(ended,)), Policy().retries)


@pytest.mark.parametrize(
    ("code", "result", "words"),
    [
        (66, Result.FAILED_DIVERGED, "not finite at step 3"),
        (67, Result.FAILED_OOM, "not finite at step 3"),
        (2, Result.FAILED_CRASHED, "refused its input: the loss is not finite at step 3"),
        (1, Result.FAILED_CRASHED, "exit code 1: the loss is not finite at step 3"),
        (-11, Result.FAILED_CRASHED, "signal 11"),
    ],
)
def test_the_process_that_failed_first_is_believed(code: int, result: Result, words: str) -> None:
    found = judged(over(text=REPORT.format(said="the loss is not finite at step 3", code=code)), TWO)
    assert isinstance(found, Finish)
    assert found.result is result
    assert words in found.reason


def test_a_process_that_was_killed_from_outside_is_tried_again() -> None:
    assert isinstance(judged(over(text=REPORT.format(said="step 3", code=-9)), TWO), Requeue)


def test_a_launcher_that_was_told_to_end_was_interrupted() -> None:
    """As by a reboot: its processes have written their checkpoint."""
    said = (
        "W1124 05:10 20043 site-packages/torch/distributed/elastic/agent/server/api.py:1] Received 15 death signal\n"
        "Traceback (most recent call last):\n"
        "torch.distributed.elastic.multiprocessing.api.SignalException: Process 20043 got signal: 15"
    )
    assert isinstance(judged(over(text=said), TWO), Requeue)


def test_nothing_else_is_read_so() -> None:
    report = REPORT.format(said="x", code=66)
    alone = trial(spec={"resources": {"gpus": 1}})
    command = trial(spec={"trainer": None, "command": ["torchrun", "x.py"], **TWO})
    for asking, ended in ((alone, over(text=report)), (command, over(text=report))):
        assert seen_through(asking, ended) is ended
    for code in (0, None, -9):
        ended = over(code, report)
        assert seen_through(trial(spec=TWO), ended) is ended
    crashed = over(text="torchrun: no such option")
    assert seen_through(trial(spec=TWO), crashed) is crashed


TOLD = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 20043 got signal: 15"


def test_a_result_that_was_written_before_the_signal_came_is_kept() -> None:
    ended = dataclasses.replace(over(text=TOLD), has_result=True)
    found = judged(ended, TWO)
    assert isinstance(found, Finish)
    assert found.result is Result.COMPLETED


def test_processes_that_were_killed_in_the_middle_wrote_no_checkpoint() -> None:
    text = "Unable to shutdown process 873 via 15, forcefully exiting via 9\n" + TOLD
    assert seen_through(trial(spec=TWO), over(text=text)).returncode == -9
    assert seen_through(trial(spec=TWO), over(text=TOLD)).returncode == 75


def test_the_complaint_of_a_process_that_lost_another_is_not_the_cause() -> None:
    said = (
        "rank 1: out_of_memory:a micro-batch of 1024 tokens does not fit; set batch.micro_batch_tokens to 512 step:12\n"
        "error: rank 0 of 2 lost another one while averaging: connection closed; what the other one said tells why"
    )
    found = judged(over(text=REPORT.format(said=said, code=67)), TWO)
    assert isinstance(found, Finish)
    assert "set batch.micro_batch_tokens to 512" in found.reason
    assert "lost another" not in found.reason
