"""The runner and the local executor with real processes: short Python children, generous deadlines."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import runner
from agent.adapters.executors.local import LocalExecutor
from agent.adapters.run_folder import RunFolder
from agent.domain.errors import ExecutionError
from agent.domain.observations import ProbeState, RunProbe
from agent.domain.runfiles import CLAIM, EXIT, ORDER, VOIDED, Claim, Control, Order, ProcessIdentity, ProcessRecord
from agent.domain.trials import StopCause
from agent.process_identity import identify, own_identity
from agent.process_tree import descendants, marked_processes, processes_with_arguments, send, send_to_group

DEADLINE_SECONDS = 60.0
SLEEPER = "import time\ntime.sleep(600)"
DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(600)"


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def order_for(
    script: str, *, grace: float = 20.0, timeout: float | None = None, argv: list[str] | None = None
) -> Order:
    return Order(
        run_uuid=uuid.uuid4().hex,
        argv=argv or [sys.executable, "-S", "-c", script],
        cwd="/",
        env={"GREETING": "hello"},
        grace_seconds=grace,
        timeout_seconds=timeout,
    )


class Run:
    """One launched run, and what the tests ask of it."""

    def __init__(self, executor: LocalExecutor, directory: Path, order: Order) -> None:
        self.executor, self.directory, self.order = executor, directory, order
        self.folder = RunFolder(directory)

    def probe(self) -> RunProbe:
        self.executor.reap()
        return self.executor.probe(self.order.run_uuid, self.directory)

    def until_over(self) -> RunProbe:
        until(lambda: self.probe().state in {ProbeState.EXITED, ProbeState.GONE}, "the run's end")
        until(lambda: self.executor.reap() == 0, "the runner's end")
        return self.probe()

    def until_started(self) -> int:
        until(lambda: self.probe().pid is not None, "the trainer's start")
        pid = self.probe().pid
        assert pid is not None
        return pid

    def until_said(self, text: str) -> None:
        until(lambda: self.folder.log.exists() and text in self.folder.log.read_text(), f"{text!r} in the log")

    def stop(self, cause: StopCause = StopCause.USER, grace: float = 20.0) -> None:
        self.executor.request_stop(
            self.directory, Control(run_uuid=self.order.run_uuid, cause=cause, grace_seconds=grace)
        )

    def runner_pid(self) -> int:
        claim = self.folder.claim()
        assert claim is not None
        return claim.identity.pid


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    executor = LocalExecutor()
    runs: list[Run] = []

    def start(script: str = SLEEPER, **options: object) -> Run:
        order = order_for(script, **options)  # type: ignore[arg-type]
        run = Run(executor, tmp_path / "runs" / order.run_uuid, order)
        runs.append(run)
        executor.launch(run.directory, order)
        return run

    yield start
    for run in runs:
        until(lambda run=run: run.probe().state is not ProbeState.UNCLAIMED, "a claim")  # type: ignore[misc]
        executor.kill(run.directory)
    until(lambda: executor.reap() == 0, "all runners to end")


def start_runner(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "agent.runner", str(directory)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_launched_run_ends_with_exit_record_log_and_result(launch: Callable[..., Run]) -> None:
    run = launch(
        "import os\nprint(os.environ['GREETING'], os.environ['CADDIE_RUN'], os.getcwd(), flush=True)\nos._exit(7)"
    )
    (run.directory / "result.json").write_text("{}")
    probe = run.until_over()
    assert probe.state is ProbeState.EXITED
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.cause, probe.exit.killed, probe.exit.error) == (7, None, False, "")
    assert probe.exit.started_at is not None
    assert probe.exit.started_at <= probe.exit.ended_at
    assert probe.log_tail == (f"hello {run.order.run_uuid} /",)
    assert probe.result_text == "{}"
    leftovers = {path.name for path in run.directory.iterdir()} - {
        "order.json", "claim.json", "process.json", "exit.json", "log.txt", "runner.log", "result.json"
    }  # fmt: skip
    assert not leftovers


def test_a_run_is_ordered_once(launch: Callable[..., Run]) -> None:
    run = launch("pass")
    with pytest.raises(ExecutionError, match="started once"):
        run.executor.launch(run.directory, run.order)


def test_exactly_one_of_eight_runners_claims(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    order = order_for(f"open({str(tmp_path / 'starts')!r}, 'a').write('x')")
    RunFolder(directory).give_order(order)
    runners = [start_runner(directory) for _ in range(8)]
    codes = sorted(process.wait(DEADLINE_SECONDS) for process in runners)
    assert codes == [runner.OK] + [runner.ALREADY_CLAIMED] * 7
    assert (tmp_path / "starts").read_text() == "x"
    assert RunFolder(directory).exit() is not None


def test_a_voided_run_is_never_started(tmp_path: Path) -> None:
    directory, executor = tmp_path / "run", LocalExecutor()
    order = order_for(f"open({str(tmp_path / 'starts')!r}, 'a').write('x')")
    RunFolder(directory).give_order(order)
    assert executor.probe(order.run_uuid, directory).state is ProbeState.UNCLAIMED
    assert executor.void(order.run_uuid, directory)
    assert executor.void(order.run_uuid, directory), "voiding again is the same answer"
    assert start_runner(directory).wait(DEADLINE_SECONDS) == runner.ALREADY_CLAIMED
    assert not (tmp_path / "starts").exists()
    assert sorted(path.name for path in directory.iterdir()) == [CLAIM, ORDER]
    assert executor.probe(order.run_uuid, directory).state is ProbeState.GONE
    executor.kill(directory)  # a voided run has no processes; its claim names the daemon, which must survive this


def test_a_claimed_run_is_not_voided(launch: Callable[..., Run]) -> None:
    run = launch("pass")
    run.until_over()
    assert not run.executor.void(run.order.run_uuid, run.directory)


def test_an_intent_without_a_folder_is_unclaimed_and_can_be_voided(tmp_path: Path) -> None:
    executor, directory = LocalExecutor(), tmp_path / "never" / "made"
    assert executor.probe("u1", directory).state is ProbeState.UNCLAIMED
    assert executor.void("u1", directory)
    assert executor.probe("u1", directory).state is ProbeState.GONE


def test_stop_is_term_and_the_trainer_may_say_goodbye(launch: Callable[..., Run]) -> None:
    run = launch(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    run.until_said("ready")
    run.stop(StopCause.PAUSE)
    probe = run.until_over()
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.cause, probe.exit.killed) == (75, StopCause.PAUSE, False)
    assert probe.log_tail[-1] == "saved"


def test_a_deaf_trainer_is_killed_after_the_grace(launch: Callable[..., Run]) -> None:
    run = launch(DEAF)
    run.until_said("deaf")
    run.stop(StopCause.PRUNE, grace=0.3)
    probe = run.until_over()
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.cause, probe.exit.killed) == (-signal.SIGKILL, StopCause.PRUNE, True)


def test_a_later_request_shortens_the_grace_and_names_the_cause(launch: Callable[..., Run]) -> None:
    run = launch(DEAF)
    run.until_said("deaf")
    run.stop(StopCause.PAUSE, grace=600.0)
    run.stop(StopCause.USER, grace=0.1)
    probe = run.until_over()
    assert probe.exit is not None
    assert (probe.exit.cause, probe.exit.killed) == (StopCause.USER, True)


def test_a_suspended_trainer_can_be_stopped(launch: Callable[..., Run]) -> None:
    run = launch(f"print('up', flush=True)\n{SLEEPER}")
    run.until_said("up")  # suspended between fork and exec it would hold up the runner's start of it
    os.kill(run.until_started(), signal.SIGSTOP)
    run.stop(grace=600.0)
    probe = run.until_over()
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.killed) == (-signal.SIGTERM, False)


def test_timeout_has_its_own_cause(launch: Callable[..., Run]) -> None:
    probe = launch(timeout=0.2).until_over()
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.cause) == (-signal.SIGTERM, StopCause.TIMEOUT)


def test_a_request_that_is_broken_or_for_another_run_is_ignored(launch: Callable[..., Run]) -> None:
    run = launch("import time\ntime.sleep(1.0)")
    run.until_started()
    (run.directory / "control.json").write_text("{broken")
    until(lambda: "ignored" in (run.directory / "runner.log").read_text(), "the complaint")
    RunFolder(run.directory).ask(Control(run_uuid="another", cause=StopCause.USER, grace_seconds=0.0))
    probe = run.until_over()
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.cause) == (0, None)
    assert (run.directory / "runner.log").read_text().count("ignored") == 1


def test_a_stop_before_the_start_starts_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    order = order_for(f"open({str(tmp_path / 'starts')!r}, 'a').write('x')")
    RunFolder(directory).give_order(order)
    LocalExecutor().request_stop(directory, Control(run_uuid=order.run_uuid, cause=StopCause.USER, grace_seconds=1.0))
    assert start_runner(directory).wait(DEADLINE_SECONDS) == runner.OK
    record = RunFolder(directory).exit()
    assert record is not None
    assert (record.returncode, record.cause) == (None, StopCause.USER)
    assert not (tmp_path / "starts").exists()


@pytest.mark.parametrize(
    ("argv", "cwd"), [(["/no/such/program"], "/"), ([sys.executable, "-c", ""], "/no/such/folder")]
)
def test_a_program_that_cannot_start_leaves_a_record(tmp_path: Path, argv: list[str], cwd: str) -> None:
    directory = tmp_path / "run"
    RunFolder(directory).give_order(Order(run_uuid="u1", argv=argv, cwd=cwd))
    assert start_runner(directory).wait(DEADLINE_SECONDS) == runner.OK
    probe = LocalExecutor().probe("u1", directory)
    assert probe.state is ProbeState.EXITED
    assert probe.exit is not None
    assert probe.exit.returncode is None
    assert "/no/such/" in probe.exit.error


def test_descendants_that_hide_in_other_sessions_are_ended(launch: Callable[..., Run]) -> None:
    # It leaves group and session, ignores TERM, and its parent is gone: only a subreaper still sees it.
    run = launch(
        "import os, signal, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        print('hidden', os.getpid(), flush=True)\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "time.sleep(0.3)\n"
    )
    run.until_said("hidden")
    hidden = int(run.folder.log.read_text().split()[1])
    assert identify(hidden) is not None
    probe = run.until_over()
    assert probe.exit is not None
    assert probe.exit.returncode == 0
    assert identify(hidden) is None


def test_term_to_the_runner_stops_its_trainer_and_hup_and_int_do_not(launch: Callable[..., Run]) -> None:
    run = launch()
    run.until_started()
    os.kill(run.runner_pid(), signal.SIGHUP)
    os.kill(run.runner_pid(), signal.SIGINT)
    assert run.probe().state is ProbeState.ALIVE
    os.kill(run.runner_pid(), signal.SIGTERM)
    probe = run.until_over()
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.cause) == (-signal.SIGTERM, StopCause.INTERRUPTED)


def test_the_trainer_does_not_inherit_blocked_or_ignored_signals(launch: Callable[..., Run]) -> None:
    run = launch(
        "import signal\n"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), *(signal.getsignal(s) == signal.SIG_DFL\n"
        "      for s in (signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD)))\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    assert run.until_over().log_tail == ("set() True True True", "True")


def test_a_killed_runner_leaves_an_orphan_that_is_adopted_and_then_gone(launch: Callable[..., Run]) -> None:
    run = launch()
    pid = run.until_started()
    os.kill(run.runner_pid(), signal.SIGKILL)
    until(lambda: run.probe().detail, "the orphan to be noticed")
    probe = run.probe()
    assert (probe.state, probe.pid) == (ProbeState.ALIVE, pid)
    assert "orphaned" in probe.detail
    restarted_daemon = LocalExecutor()
    assert restarted_daemon.probe(run.order.run_uuid, run.directory).state is ProbeState.ALIVE
    run.stop()  # there is no runner to hear it: the executor signals the trainer itself
    probe = run.until_over()
    assert (probe.state, probe.exit) == (ProbeState.GONE, None)
    assert identify(pid) is None


def start_faulty_runner(directory: Path, fault: str) -> subprocess.Popen[bytes]:
    """A runner whose writing of records goes through `fault(path, write)`."""
    code = (
        "import errno, os, sys, time\nfrom pathlib import Path\nfrom agent import runner\n"
        f"whole = runner.write_text\n{fault}\n"
        "runner.write_text = lambda path, text: fault(path, lambda: whole(path, text))\n"
        f"sys.exit(runner.main([{str(directory)!r}]))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)


def test_no_trainer_starts_when_its_runner_dies_before_the_record_is_written(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    order = order_for(f"open({str(tmp_path / 'starts')!r}, 'a').write('x')")
    RunFolder(directory).give_order(order)
    faulty = start_faulty_runner(
        directory,
        "def fault(path, write):\n"
        "    if path.name == 'process.json':\n"
        f"        Path({str(tmp_path)!r}, 'forked').write_text(str(os.getpid()))\n"
        "        time.sleep(2.0)\n"
        "    write()",
    )
    forked = tmp_path / "forked"
    until(lambda: forked.exists() and forked.read_text(), "the fork")
    child = identify(int(forked.read_text()))
    assert child is not None
    faulty.kill()
    faulty.wait()
    until(lambda: identify(child.pid) != child, "the child's end")
    assert LocalExecutor().probe(order.run_uuid, directory).state is ProbeState.GONE
    assert RunFolder(directory).process() is None
    assert not (tmp_path / "starts").exists()


def test_a_full_disk_delays_the_exit_record_and_does_not_lose_it(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    order = order_for("raise SystemExit(9)")
    RunFolder(directory).give_order(order)
    faulty = start_faulty_runner(
        directory,
        "left = [2]\n"
        "def fault(path, write):\n"
        "    if path.name == 'exit.json' and left[0]:\n"
        "        left[0] -= 1\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    write()",
    )
    assert faulty.wait(DEADLINE_SECONDS) == runner.OK
    record = RunFolder(directory).exit()
    assert record is not None
    assert record.returncode == 9


def test_what_an_orphan_leaves_behind_is_killed_before_the_run_is_gone(launch: Callable[..., Run]) -> None:
    run = launch(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    print('helper', os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "time.sleep(600)"
    )
    trainer = run.until_started()
    run.until_said("helper")
    helper = int(run.folder.log.read_text().split()[1])
    os.kill(run.runner_pid(), signal.SIGKILL)
    until(lambda: "orphaned" in run.probe().detail, "the orphan to be noticed")
    os.kill(trainer, signal.SIGKILL)
    probe = run.until_over()
    assert probe.state is ProbeState.GONE
    assert identify(helper) is None


def test_kill_ends_a_suspended_runner_and_everything_below_it(launch: Callable[..., Run]) -> None:
    run = launch("import os, time\nif os.fork() == 0:\n    os.setsid()\nprint('up', flush=True)\ntime.sleep(600)")
    run.until_started()
    until(lambda: run.folder.log.read_text().count("up") == 2, "both processes")
    os.kill(run.runner_pid(), signal.SIGSTOP)
    run.executor.kill(run.directory)
    assert run.until_over().state is ProbeState.GONE
    assert marked_processes(run.order.run_uuid) == ()


def test_kill_never_touches_a_process_that_took_over_the_pid(tmp_path: Path) -> None:
    """The records name this very test's PID with another start time: a reused PID."""
    own = own_identity()
    stranger = ProcessIdentity(pid=own.pid, start_ticks=own.start_ticks - 1, boot_id=own.boot_id)
    folder = RunFolder(tmp_path)
    (tmp_path / CLAIM).write_text(Claim(run_uuid="u1", claimant="runner", identity=stranger, at="").to_json())
    (tmp_path / "process.json").write_text(ProcessRecord(run_uuid="u1", identity=stranger, at="").to_json())
    executor = LocalExecutor()
    executor.kill(tmp_path)
    executor.request_stop(tmp_path, Control(run_uuid="u1", cause=StopCause.USER, grace_seconds=1.0))
    assert not send(stranger, signal.SIGKILL)
    assert not send_to_group(stranger, signal.SIGKILL)
    assert executor.probe("u1", tmp_path).state is ProbeState.GONE
    assert folder.exit() is None


