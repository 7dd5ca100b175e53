"""`evaluate --ttt` as a user meets it, and the settings that its options become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_verb import evaluate, result_in, small_work

from trainer.errors import InputError
from trainer.evaluation import ScoredBatch
from trainer.ranks import Ranks
from trainer.report import EvaluateResult, parse_line
from trainer.scoring import Scoring, ScoringRequest, final_line
from trainer.test_time_settings import AdaptationSettings, Mode, adaptation_settings

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")

SGD = {
    "mode": "sgd",
    "lr": 0.005,
    "chunk_tokens": 32768,
    "epochs": 3,
    "momentum": 0.9,
    "grad_clip_norm": 1.0,
    "moved": "all",
    "rank": None,
}
LORA = {
    "mode": "lora",
    "lr": 0.01,
    "chunk_tokens": 256,
    "epochs": 1,
    "momentum": None,
    "grad_clip_norm": None,
    "moved": None,
    "rank": 8,
}

_EVERY_OF_SGD = ["--ttt", "sgd", "--ttt-lr", 0.02, "--ttt-chunk", 64, "--ttt-epochs", 2]
_EVERY_OF_SGD += ["--ttt-momentum", 0.5, "--ttt-clip", 0, "--ttt-moved", "matrices"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_work(tmp_path_factory.mktemp("test_time"))


def _settings(mode: Mode, **asked: Any) -> AdaptationSettings:
    made = adaptation_settings(mode, **asked)
    assert made is not None
    return made


def _open(work: Path, ranks: Ranks | None = None, **request: Any) -> Scoring:
    files = {"source": work / "model.pt", "data": work / "data", "device": "cpu"}
    return Scoring.open(ScoringRequest(**files, **request), ranks or Ranks())


def _score(work: Path, **request: Any) -> EvaluateResult:
    return _open(work, **request).run(say=_silent)


def _silent(_: str) -> None:
    raise AssertionError("there was nothing to say")


@pytest.mark.parametrize(
    ("options", "recorded", "windows"),
    [
        (["--ttt", "sgd"], {}, (32, None)),
        (
            [*_EVERY_OF_SGD, "--stride", 16, "--context", 48],
            {"lr": 0.02, "chunk_tokens": 64, "epochs": 2, "momentum": 0.5, "grad_clip_norm": 0.0, "moved": "matrices"},
            (48, 16),
        ),
        (["--ttt", "lora", "--ttt-chunk", 16], {"chunk_tokens": 16}, (32, None)),
        (
            ["--ttt", "lora", "--context", 300, "--ttt-rank", 3, "--ttt-epochs", 2, "--ttt-lr", 0.1],
            {"rank": 3, "epochs": 2, "lr": 0.1},
            (300, None),
        ),
    ],
)
def test_a_score_has_a_metric_and_a_label_of_its_own_and_says_how(
    work: Path, tmp_path: Path, options: list[object], recorded: dict[str, object], windows: tuple[int, int | None]
) -> None:
    done = evaluate(work, tmp_path, *options)
    assert done.exit_code == 0, done.output
    result = result_in(tmp_path)
    assert (result.metric, result.context, result.stride, result.world_size) == ("ttt", *windows, 1)
    assert result.ttt is not None
    expected = (SGD if result.ttt.mode == "sgd" else LORA) | recorded
    assert result.ttt.model_dump() == expected
    assert result.val_tokens == _open(work).validation.positions
    line = done.stdout.splitlines()[-1]
    assert line.startswith(f"final_raw_ttt_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f} ")
    assert f" mode:{expected['mode']} lr:{expected['lr']:g} chunk:{expected['chunk_tokens']} " in line
    assert f" context:{windows[0]}" in line
    assert parse_line(line) is None
    assert final_line(result, "int6+zlib").startswith("final_int6_zlib_ttt_exact ")


def scoring_of(work: Path, options: list[object]) -> EvaluateResult:
    """The same windows without test-time training."""
    return _score(work, stride=options[options.index("--stride") + 1] if "--stride" in options else None)


def test_a_stream_of_one_chunk_says_that_nothing_is_learnt(work: Path, tmp_path: Path) -> None:
    """A chunk is whole windows: what the last one leaves is one more, and a first sliding window is one by itself."""
    scoring = _open(work)
    positions, window = scoring.validation.positions, 32
    whole = -(-positions // window) * window
    for options, learns in (
        (["--ttt-chunk", whole], False),
        (["--ttt-chunk", whole - 1], True),
        (["--ttt-chunk", whole, "--stride", 16], True),
    ):
        done = evaluate(work, tmp_path, "--ttt", "sgd", *options)
        assert done.exit_code == 0, done.output
        changed = abs(result_in(tmp_path).val_loss - scoring_of(work, options).val_loss) > 1e-6
        assert changed == learns
        told = "" if learns else f"nothing is learnt: all {positions} tokens are one chunk"
        assert done.stderr.startswith(told)
        assert bool(done.stderr) != learns


def test_what_is_not_asked_for_is_the_modes_default() -> None:
    assert _settings("sgd").model_dump() == SGD
    assert _settings("lora").model_dump() == LORA
    assert adaptation_settings(None, lr=None, rank=None) is None
    for settings in (_settings("sgd", lr=0.0), _settings("lora", rank=2)):
        assert AdaptationSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ttt-lr", "0.1"], "--ttt-lr"),
        (["--ttt-chunk", "64"], "--ttt-chunk"),
        (["--ttt-epochs", "1"], "--ttt-epochs"),
        (["--ttt-momentum", "0"], "--ttt-momentum"),
        (["--ttt-clip", "0"], "--ttt-clip"),
        (["--ttt-moved", "all"], "--ttt-moved"),
        (["--ttt-rank", "8"], "--ttt-rank"),
        (["--ttt", "sgd", "--ttt-rank", "8"], "--ttt-rank does nothing with --ttt sgd"),
        (["--ttt", "lora", "--ttt-momentum", "0"], "--ttt-momentum does nothing with --ttt lora"),
        (["--ttt", "lora", "--ttt-clip", "1"], "--ttt-clip does nothing with --ttt lora"),
        (["--ttt", "lora", "--ttt-moved", "all"], "--ttt-moved does nothing with --ttt lora"),
        (["--ttt", "sgd", "--ttt-lr", "nan"], "--ttt-lr nan"),
        (["--ttt", "lora", "--ttt-lr", "inf"], "--ttt-lr inf"),
        (["--ttt", "sgd", "--ttt-lr", "-0.1"], "--ttt-lr -0.1"),
        (["--ttt", "sgd", "--ttt-lr", "10.5"], "--ttt-lr 10.5"),
        (["--ttt", "sgd", "--ttt-chunk", "0"], "--ttt-chunk 0"),
        (["--ttt", "lora", "--ttt-epochs", "0"], "--ttt-epochs 0"),
        (["--ttt", "lora", "--ttt-epochs", "101"], "--ttt-epochs 101"),
        (["--ttt", "sgd", "--ttt-momentum", "1"], "--ttt-momentum 1"),
        (["--ttt", "sgd", "--ttt-momentum", "nan"], "--ttt-momentum nan"),
        (["--ttt", "sgd", "--ttt-clip", "-1"], "--ttt-clip -1"),
        (["--ttt", "lora", "--ttt-rank", "0"], "--ttt-rank 0"),
        (["--ttt", "lora", "--ttt-chunk", "8", "--stride", "8"], "--stride 8 does nothing with --ttt lora"),
        (["--ttt", "sgd", "--context", "64"], "--context 64 without --stride"),
        (["--ttt", "sgd", "--ttt-chunk", "31"], "--ttt-chunk 31 is less than the 32 tokens"),
        (["--ttt", "sgd", "--ttt-chunk", "7", "--stride", "8"], "--ttt-chunk 7 is less than the 8 tokens"),
        (["--ttt", "lora"], "--ttt-chunk 256 does not fit into a context of 32 tokens"),
    ],
)
def test_what_does_not_go_together_is_one_line(work: Path, tmp_path: Path, options: list[str], named: str) -> None:
    done = evaluate(work, tmp_path, *options)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("options", [["--ttt", "adam"], ["--ttt", "sgd", "--ttt-moved", "heads"]])
def test_a_mode_or_a_choice_that_there_is_not_is_a_usage_error(work: Path, tmp_path: Path, options: list[str]) -> None:
    done = evaluate(work, tmp_path, *options)
    assert done.exit_code == 2
    assert options[-1] in done.stderr


def test_sgd_learns_along_one_stream_in_one_process(work: Path) -> None:
    ranks = Ranks(rank=1, world_size=2)
    with pytest.raises(InputError, match=r"--ttt sgd .* not in 2"):
        _open(work, ranks, adaptation=_settings("sgd"))
    assert _open(work, ranks, adaptation=_settings("lora", chunk_tokens=8)).ranks == ranks


def test_a_learning_rate_of_zero_is_the_score_without(work: Path) -> None:
    for windows in ({}, {"stride": 8}):
        without = _score(work, **windows)
        found = _score(work, **windows, adaptation=_settings("sgd", lr=0.0, chunk_tokens=64))
        assert found.val_bpb == pytest.approx(without.val_bpb, abs=1e-6)
        learnt = _score(work, **windows, adaptation=_settings("sgd", lr=0.05, chunk_tokens=64))
        assert learnt.val_loss < without.val_loss - 0.1
    before = _score(work, adaptation=_settings("lora", lr=0.0, chunk_tokens=8))
    learnt = _score(work, adaptation=_settings("lora", lr=0.05, chunk_tokens=8))
    assert learnt.val_loss < before.val_loss - 0.1


@pytest.mark.parametrize("mode", ["sgd", "lora"])
def test_batches_are_a_matter_of_speed(work: Path, mode: Mode) -> None:
    settings = _settings(mode, chunk_tokens={"sgd": 96, "lora": 16}[mode])
    scores = [_score(work, adaptation=settings, batch_tokens=tokens).val_loss for tokens in (1, 100, 10_000)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)


@pytest.mark.parametrize("mode", ["sgd", "lora"])
def test_an_observer_that_fails_leaves_the_model_as_it_was(work: Path, mode: Mode) -> None:
    scoring = _open(work, adaptation=_settings(mode, chunk_tokens=32), batch_tokens=32)
    before = {name: weight.clone() for name, weight in scoring.model.state_dict().items()}

    def fail(batch: ScoredBatch) -> None:
        if batch.number == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        scoring.run(on_scored=[fail], say=_silent)
    for name, weight in scoring.model.named_parameters():
        assert torch.equal(weight, before[name]), name
        assert weight.requires_grad, name
    # And so a second run is a first one.
    assert scoring.run(say=_silent).val_loss == _score(work, adaptation=scoring.adaptation, batch_tokens=32).val_loss
