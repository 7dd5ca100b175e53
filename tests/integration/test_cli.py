"""Every verb of `caddie`, as tables and as JSON, with its exit codes; the verbs run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from agent import cli
from agent.adapters.executors.local import LocalExecutor
from agent.adapters.workspace import Workspace
from agent.domain.observations import Devices
from agent.domain.runfiles import EXIT, LOG
from agent.ledger.ledger import Ledger

DEADLINE_SECONDS = 30.0
CURVE = """
import sys, time
for step in range(1, 13):
    bpb = float(sys.argv[1]) + 2.0 / step
    clock = f"train_time:{step * 100}ms step_avg:100.00ms"
    print(f"step:{step}/20 val_loss:{bpb * 2:.4f} val_bpb:{bpb:.4f} {clock}", flush=True)
if sys.argv[2:]:
    time.sleep(600)
"""


RUNNERS = LocalExecutor()
"""Of all daemons of this module: each lives for one beat here, while a real one ends with its process."""


class NoGpu:
    """Stands in for the driver."""

    def __init__(self, deadline_seconds: float = 1.0, cpu_slots: int | None = None) -> None:
        self.devices = Devices(gpus=(), cpu_slots=cpu_slots or 2, note="no NVIDIA GPU: runs use CPU slots")

    def read(self) -> Devices:
        return self.devices

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        def no_constant(word: str) -> float:
            raise AssertionError(f"{word} is not JSON")

        return json.loads(self.out, parse_constant=no_constant)

    def in_one_line(self) -> str:
        """The reason of a refusal: one line on stderr, nothing on stdout."""
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("caddie: ")
        return self.err


def caddie(*arguments: object) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with (
        patch.object(sys, "argv", ["caddie", *map(str, arguments)]),
        patch("agent.bootstrap.GpuReader", NoGpu),
        patch("agent.doctor.GpuReader", NoGpu),
        patch("agent.bootstrap.LocalExecutor", lambda: RUNNERS),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), code
    return Answer(code, out.getvalue(), err.getvalue())


class Place:
    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root / "workspace")
        self.drafts = root / "drafts"
        self.drafts.mkdir()
        (root / "curve.py").write_text(CURVE, encoding="utf-8")
        self.curve = [sys.executable, "-S", str(root / "curve.py")]

    def ask(self, verb: str, *arguments: object) -> Answer:
        return caddie(verb, *arguments, "--workspace", self.workspace.root)

    def json(self, verb: str, *arguments: object) -> Any:
        answer = self.ask(verb, *arguments, "--json")
        assert (answer.code, answer.err) == (0, "")
        return answer.json

    def beat(self) -> str:
        answer = self.ask("up", "--once", "--cpu-slots", 8)
        assert (answer.code, answer.err) == (0, "")
        return answer.out

    def draft(self, name: str, text: str) -> Path:
        path = self.drafts / f"{name}.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    def command(self, name: str, argv: list[str], extra: str = "") -> Path:
        return self.draft(name, f"name: {name}\ncommand: {json.dumps(argv)}\n{extra}")

    def held(self, name: str) -> Path:
        """A spec that is never started: it waits for another one."""
        return self.command(name, ["true"], "after: [nobody]\n")

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        self.beat()
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.05)
            self.beat()

    def state(self, name: str) -> str:
        return str(self.json("show", name)["trial"]["state"])

    def clear(self) -> None:
        for folder in self.workspace.runs.glob("*/*"):
            RUNNERS.void("no-run-of-a-test", folder)
            RUNNERS.kill(folder)
        RUNNERS.reap()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A workspace with two finished trials, one that runs, and one that waits."""
    place = Place(tmp_path_factory.mktemp("busy"))
    shared = "limits: {steps: 20}\ntrack: curves\nhypothesis: better than [nothing]\n"
    for name, floor in (("good", "1.0"), ("better", "0.5")):
        place.ask("enqueue", place.command(name, [*place.curve, floor], shared))
    place.ask("enqueue", place.command("live", [*place.curve, "2.0", "stay"], shared))
    place.ask("enqueue", place.held("waiting"))
    place.beat()
    place.until(lambda: place.state("good") == place.state("better") == "finished", "two finished trials")
    place.until(lambda: place.json("show", "live")["projections"], "a projection of the live run")
    yield place
    place.clear()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    made.workspace.create()
    yield made
    made.clear()


