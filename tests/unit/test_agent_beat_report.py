"""What a heartbeat tells: from views, projections and actions to the line, the record, and the incumbents."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agent import beat_report
from agent.adapters.heartbeat_log import HeartbeatLog
from agent.decisions.policy import Policy, decide
from agent.decisions.projection.project import sentence
from agent.domain.actions import Action, Assignment, Finish, Keep, Launch, Wait
from agent.domain.beats import BeatReport, DecisionLine, RunLine, decision_text
from agent.domain.observations import CommandVerb, Device, Devices, LogPoint
from agent.domain.projections import Projection
from agent.domain.specs import Metric, Spec, track_of
from agent.domain.trials import Result, RunKind, RunState, TrialState
from agent.domain.views import ArtifactView, LedgerView, PendingCommand, RunView, TrialView

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
GPU = Device(
    index=1,
    uuid="GPU-b",
    name="card",
    memory_total_bytes=16_000_000_000,
    memory_used_bytes=4_000_000_000,
    utilization_percent=93,
)


def run(kind: RunKind = RunKind.TRAIN, state: RunState = RunState.RUNNING, **fields: Any) -> RunView:
    given: dict[str, Any] = {
        "run_uuid": f"{kind}-uuid",
        "trial_id": 1,
        "kind": kind,
        "attempt": 1,
        "state": state,
        "directory": "runs/t1-1337/train-1",
        "assignment": Assignment(cpu_slots=2),
        "intended_at": NOW,
        "pid": 4711,
    }
    return RunView(**(given | fields))


def trial(trial_id: int = 1, spec: dict[str, Any] | None = None, **fields: Any) -> TrialView:
    made = Spec.model_validate({"name": f"t{trial_id}", "command": ["x"], "limits": {"steps": 100}} | (spec or {}))
    given: dict[str, Any] = {
        "trial_id": trial_id,
        "name": made.name,
        "seed": 1337,
        "spec": made,
        "track": track_of(made, None),
        "state": TrialState.RUNNING,
        "state_since": NOW,
        "enqueued_at": NOW,
    }
    return TrialView(**(given | fields))


def finished(
    trial_id: int, raw: float | None, *, result: Result = Result.COMPLETED, size: int | None = None
) -> TrialView:
    artifact = None
    if size is not None:
        artifact = ArtifactView(
            run_uuid="u",
            path="p",
            sha256="0" * 64,
            artifact_bytes=size,
            weights_bytes=size,
            code_bytes=0,
            tokenizer_bytes=0,
            scheme="int6+zlib",
        )
    return trial(
        trial_id,
        {"track": "shared", "budget_bytes": 1000},
        state=TrialState.FINISHED,
        result=result,
        scores={} if raw is None else {Metric.RAW: raw},
        artifact=artifact,
    )


def point(step: int, val_bpb: float | None = None, train_loss: float | None = None) -> LogPoint:
    return LogPoint(step=step, val_bpb=val_bpb, train_loss=train_loss)


PROJECTION = Projection(
    trial_id=1,
    run_uuid="train-uuid",
    law="power",
    step=40,
    progress=0.4,
    n_points=8,
    final_bpb=1.25,
    low50=1.24,
    high50=1.26,
    low90=1.2,
    high90=1.3,
    r2=0.99,
    parameters={"c": 1.0},
    final_tokens=1e6,
    caveat="a warmdown is ahead",
)


def view_of(*trials: TrialView, commands: tuple[PendingCommand, ...] = ()) -> LedgerView:
    return LedgerView(at=NOW, trials=trials, commands=commands)


def report(**fields: Any) -> BeatReport:
    given: dict[str, Any] = {
        "at": NOW,
        "number": 7,
        "gpus": (),
        "cpu_slots": 2,
        "devices_note": "no GPU",
        "runs": (),
        "decisions": (),
        "commands": (),
        "enqueued": (),
        "refused": (),
        "counts": {},
        "best": (),
        "problems": (),
        "phase_seconds": {"observe": 0.25, "record": 0.5},
        "again": False,
        "restless": False,
        "waiting": 0,
        "drained": False,
        "ok": True,
    }
    return BeatReport(**(given | fields))


class TestIncumbents:
    def test_the_lowest_raw_score_of_each_track(self) -> None:
        other = trial(
            9, {"track": "other"}, state=TrialState.FINISHED, result=Result.COMPLETED, scores={Metric.RAW: 3.0}
        )
        best = beat_report.incumbents(view_of(finished(1, 1.5), finished(2, 1.4), finished(3, 1.6), other))
        assert {track: held.trial_id for track, held in best.items()} == {
            "name:shared/100steps/1000B": 2,
            "name:other/100steps/16000000B": 9,
        }

    def test_one_byte_over_budget_is_never_best_and_just_at_it_may_be(self) -> None:
        best = beat_report.incumbents(view_of(finished(1, 1.5, size=1000), finished(2, 1.4, size=1001)))
        assert [held.trial_id for held in best.values()] == [1]

    def test_an_artifact_score_does_not_stand_in_for_the_raw_one(self) -> None:
        only_artifact = replace(finished(1, None), scores={Metric.ARTIFACT: 1.0})
        assert beat_report.incumbents(view_of(only_artifact)) == {}

    @pytest.mark.parametrize("result", [Result.PRUNED, Result.STOPPED, Result.FAILED_DIVERGED, Result.FAILED_CRASHED])
    def test_what_did_not_complete_is_never_best(self, result: Result) -> None:
        best = beat_report.incumbents(view_of(finished(1, 1.0, result=result), finished(2, 1.5)))
        assert [held.trial_id for held in best.values()] == [2]

    def test_equals_go_to_the_first(self) -> None:
        best = beat_report.incumbents(view_of(finished(1, 1.5), finished(2, 1.5)))
        assert [held.trial_id for held in best.values()] == [1]


class TestDrained:
    def test_nothing_at_all_and_only_finished_trials(self) -> None:
        assert beat_report.is_drained(view_of(), ())
        assert beat_report.is_drained(view_of(finished(1, 1.0), finished(2, None)), ())

    @pytest.mark.parametrize("state", [RunState.INTENDED, RunState.RUNNING, RunState.STOPPING, RunState.UNKNOWN])
    def test_a_run_that_may_be_alive_is_work(self, state: RunState) -> None:
        live = trial(2, runs=(run(state=state),))
        assert not beat_report.is_drained(view_of(live), (Keep(trial_id=2, reason="goes on"),))

    def test_a_queued_trial_is_work_until_it_can_never_start(self) -> None:
        """As the policy says it: one that waits for its turn, and one that asks for more than there is."""
        slots = Devices(gpus=(), cpu_slots=1)
        queued = {"state": TrialState.QUEUED}
        backing_off = trial(
            1,
            runs=(run(state=RunState.EXITED, ended_at=NOW, returncode=-9),),
            **queued,
        )
        waits = decide(NOW, view_of(backing_off), slots, {}, Policy(), lambda _: None).actions
        assert [type(action) for action in waits] == [Wait]
        assert not beat_report.is_drained(view_of(backing_off), waits)
        greedy = trial(1, {"resources": {"cpus": 2}}, **queued)
        hopeless = decide(NOW, view_of(greedy), slots, {}, Policy(), lambda _: None).actions
        assert [type(action) for action in hopeless] == [Wait]
        assert beat_report.is_drained(view_of(greedy), hopeless)

    def test_a_live_export_of_a_finished_trial_is_work(self) -> None:
        exporting = replace(finished(1, 1.0), runs=(run(RunKind.EXPORT, RunState.UNKNOWN),))
        assert not beat_report.is_drained(view_of(exporting), ())

    @pytest.mark.parametrize(
        "action",
        [
            Wait(trial_id=1, reason="no device to export on"),
            Launch(trial_id=1, reason="export", kind=RunKind.EXPORT, assignment=Assignment(cpu_slots=1)),
            Finish(trial_id=1, reason="done", result=Result.COMPLETED),
        ],
    )
    def test_a_follow_up_of_a_finished_trial_is_work(self, action: Action) -> None:
        assert not beat_report.is_drained(view_of(finished(1, 1.0)), (action,))

    def test_a_paused_trial_does_not_hold_up_the_end(self) -> None:
        """The policy says of each paused trial at each beat that it waits for `resume`."""
        view = view_of(finished(1, 1.0), trial(2, state=TrialState.PAUSED))
        decided = decide(NOW, view, Devices(gpus=(), cpu_slots=1), {}, Policy(), lambda _: None)
        assert beat_report.is_drained(view, decided.actions)


class TestRunLines:
    def test_a_training_run_with_its_device_progress_and_projection(self) -> None:
        shown = trial(
            runs=(run(assignment=Assignment(gpu_uuids=("GPU-b",))),),
            val_curve=(point(10, 2.0), point(40, 1.5)),
            train_curve=(point(50, train_loss=3.0),),
            tokens_per_step=2048,
        )
        (line,) = beat_report.run_lines(view_of(shown), {1: PROJECTION}, (GPU,))
        assert line == RunLine(
            trial_id=1,
            trial="t1@1337",
            kind="train",
            state="running",
            device="gpu1",
            pid=4711,
            step=50,
            progress=0.5,
            val_bpb=1.5,
            projected_bpb=1.25,
            low90=1.2,
            high90=1.3,
            projection=f"{sentence(PROJECTION, 2048)}; a warmdown is ahead",
        )

    def test_a_card_that_is_gone_is_still_named(self) -> None:
        shown = trial(runs=(run(assignment=Assignment(gpu_uuids=("GPU-a", "GPU-b"))),))
        (line,) = beat_report.run_lines(view_of(shown), {}, (GPU,))
        assert line.device == "GPU-a+gpu1"

    def test_an_export_shows_nothing_of_the_training(self) -> None:
        shown = replace(
            finished(1, 1.0),
            runs=(run(state=RunState.EXITED), run(RunKind.EXPORT)),
            val_curve=(point(100, 1.0),),
        )
        (line,) = beat_report.run_lines(view_of(shown), {1: PROJECTION}, ())
        assert (line.kind, line.device) == ("export", "cpu x2")
        assert (line.step, line.progress, line.val_bpb, line.projected_bpb, line.projection) == (
            None,
            None,
            None,
            None,
            "",
        )

    def test_runs_that_are_over_have_no_line_and_unknown_ones_have(self) -> None:
        over = trial(1, runs=(run(state=RunState.EXITED), run(state=RunState.LOST)))
        unknown = trial(2, runs=(run(state=RunState.UNKNOWN),))
        (line,) = beat_report.run_lines(view_of(over, unknown), {}, ())
        assert (line.trial, line.state) == ("t2@1337", "unknown")


class TestDecisionLines:
    def test_each_action_with_its_reason_numbers_and_error(self) -> None:
        actions = (
            Finish(trial_id=1, reason="done", result=Result.COMPLETED, numbers={"step": 3}),
            Launch(trial_id=8, reason="starts", kind=RunKind.TRAIN, assignment=Assignment(cpu_slots=1)),
        )
        first, second = beat_report.decision_lines(view_of(trial(1)), actions, {1: "OSError: no space"})
        assert (first.trial, first.kind, first.reason, first.numbers, first.error, first.routine) == (
            "t1@1337",
            "finish",
            "completed: done",
            {"step": 3},
            "",
            False,
        )
        assert decision_text(first) == "finish t1@1337: completed: done"
        assert decision_text(second) == "launch trial 8: starts FAILED: OSError: no space"

    def test_a_suspicion_is_told_once(self) -> None:
        suspicion = (Keep(trial_id=1, reason="suspect", suspect=True),)
        (news,) = beat_report.decision_lines(view_of(trial(1)), suspicion, {})
        (known,) = beat_report.decision_lines(view_of(trial(1, suspect_step=40)), suspicion, {})
        assert (news.routine, known.routine) == (False, True)
        line = report(decisions=(news, known)).to_line()
        assert line.count("suspect") == 1

    def test_keeping_and_waiting_is_routine(self) -> None:
        actions = (Keep(trial_id=1, reason="goes on"), Wait(trial_id=1, reason="no device"))
        lines = beat_report.decision_lines(view_of(trial(1)), actions, {})
        assert [line.routine for line in lines] == [True, True]
        assert "\n" not in report(decisions=lines).to_line()


def test_command_lines_tell_what_was_done_and_what_was_refused() -> None:
    commands = (
        PendingCommand(command_id="a", verb=CommandVerb.STOP, trial_id=1),
        PendingCommand(command_id="b", verb=CommandVerb.PAUSE, trial_id=1),
        PendingCommand(command_id="c", verb=CommandVerb.RESUME, trial_id=1),
    )
    outcomes = (("b", False, "t1@1337: cannot pause"), ("a", True, "t1@1337: stopping"))
    assert beat_report.command_lines(view_of(trial(1), commands=commands), outcomes) == (
        "pause REFUSED: t1@1337: cannot pause",
        "stop t1@1337: stopping",
    )


def test_state_counts_count_every_trial() -> None:
    view = view_of(trial(1), trial(2), finished(3, 1.0))
    assert beat_report.state_counts(view) == {"running": 2, "finished": 1}


FULL = report(
    gpus=(GPU,),
    runs=(
        RunLine(
            trial_id=1,
            trial="t1@1337",
            kind="train",
            state="stopping",
            device="gpu1",
            pid=None,
            step=40,
            progress=0.4,
            val_bpb=1.5,
            projected_bpb=1.25,
            low90=1.2,
            high90=1.3,
            projection="",
        ),
    ),
    decisions=(DecisionLine(trial="t1@1337", kind="prune", reason="hopeless", numbers={"low90": 1.2, "why": None}),),
    commands=("stop t1@1337: stopping",),
    enqueued=("t2@1337",),
    refused=("bad.yaml:3: no",),
    counts={"running": 1, "finished": 2},
    best=(("a/b/1B", "t9@1", 1.1),),
    problems=("the disk is full",),
)


class TestReport:
    def test_the_line_begins_with_the_beat_and_tells_each_event_below(self) -> None:
        first, *events = FULL.to_line().split("\n")
        assert first == (
            "2026-05-01 12:00:00Z beat 7 | gpu1 4.0/16 GB 93% | finished 2 running 1 | "
            "t1@1337 train 40% bpb 1.5000 -> 1.2500 [1.2000, 1.3000] (stopping) | 0.75 s"
        )
        assert events == [
            "    asked stop t1@1337: stopping",
            "    enqueued t2@1337",
            "    refused bad.yaml:3: no",
            "    prune t1@1337: hopeless",
            "    PROBLEM the disk is full",
        ]

    def test_devices_that_are_none_unknown_or_sick_are_told_apart(self) -> None:
        assert "| 2 CPU slots |" in report().to_line()
        assert "| GPUs unknown: NVML hangs |" in report(gpus=None, devices_note="NVML hangs").to_line()
        assert "| gpu1 lost 93% |" in report(gpus=(replace(GPU, error="lost"),)).to_line()
        assert "no trials" in report().to_line()

    def test_the_record_survives_json(self) -> None:
        record = json.loads(json.dumps(FULL.to_record(), allow_nan=False))
        assert datetime.fromisoformat(record["at"]) == NOW
        assert record["line"] == FULL.to_line()
        assert record["gpus"][0]["uuid"] == "GPU-b"
        assert record["runs"][0]["low90"] == 1.2
        assert record["decisions"][0]["numbers"] == {"low90": 1.2, "why": None}
        assert record["best"] == [["a/b/1B", "t9@1", 1.1]]
        assert record["ok"] is True

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_run_that_diverged_makes_no_record_that_is_not_json(self, bad: float) -> None:
        """The ledger stores and `caddie heartbeats --json` prints this very record."""
        sick = replace(
            FULL,
            runs=(replace(FULL.runs[0], val_bpb=bad),),
            decisions=(DecisionLine(trial="t1@1337", kind="stop", reason="diverged", numbers={"loss": bad}),),
        )
        json.dumps(sick.to_record(), allow_nan=False)

    def test_the_journal_takes_a_run_that_diverged(self, tmp_path: Path) -> None:
        sick = replace(FULL, runs=(replace(FULL.runs[0], val_bpb=math.inf),))
        HeartbeatLog(tmp_path).append(sick.to_line(), sick.to_record())
        (line,) = (tmp_path / "heartbeat.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["runs"][0]["val_bpb"] is None
        assert "bpb inf" in (tmp_path / "heartbeat.log").read_text(encoding="utf-8")
