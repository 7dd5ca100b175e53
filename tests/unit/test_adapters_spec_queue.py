from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.adapters import spec_queue
from agent.adapters.spec_queue import MAX_FILES_PER_LOOK, SpecQueue
from agent.adapters.workspace import Workspace
from agent.domain.errors import SpecError
from agent.domain.specs import Spec

LATER = datetime.now(UTC) + timedelta(hours=1)


def text_of(name: str) -> str:
    return f"name: {name}\ncommand: [python, train.py]\n"


def val_sha(spec: Spec) -> str | None:
    if spec.data == "missing":
        raise SpecError("no data set there", source=spec.name, field="data", remedy="prepare one")
    return "abc123"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    workspace.create()
    return workspace


@pytest.fixture
def queue(workspace: Workspace) -> SpecQueue:
    return SpecQueue(workspace, val_sha)


def test_a_dropped_file_arrives_and_ends_in_accepted(workspace: Workspace, queue: SpecQueue) -> None:
    (workspace.queue / "my-a.yaml").write_text(text_of("a"))
    (arrival,), refusals = queue.arrivals(LATER)
    assert not refusals
    assert (arrival.spec.name, arrival.source_name, arrival.val_sha256) == ("a", "my-a.yaml", "abc123")
    assert arrival.source_text == text_of("a")
    assert not (workspace.queue / "my-a.yaml").exists()
    queue.settle(arrival.claimed_path, None)
    queue.settle(arrival.claimed_path, None)
    assert (workspace.accepted / "my-a.yaml").read_text() == text_of("a")
    assert queue.arrivals(LATER) == ((), ())


def test_a_claimed_file_is_offered_until_it_is_settled(workspace: Workspace, queue: SpecQueue) -> None:
    (workspace.queue / "a.yml").write_text(text_of("a"))
    first = queue.arrivals(LATER)
    after_crash = SpecQueue(workspace, val_sha).arrivals(LATER)
    assert first == after_crash
    assert first[0][0].source_name == "a.yml"


def test_bad_files_are_refused_with_a_text_and_stop_nothing_else(workspace: Workspace, queue: SpecQueue) -> None:
    (workspace.queue / "bad.yaml").write_text("name: [\n")
    (workspace.queue / "data.yaml").write_text(text_of("d") + "data: missing\n")
    (workspace.queue / "good.yaml").write_text(text_of("good"))
    (workspace.queue / "huge.yaml").write_bytes(b"# " + b"x" * 10_000_000)
    (workspace.queue / "latin.yaml").write_bytes(b"name: \xff\n")
    arrivals, refusals = queue.arrivals(LATER)
    assert [arrival.source_name for arrival in arrivals] == ["good.yaml"]
    assert {refusal.source_name for refusal in refusals} == {"bad.yaml", "data.yaml", "huge.yaml", "latin.yaml"}
    for refusal in refusals:
        queue.settle(refusal.claimed_path, refusal.message)
        reason = (workspace.rejected / f"{refusal.source_name}.txt").read_text()
        assert reason == refusal.message + "\n"
        assert "Remedy: " in reason
        assert (workspace.rejected / refusal.source_name).exists()


def test_refused_twice_under_one_name_keeps_both(workspace: Workspace, queue: SpecQueue) -> None:
    for text in ("first: 1\n", "second: 2\n"):
        (workspace.queue / "a.yaml").write_text(text)
        (refusal,) = queue.arrivals(LATER)[1]
        queue.settle(refusal.claimed_path, refusal.message)
    assert (workspace.rejected / "a.yaml").read_text() == "first: 1\n"
    assert (workspace.rejected / "a.2.yaml").read_text() == "second: 2\n"
    assert (workspace.rejected / "a.2.yaml.txt").exists()


def test_other_files_are_left_alone(workspace: Workspace, queue: SpecQueue) -> None:
    for name in (".hidden.yaml", ".a.yaml.123.tmp", "a.yaml.tmp", "notes.txt", "a.yaml~"):
        (workspace.queue / name).write_text(text_of("a"))
    (workspace.queue / "folder.yaml").mkdir()
    os.mkfifo(workspace.queue / "pipe.yaml")
    before = sorted(workspace.queue.iterdir())
    assert queue.arrivals(LATER) == ((), ())
    assert sorted(workspace.queue.iterdir()) == before


