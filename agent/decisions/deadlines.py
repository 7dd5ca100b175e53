"""Runs that did not do in time what they were told: overdue stops, starts that nobody claimed, and timeouts.

A runner ends its own run at its timeout. The deadline here lies behind that one: it is for a trainer whose runner
is gone, and for exports and evaluations, whose length no spec declares.
"""

from __future__ import annotations

from datetime import datetime

from agent.decisions.thresholds import Policy
from agent.domain.actions import Kill, Stop, Void
from agent.domain.trials import RunKind, RunState, StopCause, TrialState
from agent.domain.views import RunView, TrialView


def judge_deadline(trial: TrialView, run: RunView | None, now: datetime, policy: Policy) -> Kill | Stop | Void | None:
    """For one live run of a trial, of any kind. A clock that jumped back only ever makes it wait longer."""
    if run is None or not run.live:
        return None
    age = (now - run.intended_at).total_seconds()
    # A run that nobody claimed has no process to kill: claiming it here keeps a late runner from starting it.
    if run.claimed is False and run.state in {RunState.INTENDED, RunState.STOPPING, RunState.UNKNOWN}:
        if age <= policy.claim_deadline_seconds:
            return None
        return Void(
            trial_id=trial.trial_id,
            run_uuid=run.run_uuid,
            reason=f"the {run.kind} run was not claimed by its runner within {policy.claim_deadline_seconds:g} s "
            f"(it is {age:.0f} s old): voided, so that it can never start late",
            numbers={"age_seconds": age, "claim_deadline_seconds": policy.claim_deadline_seconds},
        )
    if run.stop_asked_at is None:
        return _timeout(trial, run, age, policy)
    if run.state is not RunState.STOPPING:
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


def _timeout(trial: TrialView, run: RunView, age: float, policy: Policy) -> Stop | None:
    """Stop a run that outlived its time, with everything that its runner was given to end it."""
    if run.kind is RunKind.TRAIN:
        limit, margin = trial.spec.timeout_seconds, trial.spec.grace_seconds + policy.stop_slack_seconds
        may_be_stopped = trial.state in {TrialState.LAUNCHING, TrialState.RUNNING}
        whose = "its timeout_seconds"
    else:
        limit, margin, may_be_stopped = policy.followup_timeout_seconds, 0.0, True
        whose = "followup_timeout_seconds"
    if limit is None or not may_be_stopped or age <= limit + margin:
        return None
    return Stop(
        trial_id=trial.trial_id,
        run_uuid=run.run_uuid,
        cause=StopCause.TIMEOUT,
        reason=f"the {run.kind} run is {age:.0f} s old, and {whose} of {limit:g} s has passed: told to stop from here",
        numbers={"age_seconds": age, "timeout_seconds": limit},
    )
