"""`caddie demo` as a user runs it: from text on this machine to a scored artifact, asked through the ordinary verbs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.domain.runfiles import EXIT
from trainer.report import EvaluateResult, read_result

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

BUDGET = 1_000_000
COMPLETED = ("plain", "recurrent", "wider")


def demo(root: Path, seconds: float) -> str:
    argv = [sys.executable, "-m", "agent", "demo", "--workspace", str(root), "--plain"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


class Study:
    """What the demo left, asked as a program would ask."""

    def __init__(self, root: Path, said: str) -> None:
        self.root, self.said = root, said

    def ask(self, *arguments: str) -> Any:
        argv = [sys.executable, "-m", "agent", *arguments, "--workspace", str(self.root), "--json"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
        return json.loads(done.stdout)

    def trial(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("show", name)["trial"]
        return found

    def last_decision(self, name: str, kind: str) -> dict[str, Any]:
        found = [decision for decision in self.ask("show", name)["decisions"] if decision["kind"] == kind]
        assert found, f"no {kind} of {name}"
        last: dict[str, Any] = found[-1]
        return last

    def best(self) -> dict[str, Any]:
        (board,) = self.ask("best")
        first: dict[str, Any] = board["rows"][0]
        assert first["place"] == 1
        return first


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("demo") / "workspace"
    return Study(root, demo(root, 1000))


def test_the_oversize_one_is_rejected_before_any_run(study: Study) -> None:
    trial = study.trial("oversize")
    assert (trial["state"], trial["result"]) == ("finished", "rejected:over_budget")
    assert trial["runs"] == []
    numbers = study.last_decision("oversize", "reject")["numbers"]
    assert numbers["budget_bytes"] == BUDGET
    assert numbers["predicted_bytes"] >= numbers["low_bytes"] > BUDGET
    assert f"{numbers['predicted_bytes']:,}" in trial["reason"]


def test_the_invalid_one_is_refused_with_line_field_and_remedy(study: Study) -> None:
    rejected = study.root / "queue" / "rejected"
    assert [path.name for path in rejected.glob("*.yaml")] == ["7-invalid.yaml"]
    text = (rejected / "7-invalid.yaml.txt").read_text(encoding="utf-8")
    lines = (rejected / "7-invalid.yaml").read_text(encoding="utf-8").splitlines()
    line = next(number for number, words in enumerate(lines, start=1) if "lerning_rate" in words)
    assert f"7-invalid.yaml:{line}" in text
    assert "lerning_rate" in text
    assert "Remedy" in text
    assert "invalid@1337" not in {trial["trial"] for trial in study.ask("runs", "-n", "99")}


def test_the_diverging_one_is_stopped_as_diverged(study: Study) -> None:
    trial = study.trial("diverging")
    assert trial["result"] == "failed:diverged"
    assert trial["reason"]
    run = trial["runs"][-1]
    assert run["stop_cause"] == "diverged" or run["returncode"] == 66


def test_the_hopeless_one_is_pruned_with_the_numbers_of_both_witnesses(study: Study) -> None:
    trial = study.trial("hopeless")
    assert trial["result"] == "pruned"
    decision = study.last_decision("hopeless", "prune")
    numbers = decision["numbers"]
    assert numbers["peers"] >= 3
    assert 0.2 <= numbers["progress"] < 1
    bar = numbers["incumbent_bpb"] + numbers["margin_bpb"]
    assert numbers["low90"] > bar
    assert numbers["best_end_by_peers"] > bar
    others = [other for other in map(study.trial, COMPLETED) if other["state_since"] < decision["at"]]
    fitting = [other for other in others if not other["artifact"] or other["artifact"]["artifact_bytes"] <= BUDGET]
    assert min(other["scores"]["raw"] for other in fitting) == pytest.approx(numbers["incumbent_bpb"])


@pytest.mark.parametrize("name", COMPLETED)
def test_the_others_complete_on_one_track(study: Study, name: str) -> None:
    trial = study.trial(name)
    assert trial["result"] == "completed"
    assert 0.5 < trial["scores"]["raw"] < 8
    assert trial["val_curve"][-1]["val_bpb"] < trial["val_curve"][0]["val_bpb"]
    assert trial["track"] == study.trial("plain")["track"]


def test_forecasts_were_kept(study: Study) -> None:
    for name in COMPLETED:
        kept = [record["projection"] for record in study.ask("show", name)["projections"]]
        assert kept, f"no forecast of {name}"
        assert all(made["low90"] <= made["final_bpb"] <= made["high90"] for made in kept)
        assert kept[0]["progress"] < 1


def test_the_best_is_an_artifact_within_its_budget_to_the_byte(study: Study) -> None:
    best = study.best()
    artifact = study.trial(best["name"])["artifact"]
    assert artifact["artifact_bytes"] == best["artifact_bytes"] <= BUDGET
    assert not best["over_budget"]
    file = study.root / artifact["path"]
    assert file.stat().st_size == artifact["weights_bytes"]
    assert artifact["weights_bytes"] + artifact["code_bytes"] == artifact["artifact_bytes"]


def test_the_artifacts_score_is_what_its_bytes_alone_give(study: Study, tmp_path: Path) -> None:
    best = study.best()
    assert abs(best["artifact_bpb"] - best["raw_bpb"]) < 0.05
    trial = study.trial(best["name"])
    file = study.root / trial["artifact"]["path"]
    argv = [sys.executable, "-m", "trainer", "evaluate", str(file), "--data", str(study.root / "data")]
    # Where the daemon scored it: the same bytes on another kind of device differ in the last digits.
    device = "cuda" if trial["runs"][-1]["assignment"]["gpu_uuids"] else "cpu"
    subprocess.run([*argv, "--out", str(tmp_path), "--device", device], check=True, capture_output=True, timeout=300)
    again = read_result(tmp_path / "result.json")
    assert isinstance(again, EvaluateResult)
    assert again.source_kind == "artifact"
    assert again.source_sha256 == trial["artifact"]["sha256"]
    assert again.val_bpb == pytest.approx(best["artifact_bpb"], abs=1e-4)


def test_every_beat_is_in_the_logs_and_in_the_ledger(study: Study) -> None:
    records = [json.loads(line) for line in (study.root / "logs" / "heartbeat.jsonl").read_text().splitlines()]
    assert [record["number"] for record in records] == list(range(1, len(records) + 1))
    assert records[-1]["drained"]
    assert all(record["ok"] for record in records)
    text = (study.root / "logs" / "heartbeat.log").read_text(encoding="utf-8")
    for words in ("launch plain@1337", "reject oversize@1337", "prune hopeless@1337", "export ", "evaluate "):
        assert words in text
    assert study.ask("heartbeats", "-n", "1")[0]["number"] == records[-1]["number"]


def test_it_ends_with_the_leaderboard_and_what_to_do_next(study: Study) -> None:
    best = study.best()
    assert f"{best['name']}@1337" in study.said
    assert f"{best['artifact_bpb']:.4f}" in study.said
    assert "lerning_rate" in study.said
    assert "caddie show" in study.said


def test_nothing_of_it_runs_on(study: Study) -> None:
    for trial in study.ask("runs", "-n", "99"):
        assert trial["state"] == "finished"
    folders = list((study.root / "runs").glob("*/*-*-*"))
    assert folders
    assert [folder.name for folder in folders if not (folder / EXIT).exists()] == []


def test_a_second_time_changes_nothing_and_ends_at_once(study: Study) -> None:
    def state() -> tuple[Any, ...]:
        files = sorted(str(path) for place in ("runs", "data") for path in (study.root / place).rglob("*"))
        return study.ask("best"), study.ask("runs", "-n", "99"), files

    before, beats = state(), study.ask("heartbeats", "-n", "1000")
    said = demo(study.root, 120)
    assert state() == before
    assert f"{study.best()['artifact_bpb']:.4f}" in said
    assert len(study.ask("heartbeats", "-n", "1000")) - len(beats) <= 5
