from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agent.adapters.command_inbox import CommandInbox
from agent.adapters.workspace import Workspace
from agent.domain.errors import CommandError
from agent.domain.observations import CommandVerb


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    workspace.create()
    return workspace


def test_what_is_sent_is_read_in_order_until_it_is_settled(workspace: Workspace) -> None:
    inbox = CommandInbox(workspace)
    for number, verb in enumerate(CommandVerb, start=1):
        os.utime(inbox.send(verb, number), ns=(number, number))
    commands, problems = inbox.pending()
    assert not problems
    assert [(command.verb, command.trial_id) for command in commands] == [
        (verb, number) for number, verb in enumerate(CommandVerb, start=1)
    ]
    assert CommandInbox(workspace).pending()[0] == commands, "a crash before settling loses nothing"
    for command in commands:
        inbox.settle(command.claimed_path)
        inbox.settle(command.claimed_path)
    assert inbox.pending() == ((), ())
    assert not list(workspace.claimed_commands.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "{half",
        "[]",
        "{}",
        json.dumps({"verb": "explode", "trial_id": 1}),
        json.dumps({"verb": "stop", "trial_id": "1"}),
        json.dumps({"verb": "stop", "trial_id": True}),
        json.dumps({"verb": "stop", "trial_id": 0}),
        json.dumps({"verb": "stop", "trial_id": 2**70}),
        json.dumps({"verb": ["stop"], "trial_id": 1}),
        json.dumps({"verb": "stop", "trial_id": 1, "force": True}),
        "[" * 60_000,
        " " * 100_000,
        "\xff",
    ],
)
def test_bad_commands_are_rejected_with_a_text_and_stop_nothing_else(workspace: Workspace, text: str) -> None:
    inbox = CommandInbox(workspace)
    (workspace.commands / "bad.json").write_bytes(text.encode("latin-1"))
    inbox.send(CommandVerb.PAUSE, 7)
    commands, (problem,) = inbox.pending()
    assert [command.trial_id for command in commands] == [7]
    assert "bad.json is not a command" in problem
    (note,) = workspace.rejected.glob("*.txt")
    assert note.read_text() == problem + "\n"
    assert note.with_suffix("").read_bytes() == text.encode("latin-1")
    assert len(inbox.pending()[0]) == 1, "the bad one is not offered again"


def test_other_files_are_left_alone_and_links_are_not_followed(workspace: Workspace, tmp_path: Path) -> None:
    (workspace.commands / ".x.json").write_text("{}")
    (workspace.commands / "a.json.tmp").write_text("{}")
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"verb": "stop", "trial_id": 1}))
    (workspace.commands / "link.json").symlink_to(secret)
    commands, problems = CommandInbox(workspace).pending()
    assert (commands, len(problems)) == ((), 1)
    assert secret.exists()
    assert (workspace.commands / ".x.json").exists()
    assert (workspace.commands / "a.json.tmp").exists()


def test_a_name_that_was_used_before_is_another_command(workspace: Workspace) -> None:
    inbox, seen = CommandInbox(workspace), set()
    for _ in range(2):
        (workspace.commands / "stop-it.json").write_text(json.dumps({"verb": "stop", "trial_id": 1}))
        (command,), problems = inbox.pending()
        assert not problems
        assert inbox.pending()[0] == (command,), "claimed, it keeps its id"
        seen.add(command.command_id)
        inbox.settle(command.claimed_path)
    assert len(seen) == 2
    assert "stop-it" not in seen


def test_what_send_named_keeps_its_name_as_id(workspace: Workspace) -> None:
    inbox = CommandInbox(workspace)
    path = inbox.send(CommandVerb.STOP, 1)
    assert [command.command_id for command in inbox.pending()[0]] == [path.stem]


@pytest.mark.parametrize("failing", ["open", "claim", "reject"])
def test_a_file_that_cannot_be_handled_is_told_and_offered_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    inbox = CommandInbox(workspace)
    (workspace.commands / "a.json").write_text("{" if failing == "reject" else '{"verb": "stop", "trial_id": 1}')
    (workspace.commands / "b.json").write_text('{"verb": "stop", "trial_id": 2}')
    real_open, real_rename = os.open, Path.rename

    def guarded_open(path: str | Path, *rest: int) -> int:
        if failing == "open" and str(path).endswith("a.json"):
            raise OSError(5, "Input/output error")
        return real_open(path, *rest)

    def guarded_rename(self: Path, target: Path) -> Path:
        folder = {"claim": "claimed", "reject": "rejected"}.get(failing)
        if self.name.endswith("a.json") and target.parent.name == folder:
            raise PermissionError(1, "Operation not permitted")
        return real_rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", guarded_open)
        patch.setattr(Path, "rename", guarded_rename)
        commands, problems = inbox.pending()
    assert [command.trial_id for command in commands] == [2]
    assert any("a.json" in problem for problem in problems)
    again, problems = inbox.pending()
    assert len(again) == (1 if failing == "reject" else 2)
    assert bool(problems) is (failing == "reject")


def test_waiting_names_what_a_look_would_take(workspace: Workspace) -> None:
    inbox = CommandInbox(workspace)
    (workspace.commands / ".x.json").write_text("{}")
    (workspace.commands / "notes.txt").write_text("{}")
    path = inbox.send(CommandVerb.STOP, 1)
    assert inbox.waiting() == {f"{path.name}:{path.stat().st_mtime_ns}"}
    inbox.pending()
    assert inbox.waiting() == frozenset()


def test_sending_without_a_workspace_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="a workspace"):
        CommandInbox(Workspace(tmp_path / "nowhere")).send(CommandVerb.STOP, 1)
