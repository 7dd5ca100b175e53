"""What users asked for: stop, pause, resume. Each command is obeyed, refused with the reason, or waits for its turn."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from agent.domain.actions import Action, Finish, MarkPaused, Resume, Stop
from agent.domain.observations import CommandVerb
from agent.domain.trials import LIVE_TRIAL_STATES, Result, RunKind, RunState, StopCause, TrialState
from agent.domain.views import LedgerView, PendingCommand, RunView, TrialView

Outcome = tuple[str, bool, str]
"""Command id, whether it was done, and what to tell the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    actions: dict[int, Action]
    """At most one per trial, by trial id."""
    outcomes: tuple[Outcome, ...]
    """Of the commands that are settled; the others stay pending until a later beat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    text: str
    done: bool = True
    action: Action | None = None


def answer_commands(view: LedgerView, judged: Collection[int]) -> Answers:
    """Commands on trials in `judged` wait: their trial's state changes this very beat."""
    trials = {trial.trial_id: trial for trial in view.trials}
    actions: dict[int, Action] = {}
    outcomes: list[Outcome] = []
    for command in view.commands:
        trial = trials.get(command.trial_id)
        if trial is None:
            outcomes.append((command.command_id, False, f"there is no trial {command.trial_id}"))
            continue
        if trial.trial_id in judged or trial.trial_id in actions:
            continue
        answer = _answer(command, trial)
        if answer is None:
            continue
        outcomes.append((command.command_id, answer.done, f"{trial.key}: {answer.text}"))
        if answer.action is not None:
            actions[trial.trial_id] = answer.action
    return Answers(actions=actions, outcomes=tuple(outcomes))


def _answer(command: PendingCommand, trial: TrialView) -> _Answer | None:
    if trial.state is TrialState.FINISHED:
        live = next((run for run in trial.runs if run.live and run.kind is not RunKind.TRAIN), None)
        if command.verb is CommandVerb.STOP and live is not None:
            return _stop_follow_up(trial, live)
        return _Answer(text=f"is finished ({trial.result}), which is final; {command.verb} is not possible", done=False)
    match command.verb:
        case CommandVerb.STOP:
            return _stop(trial)
        case CommandVerb.PAUSE:
            return _pause(trial)
        case CommandVerb.RESUME:
            return _resume(trial)


def _stop(trial: TrialView) -> _Answer | None:
    if trial.state is TrialState.STOPPING:
        return _Answer(text="is already being stopped")
    if trial.state not in LIVE_TRIAL_STATES:
        reason = f"stopped by the user while {trial.state}"
        action = Finish(trial_id=trial.trial_id, result=Result.STOPPED, reason=reason)
        return _Answer(text=f"stopped while {trial.state}", action=action)
    return _told(trial, StopCause.USER, "stopping", "the user asked to stop it")


def _stop_follow_up(trial: TrialView, run: RunView) -> _Answer:
    if run.state is RunState.STOPPING:
        return _Answer(text=f"its {run.kind} run is already being stopped")
    action = Stop(
        trial_id=trial.trial_id,
        run_uuid=run.run_uuid,
        cause=StopCause.USER,
        reason=f"the user asked to stop its {run.kind} run",
    )
    return _Answer(text=f"stopping its {run.kind} run; the trial itself stays finished ({trial.result})", action=action)


def _pause(trial: TrialView) -> _Answer | None:
    if trial.state in {TrialState.PAUSED, TrialState.PAUSING}:
        return _Answer(text=f"is already {trial.state}")
    if trial.state is TrialState.STOPPING:
        return _Answer(text="is being stopped for good and cannot be paused", done=False)
    if trial.state is TrialState.QUEUED:
        action = MarkPaused(trial_id=trial.trial_id, reason="held back by the user while queued")
        return _Answer(text="held back in the queue", action=action)
    if not trial.spec.can_pause:
        return _Answer(
            text="runs a program that does not declare `resumable: true`: pausing would lose its progress. "
            "Stop it, or let it run",
            done=False,
        )
    return _told(trial, StopCause.PAUSE, "pausing", "the user asked to pause it: checkpoint, then exit")


def _resume(trial: TrialView) -> _Answer | None:
    if trial.state is TrialState.PAUSED:
        action = Resume(trial_id=trial.trial_id, reason="resumed by the user")
        return _Answer(text="back in the queue", action=action)
    if trial.state is TrialState.PAUSING:
        return None  # answered when its checkpoint is written
    if trial.state is TrialState.STOPPING:
        return _Answer(text="is being stopped for good and cannot be resumed", done=False)
    return _Answer(text=f"is not paused ({trial.state}): nothing to do")


def _told(trial: TrialView, cause: StopCause, doing: str, reason: str) -> _Answer | None:
    run = trial.live_run
    if run is None:
        return None
    at = "" if trial.last_point is None else f" at step {trial.last_point.step:,}"
    action = Stop(trial_id=trial.trial_id, run_uuid=run.run_uuid, cause=cause, reason=f"{reason}{at}")
    return _Answer(text=f"{doing}{at}, with {trial.spec.grace_seconds:g} s of grace", action=action)