class TestAnswers:
    def test_up_once_prints_its_beat_and_ends(self, busy: Place) -> None:
        line = busy.beat()
        assert line.count(" beat 1 ") == 1
        assert "live@1337 train" in line
        assert not busy.workspace.pid_file.exists()

    def test_up_once_as_json_is_one_record_a_line(self, busy: Place) -> None:
        answer = busy.ask("up", "--once", "--cpu-slots", 8, "--json")
        assert answer.code == 0
        (line,) = answer.out.splitlines()
        record = json.loads(line)
        assert record["counts"] == {"finished": 2, "queued": 1, "running": 1}
        assert record["runs"][0]["trial"] == "live@1337"
        assert record["ok"] is True

    def test_a_drained_queue_tells_what_is_left_and_why(self, place: Place) -> None:
        assert place.ask("up", "--until-drained", "--plain", "--cpu-slots", 2).err == ""
        place.ask("enqueue", place.command("large", ["true"], "resources: {cpus: 9}\n"))
        answer = place.ask("up", "--until-drained", "--plain", "--cpu-slots", 2)
        assert answer.code == 0
        assert answer.err.splitlines() == [
            "caddie: 1 left that cannot start as things are:",
            "  large@1337: asks for 9 CPU slots, this machine has 2. Remedy: lower resources.cpus to 2",
        ]

    def test_queue(self, busy: Place) -> None:
        (waiting,) = busy.json("queue")["trials"]
        assert (waiting["trial"], waiting["state"], waiting["priority"]) == ("waiting@1337", "queued", 0)
        assert "waits for nobody" in waiting["waiting_because"]
        table = busy.ask("queue")
        assert table.code == 0
        assert "waiting@1337" in table.out
        assert "waits for nobody" in table.out

    def test_queue_names_files_that_were_not_taken_in(self, place: Place) -> None:
        place.ask("enqueue", place.held("one"))
        assert place.ask("queue").code == 3
        place.beat()
        place.ask("enqueue", place.held("two"))
        assert place.json("queue")["files"] == ["two.yaml"]
        assert "not yet taken in: two.yaml" in place.ask("queue").out

    def test_runs_live_ones_first_then_the_newest(self, busy: Place) -> None:
        found = busy.json("runs")
        assert [trial["state"] for trial in found] == ["running", "queued", "finished", "finished"]
        live, _, newest, _ = found
        assert live["trial"] == "live@1337"
        assert live["progress"] == pytest.approx(0.6)
        assert live["val_bpb"] == pytest.approx(2.0 + 2 / 12, abs=1e-4)
        assert live["projected_90"][0] <= live["projected_bpb"] <= live["projected_90"][1]
        assert isinstance(live["pid"], int)
        assert (busy.workspace.root / live["directory"] / LOG).exists()
        assert newest["result"] == "completed"
        assert newest["scores"]["raw"] == pytest.approx(newest["val_bpb"])
        assert len(busy.json("runs", "-n", 1)) == 3

    def test_runs_as_a_table_says_the_same(self, busy: Place) -> None:
        table = busy.ask("runs").out
        for trial in busy.json("runs"):
            assert trial["trial"] in table
        assert f"{busy.json('runs')[0]['projected_bpb']:.4f} (" in table
        assert "60%" in table

    def test_best_ranks_within_the_track(self, busy: Place) -> None:
        (board,) = busy.json("best")
        assert [(row["place"], row["name"]) for row in board["rows"]] == [(1, "better"), (2, "good")]
        assert board["metric"] == "raw"
        assert board["track"] == {"val": "name:curves", "limit": "20steps", "budget_bytes": 16_000_000}
        assert len(busy.json("best", "-n", 1)[0]["rows"]) == 1
        answer = busy.ask("best", "--track", "another")
        assert answer.code == 3
        assert "no track 'another'" in answer.in_one_line()

    def test_best_as_a_table_names_the_track_so_that_it_can_be_asked_for(self, busy: Place) -> None:
        table = busy.ask("best").out
        assert "track name:curves/20steps/16000000B, ranked by raw BPB" in table
        assert table.index("better@1337") < table.index("good@1337")
        assert len(busy.json("best", "--track", "name:curves/20steps/16000000B")) == 1

    def test_show(self, busy: Place) -> None:
        found = busy.json("show", "good")
        assert found["trial"]["scores"] == {"raw": pytest.approx(1 + 2 / 12, abs=1e-4)}
        assert [point["step"] for point in found["trial"]["val_curve"]] == list(range(1, 13))
        kinds = [decision["kind"] for decision in found["decisions"]]
        assert kinds[0] == "launch"
        assert kinds[-1] == "finish"
        assert found["decisions"][-1]["numbers"]["val_bpb"] == pytest.approx(1 + 2 / 12, abs=1e-4)
        assert found["trial"]["spec"]["track"] == "curves"

    def test_show_takes_a_number_a_name_and_a_name_with_a_seed(self, busy: Place) -> None:
        number = busy.json("show", "good")["trial"]["trial_id"]
        for reference in (number, "good", "good@1337"):
            assert busy.json("show", reference)["trial"]["name"] == "good"

    def test_show_as_text_tells_runs_projections_and_decisions(self, busy: Place) -> None:
        told = busy.ask("show", "live").out
        assert "live@1337" in told
        assert "train 1" in told
        assert "projections (newest last)" in told
        assert "launch: starts on" in told
        assert "hypothesis" in told

    def test_heartbeats_oldest_first(self, busy: Place) -> None:
        beats = busy.json("heartbeats", "-n", 3)
        assert len(beats) == 3
        assert [beat["at"] for beat in beats] == sorted(beat["at"] for beat in beats)
        assert beats[-1]["runs"][0]["trial"] == "live@1337"
        told = busy.ask("heartbeats", "-n", 3).out
        assert [told.index(beat["line"].split(" | ")[0]) >= 0 for beat in beats] == [True] * 3

    def test_logs(self, busy: Place) -> None:
        found = busy.json("logs", "good", "-n", 2)
        assert [line.split()[0] for line in found["lines"]] == ["step:11/20", "step:12/20"]
        assert Path(found["path"]).is_file()
        assert busy.ask("logs", "good", "-n", 1).out == found["lines"][-1] + "\n"

    def test_logs_are_followed_to_the_end_of_the_run(self, busy: Place) -> None:
        answer = busy.ask("logs", "good", "-f")
        assert answer.code == 0
        assert answer.out.count("\n") == 12

    def test_doctor(self, busy: Place) -> None:
        answer = busy.ask("doctor", "--json")
        checks = {check["name"]: check for check in answer.json}
        assert checks["ledger"]["verdict"] == "ok"
        assert str(busy.workspace.root) in checks["workspace"]["finding"]
        table = busy.ask("doctor")
        assert table.code == answer.code == 0
        assert "quick_check: ok" in table.out

    def test_schema(self) -> None:
        answer = caddie("schema")
        assert answer.code == 0
        assert {"name", "trainer", "command", "limits"} <= answer.json["properties"].keys()
        assert answer.json["additionalProperties"] is False


