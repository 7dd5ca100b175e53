"""From views, projections and actions to the report of a beat. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

from agent.acting import Acted
from agent.decisions.policy import Decisions
from agent.decisions.projection.project import sentence
from agent.decisions.standings import standings_of
from agent.domain.actions import Action, Finish, Keep, Wait, name_of
from agent.domain.beats import BeatReport, DecisionLine, RunLine
from agent.domain.observations import Device, Devices
from agent.domain.projections import Projection
from agent.domain.specs import Metric
from agent.domain.trials import RunKind, RunState, TrialState
from agent.domain.views import LedgerView, RunView, TrialView
from agent.ledger.ledger import Recorded

_WAITS_TOLD = 50
_RESTLESS = frozenset({RunState.INTENDED, RunState.STOPPING, RunState.UNKNOWN})
"""Runs whose state changes by itself within seconds: the next beat comes early."""


def compose(
    *,
    at: datetime,
    number: int,
    before: LedgerView,
    after: LedgerView,
    devices: Devices,
    recorded: Recorded | None,
    refused: Sequence[str],
    projections: Mapping[int, Projection],
    decisions: Decisions | None,
    acted: Acted,
    problems: Sequence[str],
    seconds: Mapping[str, float],
    again: bool,
) -> BeatReport:
    """The report of one beat: decisions on the view `before`, states and runs as they are `after` the actions."""
    actions = decisions.actions if decisions else ()
    lines = decision_lines(before, actions, acted.errors)
    return BeatReport(
        at=at,
        number=number,
        gpus=devices.gpus,
        cpu_slots=devices.cpu_slots,
        devices_note=devices.note,
        runs=run_lines(after, projections, devices.gpus or ()),
        decisions=_without_most_waits(lines),
        waiting=sum(line.kind == "wait" for line in lines),
        commands=command_lines(before, acted.outcomes),
        enqueued=recorded.enqueued if recorded else (),
        refused=tuple(refused),
        counts=state_counts(after),
        best=tuple((track, trial.key, trial.scores[Metric.RAW]) for track, trial in incumbents(after).items()),
        problems=tuple(problems),
        phase_seconds=dict(seconds),
        again=again,
        restless=any(run.state in _RESTLESS for trial in after.trials for run in trial.runs),
        drained=decisions is not None and is_drained(after, actions),
        ok=recorded is not None,
    )


def run_lines(view: LedgerView, projections: Mapping[int, Projection], gpus: Sequence[Device]) -> tuple[RunLine, ...]:
    """One line per live run, trials in the ledger's order."""
    names = {gpu.uuid: f"gpu{gpu.index}" for gpu in gpus}
    return tuple(
        _run_line(trial, run, projections.get(trial.trial_id), names)
        for trial in view.trials
        for run in trial.runs
        if run.live
    )


def _run_line(trial: TrialView, run: RunView, projection: Projection | None, names: Mapping[str, str]) -> RunLine:
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
        projection=with_caveat(shown, trial.tokens_per_step) if shown else "",
    )


def with_caveat(projection: Projection, tokens_per_step: int | None) -> str:
    """A projection in words, and what its law does not know."""
    told = sentence(projection, tokens_per_step)
    return f"{told}; {projection.caveat}" if projection.caveat else told


def decision_lines(view: LedgerView, actions: Sequence[Action], errors: Mapping[int, str]) -> tuple[DecisionLine, ...]:
    """One line per action; `errors` tells by position which could not be carried out."""
    trials = {trial.trial_id: trial for trial in view.trials}
    return tuple(
        DecisionLine(
            trial=trials[action.trial_id].key if action.trial_id in trials else f"trial {action.trial_id}",
            kind=name_of(action),
            reason=f"{action.result}: {action.reason}" if isinstance(action, Finish) else action.reason,
            numbers=dict(action.numbers),
            error=errors.get(position, ""),
            routine=_is_routine(action, trials.get(action.trial_id)),
        )
        for position, action in enumerate(actions)
    )


def _is_routine(action: Action, trial: TrialView | None) -> bool:
    """Not worth a line of its own: waiting, going on, and a suspicion that was told before."""
    if isinstance(action, Wait):
        return True
    if not isinstance(action, Keep):
        return False
    if action.suspect:
        return trial is not None and trial.suspect_step is not None
    # Of a finished trial it is said once, when exporting or scoring it was given up.
    return trial is None or trial.state is not TrialState.FINISHED


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
    """Nothing is live, nothing was done now, and what is left is finished, paused, or can never start as things are."""
    live = any(run.live for trial in view.trials for run in trial.runs)
    paused = {trial.trial_id for trial in view.trials if trial.state is TrialState.PAUSED}
    return not live and all(
        isinstance(action, Keep) or (isinstance(action, Wait) and (action.hopeless or action.trial_id in paused))
        for action in actions
    )


def _without_most_waits(lines: Sequence[DecisionLine]) -> tuple[DecisionLine, ...]:
    """A long queue waits for one reason: the first waits tell it, and a beat's record stays small."""
    waits = [line for line in lines if line.kind == "wait"]
    dropped = {id(line) for line in waits[_WAITS_TOLD:]}
    return tuple(line for line in lines if id(line) not in dropped)
