"""What to do next. The whole policy as a table of contents; each rule stands in its own file.

exits        a run is over: completed, pruned, failed, paused, or back to the queue
deadlines    an overdue stop is killed; a start that nobody claimed is voided; a run past its time is stopped
orders       what users asked for
divergence   a run that flies apart is stopped
pruning      a run that cannot reach the incumbent is stopped, after two condemnations
budget_gate  a shape that cannot fit its bytes never starts
followups    export and score what was trained
placement    who starts now, on which device, and for whom devices are held
after        which trials must be finished first, and what will never be
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from agent.decisions.budget_gate import SizeOf, judge_budget
from agent.decisions.deadlines import judge_deadline
from agent.decisions.divergence import judge_divergence
from agent.decisions.exits import judge_exit
from agent.decisions.followups import follow_up
from agent.decisions.free_devices import FreeDevices
from agent.decisions.orders import Outcome, answer_commands
from agent.decisions.placement import place
from agent.decisions.pruning import judge_pruning
from agent.decisions.standings import NO_STANDING, standings_of
from agent.decisions.thresholds import DivergencePolicy, Policy, PruningPolicy, RetryPolicy
from agent.domain.actions import Action, Keep, Wait
from agent.domain.observations import Devices
from agent.domain.projections import Projection
from agent.domain.trials import RunState, TrialState
from agent.domain.views import LedgerView, TrialView

__all__ = ["Decisions", "DivergencePolicy", "Policy", "PruningPolicy", "RetryPolicy", "decide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """One verdict for every trial that is not finished, and what is due for finished ones.

    In the order in which they shall be carried out: endings, then follow-ups, then launches.
    """

    actions: tuple[Action, ...]
    command_outcomes: tuple[Outcome, ...]
    """(command id, done, text) of the commands that are settled; others stay pending."""


def decide(  # noqa: PLR0917  # the six things that a decision stands on, in the order of a beat
    now: datetime,
    view: LedgerView,
    devices: Devices,
    projections: Mapping[int, Projection],
    policy: Policy,
    size_of: SizeOf,
) -> Decisions:
    """Pure: the same view gives the same decisions. `projections` are by trial id."""
    unfinished = [trial for trial in view.trials if trial.state is not TrialState.FINISHED]
    standings = standings_of(view)
    free = FreeDevices(devices, view, policy.gpu_memory_margin_bytes)

    verdicts: dict[int, Action] = {}
    for trial in unfinished:
        over = judge_exit(trial, policy.retries) or judge_deadline(trial, trial.live_run, now, policy)
        if over is not None:
            verdicts[trial.trial_id] = over

    answers = answer_commands(view, verdicts.keys())
    verdicts |= answers.actions

    for trial in unfinished:
        if trial.trial_id in verdicts:
            continue
        verdict = (
            judge_divergence(trial, policy.divergence)
            or judge_pruning(
                trial,
                standings.get(trial.track.key, NO_STANDING),
                projections.get(trial.trial_id),
                policy.pruning,
            )
            or judge_budget(trial, size_of)
            or _hold(trial, now)
        )
        if verdict is not None:
            verdicts[trial.trial_id] = verdict

    queued = [trial for trial in unfinished if trial.trial_id not in verdicts]
    follow_ups = follow_up(view, standings, free, now, policy, verdicts.keys())
    launches = place(queued, view, free, now, policy)
    return Decisions(actions=(*verdicts.values(), *follow_ups, *launches), command_outcomes=answers.outcomes)


def _hold(trial: TrialView, now: datetime) -> Keep | Wait | None:
    """A trial that is between two states stays there; None for queued ones, which are placed."""
    run = trial.live_run
    if trial.state is TrialState.QUEUED:
        return None
    if trial.state is TrialState.PAUSED or run is None:
        return Wait(trial_id=trial.trial_id, reason="paused; `resume` brings it back to the queue")
    if run.state is RunState.UNKNOWN:
        detail = f" ({run.error})" if run.error else ""
        reason = f"its run could not be looked at{detail}: unknown is not dead, so it is kept"
    elif run.state is RunState.STOPPING:
        asked = run.stop_asked_at
        since = "" if asked is None else f" for {max(0.0, (now - asked).total_seconds()):.0f} s"
        reason = f"{trial.state}{since} ({run.stop_cause}), with {trial.spec.grace_seconds:g} s of grace"
    else:
        reason = f"{trial.state}: its run is {run.state}"
    return Keep(trial_id=trial.trial_id, reason=reason)
