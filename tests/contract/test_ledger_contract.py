"""What every ledger promises, whatever database is behind it. A new one joins by its line in `ledger`'s params."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from agent.decisions.standings import standings_of
from agent.domain.actions import (
    Action,
    Assignment,
    Finish,
    Keep,
    Kill,
    Launch,
    MarkPaused,
    Requeue,
    Resume,
    Stop,
    Void,
    Wait,
)
from agent.domain.errors import LedgerError, NotFoundError, TransitionError
from agent.domain.observations import (
    Command,
    CommandVerb,
    Device,
    DeviceProcess,
    Devices,
    LogEvent,
    LogHeader,
    LogPoint,
    LogReading,
    Observation,
    ProbeState,
    RunProbe,
    SpecArrival,
    SpecRefusal,
)
from agent.domain.projections import Projection
from agent.domain.runfiles import ExitRecord
from agent.domain.specs import Metric, Spec, Track
from agent.domain.trials import Result, RunKind, RunState, StopCause, TrialState
from agent.domain.views import RunView, TrialView
from agent.ledger import ledger as ledger_module
from agent.ledger import recording
from agent.ledger.ledger import Ledger, Recorded
from agent.ledger.queries import CommandState, LedgerReader
from trainer.report import EvaluateResult, ExportResult, TrainResult, result_json

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
VAL = "ab12cd34ef56" + "0" * 52
GPU = Assignment(gpu_uuids=("GPU-1",))
NO_DEVICES = Devices(gpus=(), cpu_slots=2)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def spec(name: str = "plain", **changes: Any) -> Spec:
    return Spec.model_validate({"name": name, "trainer": {}, "limits": {"wallclock_seconds": 180}} | changes)


def arrival(given: Spec, val: str | None = VAL) -> SpecArrival:
    return SpecArrival(
        spec=given,
        source_text=f"name: {given.name}\n",
        source_name=f"{given.name}.yaml",
        claimed_path=f"queue/claimed/{given.name}.yaml",
        val_sha256=val,
    )


def seen(at: datetime = NOW, **facts: Any) -> Observation:
    return Observation(at=at, **({"devices": NO_DEVICES} | facts))


def reading(run_uuid: str, start: int, end: int, *points: LogPoint, **more: Any) -> LogReading:
    return LogReading(run_uuid=run_uuid, start_offset=start, offset=end, points=points, **more)


def train(step: int, loss: float = 3.0, **more: Any) -> LogPoint:
    return LogPoint(step=step, train_loss=loss, elapsed_seconds=step / 10, **more)


def val(step: int, bpb: float = 2.0, **more: Any) -> LogPoint:
    return LogPoint(step=step, val_loss=bpb * 2, val_bpb=bpb, elapsed_seconds=step / 10, **more)


def header(resumed: int | None = 0, tokens_per_step: int = 1000) -> LogHeader:
    text = "header" if resumed is None else json.dumps({"caddie": 1, "resumed_step": resumed})
    return LogHeader(params=17, tokens_per_step=tokens_per_step, val_sha256=VAL, device="cpu", text=text)


def train_result(bpb: float = 1.5, val_sha256: str = VAL) -> str:
    return result_json(
        TrainResult(
            stop_reason="finished",
            steps=100,
            tokens=100_000,
            training_seconds=10,
            wall_seconds=12,
            val_loss=bpb * 2,
            val_bpb=bpb,
            val_sha256=val_sha256,
            params=17_000_000,
            model_path="model.pt",
            model_sha256="m",
        )
    )


def export_result(sha256: str = "a1", artifact_bytes: int = 15_000_000) -> str:
    return result_json(
        ExportResult(
            artifact_path="model.caddie",
            artifact_sha256=sha256,
            artifact_bytes=artifact_bytes,
            weights_bytes=artifact_bytes - 50_000,
            code_bytes=50_000,
            tokenizer_bytes=300_000,
            scheme="int6+zlib",
            params=17_000_000,
            max_abs_error=0.01,
        )
    )


def evaluate_result(bpb: float = 1.51, sha256: str = "a1", kind: str = "artifact", **more: Any) -> str:
    return result_json(
        EvaluateResult.model_validate(
            {
                "source_path": "x",
                "source_sha256": sha256,
                "source_kind": kind,
                "val_loss": bpb * 2,
                "val_bpb": bpb,
                "val_sha256": VAL,
                "val_tokens": 1000,
                "val_bytes": 2000,
                "wall_seconds": 1,
                **more,
            }
        )
    )


class World:
    """A ledger with the few moves that the tests make again and again."""

    def __init__(self, ledger: Ledger, path: Path) -> None:
        self.ledger = ledger
        self.path = path

    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger.open(self.path)

    def record(self, at: datetime = NOW, **facts: Any) -> Recorded:
        return self.ledger.record(seen(at, **facts))

    def enqueue(self, *specs: Spec, val_sha256: str | None = VAL) -> None:
        self.record(arrivals=tuple(arrival(one, val_sha256 if one.trainer else None) for one in specs))

    def trial(self, trial_id: int = 1) -> TrialView:
        return self.ledger.view(NOW).trial(trial_id)

    def launch(self, trial_id: int = 1, uuid: str = "u1", kind: RunKind = RunKind.TRAIN) -> RunView:
        action = Launch(trial_id=trial_id, reason="room", kind=kind, assignment=GPU, numbers={"free": 1})
        return self.ledger.intend(action, run_uuid=uuid, directory=f"runs/t-{trial_id}/{uuid}", at=NOW)

    def probe(self, uuid: str = "u1", state: ProbeState = ProbeState.ALIVE, **more: Any) -> Recorded:
        if state is ProbeState.ALIVE:
            more.setdefault("pid", 4242)
        return self.record(probes=(RunProbe(run_uuid=uuid, state=state, **more),))

    def exit(self, uuid: str = "u1", code: int | None = 0, result: str | None = None, **more: Any) -> Recorded:
        record = ExitRecord(run_uuid=uuid, returncode=code, started_at=None, ended_at=after(5).isoformat(), **more)
        return self.probe(uuid, ProbeState.EXITED, exit=record, result_text=result, log_tail=("one", "two"))

    def apply(self, action: Action) -> None:
        self.ledger.apply(action, after(60))

    def running(self, given: Spec | None = None) -> None:
        self.enqueue(given or spec())
        self.launch()
        self.probe()

    def complete(self, trial_id: int, bpb: float) -> None:
        self.launch(trial_id, f"t{trial_id}")
        self.exit(f"t{trial_id}", result=train_result(bpb))
        self.apply(Finish(trial_id=trial_id, reason="done", result=Result.COMPLETED))

    def export(self, trial_id: int, artifact_bytes: int = 15_000_000, bpb: float | None = None) -> None:
        self.launch(trial_id, f"x{trial_id}", RunKind.EXPORT)
        self.exit(f"x{trial_id}", result=export_result(artifact_bytes=artifact_bytes))
        if bpb is not None:
            self.launch(trial_id, f"e{trial_id}", RunKind.EVALUATE)
            self.exit(f"e{trial_id}", result=evaluate_result(bpb))

    def reader(self) -> LedgerReader:
        return LedgerReader.open(self.path)


@pytest.fixture(params=["sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    path = tmp_path / "experiments.db"
    world = World(Ledger.open(path), path)
    yield world
    world.ledger.close()


# --- specs and commands --------------------------------------------------------------------------------------


def test_a_spec_becomes_one_queued_trial_per_seed(world: World) -> None:
    recorded = world.record(arrivals=(arrival(spec(seeds=(7, 3), priority=5)),))
    assert recorded.enqueued == ("plain@7", "plain@3")
    assert recorded.settled_specs == (("queue/claimed/plain.yaml", None),)
    first, second = world.ledger.view(after(1)).trials
    assert (first.key, second.key) == ("plain@7", "plain@3")
    assert first.spec == spec(seeds=(7, 3), priority=5)
    assert first.state is TrialState.QUEUED
    assert first.state_since == first.enqueued_at == NOW
    assert first.track.key == "ab12cd34ef56/180s/16000000B"


def test_the_same_spec_again_is_accepted_and_changes_nothing(world: World) -> None:
    world.enqueue(spec())
    again = world.record(after(9), arrivals=(arrival(spec()),))
    assert (again.enqueued, again.settled_specs) == ((), (("queue/claimed/plain.yaml", None),))
    assert len(world.ledger.view(NOW).trials) == 1


def test_a_name_with_other_contents_is_refused_with_a_remedy_and_the_others_go_on(world: World) -> None:
    world.enqueue(spec())
    recorded = world.record(arrivals=(arrival(spec(priority=9)), arrival(spec("other"))))
    (_, refusal), (_, accepted) = recorded.settled_specs
    assert refusal is not None
    assert "choose another name" in refusal
    assert accepted is None
    assert recorded.enqueued == ("other@1337",)
    assert world.trial(1).spec.priority == 0


def test_two_arrivals_of_one_name_in_one_beat(world: World) -> None:
    recorded = world.record(arrivals=(arrival(spec()), arrival(spec(priority=9))))
    assert [message is None for _, message in recorded.settled_specs] == [True, False]


def test_a_refused_file_is_told_once_however_often_it_comes_back(world: World) -> None:
    refusal = SpecRefusal(source_name="bad.yaml", claimed_path="c/bad.yaml", message="bad.yaml:3: \ud800 no \x00")
    for second in range(3):
        world.record(after(second), refusals=(refusal,))
    with world.reader() as reader:
        (event,) = reader.events()
    assert (event.kind, event.detail) == ("spec_refused", "bad.yaml:3: ? no \ufffd")


def test_commands_wait_until_they_are_settled(world: World) -> None:
    world.enqueue(spec())
    command = Command(command_id="c1", verb=CommandVerb.PAUSE, trial_id=1, claimed_path="claimed/c1.json")
    for _ in range(2):
        assert world.record(commands=(command,)).settled_commands == ("claimed/c1.json",)
    (pending,) = world.ledger.view(NOW).commands
    assert (pending.command_id, pending.verb, pending.trial_id) == ("c1", CommandVerb.PAUSE, 1)
    world.ledger.settle_command("c1", done=False, outcome="it is over", at=after(1))
    world.record(commands=(command,))
    assert world.ledger.view(NOW).commands == ()
    with world.reader() as reader:
        (record,) = reader.commands()
    assert (record.state, record.outcome) == (CommandState.REFUSED, "it is over")
    assert (record.at, record.settled_at) == (NOW, after(1))
    with pytest.raises(NotFoundError):
        world.ledger.settle_command("c2", done=True, outcome="", at=NOW)


@pytest.mark.parametrize("trial_id", [99, 2**80, -1])
def test_a_command_for_a_trial_that_never_was_is_refused_and_settled(world: World, trial_id: int) -> None:
    command = Command(command_id="c1", verb=CommandVerb.STOP, trial_id=trial_id, claimed_path="p")
    recorded = world.record(commands=(command,))
    assert recorded.settled_commands == ("p",)
    assert str(trial_id) in recorded.problems[0]
    assert world.ledger.view(NOW).commands == ()
    with world.reader() as reader:
        assert [record.settled_at for record in reader.commands()] == [NOW]


def test_commands_of_one_beat_keep_the_order_of_their_arrival(world: World) -> None:
    world.enqueue(spec())
    ids = [f"{letter}1" for letter in "zqamxb"]
    sent = [Command(command_id=name, verb=CommandVerb.PAUSE, trial_id=1, claimed_path=name) for name in ids]
    world.record(commands=tuple(sent))
    assert [command.command_id for command in world.ledger.view(NOW).commands] == ids
    world.ledger.settle_command("m1", done=True, outcome="", at=after(9))
    world.reopen()
    assert [command.command_id for command in world.ledger.view(NOW).commands] == ["z1", "q1", "a1", "x1", "b1"]
    with world.reader() as reader:
        assert [record.command_id for record in reader.commands()] == ids[::-1]


@pytest.mark.parametrize("error", [ValueError, OverflowError, ZeroDivisionError])
def test_a_spec_that_cannot_be_stored_is_refused_and_stops_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    real = recording.track_of

    def picky(given: Spec, val_sha256: str | None) -> Track:
        if given.name == "odd":
            raise error("int too large")
        return real(given, val_sha256)

    monkeypatch.setattr(recording, "track_of", picky)
    recorded = world.record(arrivals=tuple(arrival(spec(name)) for name in ("a", "odd", "b")))
    assert recorded.enqueued == ("a@1337", "b@1337")
    (_, none), (path, refusal), (_, neither) = recorded.settled_specs
    assert (none, neither, path) == (None, None, "queue/claimed/odd.yaml")
    assert refusal is not None
    assert "odd.yaml: cannot be taken into the ledger: int too large" in refusal
    with world.reader() as reader:
        assert [event.kind for event in reader.events()] == ["spec_refused"]
    monkeypatch.undo()
    assert world.record(arrivals=(arrival(spec("odd")),)).enqueued == ("odd@1337",), "nothing of it had stayed"


# --- runs ----------------------------------------------------------------------------------------------------


def test_an_intent_is_committed_with_its_decision_before_anything_runs(world: World) -> None:
    world.enqueue(spec())
    run = world.launch()
    assert (run.state, run.attempt, run.assignment, run.claimed) == (RunState.INTENDED, 1, GPU, None)
    with world.reader() as reader:
        assert reader.trial("1").state is TrialState.LAUNCHING
        assert reader.trial("1").live_run == run
        (decision,) = reader.decisions(1)
    assert (decision.kind, decision.reason, decision.run_uuid, decision.numbers) == (
        "launch",
        "room",
        "u1",
        {"free": 1},
    )


def test_a_trial_never_has_two_live_runs(world: World) -> None:
    world.running()
    with pytest.raises(TransitionError, match="u1"):
        world.launch(uuid="u2")
    with world.reader() as reader:
        assert [run.run_uuid for run in reader.trial("1").runs] == ["u1"]
        assert len(reader.decisions(1)) == 1


def test_follow_ups_want_a_completed_trial(world: World) -> None:
    world.running()
    with pytest.raises(TransitionError):
        world.launch(uuid="x1", kind=RunKind.EXPORT)


def test_a_failed_launch_is_a_lost_run_and_leaves_the_trial_to_the_policy(world: World) -> None:
    world.enqueue(spec())
    world.launch()
    world.ledger.launch_failed("u1", "ENOENT python9", after(1))
    trial = world.trial()
    assert trial.state is TrialState.LAUNCHING
    assert (trial.runs[0].state, trial.runs[0].error, trial.runs[0].ended_at) == (
        RunState.LOST,
        "ENOENT python9",
        after(1),
    )
    assert trial.runs[0].never_claimed
    world.apply(Requeue(trial_id=1, reason="again"))
    assert world.launch(uuid="u2").attempt == 2


def test_a_run_that_is_seen_starts_its_trial(world: World) -> None:
    world.enqueue(spec())
    world.launch()
    world.probe(state=ProbeState.UNCLAIMED)
    assert world.trial().runs[0].claimed is False
    assert world.trial().state is TrialState.LAUNCHING
    world.probe()
    run = world.trial().runs[0]
    assert (world.trial().state, run.state, run.pid, run.claimed) == (TrialState.RUNNING, RunState.RUNNING, 4242, True)


def test_unknown_is_not_dead(world: World) -> None:
    world.running()
    problems = world.probe(state=ProbeState.UNKNOWN, detail="EIO").problems
    assert "EIO" in problems[0]
    trial = world.trial()
    assert trial.runs[0].state is RunState.UNKNOWN
    assert trial.live_run is not None
    with pytest.raises(TransitionError):
        world.apply(Requeue(trial_id=1, reason="?"))
    world.probe()
    assert world.trial().runs[0].state is RunState.RUNNING


def test_an_exit_is_kept_whole_and_once(world: World) -> None:
    world.enqueue(spec())
    world.launch()
    for _ in range(2):
        world.exit(code=-9, killed=True, cause=StopCause.TIMEOUT, error="late")
    trial = world.trial()
    run = trial.runs[0]
    assert trial.state is TrialState.RUNNING
    assert (run.state, run.returncode, run.killed, run.error) == (RunState.EXITED, -9, True, "late")
    assert (run.stop_cause, run.last_lines, run.ended_at) == (StopCause.TIMEOUT, ("one", "two"), after(5))
    world.probe(state=ProbeState.GONE)
    assert world.trial().runs[0].state is RunState.EXITED


def test_a_process_of_a_run_that_is_over_is_a_problem(world: World) -> None:
    world.enqueue(spec())
    world.launch()
    world.probe(state=ProbeState.GONE)
    assert "alive" in world.probe().problems[0]
    assert world.trial().runs[0].state is RunState.LOST


def test_facts_about_unknown_runs_are_problems_and_stop_nothing(world: World) -> None:
    recorded = world.record(
        probes=(RunProbe(run_uuid="zz", state=ProbeState.ALIVE),),
        readings=(reading("zz", 0, 5, train(1)),),
        arrivals=(arrival(spec()),),
    )
    assert len(recorded.problems) == 2
    assert recorded.enqueued == ("plain@1337",)


# --- results -------------------------------------------------------------------------------------------------


def test_the_four_steps_from_training_to_the_artifacts_score(world: World) -> None:
    world.enqueue(spec())
    world.complete(1, 1.5)
    world.export(1, bpb=1.51)
    trial = world.trial()
    assert trial.scores == {Metric.RAW: 1.5, Metric.ARTIFACT: 1.51}
    assert trial.model_path == "runs/t-1/t1/model.pt"
    assert trial.artifact is not None
    assert (trial.artifact.path, trial.artifact.artifact_bytes) == ("runs/t-1/x1/model.caddie", 15_000_000)
    assert [run.kind for run in trial.runs] == [RunKind.TRAIN, RunKind.EXPORT, RunKind.EVALUATE]
    assert all(run.has_result for run in trial.runs)
    assert trial.state is TrialState.FINISHED


@pytest.mark.parametrize("text", ["{", "{}", export_result(), "\ud800"])
def test_a_result_that_cannot_be_read_is_a_problem_not_a_score(world: World, text: str) -> None:
    world.running()
    assert world.exit(result=text).problems
    trial = world.trial()
    assert (trial.runs[0].has_result, trial.runs[0].state, trial.scores) == (False, RunState.EXITED, {})


def test_a_score_on_another_validation_set_is_a_problem(world: World) -> None:
    world.running()
    (problem,) = world.exit(result=train_result(val_sha256="f" * 64)).problems
    assert "ffffffffffff" in problem
    assert world.trial().scores == {}
    assert world.trial().runs[0].has_result
    with world.reader() as reader:
        assert [event.kind for event in reader.events(1)] == ["result_problem"]


@pytest.mark.parametrize("text", [evaluate_result(sha256="b2"), evaluate_result(kind="model")])
def test_a_score_of_other_bytes_than_the_artifacts_is_a_problem(world: World, text: str) -> None:
    world.enqueue(spec())
    world.complete(1, 1.5)
    world.export(1)
    world.launch(1, "e1", RunKind.EVALUATE)
    assert world.exit("e1", result=text).problems
    assert Metric.ARTIFACT not in world.trial().scores


def test_a_sliding_score_is_a_final_of_its_own(world: World) -> None:
    world.enqueue(spec())
    world.complete(1, 1.5)
    world.export(1)
    world.launch(1, "e1", RunKind.EVALUATE)
    assert not world.exit("e1", result=evaluate_result(1.4, metric="sliding", context=1024, stride=64)).problems
    assert world.trial().scores == {Metric.RAW: 1.5, Metric.SLIDING: 1.4}
    (board,) = world.reader().best()
    assert board.metric is Metric.RAW  # the artifact has no score yet
    assert (board.rows[0].artifact_bpb, board.rows[0].sliding_bpb) == (None, 1.4)


def test_test_time_training_is_a_final_of_its_own(world: World) -> None:
    world.enqueue(spec())
    world.complete(1, 1.5)
    world.export(1, bpb=1.51)
    world.launch(1, "e2", RunKind.EVALUATE)
    assert not world.exit("e2", result=evaluate_result(1.3, metric="ttt", context=1024)).problems
    assert world.trial().scores == {Metric.RAW: 1.5, Metric.ARTIFACT: 1.51, Metric.TTT: 1.3}
    (board,) = world.reader().best()
    assert (board.metric, board.rows[0].ttt_bpb) == (Metric.ARTIFACT, 1.3)


def test_the_final_of_an_average_stands_beside_the_raw_one(world: World) -> None:
    world.running()
    averaged = {"averaging": "swa", "averaged_val_loss": 3.4, "averaged_val_bpb": 1.39, "raw_model_path": "raw.pt"}
    result = json.dumps({"result": json.loads(train_result(1.4))["result"] | averaged})
    assert not world.exit(result=result).problems
    assert world.trial().scores == {Metric.RAW: 1.4, Metric.EMA: 1.39}
    assert world.trial().model_path == "runs/t-1/u1/model.pt"
    assert world.reader().best()[0].rows[0].ema_bpb == 1.39


def test_an_average_of_several_models_is_the_final_of_no_trial(world: World) -> None:
    world.running()
    average = {
        "kind": "average", "method": "uniform", "model_path": "m.pt", "model_sha256": "aa", "val_loss": 3.0,
        "val_bpb": 1.2, "val_sha256": "ab" * 32, "members": [],
    }  # fmt: skip
    (problem,) = world.exit(result=json.dumps({"result": average})).problems
    assert "is a result of average, but the run was to train" in problem
    assert world.trial().scores == {}


def test_a_spec_of_an_older_version_that_means_the_same_is_the_same(world: World) -> None:
    """Its stored text and hash lack the fields that came later."""
    world.enqueue(spec())
    old = json.loads(spec().canonical_json())
    del old["init_from"], old["trainer"]["averaging"], old["trainer"]["model"]["smear_gate"]
    old["trainer"]["compile_scope"] = "pass"  # the default of then, which was stored
    with closing(sqlite3.connect(world.path)) as raw, raw:
        raw.execute("UPDATE experiments SET spec_json = ?, spec_sha256 = 'of another version'", (json.dumps(old),))
    assert world.record(arrivals=(arrival(spec()),)).enqueued == ()
    settled = world.record(arrivals=(arrival(spec(priority=spec().priority + 1)),)).settled_specs
    assert "with other contents" in str(settled[0][1])


def test_a_run_that_vanished_after_its_result_keeps_it(world: World) -> None:
    world.running()
    world.probe(state=ProbeState.GONE, result_text=train_result(1.4))
    trial = world.trial()
    assert (trial.runs[0].state, trial.runs[0].has_result, trial.scores) == (RunState.LOST, True, {Metric.RAW: 1.4})


def test_a_commands_score_comes_with_its_finish(world: World) -> None:
    world.enqueue(Spec(name="cmd", command=("python", "x.py"), track="speedrun"))
    world.launch()
    assert world.exit(result="whatever it wrote").problems == ()
    world.apply(Finish(trial_id=1, reason="done", result=Result.COMPLETED, raw_bpb=1.25))
    assert world.trial().scores == {Metric.RAW: 1.25}
    assert world.trial().track.key == "name:speedrun/open/16000000B"


def test_a_final_that_is_no_number_is_refused_and_nothing_is_stored(world: World) -> None:
    world.enqueue(Spec(name="cmd", command=("x",)))
    world.launch()
    world.exit()
    with pytest.raises(LedgerError, match="nan"):
        world.apply(Finish(trial_id=1, reason="done", result=Result.COMPLETED, raw_bpb=math.nan))
    assert world.trial().state is TrialState.RUNNING


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("model.pt", "runs/t-1/u1/model.pt"),
        ("/elsewhere/ws/runs/t-1/u1/model.pt", "runs/t-1/u1/model.pt"),
        ("runs/t-1/u1/model.pt", "runs/t-1/u1/model.pt"),
        ("/other/model.pt", "/other/model.pt"),
    ],
)
def test_paths_in_results_become_relative_to_the_workspace(world: World, told: str, expected: str) -> None:
    world.running()
    world.exit(result=train_result().replace("model.pt", told))
    assert world.trial().model_path == expected


# --- logs ----------------------------------------------------------------------------------------------------


def test_points_header_and_offset_go_in_together_and_only_once(world: World) -> None:
    world.running()
    first = reading("u1", 0, 100, train(1), val(1), header=header(), unreadable_lines=2)
    for second in (10, 20):
        world.record(after(second), readings=(first,))
    trial = world.trial()
    assert trial.val_curve == (val(1, tokens=1000),)
    assert trial.train_curve == (train(1, tokens=1000),)
    assert trial.tokens_per_step == 1000
    assert (trial.runs[0].log_offset, trial.runs[0].last_progress_at) == (100, after(10))
    world.record(readings=(reading("u1", 100, 200, val(2)), reading("u1", 200, 300, val(3))))
    assert [point.step for point in world.trial().val_curve] == [1, 2, 3]
    assert world.trial().val_curve[2].tokens == 3000


def test_a_reading_with_a_gap_before_it_is_a_problem_and_not_stored(world: World) -> None:
    world.running()
    assert "byte 50" in world.record(readings=(reading("u1", 50, 100, val(9)),)).problems[0]
    assert world.trial().val_curve == ()
    assert world.trial().runs[0].log_offset == 0


def test_a_log_that_began_anew_is_read_from_its_start_once(world: World) -> None:
    world.running()
    world.record(readings=(reading("u1", 0, 500, val(1)),))
    anew = reading("u1", 0, 80, val(2), restarted=True)
    for _ in range(2):
        world.record(readings=(anew,))
    trial = world.trial()
    assert [point.step for point in trial.val_curve] == [1, 2]
    assert trial.runs[0].log_offset == 80
    world.record(readings=(reading("u1", 80, 160, val(3)),))
    assert len(world.trial().val_curve) == 3


def test_losses_that_are_not_finite_are_kept_as_infinity_and_told(world: World) -> None:
    world.running()
    points = (train(10, math.nan), val(11, -math.inf), train(12, 2.0))
    world.record(readings=(reading("u1", 0, 9, *points),))
    trial = world.trial()
    assert [point.train_loss for point in trial.train_curve] == [math.inf, 2.0]
    assert trial.val_curve[0].val_bpb == math.inf
    with world.reader() as reader:
        (event,) = reader.events(1)
    assert (event.kind, event.step) == ("non_finite", 10)
    assert "1 more" in event.detail


def test_damaged_numbers_and_letters_in_a_log_never_stop_a_beat(world: World) -> None:
    world.running()
    log = reading(
        "u1",
        0,
        9,
        train(2**70),
        train(-1),
        train(3, tokens=2**70),
        train(4),
        events=(LogEvent(kind="late_qat", step=2**70, detail="\udcff\x00" + "x" * 10_000),),
    )
    assert world.record(readings=(log,)).problems == ()
    assert [point.step for point in world.trial().train_curve] == [4]
    with world.reader() as reader:
        (event,) = reader.events(1)
    assert event.step is None
    assert event.detail.startswith("?\ufffdxxx")
    assert len(event.detail) == 2000


@pytest.mark.parametrize("resumed", [20, None])
def test_a_resumed_runs_points_replace_the_lost_ones(world: World, resumed: int | None) -> None:
    world.running()
    world.record(readings=(reading("u1", 0, 9, val(10, 3.0), val(20, 2.5), train(25), val(30, 9.9), header=header()),))
    world.exit(code=75)
    world.apply(Requeue(trial_id=1, reason="interrupted"))
    world.launch(uuid="u2")
    log = reading("u2", 0, 9, train(21), val(40, 2.2), header=header(resumed) if resumed else None)
    world.record(readings=(log,))
    trial = world.trial()
    assert [(point.step, point.val_bpb) for point in trial.val_curve] == [(10, 3.0), (20, 2.5), (40, 2.2)]
    assert [point.step for point in trial.train_curve] == [21]


def test_views_carry_the_last_200_training_points_and_none_of_finished_trials(world: World) -> None:
    world.running()
    world.record(readings=(reading("u1", 0, 9, *(train(step) for step in range(1, 301)), val(300)),))
    assert [point.step for point in world.trial().train_curve] == list(range(101, 301))
    world.exit(result=train_result())
    world.apply(Finish(trial_id=1, reason="done", result=Result.COMPLETED))
    assert world.trial().train_curve == ()
    assert len(world.trial().val_curve) == 1


# --- decisions -----------------------------------------------------------------------------------------------


def test_stopping_for_good(world: World) -> None:
    world.running()
    world.apply(Stop(trial_id=1, reason="user", run_uuid="u1", cause=StopCause.USER))
    trial = world.trial()
    assert (trial.state, trial.state_since, trial.reason) == (TrialState.STOPPING, after(60), "user")
    run = trial.runs[0]
    assert (run.state, run.stop_cause, run.stop_asked_at) == (RunState.STOPPING, StopCause.USER, after(60))
    world.apply(Kill(trial_id=1, reason="late", run_uuid="u1"))
    world.exit(code=-9, killed=True, cause=StopCause.USER)
    world.apply(Finish(trial_id=1, reason="by the user", result=Result.STOPPED))
    assert world.trial().result is Result.STOPPED
    with world.reader() as reader:
        assert [decision.kind for decision in reader.decisions(1)] == ["launch", "stop", "kill", "finish"]
        assert [decision.run_uuid for decision in reader.decisions(1)] == ["u1", "u1", "u1", None]


def test_pausing_and_going_on(world: World) -> None:
    world.running()
    world.apply(Stop(trial_id=1, reason="user", run_uuid="u1", cause=StopCause.PAUSE))
    assert world.trial().state is TrialState.PAUSING
    world.exit(code=75)
    world.apply(MarkPaused(trial_id=1, reason="kept"))
    assert world.trial().state is TrialState.PAUSED
    world.apply(Resume(trial_id=1, reason="user"))
    assert world.trial().state is TrialState.QUEUED
    world.apply(MarkPaused(trial_id=1, reason="held"))
    assert world.trial().state is TrialState.PAUSED


def test_a_pause_that_becomes_a_stop_keeps_its_first_deadline(world: World) -> None:
    world.running()
    world.ledger.apply(Stop(trial_id=1, reason="p", run_uuid="u1", cause=StopCause.PAUSE), after(1))
    world.ledger.apply(Stop(trial_id=1, reason="s", run_uuid="u1", cause=StopCause.USER), after(2))
    run = world.trial().runs[0]
    assert (run.stop_cause, run.stop_asked_at) == (StopCause.USER, after(1))
    assert world.trial().state is TrialState.STOPPING


def test_stopping_a_follow_up_touches_only_the_run(world: World) -> None:
    world.enqueue(spec())
    world.complete(1, 1.5)
    world.launch(1, "x1", RunKind.EXPORT)
    world.apply(Stop(trial_id=1, reason="late", run_uuid="x1", cause=StopCause.TIMEOUT))
    trial = world.trial()
    assert (trial.state, trial.runs[1].state) == (TrialState.FINISHED, RunState.STOPPING)


def test_voiding_an_unclaimed_run(world: World) -> None:
    world.enqueue(spec())
    world.launch()
    world.apply(Void(trial_id=1, reason="nobody claimed it", run_uuid="u1"))
    trial = world.trial()
    assert trial.runs[0].state is RunState.LOST
    assert "nobody claimed it" in trial.runs[0].error
    assert trial.state is TrialState.LAUNCHING


def test_suspicion_is_stored_once_and_cleared(world: World) -> None:
    world.running()
    world.record(readings=(reading("u1", 0, 9, val(10), val(20)),))
    for _ in range(3):
        world.apply(Keep(trial_id=1, reason="behind", suspect=True))
    assert world.trial().suspect_step == 20
    for _ in range(3):
        world.apply(Keep(trial_id=1, reason="fine again"))
    assert world.trial().suspect_step is None
    world.apply(Wait(trial_id=1, reason="no room"))
    with world.reader() as reader:
        assert [decision.reason for decision in reader.decisions(1)] == ["room", "behind", "fine again"]


@pytest.mark.parametrize(
    "action",
    [
        Finish(trial_id=1, reason="", result=Result.COMPLETED),
        Requeue(trial_id=1, reason=""),
        MarkPaused(trial_id=1, reason=""),
        Resume(trial_id=1, reason=""),
    ],
)
def test_what_the_tables_do_not_allow_is_refused_and_stores_nothing(world: World, action: Action) -> None:
    world.running()
    before = world.trial()
    with pytest.raises(TransitionError):
        world.apply(action)
    assert world.trial() == before
    with world.reader() as reader:
        assert len(reader.decisions(1)) == 1


def test_finished_is_final(world: World) -> None:
    world.enqueue(spec())
    world.apply(Finish(trial_id=1, reason="too big", result=Result.REJECTED_OVER_BUDGET))
    for action in (Finish(trial_id=1, reason="", result=Result.COMPLETED), Requeue(trial_id=1, reason="")):
        with pytest.raises(TransitionError):
            world.apply(action)
    assert world.trial().result is Result.REJECTED_OVER_BUDGET
    with world.reader() as reader:
        assert [decision.kind for decision in reader.decisions(1)] == ["reject"]


def test_strangers_are_not_found(world: World) -> None:
    world.running()
    world.enqueue(spec("other"))
    for action in (
        Resume(trial_id=77, reason=""),
        Kill(trial_id=1, reason="", run_uuid="nope"),
        Kill(trial_id=2, reason="", run_uuid="u1"),
    ):
        with pytest.raises(NotFoundError):
            world.apply(action)


# --- time, durability, one view ------------------------------------------------------------------------------


def test_naive_times_are_refused_and_others_become_utc(world: World) -> None:
    with pytest.raises(LedgerError, match="naive"):
        world.record(NOW.replace(tzinfo=None), arrivals=(arrival(spec()),))
    assert world.ledger.view(NOW).trials == ()
    elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
    world.record(elsewhere, arrivals=(arrival(spec()),))
    assert world.trial().enqueued_at == NOW
    assert world.trial().enqueued_at.tzinfo is UTC


def test_what_was_stored_is_there_after_a_restart(world: World) -> None:
    world.enqueue(spec(seeds=(1, 2)))
    world.complete(1, 1.5)
    world.launch(2, "u2")
    world.record(readings=(reading("u2", 0, 9, train(1), val(1), header=header()),))
    before = world.ledger.view(NOW)
    world.reopen()
    assert world.ledger.view(NOW) == before


def test_reader_and_writer_see_the_same_view_also_after_follow_ups(world: World) -> None:
    world.enqueue(spec(seeds=(1, 2, 3)))
    world.complete(1, 1.5)
    late = Stop(trial_id=2, reason="late", run_uuid="x2", cause=StopCause.TIMEOUT)
    steps: tuple[Callable[[], object], ...] = (
        lambda: world.complete(2, 1.4),
        lambda: world.export(1, bpb=1.6),
        lambda: world.launch(2, "x2", RunKind.EXPORT),
        lambda: world.probe("x2"),
        lambda: world.record(readings=(reading("x2", 0, 5),)),
        lambda: world.apply(late),
        lambda: world.ledger.launch_failed("x2", "gone", NOW),
        lambda: world.launch(3, "u3"),
    )
    for step in steps:
        world.ledger.view(NOW)  # Fills the writer's memory of finished trials, which must not outlive the next step.
        step()
        with world.reader() as reader:
            assert reader.trials() == world.ledger.view(NOW).trials


# --- what the command line shows -----------------------------------------------------------------------------


def test_an_artifact_over_its_budget_is_never_best(world: World) -> None:
    world.enqueue(spec(seeds=(1, 2, 3, 4)))
    for trial_id, bpb in ((1, 1.5), (2, 1.3), (3, 1.4), (4, 1.2)):
        world.complete(trial_id, bpb)
    with world.reader() as reader:
        (board,) = reader.best()
        assert board.metric is Metric.RAW
        assert [row.seed for row in board.rows] == [4, 2, 3, 1]
    world.export(1, artifact_bytes=16_000_000, bpb=1.51)
    world.export(2, artifact_bytes=16_000_001, bpb=1.31)
    world.export(3, artifact_bytes=15_999_999, bpb=1.55)
    with world.reader() as reader:
        (board,) = reader.best()
        assert board.metric is Metric.ARTIFACT
        assert [(row.seed, row.place, row.over_budget) for row in board.rows] == [
            (1, 1, False),
            (3, 2, False),
            (4, None, False),
            (2, None, True),
        ]
        first = board.rows[0]
        assert (first.raw_bpb, first.artifact_bpb, first.ema_bpb, first.params) == (1.5, 1.51, None, 17_000_000)
        (raw,) = reader.best(limit=2, metric=Metric.RAW)
        assert [row.seed for row in raw.rows] == [4, 3]
        assert reader.best(track="no/such/1B") == ()


def test_tracks_are_never_mixed(world: World) -> None:
    world.enqueue(spec("a"), spec("b", limits={"tokens": 1000}), Spec(name="c", command=("x",)))
    for trial_id in (1, 2):
        world.complete(trial_id, 1.0 + trial_id)
    with world.reader() as reader:
        boards = reader.best()
        assert [(board.track.limit, [row.name for row in board.rows]) for board in boards] == [
            ("1000tok", ["b"]),
            ("180s", ["a"]),
        ]
        assert [trial.key for trial in reader.trials([TrialState.QUEUED])] == ["c@1337"]
        assert len(reader.trials()) == 3


@pytest.mark.parametrize(("reference", "key"), [("1", "one@5"), ("one", "one@5"), ("two@8", "two@8"), ("7", "7@1337")])
def test_a_trial_is_found_by_number_name_or_name_and_seed(world: World, reference: str, key: str) -> None:
    world.enqueue(spec("one", seeds=(5,)), spec("two", seeds=(8, 9)), spec("7"))
    with world.reader() as reader:
        assert reader.trial(reference).key == key


@pytest.mark.parametrize(
    ("reference", "says"),
    [("two", "two@8, two@9"), ("two@1", "two@8, two@9"), ("99", "99"), ("x", "'x'"), ("", "''"), ("9" * 40, "999")],
)
def test_a_trial_that_is_not_found_says_what_there_is(world: World, reference: str, says: str) -> None:
    world.enqueue(spec("two", seeds=(8, 9)))
    with world.reader() as reader, pytest.raises(NotFoundError, match=says):
        reader.trial(reference)


def projection(**changes: Any) -> Projection:
    values: dict[str, Any] = dict.fromkeys(Projection.__dataclass_fields__, 1.0) | {
        "trial_id": 1,
        "run_uuid": "u1",
        "law": "power",
        "step": 10,
        "n_points": 5,
        "parameters": {"c": 1.1},
        "reference_step": None,
        "caveat": "warmdown ahead",
    }
    return Projection(**(values | changes))


def test_projections_are_kept_when_they_rest_on_new_points(world: World) -> None:
    world.running()
    for second, made in enumerate((projection(), projection(final_bpb=1.1), projection(step=20))):
        world.ledger.save_projections((made,), after(second))
    with world.reader() as reader:
        assert [record.projection for record in reader.projections(1)] == [projection(), projection(step=20)]
        latest = reader.latest_projection(1)
        assert latest is not None
        assert (latest.at, latest.projection.step) == (after(2), 20)
        assert reader.latest_projection(2) is None
    with pytest.raises(LedgerError, match="not finite"):
        world.ledger.save_projections((projection(step=30), projection(step=31, r2=math.nan)), after(9))
    with world.reader() as reader:
        assert len(reader.projections(1)) == 2


def test_heartbeats_and_devices(world: World) -> None:
    gpu = Device(
        index=0,
        uuid="GPU-1",
        name="Card",
        memory_total_bytes=16 * 10**9,
        memory_used_bytes=10**9,
        power_watts=99.5,
        throttle_reasons=("power cap",),
        processes=(DeviceProcess(pid=1, name="x", memory_bytes=None),),
    )
    other = dataclasses.replace(gpu, index=1, uuid="GPU-2", error="fell off the bus")
    for second in (1, 1, 2):
        later = dataclasses.replace(gpu, temperature_celsius=second)
        world.record(after(second), devices=Devices(gpus=(other, later), cpu_slots=2))
    world.ledger.save_heartbeat(after(1), "{}", 0.5)
    world.ledger.save_heartbeat(after(2), '{"n":2}', 0.25)
    with world.reader() as reader:
        first, second_gpu = reader.devices()
        assert first.device == dataclasses.replace(gpu, temperature_celsius=2)
        assert (first.at, second_gpu.device) == (after(2), other)
        assert [beat.report_json for beat in reader.heartbeats(1)] == ['{"n":2}']
        assert reader.heartbeats(9)[1].seconds == 0.5


def test_a_decisions_numbers_are_strict_json(world: World) -> None:
    world.enqueue(spec())
    world.apply(MarkPaused(trial_id=1, reason="r", numbers={"a": math.inf, "b": 2, "c": None, "d": "x"}))
    with world.reader() as reader:
        assert reader.decisions(1)[0].numbers == {"a": "inf", "b": 2, "c": None, "d": "x"}


def test_leaderboard_and_policy_agree_on_the_incumbent(world: World) -> None:
    world.enqueue(spec("a", seeds=(1, 2, 3, 4)), spec("b", limits={"tokens": 1000}, seeds=(1, 2)))
    for trial_id, bpb in ((1, 1.5), (2, 1.3), (3, 1.4), (4, 1.4), (5, 1.1), (6, 1.1)):
        world.complete(trial_id, bpb)
        if trial_id == 2:
            world.export(2, artifact_bytes=16_000_001)
        standings = standings_of(world.ledger.view(NOW))
        with world.reader() as reader:
            boards = {board.track.key: board.rows[0] for board in reader.best(metric=Metric.RAW)}
        placed = {track: row.trial_id for track, row in boards.items() if row.place == 1}
        held = {track: s.incumbent.trial_id for track, s in standings.items() if s.incumbent is not None}
        assert placed == held


def test_old_heartbeats_and_samples_are_let_go_in_portions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "KEPT_HEARTBEATS", 3)
    monkeypatch.setattr(ledger_module, "_DELETED_AT_ONCE", 2)
    gpu = Device(index=0, uuid="GPU-1", name="Card", memory_total_bytes=16, memory_used_bytes=1)
    for day in range(8):
        world.record(NOW + timedelta(days=day), devices=Devices(gpus=(gpu,), cpu_slots=2))
    for day in range(6):
        world.ledger.save_heartbeat(NOW + timedelta(days=day), f"{day}", 0.5)
    with world.reader() as reader:
        assert [beat.report_json for beat in reader.heartbeats(99)] == ["5", "4", "3"]

    def samples() -> int:
        with closing(sqlite3.connect(world.path)) as connection:
            return int(connection.execute("SELECT count(*) FROM device_samples").fetchone()[0])

    assert samples() == 8
    left = []
    for _ in range(4):
        world.ledger.save_heartbeat(NOW + timedelta(days=35), "later", 0.5)
        left.append(samples())
    assert left == [6, 4, 3, 3], "the newest 30 days stay"


def test_an_unclaimed_run_that_was_out_of_sight_can_be_voided(world: World) -> None:
    world.enqueue(spec())
    world.launch()
    world.probe(state=ProbeState.UNCLAIMED)
    world.probe(state=ProbeState.UNKNOWN, detail="EIO")
    run = world.trial().runs[0]
    assert (run.state, run.claimed) == (RunState.UNKNOWN, False)
    world.apply(Void(trial_id=1, reason="nobody came", run_uuid="u1"))
    run = world.trial().runs[0]
    assert (run.state, run.never_claimed, run.error) == (RunState.LOST, True, "nobody came")
    world.apply(Requeue(trial_id=1, reason="again"))


def test_why_a_program_did_not_start_is_kept(world: World) -> None:
    world.running()
    world.exit(code=None, error="cannot start x: No space left on device", errno=28)
    run = world.trial().runs[0]
    assert (run.errno, run.returncode, run.error) == (28, None, "cannot start x: No space left on device")


def test_an_interruption_that_the_runner_reports_is_the_runs_cause(world: World) -> None:
    world.running()
    world.exit(cause=StopCause.INTERRUPTED)
    assert world.trial().runs[0].stop_cause is StopCause.INTERRUPTED


def test_a_result_that_cannot_be_used_is_told(world: World) -> None:
    world.running()
    exited = ExitRecord(run_uuid="u1", returncode=0, started_at=None, ended_at=after(5).isoformat())
    recorded = world.probe(state=ProbeState.EXITED, exit=exited, detail="result.json is larger than 9 bytes")
    assert "larger than 9 bytes" in recorded.problems[0]
    assert "larger than 9 bytes" in world.trial().runs[0].error


def test_stopping_a_follow_up_leaves_its_trial_finished(world: World) -> None:
    world.enqueue(spec())
    world.complete(1, 1.5)
    world.launch(1, "x1", RunKind.EXPORT)
    world.apply(Stop(trial_id=1, reason="too long", run_uuid="x1", cause=StopCause.TIMEOUT))
    trial = world.trial()
    assert (trial.state, trial.result) == (TrialState.FINISHED, Result.COMPLETED)
    assert trial.runs[-1].state is RunState.STOPPING


def test_giving_up_is_stored_once(world: World) -> None:
    world.enqueue(spec())
    world.complete(1, 1.5)
    assert not world.trial().given_up
    for _ in range(3):
        world.apply(Keep(trial_id=1, reason="export is given up"))
    assert world.trial().given_up
    with world.reader() as reader:
        assert [d.reason for d in reader.decisions(1)].count("export is given up") == 1
