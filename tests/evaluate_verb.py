"""`evaluate` as a user meets it, on the data set and the model of a folder that `small_work` has made."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from small_data_set import make_data_set, make_model
from trainer.__main__ import app
from trainer.report import EvaluateResult, read_result


def small_work(folder: Path) -> Path:
    make_model(folder / "model.pt", make_data_set(folder / "data"))
    return folder


def evaluate(work: Path, out: Path, *options: object) -> Result:
    command = ["evaluate", work / "model.pt", "--data", work / "data", "--out", out, "--device", "cpu", *options]
    return CliRunner().invoke(app, [str(argument) for argument in command])


def result_in(out: Path) -> EvaluateResult:
    result = read_result(out / "result.json")
    assert isinstance(result, EvaluateResult)
    return result