def test_records_of_an_earlier_boot_are_gone(tmp_path: Path) -> None:
    own = own_identity()
    before = ProcessIdentity(pid=own.pid, start_ticks=own.start_ticks, boot_id="an-earlier-boot")
    (tmp_path / CLAIM).write_text(Claim(run_uuid="u1", claimant="runner", identity=before, at="").to_json())
    assert LocalExecutor().probe("u1", tmp_path).state is ProbeState.GONE


@pytest.mark.parametrize("name", [CLAIM, EXIT, "process.json"])
@pytest.mark.parametrize("text", ["{half", "[]", '{"run_uuid": "u1"}', "\0\0"])
def test_unreadable_records_are_unknown_never_dead(tmp_path: Path, name: str, text: str) -> None:
    claim = Claim(run_uuid="u1", claimant="runner", identity=own_identity(), at="")
    (tmp_path / CLAIM).write_text(claim.to_json())
    assert LocalExecutor().probe("u1", tmp_path).state is ProbeState.ALIVE
    (tmp_path / name).write_text(text)
    probe = LocalExecutor().probe("u1", tmp_path)
    assert probe.state is ProbeState.UNKNOWN
    assert name in probe.detail


def test_a_folder_of_another_run_is_unknown(tmp_path: Path) -> None:
    (tmp_path / CLAIM).write_text(Claim(run_uuid="u2", claimant=VOIDED, identity=own_identity(), at="").to_json())
    assert LocalExecutor().probe("u1", tmp_path).state is ProbeState.UNKNOWN


