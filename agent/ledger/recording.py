"""One observation's facts into the ledger. Repeating an observation changes nothing.

Works inside the caller's transaction. What one fact gets wrong becomes a problem in the report and never stops
the others: a log line or a result that raised here would come back, and stop every beat to come.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.domain.errors import DuplicateNameError
from agent.domain.observations import (
    Command,
    Device,
    Observation,
    ProbeState,
    RunProbe,
    SpecArrival,
)
from agent.domain.specs import Spec, track_of
from agent.domain.trials import LIVE_RUN_STATES, RunEvent, RunKind, TrialEvent, TrialState
from agent.ledger.column_types import LARGEST_INTEGER, clean
from agent.ledger.readings import take_reading
from agent.ledger.results import take_result
from agent.ledger.tables import (
    CommandRow,
    CommandState,
    DeviceSampleRow,
    EventRow,
    ExperimentRow,
    RunRow,
    TrialRow,
)
from agent.ledger.transitions import move_run, move_trial, trial_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What came of an observation, once it is committed. Files may be moved on only after that."""

    enqueued: tuple[str, ...] = ()
    """Keys of the new trials, such as `plain-gpt@1337`."""
    settled_specs: tuple[tuple[str, str | None], ...] = ()
    """(claimed path, refusal) of each arrival; None means accepted, now or before."""
    settled_commands: tuple[str, ...] = ()
    """Claimed paths of the commands that the ledger now holds."""
    problems: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Recording:
    """The facts of one observation on their way into one transaction."""

    session: Session
    at: datetime
    touched: set[int] = field(default_factory=set)
    """Trials whose views are no longer true."""
    problems: list[str] = field(default_factory=list)

    def record(self, observation: Observation) -> Recorded:
        enqueued: list[str] = []
        settled: list[tuple[str, str | None]] = []
        for arrival in observation.arrivals:
            try:
                # Of a spec that cannot be stored nothing stays, and the other facts do.
                with self.session.begin_nested():
                    enqueued += self._admit(arrival)
                settled.append((arrival.claimed_path, None))
            except DuplicateNameError as error:
                settled.append((arrival.claimed_path, self._refused(str(error))))
            except (ValueError, ArithmeticError) as error:
                text = f"{arrival.source_name}: cannot be taken into the ledger: {error}. Remedy: correct its values"
                settled.append((arrival.claimed_path, self._refused(text)))
        for refusal in observation.refusals:
            self._refused(refusal.message)
        commands = tuple(self._command(command) for command in observation.commands)
        runs = self._runs({probe.run_uuid for probe in observation.probes} | {r.run_uuid for r in observation.readings})
        # Log lines before exits: a final value that stands in the log is there when the run's end is judged.
        for reading in observation.readings:
            if (run := self._known(runs, reading.run_uuid, "log")) is not None:
                self._note(take_reading(self.session, run, reading, self.at))
                self.touched.add(run.trial_id)
        for probe in observation.probes:
            if (run := self._known(runs, probe.run_uuid, "process")) is not None:
                self._probe(run, probe)
        self._sample(observation.devices.gpus or ())
        return Recorded(
            enqueued=tuple(enqueued),
            settled_specs=tuple(settled),
            settled_commands=commands,
            problems=tuple(self.problems),
        )

    def _admit(self, arrival: SpecArrival) -> list[str]:
        """A new experiment with its queued trials; nothing if it is known with the same contents."""
        spec, sha256 = arrival.spec, arrival.spec.sha256()
        known = self.session.scalar(select(ExperimentRow).where(ExperimentRow.name == spec.name))
        if known is not None:
            if known.spec_sha256 == sha256 or _means_the_same(known.spec_json, spec):
                return []
            raise DuplicateNameError(
                f"{arrival.source_name}: field 'name': an experiment named '{spec.name}' with other contents exists "
                f"(enqueued {known.enqueued_at:%Y-%m-%d %H:%M}Z from {known.source_name}). Remedy: choose another name"
            )
        track_key = track_of(spec, arrival.val_sha256).key
        experiment = ExperimentRow(
            name=spec.name,
            study=spec.study,
            spec_json=spec.canonical_json(),
            spec_sha256=sha256,
            source_text=arrival.source_text,
            source_name=arrival.source_name,
            enqueued_at=self.at,
        )
        self.session.add(experiment)
        self.session.flush()
        for seed in spec.seeds:
            trial = TrialRow(
                experiment_id=experiment.id,
                seed=seed,
                track_key=track_key,
                state=TrialState.QUEUED,
                reason="",
                state_since=self.at,
                priority=spec.priority,
                given_up=False,
            )
            self.session.add(trial)
            self.session.flush()  # One by one, so that ids follow the order of the seeds.
        return [f"{spec.name}@{seed}" for seed in spec.seeds]

    def _refused(self, message: str) -> str:
        self._event("spec_refused", clean(message))
        return message

    def _event(self, kind: str, detail: str) -> None:
        """Something about no trial, once: a file that could not be moved away comes back with the next beat."""
        known = select(EventRow.id).where(EventRow.kind == kind, EventRow.detail == detail).limit(1)
        if self.session.scalar(known) is None:
            self.session.add(EventRow(at=self.at, kind=kind, detail=detail))
            self.session.flush()

    def _command(self, command: Command) -> str:
        known = select(CommandRow.id).where(CommandRow.command_id == command.command_id)
        if self.session.scalar(known) is None:
            exists = self.session.get(TrialRow, command.trial_id) if abs(command.trial_id) <= LARGEST_INTEGER else None
            self.session.add(
                CommandRow(
                    command_id=command.command_id,
                    verb=command.verb,
                    trial_id=command.trial_id if exists else 0,
                    state=CommandState.PENDING if exists else CommandState.REFUSED,
                    outcome="" if exists else f"there is no trial {command.trial_id}",
                    at=self.at,
                    settled_at=None if exists else self.at,
                )
            )
            if exists is None:
                self.problems.append(f"command {command.verb}: there is no trial {command.trial_id}")
            self.session.flush()
        return command.claimed_path

    def _runs(self, uuids: set[str]) -> dict[str, RunRow]:
        rows = self.session.scalars(select(RunRow).where(RunRow.uuid.in_(sorted(uuids)))) if uuids else ()
        return {row.uuid: row for row in rows}

    def _known(self, runs: dict[str, RunRow], run_uuid: str, what: str) -> RunRow | None:
        run = runs.get(run_uuid)
        if run is None:
            self._note(f"a {what} was seen of run {run_uuid}, which the ledger does not know")
        return run

    def _note(self, problem: str | None) -> None:
        if problem:
            self.problems.append(clean(problem))

    def _probe(self, run: RunRow, probe: RunProbe) -> None:
        if run.state not in LIVE_RUN_STATES:
            if probe.state is ProbeState.ALIVE:
                self._note(
                    f"run {run.uuid} is over ({run.state}) in the ledger, but process {probe.pid} of it is alive"
                )
            return
        trial = trial_row(self.session, run.trial_id)
        before = (run.state, run.pid, run.claimed, trial.state)
        match probe.state:
            case ProbeState.UNCLAIMED:
                run.claimed = False
            case ProbeState.UNKNOWN:
                move_run(run, RunEvent.LOSE_SIGHT, self.at)
                self._note(f"run {run.uuid} could not be looked at: {probe.detail}")
            case ProbeState.ALIVE:
                move_run(run, RunEvent.SEEN, self.at)
                run.pid, run.claimed = probe.pid or run.pid, True
                self._started(trial, run)
            case ProbeState.GONE:
                self._ended(trial, run, probe)
                move_run(run, RunEvent.VANISH, self.at)
                run.error = run.error or clean(probe.detail)
            case ProbeState.EXITED:
                self._started(trial, run)
                self._exit(run, probe)
                self._ended(trial, run, probe)
                move_run(run, RunEvent.EXIT, self.at)
        if (run.state, run.pid, run.claimed, trial.state) != before:
            self.touched.add(trial.id)

    def _started(self, trial: TrialRow, run: RunRow) -> None:
        if run.kind is RunKind.TRAIN and trial.state is TrialState.LAUNCHING:
            move_trial(trial, TrialEvent.STARTED, self.at)

    def _exit(self, run: RunRow, probe: RunProbe) -> None:
        run.claimed = True
        if probe.detail:
            self._note(f"run {run.uuid}: {probe.detail}")
        if probe.exit is None:
            return
        run.returncode, run.killed, run.errno = probe.exit.returncode, probe.exit.killed, probe.exit.errno
        run.error = clean(probe.exit.error or probe.detail)
        run.ended_at = _instant(probe.exit.ended_at) or self.at
        # A stop that the runner began itself, such as a timeout; one that was asked for is known already.
        run.stop_cause = run.stop_cause or probe.exit.cause

    def _ended(self, trial: TrialRow, run: RunRow, probe: RunProbe) -> None:
        run.last_lines = [clean(line) for line in probe.log_tail]
        if probe.result_text is not None:
            problem = take_result(self.session, trial, run, probe.result_text, self.at)
            if problem:
                self._note(problem)
                self.session.add(
                    EventRow(at=self.at, trial_id=trial.id, run_id=run.id, kind="result_problem", detail=problem)
                )

    def _sample(self, gpus: tuple[Device, ...]) -> None:
        stored = set(self.session.scalars(select(DeviceSampleRow.uuid).where(DeviceSampleRow.at == self.at)))
        for gpu in gpus:
            if gpu.uuid not in stored:
                values: dict[str, Any] = {
                    field.name: getattr(gpu, field.name)
                    for field in dataclasses.fields(gpu)
                    if field.name not in {"index", "processes", "throttle_reasons"}
                }
                self.session.add(
                    DeviceSampleRow(
                        at=self.at,
                        device_index=gpu.index,
                        throttle_reasons=list(gpu.throttle_reasons),
                        processes=[dataclasses.asdict(process) for process in gpu.processes],
                        **values,
                    )
                )
                stored.add(gpu.uuid)


def _instant(text: str) -> datetime | None:
    """A runner's time stamp; None if it is not one that can be placed."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        return None
    return instant.astimezone(UTC) if instant.tzinfo is not None else None


def _means_the_same(stored: str, spec: Spec) -> bool:
    """Whether a spec stored by an older version is this one: fields that it lacks have their default, and the scope of
    compiled graphs, which was another by default, changes nothing of what is trained."""
    try:
        known = Spec.model_validate_json(stored)
    except ValueError:  # it was valid once, and is not what arrived
        return False
    if known.trainer is not None and spec.trainer is not None:
        scope = {"compile_scope": spec.trainer.compile_scope}
        known = known.model_copy(update={"trainer": known.trainer.model_copy(update=scope)})
    return known == spec
