"""The heartbeat with its real parts on a real folder; faults come from the outside: devices, disk, processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest

from agent import bootstrap
from agent.adapters.executors.local import LocalExecutor
from agent.adapters.workspace import Workspace
from agent.daemon import Daemon
from agent.decisions.thresholds import Policy, RetryPolicy
from agent.domain.beats import BeatReport
from agent.domain.errors import LedgerError
from agent.domain.observations import CommandVerb, Devices
from agent.domain.runfiles import CLAIM, EXIT, LOG, Order
from agent.domain.specs import Metric
from agent.domain.trials import Result, RunState, TrialState
from agent.domain.views import TrialView
from agent.ledger.queries import CommandState, LedgerReader
from agent.settings import Settings

DEADLINE_SECONDS = 12.0
NO_GPU = Devices(gpus=(), cpu_slots=2, note="no NVIDIA GPU")
SHA = "ab" * 32


class Machine:
    """Stands in for the driver."""

    def __init__(self) -> None:
        self.devices = NO_GPU
        self.fault: Exception | None = None

    def read(self) -> Devices:
        if self.fault is not None:
            raise self.fault
        return self.devices

    def close(self) -> None:
        """Nothing to end."""


class FaultyExecutor(LocalExecutor):
    """The real one, on a machine that fails around the spawn."""

    fault = ""

    def launch(self, directory: Path, order: Order) -> None:
        if self.fault == "before the spawn":
            raise OSError(errno.EAGAIN, "no more processes")
        super().launch(directory, order)
        if self.fault == "after the claim":
            until((directory / CLAIM).exists, "the runner's claim")
        if self.fault:
            raise OSError(errno.ENOSPC, "no space left")


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


class Bench:
    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root / "workspace")
        self.workspace.create()
        self.marks = root / "marks"
        self.marks.mkdir()
        policy = Policy(retries=RetryPolicy(backoff_seconds=0))
        self._heartbeat = bootstrap.heartbeat(self.workspace, Settings(policy=policy, disk_floor_bytes=0))
        self.heart = self._heartbeat.__enter__()
        self.machine = Machine()
        self.heart.observer.gpus = self.machine  # type: ignore[assignment]  # the outside
        self.executor = FaultyExecutor()
        self.heart.observer.executor = self.heart.hands.executor = self.executor
        self.number = 0

    def close(self) -> None:
        self.executor.fault = ""
        for folder in self.workspace.runs.glob("*/*"):
            self.executor.void("no-run-of-a-test", folder)
            self.executor.kill(folder)
        until(lambda: self.executor.reap() == 0, "all runners to end")
        self._heartbeat.__exit__(None, None, None)

    def beat(self) -> BeatReport:
        self.number += 1
        return self.heart.beat(datetime.now(UTC), self.number)

    def drop(self, name: str, text: str, *, age: float = 10.0) -> Path:
        path = self.workspace.queue / f"{name}.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        os.utime(path, (time.time() - age, time.time() - age))
        return path

    def command(self, name: str, script: str = "", extra: str = "") -> Path:
        """A spec whose program first leaves a mark: how often it ran is how long that file is."""
        mark = f"open({str(self.marks / name)!r}, 'a').write('x')\n"
        argv = json.dumps([sys.executable, "-S", "-c", mark + script])
        return self.drop(name, f"name: {name}\ncommand: {argv}\n{extra}")

    def sleeper(self, name: str, extra: str = "") -> None:
        self.command(name, "import time\ntime.sleep(600)", extra)

    def trainer_spec(self, name: str, *, vocab_size: int = 512) -> None:
        manifest = self.workspace.data / "manifest.json"
        manifest.write_text(json.dumps({"val_sha256": SHA, "vocab_size": 512}), encoding="utf-8")
        model = f"{{vocab_size: {vocab_size}, num_layers: 2, model_dim: 64, num_heads: 2, num_kv_heads: 1}}"
        self.drop(name, f"name: {name}\nlimits: {{steps: 3}}\nbudget_bytes: 100\ntrainer:\n  model: {model}\n")

    def times_run(self, name: str) -> int:
        path = self.marks / name
        return path.stat().st_size if path.exists() else 0

    def trial(self, name: str) -> TrialView:
        return next(t for t in self.heart.ledger.view(datetime.now(UTC)).trials if t.name == name)

    def names(self) -> list[str]:
        return [trial.name for trial in self.heart.ledger.view(datetime.now(UTC)).trials]

    def beat_until(self, condition: Callable[[], object], what: str) -> list[BeatReport]:
        reports: list[BeatReport] = []

        def beaten() -> bool:
            reports.append(self.beat())
            return bool(condition())

        until(beaten, what)
        return reports

    def until_finished(self, name: str) -> TrialView:
        self.beat_until(lambda: self.trial(name).state is TrialState.FINISHED, f"{name} to finish")
        return self.trial(name)

    def until_running(self, name: str) -> None:
        self.beat_until(lambda: self.times_run(name) and self.trial(name).state is TrialState.RUNNING, f"{name} to run")

    def files(self) -> dict[str, list[str]]:
        """Where the spec files are, by the name that their owner gave them."""
        queue = self.workspace.queue
        return {
            place: sorted(path.name.partition("-")[2] or path.name for path in (queue / place).glob("*.yaml"))
            for place in (".", "claimed", "accepted", "rejected")
        }


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def fails(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@contextmanager
def broken(thing: object, name: str, error: Exception) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thing, name, fails(error))
        yield


def told(report: BeatReport, text: str) -> bool:
    return any(text in problem for problem in report.problems)


class TestPlainBeats:
    def test_a_spec_becomes_a_trial_a_run_and_a_score(self, bench: Bench) -> None:
        line = "step:5/5 val_loss:2.5 val_bpb:1.2500 train_time:500ms step_avg:100.00ms"
        bench.command("one", f"print({line!r})", "limits: {steps: 5}\n")
        first = bench.beat()
        assert first.enqueued == ("one@1337",)
        assert [decision.kind for decision in first.decisions] == ["launch"]
        assert [(run.trial, run.device) for run in first.runs] == [("one@1337", "cpu x1")]
        assert (first.ok, first.drained, first.problems) == (True, False, ())
        trial = bench.until_finished("one")
        assert trial.result is Result.COMPLETED
        assert trial.scores == {Metric.RAW: 1.25}
        assert bench.files()["accepted"] == ["one.yaml"]
        last = bench.beat()
        assert last.drained
        assert last.best == ((trial.track.key, "one@1337", 1.25),)
        assert last.counts == {"finished": 1}

    def test_an_ending_asks_for_the_next_beat_at_once(self, bench: Bench) -> None:
        bench.command("one")
        reports = bench.beat_until(lambda: bench.trial("one").state is TrialState.FINISHED, "the end")
        assert [report.again for report in reports] == [False] * (len(reports) - 1) + [True]
        assert not bench.beat().again

    def test_a_bad_spec_is_refused_beside_its_reason(self, bench: Bench) -> None:
        bench.drop("bad", "name: bad\ncommand: [x]\nprioritty: 3\n")
        bench.trainer_spec("strange", vocab_size=1024)
        report = bench.beat()
        assert len(report.refused) == 2
        assert bench.files() == {".": [], "claimed": [], "accepted": [], "rejected": ["bad.yaml", "strange.yaml"]}
        assert "prioritty" in (bench.workspace.rejected / "bad.yaml.txt").read_text(encoding="utf-8")
        assert "has 512" in (bench.workspace.rejected / "strange.yaml.txt").read_text(encoding="utf-8")
        assert bench.beat().refused == ()

    def test_a_name_that_is_taken_is_refused_and_the_same_spec_again_is_no_news(self, bench: Bench) -> None:
        same = bench.command("one", extra="after: [nobody]\n").read_text(encoding="utf-8")
        bench.beat()
        bench.drop("one", same)
        bench.drop("two", same.replace("nobody", "somebody"))
        report = bench.beat()
        assert report.enqueued == ()
        assert len(report.refused) == 1
        assert "choose another name" in report.refused[0]
        assert bench.names() == ["one"]

    def test_what_cannot_fit_is_rejected_without_a_run(self, bench: Bench) -> None:
        bench.trainer_spec("oversize")
        report = bench.beat()
        (decision,) = report.decisions
        assert decision.kind == "reject"
        assert int(str(decision.numbers["predicted_bytes"])) > 100
        assert bench.trial("oversize").result is Result.REJECTED_OVER_BUDGET
        assert bench.trial("oversize").runs == ()
        assert report.again

    def test_commands_are_answered_and_their_files_go(self, bench: Bench) -> None:
        bench.command("held", extra="after: [nobody]\n")
        bench.beat()
        trial_id = bench.trial("held").trial_id
        bench.heart.observer.inbox.send(CommandVerb.PAUSE, trial_id)
        bench.heart.observer.inbox.send(CommandVerb.STOP, 99)
        report = bench.beat()
        assert report.commands == ("pause held@1337: held back in the queue",)
        assert told(report, "there is no trial 99")
        assert bench.trial("held").state is TrialState.PAUSED
        assert list(bench.workspace.commands.rglob("*.json")) == []
        bench.heart.observer.inbox.send(CommandVerb.STOP, trial_id)
        assert bench.until_finished("held").result is Result.STOPPED

    def test_a_stop_reaches_the_process(self, bench: Bench) -> None:
        bench.sleeper("long", "grace_seconds: 5\n")
        bench.until_running("long")
        bench.heart.observer.inbox.send(CommandVerb.STOP, bench.trial("long").trial_id)
        trial = bench.until_finished("long")
        assert trial.result is Result.STOPPED
        assert trial.runs[0].returncode == -15

    def test_a_program_that_cannot_be_started_fails_its_trial_and_no_other(self, bench: Bench) -> None:
        bench.drop("absent", "name: absent\ncommand: [/nonexistent/program]\n")
        bench.command("present")
        assert bench.until_finished("absent").result is Result.FAILED_CRASHED
        assert "/nonexistent/program" in bench.trial("absent").reason
        assert bench.until_finished("present").result is Result.COMPLETED


class TestNews:
    def test_an_empty_workspace_has_none(self, bench: Bench) -> None:
        bench.beat()
        assert bench.heart.news() == frozenset()

    def test_a_file_is_news_when_it_comes_when_it_changes_and_when_it_has_rested(self, bench: Bench) -> None:
        path = bench.drop("one", "name: one\n", age=0)
        fresh = bench.heart.news()
        assert len(fresh) == 1
        assert bench.heart.news() == fresh
        os.utime(path, (time.time() - 10, time.time() - 10))
        rested = bench.heart.news()
        assert len(rested) == 1
        assert rested != fresh

    def test_a_command_is_news_and_hidden_files_and_folders_are_not(self, bench: Bench) -> None:
        (bench.workspace.queue / ".one.yaml.tmp").write_text("half", encoding="utf-8")
        assert bench.heart.news() == frozenset()
        path = bench.heart.observer.inbox.send(CommandVerb.STOP, 1)
        (news,) = bench.heart.news()
        assert news.startswith(path.name)

    def test_an_exit_record_of_a_live_run_is_news_until_it_was_seen(self, bench: Bench) -> None:
        bench.command("one")
        bench.beat()
        until(bench.heart.news, "the exit record")
        assert bench.heart.news() == {bench.trial("one").runs[0].run_uuid}
        bench.until_finished("one")
        assert bench.heart.news() == frozenset()

    def test_a_file_that_is_never_taken_is_no_news(self, bench: Bench) -> None:
        """Or a daemon that shall end when the queue is drained never ends."""
        (bench.workspace.queue / "notes.txt").write_text("mine", encoding="utf-8")
        (bench.workspace.queue / "one.yaml~").write_text("an editor's copy", encoding="utf-8")
        assert bench.heart.news() == frozenset()

    def test_a_queue_that_is_gone_is_told_and_does_not_end_the_daemon(self, bench: Bench) -> None:
        shutil.rmtree(bench.workspace.queue)
        daemon = Daemon(bench.heart, interval_seconds=1, watch_seconds=1, on_beat=lambda _: None)
        report = daemon.once()
        assert told(report, "queue")


class TestFaultsOfLooking:
    def test_a_driver_that_raises_is_told_and_the_next_beat_goes_on(self, bench: Bench) -> None:
        bench.machine.fault = RuntimeError("the driver is on fire")
        bench.command("one")
        report = bench.beat()
        assert told(report, "the driver is on fire")
        assert not report.ok
        assert bench.times_run("one") == 0
        assert bench.files()["."] + bench.files()["claimed"] == ["one.yaml"]
        bench.machine.fault = None
        assert bench.beat().problems == ()
        assert bench.until_finished("one").result is Result.COMPLETED
        assert bench.times_run("one") == 1

    def test_unknown_gpus_hold_back_what_may_need_one_and_nothing_else(self, bench: Bench) -> None:
        bench.machine.devices = Devices(gpus=None, cpu_slots=2, note="NVML hangs")
        bench.command("any")
        bench.command("cpu", extra="resources: {gpus: 0}\n")
        report = bench.beat()
        kinds = {decision.trial: decision.kind for decision in report.decisions}
        assert kinds == {"any@1337": "wait", "cpu@1337": "launch"}
        assert "GPUs unknown: NVML hangs" in report.to_line()

    def test_a_log_that_cannot_be_read_is_told_and_stops_nothing(self, bench: Bench) -> None:
        bench.sleeper("long")
        bench.until_running("long")
        log = bench.workspace.root / bench.trial("long").runs[0].directory / LOG
        log.unlink(missing_ok=True)
        log.mkdir()
        bench.command("other")
        report = bench.beat()
        assert told(report, f"log {log} of long@1337 could not be read")
        assert report.ok
        assert bench.until_finished("other").result is Result.COMPLETED
        assert bench.trial("long").state is TrialState.RUNNING

    def test_a_queue_that_cannot_be_read_does_not_blind_the_daemon_to_its_runs(self, bench: Bench) -> None:
        bench.command("one")
        bench.beat()
        until(lambda: list(bench.workspace.runs.glob(f"*/*/{EXIT}")), "the exit record")
        shutil.rmtree(bench.workspace.claimed)
        report = bench.beat()
        assert told(report, str(bench.workspace.claimed))
        assert bench.trial("one").state is TrialState.FINISHED

    def test_a_run_whose_folder_cannot_be_understood_is_unknown_and_never_started_again(self, bench: Bench) -> None:
        bench.sleeper("long")
        bench.until_running("long")
        claim = bench.workspace.root / bench.trial("long").runs[0].directory / CLAIM
        held = claim.read_bytes()
        claim.write_text("{", encoding="utf-8")
        report = bench.beat()
        assert [run.state for run in report.runs] == ["unknown"]
        assert report.problems
        claim.write_bytes(held)
        bench.beat()
        assert [run.state for run in bench.trial("long").runs] == [RunState.RUNNING]
        assert bench.times_run("long") == 1


class TestFaultsOfTheLedger:
    def test_facts_that_were_not_stored_lead_to_no_decision_and_lose_no_file(self, bench: Bench) -> None:
        bench.command("one")
        bench.drop("bad", "name: bad\n")
        bench.heart.observer.inbox.send(CommandVerb.STOP, 1)
        with broken(bench.heart.ledger, "record", LedgerError("the disk is full")):
            for _ in range(2):
                report = bench.beat()
                assert told(report, "phase record failed: LedgerError: the disk is full")
                assert (report.ok, report.decisions, report.runs, report.drained) == (False, (), (), False)
        assert bench.files() == {".": [], "claimed": ["bad.yaml", "one.yaml"], "accepted": [], "rejected": []}
        assert len(list(bench.workspace.commands.rglob("*.json"))) == 1
        assert list(bench.workspace.runs.iterdir()) == []
        report = bench.beat()
        assert report.enqueued == ("one@1337",)
        assert bench.files() == {".": [], "claimed": [], "accepted": ["one.yaml"], "rejected": ["bad.yaml"]}
        bench.beat_until(lambda: bench.trial("one").state is TrialState.FINISHED, "the end")
        assert bench.times_run("one") <= 1

    def test_a_live_run_is_not_started_again_while_nothing_can_be_stored(self, bench: Bench) -> None:
        bench.command("one")
        bench.beat()
        until(lambda: list(bench.workspace.runs.glob(f"*/*/{EXIT}")), "the exit record")
        with broken(bench.heart.ledger, "record", LedgerError("the disk is full")):
            bench.beat()
            bench.beat()
        assert bench.until_finished("one").result is Result.COMPLETED
        assert bench.times_run("one") == 1
        assert len(bench.trial("one").runs) == 1

    def test_a_ledger_that_cannot_be_read_is_told_and_the_next_beat_goes_on(self, bench: Bench) -> None:
        bench.command("one")
        with broken(bench.heart.ledger, "view", LedgerError("locked")):
            report = bench.beat()
        assert told(report, "phase observe failed: LedgerError: locked")
        assert bench.until_finished("one").result is Result.COMPLETED

    def test_a_claimed_file_that_cannot_be_moved_on_is_taken_in_once(self, bench: Bench) -> None:
        bench.command("one")
        with broken(bench.heart.observer.specs, "settle", OSError(errno.EROFS, "read-only")):
            report = bench.beat()
            assert told(report, "read-only")
            assert report.ok
            assert bench.files()["claimed"] == ["one.yaml"]
            bench.beat()
        assert bench.until_finished("one").result is Result.COMPLETED
        assert bench.files()["accepted"] == ["one.yaml"]
        assert (bench.names(), bench.times_run("one")) == (["one"], 1)

    def test_an_intent_that_was_not_stored_starts_nothing(self, bench: Bench) -> None:
        bench.command("one")
        with broken(bench.heart.ledger, "intend", LedgerError("the disk is full")):
            report = bench.beat()
        assert [decision.error for decision in report.decisions] == ["the disk is full"]
        assert list(bench.workspace.runs.iterdir()) == []
        assert bench.trial("one").state is TrialState.QUEUED
        assert bench.until_finished("one").result is Result.COMPLETED
        assert bench.times_run("one") == 1

    def test_projections_that_cannot_be_stored_do_not_hold_up_decisions(self, bench: Bench) -> None:
        bench.command("one")
        with broken(bench.heart.ledger, "save_projections", LedgerError("the disk is full")):
            report = bench.beat()
        assert told(report, "phase project failed")
        assert [decision.kind for decision in report.decisions] == ["launch"]

    def test_a_policy_that_breaks_does_nothing_and_is_asked_again(self, bench: Bench) -> None:
        bench.trainer_spec("oversize")
        size_of = bench.heart.size_of
        bench.heart.size_of = fails(ZeroDivisionError("no shape"))
        report = bench.beat()
        assert told(report, "phase decide failed: ZeroDivisionError: no shape")
        assert (report.ok, report.decisions, report.drained) == (True, (), False)
        assert report.counts == {"queued": 1}
        bench.heart.size_of = size_of
        bench.beat()
        assert bench.trial("oversize").result is Result.REJECTED_OVER_BUDGET

    def test_a_stop_that_could_not_be_carried_out_is_told_as_refused_and_can_be_asked_again(self, bench: Bench) -> None:
        bench.sleeper("long", "grace_seconds: 5\n")
        bench.until_running("long")
        trial_id = bench.trial("long").trial_id
        bench.heart.observer.inbox.send(CommandVerb.STOP, trial_id)
        with broken(bench.heart.ledger, "apply", LedgerError("locked")):
            report = bench.beat()
        assert [decision.error for decision in report.decisions] == ["locked"]
        with LedgerReader.open(bench.workspace.database) as reader:
            (command,) = reader.commands()
        assert command.state is CommandState.REFUSED
        assert command.outcome.endswith("it failed: locked")
        (told_of_it,) = report.commands
        assert told_of_it.startswith("stop REFUSED: ")
        bench.heart.observer.inbox.send(CommandVerb.STOP, trial_id)
        assert bench.until_finished("long").result is Result.STOPPED


class TestFaultsOfActing:
    def test_a_stop_that_never_reached_its_run_is_asked_again_with_its_whole_grace(self, bench: Bench) -> None:
        bench.sleeper("long", "grace_seconds: 5\n")
        bench.until_running("long")
        bench.heart.observer.inbox.send(CommandVerb.STOP, bench.trial("long").trial_id)
        with broken(bench.executor, "request_stop", OSError(errno.ENOSPC, "no space left")):
            bench.beat()  # decided and committed, and then as if the daemon had died
        decided = bench.trial("long").runs[0]
        assert decided.state is RunState.STOPPING
        assert decided.stop_asked_at is not None
        # Long past the deadline of the request that nobody heard: asked first, and not killed for it.
        late = decided.stop_asked_at + timedelta(hours=1)
        bench.heart.beat(late, 99)
        assert bench.trial("long").runs[0].stop_asked_at == late
        trial = bench.until_finished("long")
        assert trial.result is Result.STOPPED
        assert trial.runs[0].returncode == -15  # by TERM

    def test_below_the_disk_floor_nothing_starts_and_what_runs_runs_on(self, bench: Bench) -> None:
        bench.sleeper("long")
        bench.until_running("long")
        bench.heart.disk_floor_bytes = 10**18
        bench.command("one")
        report = bench.beat()
        assert {d.trial: d.kind for d in report.decisions} == {"long@1337": "keep", "one@1337": "wait"}
        assert told(report, "nothing is launched below 1,000,000,000,000,000,000")
        assert not report.drained
        assert bench.trial("one").state is TrialState.QUEUED
        assert bench.trial("long").state is TrialState.RUNNING
        bench.heart.disk_floor_bytes = 0
        assert bench.until_finished("one").result is Result.COMPLETED

    def test_a_stop_is_carried_out_below_the_disk_floor(self, bench: Bench) -> None:
        bench.sleeper("long", "grace_seconds: 5\n")
        bench.until_running("long")
        bench.heart.disk_floor_bytes = 10**18
        bench.heart.observer.inbox.send(CommandVerb.STOP, bench.trial("long").trial_id)
        assert bench.until_finished("long").result is Result.STOPPED

    @pytest.mark.parametrize("fault", ["before the spawn", "after the spawn", "after the claim"])
    def test_a_launch_that_fails_never_runs_a_trial_twice(self, bench: Bench, fault: str) -> None:
        bench.command("one")
        bench.executor.fault = fault
        report = bench.beat()
        (launch,) = report.decisions
        assert launch.error.startswith("[Errno ")
        if fault == "before the spawn":
            assert [run.state for run in bench.trial("one").runs] == [RunState.LOST]
        if fault == "after the claim":
            assert len(bench.trial("one").runs) == 1
            assert bench.trial("one").runs[0].live
        bench.executor.fault = ""
        assert bench.until_finished("one").result is Result.COMPLETED
        until(lambda: bench.executor.reap() == 0, "late runners to end")
        assert bench.times_run("one") == 1
        assert len(bench.trial("one").runs) == (1 if fault == "after the claim" else len(bench.trial("one").runs))

    def test_one_launch_that_fails_does_not_hold_up_the_other(self, bench: Bench) -> None:
        bench.command("broken", extra="working_directory: nowhere\npriority: 9\n")
        bench.command("sound")
        report = bench.beat()
        errors = {decision.trial: decision.error for decision in report.decisions}
        assert "working_directory" in errors["broken@1337"]
        assert errors["sound@1337"] == ""
        assert bench.until_finished("sound").result is Result.COMPLETED
        assert bench.until_finished("broken").result is Result.FAILED_LOST
        assert bench.times_run("broken") == 0
        assert "could not be started" in bench.trial("broken").reason

    def test_a_start_that_nobody_claims_is_voided_and_tried_again(self, bench: Bench) -> None:
        """The daemon is killed after the intent, before the spawn: nothing was started, and nothing says so."""
        bench.command("one")
        no_disk = OSError(errno.ENOSPC, "no space left")
        with broken(bench.executor, "launch", no_disk), broken(bench.executor, "void", no_disk):
            bench.beat()
        assert [run.state for run in bench.trial("one").runs] == [RunState.INTENDED]
        bench.heart.policy = bench.heart.policy.model_copy(update={"claim_deadline_seconds": 1e-6})
        bench.beat_until(lambda: bench.trial("one").runs[0].state is RunState.LOST, "the voiding")
        bench.heart.policy = bench.heart.policy.model_copy(update={"claim_deadline_seconds": 60})
        assert bench.until_finished("one").result is Result.COMPLETED
        assert [run.state for run in bench.trial("one").runs] == [RunState.LOST, RunState.EXITED]
        assert bench.times_run("one") == 1


class TestFaultsOfTheReport:
    def test_a_journal_that_cannot_be_written_does_not_stop_the_work(self, bench: Bench) -> None:
        shutil.rmtree(bench.workspace.logs)
        bench.command("one")
        assert bench.beat().ok
        assert bench.until_finished("one").result is Result.COMPLETED

    def test_a_report_that_could_not_be_written_is_told_on_the_next_beat(self, bench: Bench) -> None:
        shutil.rmtree(bench.workspace.logs)
        bench.beat()
        bench.workspace.logs.mkdir()
        assert told(bench.beat(), "phase report failed")

    def test_every_beat_is_in_both_logs_and_in_the_ledger(self, bench: Bench) -> None:
        bench.command("one")
        bench.until_finished("one")
        lines = (bench.workspace.logs / "heartbeat.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["number"] for line in lines] == list(range(1, bench.number + 1))
        text = (bench.workspace.logs / "heartbeat.log").read_text(encoding="utf-8")
        assert text.count(" beat ") == bench.number
        assert "launch one@1337: starts" in text


class TestAnotherDaemon:
    def test_the_next_one_takes_over_what_runs_and_what_was_claimed(self, bench: Bench) -> None:
        bench.sleeper("long")
        bench.until_running("long")
        bench.command("one")
        with broken(bench.heart.ledger, "record", LedgerError("killed here")):
            bench.beat()
        settings = Settings(disk_floor_bytes=0)
        with bootstrap.heartbeat(bench.workspace, settings) as heart:
            heart.observer.gpus = bench.machine  # type: ignore[assignment]  # the outside
            heart.observer.executor = heart.hands.executor = bench.executor  # to be reaped at the end
            report = heart.beat(datetime.now(UTC) + timedelta(seconds=1), 1)
        assert report.enqueued == ("one@1337",)
        assert [run.trial for run in report.runs] == ["long@1337", "one@1337"]
        assert bench.times_run("long") == 1
        assert bench.until_finished("one").result is Result.COMPLETED
        assert bench.times_run("one") == 1


def test_a_view_of_a_beat_is_a_value_that_json_takes(bench: Bench) -> None:
    bench.sleeper("long")
    report: Any = json.loads(json.dumps(bench.beat().to_record(), allow_nan=False))
    assert report["runs"][0]["trial"] == "long@1337"