def test_an_empty_claim_is_over_once_its_writer_is_gone(tmp_path: Path) -> None:
    (tmp_path / CLAIM).touch()
    writer = subprocess.Popen([sys.executable, "-c", SLEEPER, "agent.runner", str(tmp_path)])
    try:
        until(lambda: processes_with_arguments("agent.runner", str(tmp_path)), "the writer")
        assert LocalExecutor().probe("u1", tmp_path).state is ProbeState.UNKNOWN
    finally:
        writer.kill()
        writer.wait()
    assert LocalExecutor().probe("u1", tmp_path).state is ProbeState.GONE
    assert not LocalExecutor().void("u1", tmp_path)


def test_an_order_that_cannot_be_read_claims_nothing(tmp_path: Path) -> None:
    (tmp_path / ORDER).write_text("{half")
    assert start_runner(tmp_path).wait(DEADLINE_SECONDS) == runner.BAD_ORDER
    assert sorted(path.name for path in tmp_path.iterdir()) == [ORDER]


def test_a_result_of_absurd_size_is_left_out_and_said(launch: Callable[..., Run]) -> None:
    run = launch("pass")
    (run.directory / "result.json").write_bytes(b" " * ((1 << 20) + 1))
    probe = run.until_over()
    assert probe.state is ProbeState.EXITED
    assert probe.result_text is None
    assert "result.json is larger" in probe.detail


