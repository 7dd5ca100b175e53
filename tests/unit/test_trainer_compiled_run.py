"""A whole run under torch.compile: its switches act, and nothing is compiled once the clock runs.

With the backend `aot_eager`, which captures and guards graphs as any does, and generates no code.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from small_data_set import make_data_set
from tiny_training import EVERYTHING, PLAIN, Settings, losses, result, run, scores, settings
from trainer.report import Event, ExitCode, Line
from trainer.warmup import build_passes

LOOP = {"first": 0, "last": 0, "start_fraction": 0.25, "gate_fraction": 0.5}
CASES: dict[str, Settings] = {
    "plain": PLAIN
    | {
        "limits": {"steps": 6},
        "model": PLAIN["model"] | {"num_layers": 1, "recurrence": LOOP},
        "qat": {"enabled": True, "start_fraction": 0.5},
        "export": {"bits": 4},
    },
    "everything": EVERYTHING
    | {
        "limits": {"steps": 6},
        "model": EVERYTHING["model"]
        | {"num_layers": 2, "recurrence": LOOP, "parallel_from": 1, "value_embedding": {"layers": [1], "dim": 8}},
        "qat": {"enabled": True, "start_fraction": 0.5},
        "export": {"bits": 4},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("compiled") / "data").path


@pytest.fixture(autouse=True)
def _one_thread(seeded_on_one_thread: None) -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_flush_denormal(False)


def details(lines: list[Line], kind: str) -> list[tuple[int, str]]:
    return [(line.step, line.detail) for line in lines if isinstance(line, Event) and line.kind == kind]


@pytest.mark.parametrize("name", CASES)
def test_every_switch_acts_in_a_compiled_run_and_compiles_nothing_more(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("trainer.run_state.build_passes", partial(build_passes, backend="aot_eager"))
    curves = {}
    for title, changed in {
        "eager": {},
        "compiled": {"compile": True},
        "unquantised": {"compile": True, "qat": {"enabled": False}},
    }.items():
        code, lines = run(settings(CASES[name], **changed), data, tmp_path / title, capsys)
        assert code is ExitCode.OK
        curves[title] = losses(lines)
        compiled = "compile" in changed
        assert details(lines, "recompiles") == ([(6, "0")] if compiled else [])
        assert result(tmp_path / title).recompiles == (0 if compiled else None)
        assert bool(details(lines, "warm_up")) == compiled
        if title == "eager":
            whole = scores(lines)
        elif title == "compiled":
            for found, wanted in zip(scores(lines), whole, strict=True):
                assert found == pytest.approx(wanted, rel=1e-3)
            assert [step for step, _ in details(lines, "late_qat")] == [3]
    assert curves["compiled"] == pytest.approx(curves["eager"], rel=1e-3)
    differ = [step for step, loss in curves["compiled"].items() if abs(loss / curves["unquantised"][step] - 1) > 1e-4]
    assert differ
    assert min(differ) == 4  # the first after the switch
