"""The whole daemon as a process, on a workspace with `command:` specs: no model, real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CADDIE = [sys.executable, "-m", "agent"]
DEADLINE_SECONDS = 90.0

CURVE = """
import sys, time
seconds, floor = float(sys.argv[1]), float(sys.argv[2])
for step in range(1, 21):
    time.sleep(seconds / 20)
    bpb = floor + 2.0 / step
    clock = f"train_time:{step * 100}ms step_avg:100.00ms"
    print(f"step:{step}/20 val_loss:{bpb * 2:.4f} val_bpb:{bpb:.4f} {clock}", flush=True)
"""


class Bench:
    """One workspace, its daemon processes, and the answers of the CLI."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.script = root.parent / "curve.py"
        self.script.write_text(textwrap.dedent(CURVE), encoding="utf-8")
        self.daemons: list[subprocess.Popen[bytes]] = []

    def up(self, *arguments: str) -> subprocess.Popen[bytes]:
        argv = [
            *CADDIE,
            "up",
            "--workspace",
            str(self.root),
            "--interval",
            "1",
            "--plain",
            "--cpu-slots",
            "2",
            *arguments,
        ]
        log = (self.root.parent / "daemon.out").open("ab")
        with log:
            daemon = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        self.daemons.append(daemon)
        return daemon

    def ask(self, *arguments: str) -> Any:
        argv = [*CADDIE, *arguments, "--workspace", str(self.root), "--json"]
        answer = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(answer.stdout)

    def drop(self, name: str, text: str) -> None:
        (self.root / "queue").mkdir(parents=True, exist_ok=True)
        (self.root / "queue" / name).write_text(textwrap.dedent(text), encoding="utf-8")

    def curve_spec(self, name: str, *, seconds: float, floor: float = 1.0, extra: str = "") -> None:
        command = json.dumps([sys.executable, str(self.script), str(seconds), str(floor)])
        self.drop(f"{name}.yaml", f"name: {name}\ncommand: {command}\ntrack: curves\n{extra}")

    def trial(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("show", name)["trial"]
        return found

    def until(self, what: Callable[[], Any], why: str) -> Any:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            try:
                if value := what():
                    return value
            except subprocess.CalledProcessError as error:
                if error.returncode not in {1, 3}:  # those say: no ledger or no such trial yet
                    raise
            time.sleep(0.2)
        out = (self.root.parent / "daemon.out").read_text(encoding="utf-8")
        pytest.fail(f"never came true: {why}\n{out[-4000:]}")

    def until_running(self, name: str) -> dict[str, Any]:
        def running() -> dict[str, Any] | None:
            runs = self.trial(name)["runs"]
            return runs[-1] if runs and runs[-1]["pid"] and runs[-1]["state"] == "running" else None

        found: dict[str, Any] = self.until(running, f"{name} runs")
        return found

    def until_finished(self, name: str) -> dict[str, Any]:
        def finished() -> dict[str, Any] | None:
            trial = self.trial(name)
            return trial if trial["state"] == "finished" else None

        found: dict[str, Any] = self.until(finished, f"{name} is finished")
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "workspace")
    yield made
    for daemon in made.daemons:
        if daemon.poll() is None:
            daemon.send_signal(signal.SIGTERM)
        daemon.wait(timeout=60)
    for process in (made.root / "runs").glob("*/*/process.json"):
        try:
            os.killpg(json.loads(process.read_text(encoding="utf-8"))["identity"]["pid"], signal.SIGKILL)
        except ProcessLookupError:
            continue


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_command_of_another_kind_is_run_and_judged_by_its_log(bench: Bench) -> None:
    script = bench.root.parent / "other.py"
    script.write_text(
        'for i in range(1, 6):\n    print(\'{"it": %d, "m": {"bpb": %f}}\' % (i, 3 - i / 10))\n', encoding="utf-8"
    )
    bench.drop(
        "other.yaml",
        f"""\
        name: other
        command: [{sys.executable}, {script}]
        log: {{format: jsonl, fields: {{step: it, val_bpb: m.bpb}}}}
        """,
    )
    assert bench.up("--until-drained").wait(timeout=DEADLINE_SECONDS) == 0
    trial = bench.trial("other")
    assert trial["result"] == "completed"
    assert trial["scores"] == {"raw": pytest.approx(2.5)}
    assert [point["val_bpb"] for point in trial["val_curve"]] == pytest.approx([2.9, 2.8, 2.7, 2.6, 2.5])
    (board,) = bench.ask("best")
    assert board["rows"][0]["name"] == "other"