def test_a_result_that_cannot_be_read_now_is_unknown(
    launch: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launch("pass")
    (run.directory / "result.json").write_text("{}")
    assert run.until_over().result_text == "{}"
    real = os.open

    def failing(path: str | Path, *rest: int) -> int:
        if str(path).endswith("result.json"):
            raise OSError(5, "Input/output error")
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        probe = run.probe()
    assert probe.state is ProbeState.UNKNOWN
    assert "Input/output error" in probe.detail
    assert run.probe().state is ProbeState.EXITED


@pytest.mark.parametrize("kind", ["pipe", "folder", "latin"])
def test_a_result_that_is_none_does_not_hold_up_the_end(launch: Callable[..., Run], kind: str) -> None:
    run = launch("pass")
    path = run.directory / "result.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.write_bytes(b"\xff")
    probe = run.until_over()
    assert (probe.state, probe.result_text) == (ProbeState.EXITED, None)
    assert "result.json" in probe.detail


POLITE = (
    "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    "print('ready', flush=True)\ntime.sleep(600)"
)


def test_a_runner_told_to_end_from_outside_says_so(launch: Callable[..., Run]) -> None:
    run = launch(POLITE)
    run.until_said("ready")
    os.kill(run.runner_pid(), signal.SIGTERM)
    probe = run.until_over()
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.cause) == (0, StopCause.INTERRUPTED)