def test_symbolic_links_are_refused_and_their_target_is_untouched(
    workspace: Workspace, queue: SpecQueue, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(text_of("secret"))
    (workspace.queue / "link.yaml").symlink_to(secret)
    (workspace.queue / "dangling.yaml").symlink_to("nowhere")
    arrivals, refusals = queue.arrivals(LATER)
    assert not arrivals
    assert len(refusals) == 2
    for refusal in refusals:
        assert "symbolic link" in refusal.message
        queue.settle(refusal.claimed_path, refusal.message)
    assert secret.read_text() == text_of("secret")
    assert (workspace.rejected / "link.yaml").is_symlink()
    assert queue.arrivals(LATER) == ((), ())


@pytest.mark.parametrize("half", ["name: a\ncommand: [pyth", "name: a\n", "name: a\ncommand: [a]\nseeds: [1"])
def test_a_young_half_written_file_is_left_until_it_is_old(workspace: Workspace, queue: SpecQueue, half: str) -> None:
    path = workspace.queue / "a.yaml"
    path.write_text(half)
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    assert queue.arrivals(written + timedelta(seconds=0.5)) == ((), ())
    assert path.exists()
    arrivals, refusals = queue.arrivals(written + timedelta(seconds=2.5))
    assert (len(arrivals), len(refusals)) == (0, 1)


def test_a_young_whole_file_arrives_at_once(workspace: Workspace, queue: SpecQueue) -> None:
    path = workspace.queue / "a.yaml"
    path.write_text(text_of("a"))
    arrivals, _ = queue.arrivals(datetime.fromtimestamp(path.stat().st_mtime, UTC))
    assert len(arrivals) == 1


def test_a_look_is_bounded_and_oldest_come_first(workspace: Workspace, queue: SpecQueue) -> None:
    count = MAX_FILES_PER_LOOK + 20
    for number in range(count):
        path = workspace.queue / f"{count - number:03}.yaml"
        path.write_text(text_of(f"n{number}"))
        os.utime(path, ns=(number, number))
    arrivals, _ = queue.arrivals(LATER)
    assert [arrival.spec.name for arrival in arrivals] == [f"n{number}" for number in range(MAX_FILES_PER_LOOK)]
    for arrival in arrivals:
        queue.settle(arrival.claimed_path, None)
    assert len(queue.arrivals(LATER)[0]) == 20


def test_a_file_that_cannot_be_looked_at_now_is_offered_later(workspace: Workspace) -> None:
    fail = [True]

    def flaky(spec: Spec) -> str | None:
        if fail[0]:
            raise OSError(5, "Input/output error")
        return None

    queue = SpecQueue(workspace, flaky)
    (workspace.queue / "a.yaml").write_text(text_of("a"))
    assert queue.arrivals(LATER) == ((), ())
    fail[0] = False
    assert len(queue.arrivals(LATER)[0]) == 1


def test_a_file_that_cannot_be_claimed_is_told_and_stops_nothing_else(
    workspace: Workspace, queue: SpecQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (workspace.queue / f"{name}.yaml").write_text(text_of(name))
    real = Path.rename

    def guarded(self: Path, target: Path) -> Path:
        if self.name == "a.yaml":
            raise PermissionError(1, "Operation not permitted")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", guarded)
    assert [arrival.spec.name for arrival in queue.arrivals(LATER)[0]] == ["b"]
    (fault,) = queue.faults
    assert "a.yaml cannot be taken out of the queue: Operation not permitted" in fault
    monkeypatch.undo()
    assert len(queue.arrivals(LATER)[0]) == 2
    assert queue.faults == ()


@pytest.mark.parametrize("error", [OverflowError, ValueError])
def test_a_spec_without_a_track_is_refused(
    workspace: Workspace, queue: SpecQueue, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def no_track(*_: object) -> None:
        raise error("int too large to convert to float")

    monkeypatch.setattr(spec_queue, "track_of", no_track)
    path = workspace.queue / "a.yaml"
    path.write_text(text_of("a"))
    with pytest.raises(SpecError, match="its track cannot be computed"):
        queue.check(path)
    arrivals, (refusal,) = queue.arrivals(LATER)
    assert arrivals == ()
    assert "int too large" in refusal.message


def test_a_date_in_the_future_does_not_keep_a_file_young(workspace: Workspace, queue: SpecQueue) -> None:
    path = workspace.queue / "a.yaml"
    path.write_text("name: a\n")
    future = LATER + timedelta(days=9)
    os.utime(path, (future.timestamp(), future.timestamp()))
    assert queue.arrivals() == ((), ()), "it was changed just now"
    assert len(queue.arrivals(LATER)[1]) == 1


def test_waiting_names_what_a_look_would_take_and_tells_when_it_has_rested(
    workspace: Workspace, queue: SpecQueue
) -> None:
    assert queue.waiting() == frozenset()
    for name in (".hidden.yaml", "a.yaml.tmp", "notes.txt"):
        (workspace.queue / name).write_text(text_of("a"))
    path = workspace.queue / "a.yaml"
    path.write_text(text_of("a"))
    assert queue.waiting() == {f"a.yaml:{path.stat().st_mtime_ns}"}
    os.utime(path, ns=(5, 5))
    assert queue.waiting() == {"a.yaml:5:rested"}
    (workspace.queue / "gone.yaml").symlink_to("nowhere")
    assert len(queue.waiting()) == 2
    queue.arrivals(LATER)
    assert queue.waiting() == frozenset()


def test_enqueue_validates_first_and_copies(workspace: Workspace, queue: SpecQueue, tmp_path: Path) -> None:
    source = tmp_path / "mine.yaml"
    source.write_text(text_of("a"))
    assert queue.check(source).name == "a"
    assert not list(workspace.queue.glob("*.yaml")), "checking queues nothing"
    assert queue.enqueue(source) == workspace.queue / "mine.yaml"
    assert queue.enqueue(source) == workspace.queue / "mine.2.yaml"
    assert source.exists()
    assert [arrival.spec.name for arrival in queue.arrivals()[0]] == ["a", "a"]
    source.write_text("name: a\n")
    with pytest.raises(SpecError, match=r"mine\.yaml"):
        queue.enqueue(source)
    source.write_text(text_of("a") + "data: missing\n")
    for verb in (queue.check, queue.enqueue):
        with pytest.raises(SpecError, match="no data set there"):
            verb(source)
    with pytest.raises(SpecError, match="cannot be read"):
        queue.enqueue(tmp_path / "nowhere.yaml")
    assert queue.arrivals() == queue.arrivals()
    assert not [path for path in workspace.queue.iterdir() if path.is_file()]


def test_enqueue_names_what_has_no_yaml_name_after_its_experiment(
    workspace: Workspace, queue: SpecQueue, tmp_path: Path
) -> None:
    source = tmp_path / "notes.txt"
    source.write_text(text_of("a"))
    assert queue.enqueue(source) == workspace.queue / "a.yaml"