def test_a_killed_daemon_is_followed_by_one_that_adopts_its_runs(bench: Bench) -> None:
    bench.curve_spec("long", seconds=12)
    daemon = bench.up()
    before = bench.until_running("long")
    daemon.kill()
    daemon.wait(timeout=30)
    assert alive(before["pid"])
    bench.up("--until-drained")
    after = bench.until_running("long")
    assert after["pid"] == before["pid"]
    trial = bench.until_finished("long")
    assert trial["result"] == "completed"
    assert len(trial["runs"]) == 1
    assert [point["step"] for point in trial["val_curve"]] == list(range(1, 21))


def test_sigterm_stops_the_daemon_and_leaves_its_runs_alive(bench: Bench) -> None:
    bench.curve_spec("long", seconds=20)
    daemon = bench.up()
    run = bench.until_running("long")
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(timeout=60) == 0
    assert alive(run["pid"])


def test_a_second_daemon_is_refused_and_names_the_first(bench: Bench) -> None:
    daemon = bench.up()
    database = bench.root / "experiments.db"
    bench.until(database.exists, "the daemon is up")
    argv = [*CADDIE, "up", "--workspace", str(bench.root), "--once"]
    second = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 4
    assert str(daemon.pid) in second.stderr


def test_stop_ends_a_run_and_pause_is_refused_where_it_would_lose_work(bench: Bench) -> None:
    bench.curve_spec("long", seconds=60, extra="grace_seconds: 2\n")
    bench.up()
    run = bench.until_running("long")
    bench.ask("pause", "long")
    told = bench.until(
        lambda: [line for beat in bench.ask("heartbeats", "-n", "50") for line in beat["commands"]],
        "the pause is answered",
    )
    assert told == [next(line for line in told if line.startswith("pause REFUSED: long@1337"))]
    assert "resumable: true" in told[0]
    assert alive(run["pid"])
    bench.ask("stop", "long")
    trial = bench.until_finished("long")
    assert trial["result"] == "stopped"
    assert not alive(run["pid"])


def test_a_bad_spec_is_refused_beside_its_reason_and_stops_nothing_else(bench: Bench) -> None:
    bench.drop("bad.yaml", "name: bad\ncommand: [true]\nprioritty: 3\n")
    bench.curve_spec("good", seconds=1)
    bench.up("--until-drained")
    assert bench.until_finished("good")["result"] == "completed"
    reason = bench.until(lambda: list((bench.root / "queue" / "rejected").glob("*.txt")), "the reason lies there")
    text = reason[0].read_text(encoding="utf-8")
    assert "bad.yaml:3" in text
    assert "prioritty" in text
    assert "priority" in text.replace("prioritty", "")


def test_priority_and_after_order_the_launches(bench: Bench) -> None:
    bench.curve_spec("first", seconds=1, extra="priority: 5\nresources: {cpus: 2}\n")
    bench.curve_spec("last", seconds=1, extra="after: [middle]\npriority: 9\n")
    bench.curve_spec("middle", seconds=1, extra="resources: {cpus: 2}\n")
    assert bench.up("--until-drained").wait(timeout=DEADLINE_SECONDS) == 0
    begun = {name: bench.trial(name)["runs"][0]["intended_at"] for name in ("first", "middle", "last")}
    assert begun["first"] < begun["middle"] < begun["last"]
