"""A training run is over: what becomes of its trial.

Judged by what was asked of the run first, then by how the trainer says it ended, and only then by signals
and disappearances. A result that was written is never thrown away, whatever was asked.
"""

from __future__ import annotations

import errno
import math
from datetime import datetime, timedelta

from agent.decisions.thresholds import RetryPolicy
from agent.decisions.torchrun import seen_through
from agent.domain.actions import Finish, MarkPaused, Numbers, Requeue
from agent.domain.specs import Metric
from agent.domain.trials import LIVE_TRIAL_STATES, Result, RunKind, RunState, StopCause, TrialState
from agent.domain.views import RunView, TrialView
from trainer.config import BatchConfig
from trainer.report import ExitCode

Verdict = Finish | Requeue | MarkPaused

FOREIGN_SIGNALS = {1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 9: "SIGKILL", 15: "SIGTERM"}
"""Signals that somebody else sends; a program that dies of any other signal did so by its own doing."""

NOT_THE_SPECS_FAULT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE})
"""Why a program may not start that will start later: the machine was short of something."""

_UNASKED = frozenset({StopCause.PAUSE, StopCause.INTERRUPTED})
"""Ends that say nothing about the program: they count as no failed attempt."""
_MAX_BACKOFF_SECONDS = 3600.0
_INTERRUPTED = StopCause.INTERRUPTED
_OUT_OF_MEMORY_SIGNS = ("out of memory", "outofmemoryerror", "memoryerror")
_RESULT_OF_CAUSE = {
    StopCause.PRUNE: Result.PRUNED,
    StopCause.DIVERGED: Result.FAILED_DIVERGED,
    StopCause.USER: Result.STOPPED,
    StopCause.TIMEOUT: Result.FAILED_STALLED,
}


def judge_exit(trial: TrialView, retries: RetryPolicy) -> Verdict | None:
    """The verdict on a trial whose training run is proved over; None while one is or may be alive, or none is due."""
    if trial.state not in LIVE_TRIAL_STATES or trial.live_run is not None:
        return None
    run = trial.last_train_run
    if run is None:
        return _give_back(trial, "no run of this trial is on record", Result.FAILED_LOST, retries)
    run = seen_through(trial, run)
    cause = _purpose(trial, run)
    return (
        _completed(trial, run, cause)
        or _stopped_for(trial, run, cause)
        or _interrupted(trial, run, cause, retries)
        or _by_trainers_word(trial, run)
        or _paused(trial, run, cause)
        or _by_death(trial, run, retries)
    )


def fruitless_attempts(trial: TrialView) -> int:
    """How many of the last training runs ended, unasked, without a new point beyond the runs before them."""
    furthest, fruitless = -1, 0
    for run in trial.runs_of(RunKind.TRAIN):
        if run.last_step is not None and run.last_step > furthest:
            furthest, fruitless = run.last_step, 0
        elif not run.live and run.stop_cause not in _UNASKED:
            fruitless += 1
    return fruitless


def retry_not_before(trial: TrialView, retries: RetryPolicy) -> datetime | None:
    """When a requeued trial may start again; None if at once: it never ran, or was paused on purpose."""
    run = trial.last_train_run
    if run is None or run.live or run.stop_cause is StopCause.PAUSE:
        return None
    return (run.ended_at or trial.state_since) + timedelta(seconds=backoff_seconds(fruitless_attempts(trial), retries))


def backoff_seconds(failures: int, retries: RetryPolicy) -> float:
    """How long to wait after that many failures in a row."""
    doublings = min(20, max(0, failures - 1))
    return min(_MAX_BACKOFF_SECONDS, retries.backoff_seconds * 2.0**doublings)


def _purpose(trial: TrialView, run: RunView) -> StopCause | None:
    """Why the run was told to end; a trial's own state stands in where the run does not say."""
    if run.stop_cause is not None:
        return run.stop_cause
    return {TrialState.PAUSING: StopCause.PAUSE, TrialState.STOPPING: StopCause.USER}.get(trial.state)


def _completed(trial: TrialView, run: RunView, cause: StopCause | None) -> Finish | None:
    code = run.returncode
    # A program that itself reports a failure is believed; one that was killed or lost after its result is not blamed.
    if run.has_result and (code is None or code <= 0):
        ending = {None: "; how it exited was not recorded", 0: ""}.get(code, f"; it ended with {_how(run)} after that")
        asked = f"; it finished before it could be stopped ({cause})" if cause not in {None, _INTERRUPTED} else ""
        raw = trial.scores.get(Metric.RAW)
        score = "" if raw is None else f" with val_bpb {raw:.4f}"
        return _finish(trial, run, Result.COMPLETED, f"the run wrote its result{score}{ending}{asked}")
    if trial.spec.command is not None and run.state is RunState.EXITED and code == 0:
        reached_end = (trial.progress or 0.0) >= 1.0
        # A program that takes TERM and exits 0 was stopped, not finished, unless its own limit was reached.
        if cause is None or reached_end:
            return _finish_command(trial, run)
    return None


