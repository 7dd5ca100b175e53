"""Real processes side by side: torchrun starts two, they share the windows, and one tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from two_processes import torchrun

from small_data_set import make_data_set, make_model
from trainer.report import EvaluateResult, read_result
from trainer.scoring import Scoring, ScoringRequest

# Both parts in one pair of processes: equal losses must add up equally to 1e-9, a model's scores to 1e-6.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from trainer.evaluation import ValidationStream, score
from trainer.evaluation_windows import plain, sliding
from trainer.ranks import ALONE, Ranks
from trainer.scoring import Scoring, ScoringRequest

ranks = Ranks.from_environment()
tokens = np.random.default_rng(0).integers(0, 300, 20_001).astype(np.uint16)
size = np.ones(20_000, dtype=np.uint16)
validation = ValidationStream(tokens=tokens, bytes=20_000, target_bytes=size)

def losses(inputs, targets, scored):
    return (((inputs * 31 + targets * 17) % 97).to(torch.float32) / 10 + 0.1)[:, -scored:]

def fake(plan, batch_tokens, ranks):
    return score(plan, losses, validation, batch_tokens=batch_tokens, device="cpu", ranks=ranks).loss

with ranks.joined():
    assert ranks.sum_float64([1.0, ranks.rank, 2.0**-40]) == [2.0, 1.0, 2.0**-39]
    plans = (plain(20_000, seq_len=64), sliding(20_000, context=64, stride=16), plain(20_000, seq_len=20_000))
    reduced = [
        [fake(plan, batch_tokens, who) for batch_tokens in (64 * 7, 64 * 100) for who in (ALONE, ranks)]
        for plan in plans
    ]
    files = dict(source=Path(sys.argv[1]), data=Path(sys.argv[2]), device="cpu")
    whole = [
        [
            Scoring.open(ScoringRequest(**files, stride=stride, batch_tokens=batch), who).run(say=str).val_loss
            for batch in (32, 500) for who in (ALONE, ranks)
        ]
        for stride in (None, 8)
    ]
if ranks.first:
    print(json.dumps([reduced, whole]))
"""

LOST = """
import os
from trainer.ranks import Ranks, RanksError
ranks = Ranks.from_environment()
with ranks.joined():
    if ranks.rank == 1:
        os._exit(0)
    try:
        ranks.sum_float64([1.0])
    except RanksError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_model(folder / "model.pt", make_data_set(folder / "data"))
    return folder


def test_one_and_two_processes_agree_whatever_the_batch(work: Path) -> None:
    script = work / "agreement.py"
    script.write_text(PROGRAM)
    done = torchrun(script, work / "model.pt", work / "data")
    assert done.returncode == 0, done.stderr
    reduced, whole = json.loads(done.stdout.splitlines()[-1])
    for scores in reduced:
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-9, rel=0)
    for scores in whole:
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-6, rel=0)
    assert whole[0][0] != whole[1][0]


def test_the_verb_under_torchrun_writes_one_result_and_one_line(work: Path) -> None:
    out = work / "out"
    options = ["--data", work / "data", "--out", out, "--device", "cpu", "--stride", 8]
    done = torchrun("-m", "trainer", "evaluate", work / "model.pt", *options)
    assert done.returncode == 0, done.stderr
    result = read_result(out / "result.json")
    assert isinstance(result, EvaluateResult)
    assert (result.world_size, result.metric) == (2, "sliding")
    assert done.stdout.count("final_raw_sliding_window_exact") == 1
    alone = Scoring.open(ScoringRequest(source=work / "model.pt", data=work / "data", device="cpu", stride=8)).run(
        say=lambda _: None
    )
    assert result.val_bpb == pytest.approx(alone.val_bpb, abs=1e-6)
    assert (result.val_tokens, result.val_bytes) == (alone.val_tokens, alone.val_bytes)


def test_a_process_that_is_gone_is_an_error_and_not_a_hang(work: Path) -> None:
    script = work / "lost.py"
    script.write_text(LOST)
    done = torchrun(script)
    assert "rank 0 of 2 lost another one while adding up" in done.stdout, done.stderr
