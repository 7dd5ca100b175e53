"""Carrying out decisions: commit the intent, touch the process, commit the outcome."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from agent.adapters.executors.local import LocalExecutor
from agent.adapters.run_orders import CONFIG, build_order, run_directory
from agent.adapters.workspace import Workspace
from agent.atomic_files import write_text
from agent.decisions.policy import Decisions
from agent.domain.actions import Action, Finish, Keep, Kill, Launch, MarkPaused, Requeue, Resume, Stop, Void, Wait
from agent.domain.errors import CaddieError
from agent.domain.runfiles import CONTROL, Control
from agent.domain.trials import RunState, StopCause
from agent.domain.views import LedgerView, RunView, TrialView
from agent.ledger.ledger import Ledger

log = logging.getLogger(__name__)


Outcome = tuple[str, bool, str]
"""A command's id, whether it was done, and what came of it in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    errors: Mapping[int, str] = field(default_factory=dict)
    """By position among the actions: why one could not be carried out."""
    outcomes: tuple[Outcome, ...] = ()


@dataclass(slots=True, kw_only=True)
class Hands:
    workspace: Workspace
    ledger: Ledger
    executor: LocalExecutor

    def act(self, view: LedgerView, decisions: Decisions, at: datetime) -> Acted:
        """Do everything that was decided; what cannot be done is told, and keeps nothing else from being done."""
        errors: dict[int, str] = {}
        renewed = self._renew_stops(view, at)
        for position, action in enumerate(decisions.actions):
            if isinstance(action, Kill) and action.run_uuid in renewed:
                continue  # it has only now been asked to stop: its grace begins here
            try:
                self._carry_out(action, view, at)
            except Exception as error:
                # One action that fails must not keep the others from being done; it is told with its trial.
                log.exception("could not carry out %s", action)
                errors[position] = _words(error)
        return Acted(errors=errors, outcomes=self._settle(view, decisions, errors, at))

    def _renew_stops(self, view: LedgerView, at: datetime) -> frozenset[str]:
        """Ask again where a stop was decided but its request never reached the run's folder, such as after a crash."""
        renewed = set()
        for trial in view.trials:
            for run in trial.runs:
                if run.state is not RunState.STOPPING or run.stop_cause is None or run.claimed is False:
                    continue
                if not (self._directory(run) / CONTROL).exists():
                    renewed.add(run.run_uuid)
                    try:
                        self._ask_to_stop(trial, run, run.stop_cause)
                        self.ledger.stop_asked(run.run_uuid, at)
                    except (CaddieError, OSError):
                        log.exception("could not renew the stop of %s", run.directory)
        return frozenset(renewed)

    def _carry_out(self, action: Action, view: LedgerView, at: datetime) -> None:
        trial = view.trial(action.trial_id)
        match action:
            case Launch():
                self._launch(action, trial, at)
            case Stop(run_uuid=run_uuid, cause=cause):
                self.ledger.apply(action, at)
                self._ask_to_stop(trial, _run(trial, run_uuid), cause)
            case Kill(run_uuid=run_uuid):
                self.ledger.apply(action, at)
                self.executor.kill(self._directory(_run(trial, run_uuid)))
            case Void(run_uuid=run_uuid):
                # The claim first: only a run that no runner can start any more may be called lost. If this dies
                # in between, the next probe sees the voided claim.
                if self.executor.void(run_uuid, self._directory(_run(trial, run_uuid))):
                    self.ledger.apply(action, at)
            case Finish() | Requeue() | MarkPaused() | Resume() | Keep():
                self.ledger.apply(action, at)
            case Wait():
                pass

    def _launch(self, action: Launch, trial: TrialView, at: datetime) -> None:
        run_uuid = str(uuid.uuid4())
        directory = run_directory(trial, action.kind, run_uuid)
        self.ledger.intend(action, run_uuid=run_uuid, directory=directory, at=at)
        folder = self.workspace.root / directory
        try:
            order, config = build_order(self.workspace.root, trial, action, run_uuid=run_uuid, directory=directory)
            folder.mkdir(parents=True, exist_ok=True)
            if config is not None:
                write_text(folder / CONFIG, config)
            self.executor.launch(folder, order)
        except Exception as error:
            # The spawn may have happened or not: void first, and only a run that nobody can claim any more is over.
            if self.executor.void(run_uuid, folder):
                self.ledger.launch_failed(run_uuid, _words(error), at)
            raise

    def _ask_to_stop(self, trial: TrialView, run: RunView, cause: StopCause) -> None:
        control = Control(run_uuid=run.run_uuid, cause=cause, grace_seconds=trial.spec.grace_seconds)
        self.executor.request_stop(self._directory(run), control)

    def _settle(
        self, view: LedgerView, decisions: Decisions, errors: Mapping[int, str], at: datetime
    ) -> tuple[Outcome, ...]:
        """Tell each command's outcome; one whose action failed is refused with the error, not called done."""
        failed = {decisions.actions[position].trial_id: error for position, error in errors.items()}
        trials = {command.command_id: command.trial_id for command in view.commands}
        outcomes: list[Outcome] = []
        for command_id, done, outcome in decisions.command_outcomes:
            error = failed.get(trials.get(command_id, 0))
            told = outcome if error is None else f"{outcome}; it failed: {error}"
            outcomes.append((command_id, done and error is None, told))
            self.ledger.settle_command(command_id, done=done and error is None, outcome=told, at=at)
        return tuple(outcomes)

    def _directory(self, run: RunView) -> Path:
        return self.workspace.root / run.directory


def _run(trial: TrialView, run_uuid: str) -> RunView:
    return next(run for run in trial.runs if run.run_uuid == run_uuid)


def _words(error: Exception) -> str:
    """Our own errors speak for themselves; of others the kind is half of the story."""
    return str(error) if isinstance(error, CaddieError | OSError) else f"{type(error).__name__}: {error}"
