"""From views, projections and actions to the report of a beat. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from agent.decisions.standings import standings_of
from agent.domain.actions import Action, Finish, Keep, Wait, name_of
from agent.domain.beats import DecisionLine, RunLine
from agent.domain.observations import Device
from agent.domain.projections import Projection
from agent.domain.trials import RunKind, TrialState
from agent.domain.views import LedgerView, RunView, TrialView


def run_lines(
    view: LedgerView,
    projections: Mapping[int, Projection],
    gpus: Sequence[Device],
    sentence: Callable[[Projection, int | None], str],
) -> tuple[RunLine, ...]:
    """One line per live run, trials in the ledger's order."""
    names = {gpu.uuid: f"gpu{gpu.index}" for gpu in gpus}
    return tuple(
        _run_line(trial, run, projections.get(trial.trial_id), names, sentence)
        for trial in view.trials
        for run in trial.runs
        if run.live
    )


def _run_line(
    trial: TrialView,
    run: RunView,
    projection: Projection | None,
    names: Mapping[str, str],
    sentence: Callable[[Projection, int | None], str],
) -> RunLine:
    training = run.kind is RunKind.TRAIN
    point = trial.last_point if training else None
    latest_bpb = trial.val_curve[-1].val_bpb if training and trial.val_curve else None
    shown = projection if training else None
    return RunLine(
        trial_id=trial.trial_id,
        trial=trial.key,
        kind=run.kind.value,
        state=run.state.value,
        device="+".join(names.get(uuid, uuid) for uuid in run.assignment.gpu_uuids)
        or f"cpu x{run.assignment.cpu_slots}",
        pid=run.pid,
        step=point.step if point else None,
        progress=trial.progress if training else None,
        val_bpb=latest_bpb,
        projected_bpb=shown.final_bpb if shown else None,
        low90=shown.low90 if shown else None,
        high90=shown.high90 if shown else None,
        projection=_told(shown, trial.tokens_per_step, sentence) if shown else "",
    )


def _told(
    projection: Projection, tokens_per_step: int | None, sentence: Callable[[Projection, int | None], str]
) -> str:
    told = sentence(projection, tokens_per_step)
    return f"{told}; {projection.caveat}" if projection.caveat else told


def decision_lines(view: LedgerView, actions: Sequence[Action], errors: Mapping[int, str]) -> tuple[DecisionLine, ...]:
    """One line per action; `errors` tells by position which could not be carried out."""
    keys = {trial.trial_id: trial.key for trial in view.trials}
    suspects = {trial.trial_id for trial in view.trials if trial.suspect_step is not None}
    return tuple(
        DecisionLine(
            trial=keys.get(action.trial_id, f"trial {action.trial_id}"),
            kind=name_of(action),
            reason=f"{action.result}: {action.reason}" if isinstance(action, Finish) else action.reason,
            numbers=dict(action.numbers),
            error=errors.get(position, ""),
            # A suspicion is news once; until the next check confirms or clears it, it is routine.
            routine=isinstance(action, Wait)
            or (isinstance(action, Keep) and (not action.suspect or action.trial_id in suspects)),
        )
        for position, action in enumerate(actions)
    )


def command_lines(view: LedgerView, outcomes: Sequence[tuple[str, bool, str]]) -> tuple[str, ...]:
    """What came of each command: (id, done, text) as decided; the text begins with the trial."""
    verbs = {command.command_id: command.verb.value for command in view.commands}
    return tuple(f"{verbs[command_id]} {text if done else f'REFUSED: {text}'}" for command_id, done, text in outcomes)


def state_counts(view: LedgerView) -> dict[str, int]:
    return dict(Counter(trial.state.value for trial in view.trials))


def incumbents(view: LedgerView) -> dict[str, TrialView]:
    """By track, the completed trial with the best raw score whose artifact is not known to be over budget."""
    return {
        track: standing.incumbent for track, standing in standings_of(view).items() if standing.incumbent is not None
    }


def is_drained(view: LedgerView, actions: Sequence[Action]) -> bool:
    """Nothing queued, nothing live, nothing done or waiting now: only finished and paused trials are left."""
    quiet = all(trial.state in {TrialState.FINISHED, TrialState.PAUSED} for trial in view.trials)
    live = any(run.live for trial in view.trials for run in trial.runs)
    # A finished trial may still wait for a device to be exported on.
    return quiet and not live and all(isinstance(action, Keep) for action in actions)
