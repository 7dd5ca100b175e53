"""`analyse` as a user meets it: JSON, tables and plots of a model's score."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner, Result

from small_data_set import make_data_set, make_model, texts
from trainer.__main__ import app
from trainer.analysis.findings import Analysis, AnalysisError
from trainer.analysis.measuring import LossCollector
from trainer.report import EvaluateResult, read_result
from trainer.scoring import Scoring, ScoringRequest

ROOT = Path(__file__).resolve().parents[2]
PLOTS = {"tail_share", "byte_leverage", "loss_by_context", "loss_by_class", "bpb_by_source"}
# One is in a script that the font of the plots lacks.
OWNERS = ["owner0", "漢字", "$owner2$"]
SOURCES = [f"{OWNERS[number % 3]}/repository{number}" for number in range(12)]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analyse")
    make_model(folder / "model.pt", make_data_set(folder / "data", sources=SOURCES))
    done = _run("analyse", folder / "model.pt", "--data", folder / "data", "--out", folder / "out", "--device", "cpu")
    assert done.exit_code == 0, done.output
    (folder / "analyse.log").write_text(done.stdout)
    return folder


def test_an_analysis_has_the_score_of_the_evaluation(work: Path, tmp_path: Path) -> None:
    _run("evaluate", work / "model.pt", "--data", work / "data", "--out", tmp_path, "--device", "cpu")
    evaluated, found = read_result(tmp_path / "result.json"), Analysis.from_file(work / "out" / "analysis.json")
    assert isinstance(evaluated, EvaluateResult)
    assert found.score.val_bpb == pytest.approx(evaluated.val_bpb, abs=1e-9)
    assert found.by_source is not None
    for groups in (found.by_length, found.by_context, found.by_class, found.by_source):
        assert math.fsum(group.bpb_contribution for group in groups) == pytest.approx(evaluated.val_bpb, abs=1e-9)
        assert sum(group.tokens for group in groups) == evaluated.val_tokens == sum(found.losses.histogram_tokens)
        assert sum(group.bytes for group in groups) == evaluated.val_bytes
    assert {group.name for group in found.by_source} == set(OWNERS)
    # Windows of 32 tokens: every context length once a window, but for the last, shorter one.
    full, rest = divmod(evaluated.val_tokens, 32)
    spans = {"1": (1, 1), "2-3": (2, 3), "4-7": (4, 7), "8-15": (8, 15), "16-31": (16, 31), "32": (32, 32)}
    expected = {name: full * (b - a + 1) + max(0, min(b, rest) - a + 1) for name, (a, b) in spans.items()}
    assert {group.name: group.tokens for group in found.by_context} == expected


def test_losses_are_kept_where_they_belong(work: Path) -> None:
    scoring = Scoring.open(ScoringRequest(source=work / "model.pt", data=work / "data", stride=8, device="cpu"))
    collector = LossCollector(scoring.validation.positions, "cpu")
    with pytest.raises(RuntimeError, match="have no loss"):
        collector.losses()
    result = scoring.run(on_scored=[collector], say=lambda _: None)
    losses = collector.losses()
    assert losses.sum(dtype=np.float64) / losses.size == pytest.approx(result.val_loss, rel=1e-12)
    window = next(one for one in reversed(list(scoring.plan)))
    stream = scoring.validation.tokens.astype(np.int64)
    import torch

    with torch.no_grad():
        inputs, targets = (torch.from_numpy(stream[window.start + k : window.end + k])[None] for k in (0, 1))
        alone = scoring.model.token_losses(inputs, targets)[0, window.score_from - window.start :]
    assert losses[window.score_from :] == pytest.approx(alone.numpy(), abs=1e-5)


def test_the_tables_are_printed_and_written(work: Path) -> None:
    text = (work / "out" / "analysis.md").read_text()
    assert (work / "analyse.log").read_text() == text
    found = Analysis.from_file(work / "out" / "analysis.json")
    assert f"val_bpb {found.score.val_bpb:.6f}" in text
    rows = [line for line in text.splitlines() if line.startswith("| all ")]
    assert len(rows) == 4
    assert all(f"{found.score.val_tokens}" in row and f"{found.score.val_bpb:.4f}" in row for row in rows)
    for line in ("| owner0 ", "| word-initial letters ", "| 16-31 ", "## Loss of single tokens", "47% of the bytes"):
        assert line in text


def _require_drawn(folder: Path, names: set[str]) -> None:
    assert {path.stem for path in folder.glob("*.png")} == names
    for path in folder.glob("*.png"):
        pixels = imread(path)
        assert pixels.shape[:2] == (540, 840)
        inside = pixels[60:-90, 200:-40, :3]  # the axes' inside, without labels
        assert 0.001 < np.mean(inside.min(axis=2) < 0.95) < 0.9, path


def test_plots_have_something_on_them(work: Path) -> None:
    _require_drawn(work / "out", PLOTS)


def test_a_finished_analysis_is_shown_again_without_model_data_or_torch(work: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom trainer.__main__ import app\n"
        "try:\n    app(['analyse', '--from', sys.argv[1], '--out', sys.argv[2]])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    written = work / "out" / "analysis.json"
    done = subprocess.run(
        [sys.executable, "-c", program, written, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == (work / "analyse.log").read_text()
    assert (tmp_path / "analysis.md").read_bytes() == (work / "out" / "analysis.md").read_bytes()
    _require_drawn(tmp_path, PLOTS)


def test_sliding_windows_without_sources_and_plots(tmp_path: Path) -> None:
    dataset = make_data_set(tmp_path / "data", case_folding=True, val=texts(6, 5))
    make_model(tmp_path / "model.pt", dataset)
    options = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--device", "cpu", "--no-plots"]
    done = _run("analyse", tmp_path / "model.pt", *options, "--stride", 8, "--context", 40)
    assert done.exit_code == 0, done.output
    found = Analysis.from_file(tmp_path / "out" / "analysis.json")
    assert (found.score.metric, found.score.stride, found.score.context) == ("sliding", 8, 40)
    assert found.by_source is None
    assert not list((tmp_path / "out").glob("*.png"))
    marks = next(group for group in found.by_class if group.name == "case marks")
    assert marks.tokens > 0 == marks.bytes
    assert marks.bpb is None
    assert {group.name: group.tokens for group in found.by_context}["32-40"] > found.score.val_tokens - 40
    assert "sliding windows, stride 8 of 40 tokens" in done.stdout
    assert "## By source" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--out", "o"], "give SOURCE and --data"),
        (["model.pt", "--out", "o"], "give SOURCE and --data"),
        (["model.pt", "--from", "a.json", "--out", "o"], "leave SOURCE"),
        (["--from", "absent.json", "--out", "o"], "absent.json"),
    ],
)
def test_half_a_question_is_one_line(arguments: list[str], named: str) -> None:
    done = _run("analyse", *arguments)
    assert done.exit_code == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_files_that_are_no_analysis_are_named(work: Path, tmp_path: Path) -> None:
    whole = json.loads((work / "out" / "analysis.json").read_text())
    for change, named in (({"version": 2}, "version 2"), ({"losses": None}, "not an analysis")):
        path = tmp_path / "a.json"
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(AnalysisError, match=named):
            Analysis.from_file(path)


def test_an_analysis_is_one_process(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    done = _run("analyse", work / "model.pt", "--data", work / "data", "--out", tmp_path)
    assert done.exit_code == 2
    assert "without torchrun" in done.stderr