class TestBudget:
    def spec(self, place: Place, budget: int) -> Path:
        return place.draft("b", f"name: b\nlimits: {{steps: 3}}\nbudget_bytes: {budget}\ntrainer: {{}}\n")

    def test_what_fits(self, place: Place) -> None:
        answer = caddie("budget", self.spec(place, 10**9), "--json")
        assert answer.code == 0
        assert answer.json["fits"] is True
        assert answer.json["hopeless"] is False
        assert answer.json["verdict"]["budget_bytes"] == 10**9
        assert answer.json["estimate"]["by_module"]
        table = caddie("budget", self.spec(place, 10**9))
        assert "fits: predicted artifact" in table.out
        assert f"{answer.json['verdict']['predicted_bytes']:,}" in table.out

    def test_what_cannot_fit_ends_with_1(self, place: Place) -> None:
        answer = caddie("budget", self.spec(place, 1000), "--json")
        assert answer.code == 1
        assert answer.json["hopeless"] is True
        table = caddie("budget", self.spec(place, 1000))
        assert table.code == 1
        assert "cannot fit" in table.out

    def test_a_command_cannot_be_predicted(self, place: Place) -> None:
        answer = caddie("budget", place.held("one"))
        assert answer.code == 1
        assert "field 'command'" in answer.in_one_line()


