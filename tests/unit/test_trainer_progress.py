"""What a long verb says of itself."""

from __future__ import annotations

import sys

import pytest

from trainer.data.progress import Bars, Lines, Progress, Silent, Timed, shown_to


def _work(progress: Progress) -> None:
    with progress.stage("index", total=4_000_000) as advance:
        advance(1_000_000)
        advance(3_000_000)
    with progress.stage("split", total=3000, unit="documents") as advance:
        advance(3000)
    with progress.stage("tokenizer"):
        pass


def test_lines_tell_the_end_of_each_stage_and_its_rate() -> None:
    said: list[str] = []
    _work(Lines(said.append))
    assert [line.split(" in ")[0] for line in said[:2]] == ["index: 4.0 MB", "split: 3,000 documents"]
    assert said[0].endswith("MB/s")
    assert said[1].endswith("documents/s")
    assert said[2].startswith("tokenizer: ")
    assert len(said) == 3


def test_lines_tell_how_far_a_long_stage_is() -> None:
    said: list[str] = []
    _work(Lines(said.append, every_seconds=0.0))
    assert said[0].startswith("index: 1.0 MB of 4.0 MB (25%), ")
    assert said[1].startswith("index: 4.0 MB of 4.0 MB (100%), ")


def test_bars_leave_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    _work(Bars())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "index: 4.0 MB in " in shown.err
    assert "split: 3,000 documents in " in shown.err


def test_stages_are_timed_in_order_and_only_if_they_end() -> None:
    timed = Timed(Silent())
    _work(timed)
    with pytest.raises(OSError, match="full"), timed.stage("encode"):
        raise OSError("full")
    assert list(timed.seconds) == ["index", "split", "tokenizer"]
    assert all(seconds >= 0 for seconds in timed.seconds.values())


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, kind in ((True, Bars), (False, Lines)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer, raising=False)
        assert isinstance(shown_to(lambda _: None), kind)