def _finish_command(trial: TrialView, run: RunView) -> Finish:
    last = next((p for p in reversed(trial.val_curve) if p.val_bpb is not None), None)
    if last is None or last.val_bpb is None or not math.isfinite(last.val_bpb):
        reason = "the program ended with exit code 0; no score was found in its log: check the spec's `log` section"
        return _finish(trial, run, Result.COMPLETED, reason)
    if Metric.RAW in trial.scores:
        return _finish(
            trial, run, Result.COMPLETED, f"the program finished with val_bpb {trial.scores[Metric.RAW]:.4f}"
        )
    return Finish(
        trial_id=trial.trial_id,
        result=Result.COMPLETED,
        reason=f"the program ended with exit code 0; its last val_bpb is {last.val_bpb:.4f} at step {last.step:,}",
        numbers={**_numbers(trial, run), "val_bpb": last.val_bpb},
        raw_bpb=last.val_bpb,
    )


def _stopped_for(trial: TrialView, run: RunView, cause: StopCause | None) -> Finish | None:
    if cause is None or cause in {StopCause.PAUSE, _INTERRUPTED}:
        return None
    where = _where(trial)
    forced = ", killed after its grace" if run.killed else ""
    reason = {
        StopCause.PRUNE: f"pruned {where}; the run is over ({_how(run)}{forced})",
        StopCause.DIVERGED: f"diverged {where}; the run is over ({_how(run)}{forced})",
        StopCause.USER: f"stopped by the user {where} ({_how(run)}{forced})",
        StopCause.TIMEOUT: f"the run exceeded its timeout_seconds of {_timeout(trial)} {where}{forced}. "
        "Remedy: raise timeout_seconds, or find what it waited for in its log",
    }[cause]
    return _finish(trial, run, _RESULT_OF_CAUSE[cause], reason)


def _interrupted(trial: TrialView, run: RunView, cause: StopCause | None, retries: RetryPolicy) -> Verdict | None:
    """A command that was told to end by the machine: however it says goodbye, it was not done."""
    if cause is not _INTERRUPTED or trial.spec.trainer is not None or run.returncode is None:
        return None
    why = f"its runner was told to end from outside, as by a reboot or the stop of a service ({_how(run)})"
    return _give_back(trial, why, Result.FAILED_CRASHED, retries)


def _by_trainers_word(trial: TrialView, run: RunView) -> Finish | None:
    """Exit codes mean something only when Caddie's own trainer says them; other programs' words are read instead."""
    code = run.returncode
    if run.state is not RunState.EXITED or code is None or code <= 0:
        return None
    if trial.spec.trainer is None:
        said = " ".join(run.last_lines).lower()
        if any(sign in said for sign in _OUT_OF_MEMORY_SIGNS):
            remedy = "Remedy: a smaller batch, or a GPU with more memory (resources.vram_gb)"
            return _finish(trial, run, Result.FAILED_OOM, f"out of memory ({_how(run)}): {_last_line(run)}. {remedy}")
        return None
    if code == ExitCode.DIVERGED:
        reason = f"the loss stopped being finite {_where(trial)}: {_last_line(run)}"
        return _finish(trial, run, Result.FAILED_DIVERGED, reason)
    if code == ExitCode.OUT_OF_MEMORY:
        return _finish(
            trial, run, Result.FAILED_OOM, _out_of_memory(run, trial.spec.trainer.batch, trial.spec.processes)
        )
    if code == ExitCode.BAD_INPUT:
        return _finish(trial, run, Result.FAILED_CRASHED, f"the trainer refused its input: {_last_line(run)}")
    return None