class TestEnqueue:
    def test_copies_into_the_queue(self, place: Place) -> None:
        found = place.json("enqueue", place.held("one"), place.held("two"))
        assert sorted(Path(path).name for path in found) == ["one.yaml", "two.yaml"]
        for path in found:
            assert Path(path).parent == place.workspace.queue
            assert Path(path).is_file()
        assert "queued " in place.ask("enqueue", place.held("three")).out

    def test_makes_the_workspace(self, tmp_path: Path) -> None:
        place = Place(tmp_path)
        assert place.ask("enqueue", place.held("one")).code == 0
        assert (place.workspace.queue / "one.yaml").is_file()

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_one_bad_file_queues_none(self, place: Place, position: int) -> None:
        files = [place.held("one"), place.held("two")]
        files.insert(position, place.draft("bad", "name: bad\ncommand: [x]\nprioritty: 3\n"))
        answer = place.ask("enqueue", *files)
        assert answer.code == 1
        told = answer.in_one_line()
        assert "bad.yaml:3" in told
        assert "prioritty" in told
        assert list(place.workspace.queue.glob("*.yaml")) == []

    def test_a_missing_data_set_is_refused_with_the_remedy(self, place: Place) -> None:
        answer = place.ask("enqueue", place.draft("t", "name: t\nlimits: {steps: 3}\ntrainer: {}\n"))
        assert answer.code == 1
        assert "python -m trainer data prepare" in answer.in_one_line()

    def test_a_file_that_is_not_there_is_wrong_usage(self, place: Place) -> None:
        answer = place.ask("enqueue", place.drafts / "nowhere.yaml")
        assert answer.code == 2
        # The message stands in a box, and wraps wherever the path's length makes it.
        assert "does not exist" in " ".join(re.split(r"[\s│]+", answer.err))


class TestCommands:
    def test_pause_resume_and_stop_of_a_queued_trial(self, place: Place) -> None:
        place.ask("enqueue", place.held("one"))
        place.beat()
        (sent,) = place.json("pause", "one")
        assert (sent["trial"], sent["verb"]) == ("one@1337", "pause")
        assert json.loads(Path(sent["file"]).read_text(encoding="utf-8"))["verb"] == "pause"
        place.beat()
        assert place.state("one") == "paused"
        assert place.json("queue")["trials"][0]["state"] == "paused"
        assert "resume one@1337: asked; no daemon is running" in place.ask("resume", "one").out
        place.beat()
        assert place.state("one") == "queued"
        place.json("stop", "1")
        assert "asked stop one@1337: stopped while queued" in place.beat()
        assert place.json("show", "one")["trial"]["result"] == "stopped"

    def test_a_running_daemon_is_said(self, place: Place) -> None:
        place.ask("enqueue", place.held("one"))
        place.beat()
        with place.workspace.lock():
            assert "the daemon acts within a second" in place.ask("stop", "one").out

    def test_several_trials_or_none(self, place: Place) -> None:
        place.ask("enqueue", place.held("one"), place.held("two"))
        place.beat()
        answer = place.ask("stop", "one", "nobody")
        assert answer.code == 3
        assert "nobody" in answer.in_one_line()
        assert list(place.workspace.commands.glob("*.json")) == []
        assert [sent["trial"] for sent in place.json("stop", "one", "two")] == ["one@1337", "two@1337"]


