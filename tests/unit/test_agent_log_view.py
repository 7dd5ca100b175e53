"""A run's log for people: its tail, and following it to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agent import log_view
from agent.domain.errors import NotFoundError
from agent.domain.runfiles import EXIT, LOG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / LOG).write_text("".join(f"line {number}\n" for number in range(1, 6)), encoding="utf-8")
    return tmp_path


def between_polls(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """What the run does while the view sleeps; sleeping once more than that is a view that does not end."""
    left = iter(steps)

    def sleep(_seconds: float) -> None:
        step = next(left, None)
        assert step is not None, "followed on after the run was over"
        step()

    monkeypatch.setattr(log_view.time, "sleep", sleep)


def append(folder: Path, data: bytes) -> Callable[[], None]:
    def write() -> None:
        with (folder / LOG).open("ab") as file:
            file.write(data)

    return write


def end(folder: Path) -> Callable[[], None]:
    return lambda: (folder / EXIT).write_text("{}", encoding="utf-8")


def test_the_last_lines(folder: Path) -> None:
    assert log_view.tail(folder / LOG, 2) == ["line 4", "line 5"]
    assert log_view.tail(folder / LOG, 99)[0] == "line 1"


def test_a_huge_log_is_read_from_its_end_only(folder: Path) -> None:
    append(folder, b"x" * (2 << 20) + b"\nlast\n")()
    assert log_view.tail(folder / LOG, 1) == ["last"]
    assert sum(len(line) for line in log_view.tail(folder / LOG, 99)) < 2 << 20


def test_bytes_that_are_no_text_are_shown_as_such(folder: Path) -> None:
    append(folder, b"\xff\xfe broken\n")()
    assert log_view.tail(folder / LOG, 1) == ["\ufffd\ufffd broken"]


def test_no_log_yet_is_said(tmp_path: Path) -> None:
    for look in (
        lambda: log_view.tail(tmp_path / LOG, 1),
        lambda: log_view.show(tmp_path, lines=1, follow=False),
        lambda: log_view.show(tmp_path, lines=1, follow=True),
    ):
        with pytest.raises(NotFoundError, match="there is no log at"):
            look()


def test_without_follow_it_ends_though_the_run_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_view.show(folder, lines=2, follow=False)
    assert capsys.readouterr().out == "line 4\nline 5\n"


def test_follow_ends_when_the_run_is_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def last_words() -> None:
        append(folder, b"last words\n")()
        end(folder)()

    between_polls(monkeypatch, append(folder, b"half a "), append(folder, b"line\n"), last_words)
    log_view.show(folder, lines=1, follow=True)
    assert capsys.readouterr().out == "line 5\nhalf a line\nlast words\n"


def test_follow_of_a_run_that_is_over_prints_and_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end(folder)()
    between_polls(monkeypatch)
    log_view.show(folder, lines=2, follow=True)
    assert capsys.readouterr().out == "line 4\nline 5\n"


def test_a_letter_that_comes_in_two_pieces_is_one_letter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    between_polls(monkeypatch, append(folder, b"caf\xc3"), append(folder, b"\xa9\n"), end(folder))
    log_view.show(folder, lines=1, follow=True)
    assert capsys.readouterr().out == "line 5\ncafé\n"