def test_also_when_the_trainer_was_told_first_as_by_a_reboot(launch: Callable[..., Run]) -> None:
    run = launch(POLITE)
    run.until_said("ready")
    trainer = run.until_started()
    os.kill(run.runner_pid(), signal.SIGSTOP)  # so that it sees both at once
    os.kill(trainer, signal.SIGTERM)
    until(lambda: identify(trainer) is None, "the trainer's end")
    os.kill(run.runner_pid(), signal.SIGTERM)
    os.kill(run.runner_pid(), signal.SIGCONT)
    probe = run.until_over()
    assert probe.exit is not None
    assert (probe.exit.returncode, probe.exit.cause) == (0, StopCause.INTERRUPTED)


def test_a_request_outranks_the_signal_that_comes_after_it(launch: Callable[..., Run]) -> None:
    run = launch(POLITE)
    run.until_said("ready")
    os.kill(run.runner_pid(), signal.SIGSTOP)
    run.stop(StopCause.PRUNE)
    os.kill(run.runner_pid(), signal.SIGTERM)
    os.kill(run.runner_pid(), signal.SIGCONT)
    probe = run.until_over()
    assert probe.exit is not None
    assert probe.exit.cause is StopCause.PRUNE


def test_why_a_program_did_not_start_is_in_the_exit_record(launch: Callable[..., Run], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for argv, number in ((["/no/such/program"], errno.ENOENT), ([str(plain)], errno.EACCES)):
        exited = launch(argv=argv).until_over().exit
        assert exited is not None
        assert (exited.returncode, exited.errno) == (None, number)
        assert exited.error.startswith(f"cannot start {argv[0]} in /: {os.strerror(number)}")


def test_what_fails_between_fork_and_exec_keeps_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "process.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, text)

    monkeypatch.setattr(runner, "write_text", full)
    with pytest.raises(OSError, match="No space left") as caught:
        runner._start(tmp_path, order_for("pass"))
    assert caught.value.errno == errno.ENOSPC


def test_the_log_tail_is_bounded(launch: Callable[..., Run]) -> None:
    run = launch("print('x' * 100_000)\nfor i in range(200): print('line', i)\nprint('y' * 5000)")
    tail = run.until_over().log_tail
    assert len(tail) == 50
    assert tail[0] == "line 151"
    assert tail[-1] == "y" * 2000


def test_descendants_sees_children_and_not_zombies() -> None:
    before = {process.pid for process in descendants(os.getpid())}
    child = subprocess.Popen([sys.executable, "-S", "-c", SLEEPER])
    assert {process.pid for process in descendants(os.getpid())} - before == {child.pid}
    child.kill()
    until(lambda: child.pid not in {process.pid for process in descendants(os.getpid())}, "the zombie to be left out")
    child.wait()


def test_the_runner_imports_little() -> None:
    code = "import json, sys, agent.runner; print(json.dumps(sorted(sys.modules)))"
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=root).stdout
    modules = set(json.loads(output))
    heavy = {"pydantic", "sqlalchemy", "trainer", "yaml", "numpy", "torch", "logging", "agent.adapters", "agent.ledger"}
    assert not heavy & modules
    assert {name for name in modules if name.startswith("agent")} == {
        "agent", "agent.atomic_files", "agent.domain", "agent.domain.errors", "agent.domain.runfiles",
        "agent.domain.trials", "agent.process_identity", "agent.process_tree", "agent.runner",
    }  # fmt: skip