def _out_of_memory(run: RunView, batch: BatchConfig, processes: int) -> str:
    """The reason and the remedy. Where the trainer chose the micro-batch, it is the trainer's log that names it."""
    micro = batch.micro_batch_tokens
    if micro is None:
        return (
            f"out of memory with micro-batches of the trainer's own choice: {_last_line(run)}. Remedy: give "
            "batch.micro_batch_tokens, less than the log tells (more accumulation, the same tokens a step), or a GPU "
            "with more free memory"
        )
    smaller = [tokens for tokens in batch.micro_choices(processes) if tokens <= micro // 2]
    remedy = (
        f"batch.micro_batch_tokens {max(smaller):,} (more accumulation, the same tokens a step), or " if smaller else ""
    )
    return f"out of memory with micro-batches of {micro:,} tokens. Remedy: {remedy}a GPU with more free memory"


def _paused(trial: TrialView, run: RunView, cause: StopCause | None) -> MarkPaused | None:
    if cause is not StopCause.PAUSE or trial.state is not TrialState.PAUSING:
        return None
    kept = (
        "its checkpoint was written" if run.returncode in {0, ExitCode.INTERRUPTED} else "from its last checkpoint on"
    )
    return MarkPaused(
        trial_id=trial.trial_id,
        reason=f"paused {_where(trial)} ({_how(run)}); {kept}; resume to go on",
        numbers=_numbers(trial, run),
    )


def _by_death(trial: TrialView, run: RunView, retries: RetryPolicy) -> Verdict:
    code = run.returncode
    if run.state is RunState.LOST:
        what = "the run could not be started" if run.never_claimed else "the run vanished without an exit record"
        detail = f": {run.error}" if run.error else ""
        return _give_back(trial, f"{what}{detail}", Result.FAILED_LOST, retries)
    if code is None:
        reason = f"the run could not be started: {run.error or 'no reason was recorded'}"
        if run.errno in NOT_THE_SPECS_FAULT:
            return _give_back(trial, reason, Result.FAILED_CRASHED, retries)
        return _finish(trial, run, Result.FAILED_CRASHED, reason)
    if trial.spec.trainer is not None and code == ExitCode.INTERRUPTED:
        why = "the trainer was interrupted by a signal that was not Caddie's; what it had done is in its checkpoint"
        return _give_back(trial, why, Result.FAILED_LOST, retries)
    if -code in FOREIGN_SIGNALS:
        hint = " (if the machine was short of memory, by its kernel)" if code == -9 else ""
        return _give_back(trial, f"killed by {_how(run)} from outside{hint}", Result.FAILED_CRASHED, retries)
    if code == 0:
        detail = f": {run.error}" if run.error else ""
        reason = f"the trainer said that all went well, but left no readable result.json{detail}"
        return _finish(trial, run, Result.FAILED_CRASHED, reason)
    return _finish(trial, run, Result.FAILED_CRASHED, f"crashed {_where(trial)} with {_how(run)}: {_last_line(run)}")


def _give_back(trial: TrialView, why: str, given_up: Result, retries: RetryPolicy) -> Verdict:
    """Try again, where the state allows it and the attempts still get somewhere."""
    run = trial.last_train_run
    numbers: Numbers = {} if run is None else _numbers(trial, run)
    if trial.state is TrialState.PAUSING:
        return MarkPaused(trial_id=trial.trial_id, reason=f"paused: {why}; resume to go on", numbers=numbers)
    if trial.state is TrialState.STOPPING:
        return Finish(trial_id=trial.trial_id, result=Result.STOPPED, reason=f"stopped: {why}", numbers=numbers)
    fruitless = fruitless_attempts(trial)
    numbers["attempts_without_progress"] = fruitless
    if fruitless >= retries.max_attempts_without_progress:
        return Finish(
            trial_id=trial.trial_id,
            result=given_up,
            reason=f"{why}; {fruitless} attempts in a row got no further: given up",
            numbers=numbers,
        )
    start = (
        "goes on from its last checkpoint"
        if trial.spec.can_pause
        else "is proved over: starts again from the beginning"
    )
    count = (
        f" (attempt {fruitless + 1} of {retries.max_attempts_without_progress} without progress)" if fruitless else ""
    )
    return Requeue(trial_id=trial.trial_id, reason=f"{why}; {start}{count}", numbers=numbers)


def _finish(trial: TrialView, run: RunView, result: Result, reason: str) -> Finish:
    return Finish(trial_id=trial.trial_id, result=result, reason=reason, numbers=_numbers(trial, run))


def _numbers(trial: TrialView, run: RunView) -> Numbers:
    last = trial.last_point
    return {
        "returncode": run.returncode,
        "attempt": run.attempt,
        "step": last.step if last else None,
        "progress": trial.progress,
    }


def _how(run: RunView) -> str:
    if run.returncode is None:
        return "no exit code"
    if run.returncode < 0:
        return FOREIGN_SIGNALS.get(-run.returncode, f"signal {-run.returncode}")
    return f"exit code {run.returncode}"


def _where(trial: TrialView) -> str:
    last, progress = trial.last_point, trial.progress
    if last is None:
        return "before its first point"
    return f"at step {last.step:,}" + ("" if progress is None else f" ({progress:.0%} of the run)")


def _timeout(trial: TrialView) -> str:
    seconds = trial.spec.timeout_seconds
    return "unknown length" if seconds is None else f"{seconds:g} s"


def _last_line(run: RunView) -> str:
    line = next((line.strip() for line in reversed(run.last_lines) if line.strip()), "")
    return line[:300] or run.error or "its log is empty"