class TestExitCodes:
    @pytest.mark.parametrize("verb", ["show", "logs", "stop", "pause", "resume"])
    def test_no_such_trial_is_3(self, busy: Place, verb: str) -> None:
        for arguments in ((verb, "nobody"), (verb, "nobody", "--json"), (verb, "999")):
            answer = busy.ask(*arguments)
            assert answer.code == 3
            assert "there is no trial" in answer.in_one_line()

    def test_a_seed_that_is_not_there_names_those_that_are(self, busy: Place) -> None:
        assert "good@1337" in busy.ask("show", "good@7").in_one_line()

    def test_a_trial_that_has_not_run_has_no_log(self, busy: Place) -> None:
        answer = busy.ask("logs", "waiting", "-f")
        assert answer.code == 3
        assert "has no train run yet" in answer.in_one_line()

    @pytest.mark.parametrize("verb", ["queue", "runs", "best", "heartbeats"])
    def test_no_workspace_is_1_and_no_ledger_is_3(self, tmp_path: Path, verb: str) -> None:
        place = Place(tmp_path)
        answer = place.ask(verb)
        assert answer.code == 1
        assert "no workspace" in answer.in_one_line()
        assert not place.workspace.root.exists()
        place.workspace.create()
        answer = place.ask(verb)
        assert answer.code == 3
        assert "caddie up makes it" in answer.in_one_line()

    @pytest.mark.parametrize(
        "arguments",
        [
            ("frobnicate",),
            ("show",),
            ("runs", "--limit", "0"),
            ("up", "--cpu-slots", "0"),
            ("best", "--metric", "speed"),
            ("logs", "good", "-f", "--json"),
            ("heartbeats", "--no-such-option"),
        ],
    )
    def test_wrong_usage_is_2(self, busy: Place, arguments: tuple[str, ...]) -> None:
        answer = busy.ask(*arguments)
        assert answer.code == 2
        assert answer.out == ""
        assert "Usage: " in answer.err

    def test_another_daemon_is_4(self, place: Place) -> None:
        with place.workspace.lock():
            answer = place.ask("up", "--once")
        assert answer.code == 4
        assert str(os.getpid()) in answer.in_one_line()

    def test_settings_that_cannot_be_used_are_1(self, place: Place) -> None:
        place.workspace.settings_file.write_text("intervall = 3\n", encoding="utf-8")
        answer = place.ask("up", "--once")
        assert answer.code == 1
        assert "intervall" in answer.in_one_line()
        answer = place.ask("doctor")
        assert answer.code == 1
        assert "intervall" in answer.out

    def test_an_interval_that_cannot_be_is_refused(self, place: Place) -> None:
        answer = place.ask("up", "--once", "--interval", "-1")
        assert answer.code in {1, 2}
        assert "interval" in answer.err

    def test_a_corrupt_ledger_is_1_in_one_line(self, place: Place) -> None:
        place.beat()
        place.workspace.database.write_bytes(b"not a database at all, " * 500)
        for verb in (("up", "--once"), ("runs",), ("best", "--json")):
            answer = place.ask(*verb)
            assert answer.code == 1
            assert str(place.workspace.database) in answer.in_one_line()
        assert place.ask("doctor").code == 1

    def test_a_file_in_place_of_the_workspace_is_1(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("", encoding="utf-8")
        answer = caddie("up", "--once", "--workspace", tmp_path / "file")
        assert answer.code == 1
        assert str(tmp_path / "file") in answer.in_one_line()


class TestOddWords:
    """What programs and people write is shown as it is, and breaks no table and no JSON."""

    def test_a_log_that_looks_like_markup(self, place: Place) -> None:
        words = "no [/tag] [red]x"
        place.ask("enqueue", place.command("odd", [sys.executable, "-S", "-c", f"import sys\nsys.exit({words!r})"]))
        place.until(lambda: place.state("odd") == "finished", "the end")
        assert words in place.json("show", "odd")["trial"]["reason"]
        for verb in (("runs",), ("show", "odd"), ("heartbeats",)):
            answer = place.ask(*verb)
            assert answer.code == 0
            assert words in answer.out

    def test_a_hypothesis_that_looks_like_markup(self, busy: Place) -> None:
        assert "better than [nothing]" in busy.ask("show", "good").out

    def test_scores_that_are_no_numbers(self, place: Place) -> None:
        line = "step:1/5 val_loss:nan val_bpb:nan train_time:500ms step_avg:100.00ms"
        script = f"print({line!r}, flush=True)\nimport time\ntime.sleep(600)"
        argv = [sys.executable, "-S", "-c", script]
        place.ask("enqueue", place.command("nan", argv, "grace_seconds: 2\nlimits: {steps: 5}\n"))
        place.until(lambda: "val_bpb" in place.ask("logs", "nan").out, "a line in the log")
        place.until(lambda: "asked" in place.beat() or "stop nan@1337" in place.ask("heartbeats").out, "the stop")
        for verb in (("runs",), ("show", "nan"), ("heartbeats",), ("best",)):
            assert place.ask(*verb, "--json").json is not None
            assert place.ask(*verb).code == 0


def test_following_a_run_that_was_lost_ends(place: Place) -> None:
    """A run whose runner was killed leaves no exit record; the ledger knows that it is over."""
    place.ask("enqueue", place.command("lost", [*place.curve, "1.0", "stay"], "resumable: true\n"))
    place.until(lambda: place.state("lost") == "running", "the run")
    place.ask("stop", "lost")
    folder = place.workspace.root / place.json("show", "lost")["trial"]["runs"][-1]["directory"]
    RUNNERS.kill(folder)
    place.until(lambda: place.state("lost") == "finished", "the end")
    assert not (folder / EXIT).exists()
    argv = [sys.executable, "-m", "agent", "logs", "lost", "-f", "--workspace", str(place.workspace.root)]
    try:
        followed = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        pytest.fail("caddie logs -f goes on for ever after a run that was lost")
    assert followed.returncode == 0
    assert "step:12/20" in followed.stdout


class TestAsAProgram:
    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, *arguments]
        return subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment}
        )

    def test_help_is_light(self) -> None:
        """Neither torch nor what the daemon needs is imported to print a help text."""
        script = """
            import sys
            sys.argv = ["caddie", "--help"]
            from agent.cli import main
            try:
                main()
            finally:
                heavy = {"torch", "sqlalchemy", "alembic", "scipy", "numpy", "apscheduler"} & sys.modules.keys()
                sys.stderr.write(",".join(sorted(heavy)))
        """
        answer = self.run("-c", textwrap.dedent(script))
        assert answer.returncode == 0
        assert "enqueue" in answer.stdout
        assert answer.stderr == ""

    def test_each_verb_has_a_help(self) -> None:
        for verb in ("up", "enqueue", "queue", "runs", "best", "show", "heartbeats", "logs", "stop", "pause", "resume"):
            assert caddie(verb, "--help").code == 0
        for verb in ("budget", "schema", "doctor", "demo"):
            assert caddie(verb, "--help").code == 0

    def test_no_arguments_print_the_help(self) -> None:
        answer = self.run("-m", "agent")
        assert answer.returncode in {0, 2}
        assert "heartbeats" in answer.stdout + answer.stderr

    def test_shell_completion(self) -> None:
        # Typer looks for the shell among the parents, which under make is plain sh; this makes it believe the argument.
        named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
        shown = self.run("-m", "agent", "--show-completion", "bash", **named)
        assert shown.returncode == 0
        assert "COMP_WORDS" in shown.stdout
        argv = ["-c", "import sys; sys.argv = ['caddie']; from agent.cli import main; main()"]
        answer = self.run(*argv, _CADDIE_COMPLETE="complete_bash", COMP_WORDS="caddie he", COMP_CWORD="1")
        assert answer.stdout.split() == ["heartbeats"]

    def test_a_refusal_shows_no_traceback(self, tmp_path: Path) -> None:
        answer = self.run("-m", "agent", "runs", "--workspace", str(tmp_path / "nowhere"))
        assert answer.returncode == 1
        assert "Traceback" not in answer.stderr
        assert answer.stderr.count("\n") == 1

    def test_the_workspace_may_come_from_the_environment(self, busy: Place) -> None:
        answer = self.run("-m", "agent", "best", "--json", CADDIE_WORKSPACE=str(busy.workspace.root))
        assert answer.returncode == 0
        assert json.loads(answer.stdout)[0]["rows"][0]["name"] == "better"

    def test_a_reader_that_has_gone_is_no_error(self, busy: Place) -> None:
        argv = [sys.executable, "-m", "agent", "show", "good", "--json", "--workspace", str(busy.workspace.root)]
        asking = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert asking.stdout is not None
        asking.stdout.close()
        _, err = asking.communicate(timeout=60)
        assert asking.returncode == 0
        assert err == b""


def test_a_ledger_without_a_trial_is_said_in_words(place: Place) -> None:
    Ledger.open(place.workspace.database).close()
    assert place.ask("queue").out == "nothing is queued\n"
    assert "no trials yet" in place.ask("runs").out
    assert "no finished scores yet" in place.ask("best").out
    assert [place.json(verb) for verb in ("runs", "best", "heartbeats")] == [[], [], []]
    assert place.json("queue") == {"trials": [], "files": []}
