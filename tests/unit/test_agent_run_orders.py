"""From a decision to launch to the exact program, arguments and environment."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agent.adapters.run_orders import build_order, run_directory, trial_directory
from agent.domain.actions import Assignment, Launch
from agent.domain.errors import ExecutionError
from agent.domain.specs import Spec, track_of
from agent.domain.trials import RunKind, RunState, TrialState
from agent.domain.views import RunView, TrialView
from trainer.config import TrainConfig

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
UUID = "0123456789abcdef"
DIRECTORY = "runs/t-7/train-1-01234567"


def trial(runs: tuple[RunView, ...] = (), **spec: Any) -> TrialView:
    made = Spec.model_validate({"name": "t", "seeds": [7]} | (spec or {"trainer": {}, "limits": {"steps": 10}}))
    return TrialView(
        trial_id=1,
        name="t",
        seed=7,
        spec=made,
        track=track_of(made, None),
        state=TrialState.QUEUED,
        state_since=NOW,
        enqueued_at=NOW,
        runs=runs,
    )


def over(kind: RunKind) -> RunView:
    return RunView(
        run_uuid="u",
        trial_id=1,
        kind=kind,
        attempt=1,
        state=RunState.EXITED,
        directory="d",
        assignment=Assignment(cpu_slots=1),
        intended_at=NOW,
    )


def launch(kind: RunKind = RunKind.TRAIN, source: str | None = None, assignment: Assignment | None = None) -> Launch:
    return Launch(trial_id=1, reason="", kind=kind, source=source, assignment=assignment or Assignment(cpu_slots=3))


def test_folders_count_attempts_of_their_own_kind() -> None:
    tried = trial(runs=(over(RunKind.TRAIN), over(RunKind.TRAIN), over(RunKind.EXPORT)))
    assert trial_directory(tried) == "runs/t-7"
    assert run_directory(tried, RunKind.TRAIN, UUID) == "runs/t-7/train-3-01234567"
    assert run_directory(tried, RunKind.EXPORT, UUID) == "runs/t-7/export-2-01234567"
    assert run_directory(tried, RunKind.EVALUATE, UUID) == "runs/t-7/evaluate-1-01234567"


def test_training_resumes_from_the_checkpoints_that_all_runs_of_the_trial_share(tmp_path: Path) -> None:
    order, config = build_order(tmp_path, trial(), launch(), run_uuid=UUID, directory=DIRECTORY)
    folder = tmp_path / DIRECTORY
    assert order.argv == [
        sys.executable,
        *("-m", "trainer", "train", str(folder / "config.json")),
        *("--data", str(tmp_path / "data"), "--out", str(folder)),
        *("--checkpoints", str(tmp_path / "runs/t-7/checkpoints"), "--resume", "auto"),
    ]
    assert config is not None
    written = TrainConfig.model_validate_json(config)
    assert (written.seed, written.limits.steps) == (7, 10)
    assert order.cwd == str(folder)
    assert order.run_uuid == UUID


def test_several_gpus_train_under_torchrun_and_only_train(tmp_path: Path) -> None:
    asking = trial(trainer={}, limits={"steps": 10}, resources={"gpus": 4})
    cards = Assignment(gpu_uuids=("a", "b", "c", "d"))
    order, _ = build_order(tmp_path, asking, launch(assignment=cards), run_uuid=UUID, directory=DIRECTORY)
    assert order.argv[:10] == [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
        *("-m", "trainer", "train", str(tmp_path / DIRECTORY / "config.json")),
    ]
    assert order.env["CUDA_VISIBLE_DEVICES"] == "a,b,c,d"
    assert order.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "29"
    scored, _ = build_order(tmp_path, asking, launch(RunKind.EVALUATE, "m"), run_uuid=UUID, directory="d")
    assert scored.argv[:4] == [sys.executable, "-m", "trainer", "evaluate"]


@pytest.mark.parametrize(("grace", "patience"), [(300, "299"), (1.5, "1"), (0.2, "1")])
def test_torchrun_waits_for_checkpoints_nearly_as_long_as_the_runner(
    tmp_path: Path, grace: float, patience: str
) -> None:
    asking = trial(trainer={}, limits={"steps": 10}, resources={"gpus": 2}, grace_seconds=grace)
    order, _ = build_order(tmp_path, asking, launch(), run_uuid=UUID, directory=DIRECTORY)
    assert order.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == patience
    asking = trial(trainer={}, limits={"steps": 10}, grace_seconds=grace)
    alone, _ = build_order(tmp_path, asking, launch(), run_uuid=UUID, directory=DIRECTORY)
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in alone.env


def test_a_branch_begins_from_a_file_of_the_workspace(tmp_path: Path) -> None:
    spec = {"trainer": {}, "limits": {"steps": 10}}
    order, _ = build_order(
        tmp_path, trial(**spec, init_from="runs/a-1/x.pt"), launch(), run_uuid=UUID, directory=DIRECTORY
    )
    assert order.argv[-2:] == ["--init-from", str(tmp_path / "runs/a-1/x.pt")]
    plain, _ = build_order(tmp_path, trial(**spec), launch(), run_uuid=UUID, directory=DIRECTORY)
    assert "--init-from" not in plain.argv


@pytest.mark.parametrize("kind", [RunKind.EXPORT, RunKind.EVALUATE])
def test_an_export_and_an_evaluation_read_their_file_and_have_no_timeout(tmp_path: Path, kind: RunKind) -> None:
    spec = {"trainer": {}, "limits": {"steps": 10}, "timeout_seconds": 5, "data": "/elsewhere"}
    asked = launch(kind, "runs/t-7/model.pt")
    order, config = build_order(tmp_path, trial(**spec), asked, run_uuid=UUID, directory="d")
    assert order.argv[1:5] == ["-m", "trainer", str(kind), str(tmp_path / "runs/t-7/model.pt")]
    assert order.argv[5:] == ["--data", "/elsewhere", "--out", str(tmp_path / "d")]
    assert config is None
    assert order.timeout_seconds is None
    trained, _ = build_order(tmp_path, trial(**spec), launch(), run_uuid=UUID, directory="d")
    assert trained.timeout_seconds == 5


def test_an_export_without_a_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="export of t@7 names no file"):
        build_order(tmp_path, trial(), launch(RunKind.EXPORT), run_uuid=UUID, directory="d")


def test_a_command_is_passed_on_as_it_stands(tmp_path: Path) -> None:
    argv = ["prog", "a b", "$HOME", "*"]
    order, config = build_order(
        tmp_path, trial(command=argv, grace_seconds=4), launch(), run_uuid=UUID, directory=DIRECTORY
    )
    assert order.argv == argv
    assert config is None
    assert order.grace_seconds == 4
    assert order.cwd == str(tmp_path / DIRECTORY)


def test_a_commands_working_directory_lies_in_the_workspace_and_must_be_there(tmp_path: Path) -> None:
    asking = trial(command=["prog"], working_directory="code")
    with pytest.raises(ExecutionError, match=r"code is not a folder\. Make it"):
        build_order(tmp_path, asking, launch(), run_uuid=UUID, directory="d")
    (tmp_path / "code").mkdir()
    order, _ = build_order(tmp_path, asking, launch(), run_uuid=UUID, directory="d")
    assert order.cwd == str(tmp_path / "code")


class TestEnvironment:
    def env(self, assignment: Assignment, **spec: Any) -> dict[str, str]:
        asking = trial(command=["prog"], **spec)
        order, _ = build_order(
            Path("/workspace-of-a-test"), asking, launch(assignment=assignment), run_uuid=UUID, directory="d"
        )
        return order.env

    def test_a_cpu_run_sees_no_gpu_and_gets_its_threads(self) -> None:
        env = self.env(Assignment(cpu_slots=3))
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        assert env["OMP_NUM_THREADS"] == "3"
        assert env["CADDIE_RUN"] == UUID

    def test_a_gpu_run_sees_its_own_cards_and_not_all_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpus = Assignment(gpu_uuids=("GPU-a", "GPU-b"))
        for cores, threads in ((1, "1"), (6, "3"), (64, "8")):
            monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
            env = self.env(gpus)
            assert env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
            assert env["OMP_NUM_THREADS"] == threads

    def test_what_the_spec_asks_for_is_added(self) -> None:
        env = self.env(Assignment(cpu_slots=1), env={"RUN_ID": "x", "PYTHONUNBUFFERED": "0"})
        assert env["RUN_ID"] == "x"
        assert env["PYTHONUNBUFFERED"] == "0"
        assert env["CUDA_VISIBLE_DEVICES"] == ""
