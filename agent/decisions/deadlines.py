"""Runs that did not do in time what they were told: stops that are overdue, and starts that nobody claimed."""

from __future__ import annotations

from datetime import datetime

from agent.decisions.thresholds import Policy
from agent.domain.actions import Kill, Void
from agent.domain.trials import RunState
from agent.domain.views import RunView, TrialView


def judge_deadline(trial: TrialView, run: RunView | None, now: datetime, policy: Policy) -> Kill | Void | None:
    """For one live run of a trial, of any kind. A clock that jumped back only ever makes it wait longer."""
    if run is None or not run.live:
        return None
    age = (now - run.intended_at).total_seconds()
    # A run that nobody claimed has no process to kill: claiming it here keeps a late runner from starting it.
    if run.claimed is False and run.state in {RunState.INTENDED, RunState.STOPPING}:
        if age <= policy.claim_deadline_seconds:
            return None
        return Void(
            trial_id=trial.trial_id,
            run_uuid=run.run_uuid,
            reason=f"the {run.kind} run was not claimed by its runner within {policy.claim_deadline_seconds:g} s "
            f"(it is {age:.0f} s old): voided, so that it can never start late",
            numbers={"age_seconds": age, "claim_deadline_seconds": policy.claim_deadline_seconds},
        )
    if run.state is not RunState.STOPPING or run.stop_asked_at is None:
        return None
    waited = (now - run.stop_asked_at).total_seconds()
    allowed = trial.spec.grace_seconds + policy.stop_slack_seconds
    if waited <= allowed:
        return None
    return Kill(
        trial_id=trial.trial_id,
        run_uuid=run.run_uuid,
        reason=f"told to stop {waited:.0f} s ago; its grace of {trial.spec.grace_seconds:g} s and "
        f"{policy.stop_slack_seconds:g} s more have passed: killed with its whole group",
        numbers={"waited_seconds": waited, "allowed_seconds": allowed},
    )
