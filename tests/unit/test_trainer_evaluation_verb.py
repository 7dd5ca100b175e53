"""`evaluate` as a user meets it: plain and sliding, files, lines, exit codes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_verb import evaluate, result_in, small_work
from torch import Tensor
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.artifact import MAGIC
from trainer.evaluation import ScoredBatch, ValidationStream
from trainer.model.gpt import GPT
from trainer.model_file import load_model, save_model
from trainer.ranks import Ranks, RanksError
from trainer.report import parse_line
from trainer.scoring import RemainingTime, Scoring, ScoringRequest


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_work(tmp_path_factory.mktemp("evaluate"))


def test_a_plain_score_says_so(work: Path, tmp_path: Path) -> None:
    done = evaluate(work, tmp_path)
    assert done.exit_code == 0, done.output
    result = result_in(tmp_path)
    assert (result.metric, result.context, result.stride, result.world_size) == ("plain", 32, None, 1)
    assert result.peak_memory_bytes is None
    assert result.scoring_seconds is not None
    assert 0 < result.scoring_seconds <= result.wall_seconds
    line = f"final_raw_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}"
    assert done.stdout.splitlines() == [line]
    assert done.stderr == ""


def test_an_averaged_model_has_a_label_of_its_own(work: Path, tmp_path: Path) -> None:
    raw = load_model(work / "model.pt", "cpu")
    hashes = {"tokenizer_sha256": raw.tokenizer_sha256, "val_sha256": raw.val_sha256}
    save_model(tmp_path / "averaged.pt", raw.model, raw.config, averaging="ema", **hashes)
    done = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "averaged.pt"), "--data", str(work / "data"), "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    result = result_in(tmp_path)
    assert result.averaging == "ema"
    assert done.stdout == f"final_ema_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}\n"


def test_a_sliding_score_has_a_label_of_its_own_and_more_context(work: Path, tmp_path: Path) -> None:
    scores = {}
    for stride, context in ((8, None), (8, 64), (32, None)):
        options = [] if context is None else ["--context", context]
        done = evaluate(work, tmp_path, "--stride", stride, *options, "--batch-tokens", 200)
        assert done.exit_code == 0, done.output
        result = result_in(tmp_path)
        assert (result.metric, result.context, result.stride) == ("sliding", context or 32, stride)
        assert done.stdout == (
            f"final_raw_sliding_window_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f} "
            f"stride:{stride} context:{context or 32}\n"
        )
        assert parse_line(done.stdout) is None
        assert result.val_bpb == pytest.approx(result.val_loss / math.log(2) * result.val_tokens / result.val_bytes)
        scores[stride, context] = result.val_loss
    assert len(set(scores.values())) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--stride", "33"], "stride of 33"),
        (["--stride", "0"], "stride of 0"),
        (["--stride", "4", "--context", "3"], "stride of 4"),
        (["--context", "64"], "--stride"),
    ],
)
def test_windows_that_cannot_be_laid_are_one_line(work: Path, tmp_path: Path, options: list[str], named: str) -> None:
    (tmp_path / "result.json").write_text("an older one")
    done = evaluate(work, tmp_path, *options)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "result.json").read_text() == "an older one"


@pytest.mark.parametrize(("given", "remedy"), [([], "--batch-tokens 32768"), (["--batch-tokens", "40"], "GPU")])
def test_a_batch_that_does_not_fit_names_a_smaller_one(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], remedy: str
) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "token_losses", full)
    done = evaluate(work, tmp_path, *given)
    assert done.exit_code == 67
    assert done.stderr.startswith("error: a batch of ")
    assert remedy in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_a_bug_in_the_pass_keeps_its_traceback(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("not memory")

    monkeypatch.setattr(GPT, "token_losses", broken)
    done = evaluate(work, tmp_path)
    assert done.exit_code == 1
    assert isinstance(done.exception, RuntimeError)


def test_a_compiled_pass_scores_the_same_and_compiles_one_graph(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def compiled(function: object, **options: object) -> object:
        assert options == {"dynamic": False, "fullgraph": True}

        def backend(module: torch.fx.GraphModule, inputs: object) -> object:
            graphs.append(module)
            return module

        return real(function, backend=backend, **options)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    request = {"source": work / "model.pt", "data": work / "data", "stride": 8, "batch_tokens": 320, "device": "cpu"}
    plain = Scoring.open(ScoringRequest(**request)).run(say=_silent)
    assert not graphs
    fast = Scoring.open(ScoringRequest(**request, compile=True)).run(say=_silent)
    assert len(graphs) == 1
    assert fast.val_bpb == pytest.approx(plain.val_bpb, abs=1e-6)


def _silent(_: str) -> None:
    raise AssertionError("there was nothing to say")


def _batch(number: int, batches: int) -> ScoredBatch:
    nothing = torch.zeros(64, 2048)
    return ScoredBatch(
        number=number,
        batches=batches,
        inputs=nothing,
        targets=nothing,
        positions=nothing,
        valid=nothing,
        losses=nothing,
    )


@pytest.mark.parametrize(
    ("batches", "said"),
    [(545, ["about 41 s left: 540 batches of 64 x 2048 tokens"]), (100, []), (4, [])],
)
def test_a_long_evaluation_says_how_long(batches: int, said: list[str]) -> None:
    now = [0.0]
    lines: list[str] = []
    remaining = RemainingTime(torch.device("cpu"), lines.append, clock=lambda: now[0])
    for number in range(batches):
        now[0] += 60.0 if number < 2 else 0.0759  # the first ones warm up
        remaining(_batch(number, batches))
    assert lines == said
    assert all(parse_line(line) is None for line in lines)


def test_the_ranks_of_torchrun_are_read_and_checked() -> None:
    whole = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert Ranks.from_environment({}) == Ranks.from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks()
    assert Ranks.from_environment(whole) == Ranks(rank=3, world_size=8, local_rank=1)
    for change, named in (
        ({"MASTER_PORT": None}, "MASTER_PORT"),
        ({"RANK": None}, "RANK"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
    ):
        given = {name: value for name, value in {**whole, **change}.items() if value is not None}
        with pytest.raises(RanksError, match=named):
            Ranks.from_environment(given)


def test_one_process_adds_up_alone() -> None:
    with Ranks().joined():
        assert Ranks().sum_float64([1.5, 2.0]) == [1.5, 2.0]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("failing", [False, True])
def test_processes_part_unless_one_failed_and_then_gloo_gets_a_moment(
    monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    """Without it an error's exit code is now and then that of an abort: see `Ranks.joined`."""
    done: list[object] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: done.append("parted"))
    monkeypatch.setattr("trainer.ranks.time.sleep", done.append)
    monkeypatch.setattr(Ranks, "_require_one_backend", lambda *_: None)
    with pytest.raises(InterruptedError) if failing else nullcontext(), Ranks(world_size=2).joined():
        if failing:
            raise InterruptedError
    assert done == ([0.1] if failing else ["parted"])


def test_an_artifact_is_told_from_a_model_by_its_first_bytes(work: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(MAGIC + b"\\0" * 50)
    command = ["evaluate", str(tmp_path / "x"), "--data", str(work / "data"), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "artifact" in done.stderr


def test_the_stream_is_the_shards_one_after_the_other(work: Path) -> None:
    scoring = Scoring.open(ScoringRequest(source=work / "model.pt", data=work / "data", device="cpu"))
    assert len(scoring.dataset.val_shards) > 1
    assert scoring.validation.positions == scoring.dataset.manifest.val_tokens
    assert np.array_equal(scoring.validation.tokens, ValidationStream.load(scoring.dataset).tokens)
