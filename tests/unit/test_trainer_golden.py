"""Golden loss curves: what a fixed tiny run on fixed tokens has always come to, step by step.

Whatever changes the numbers of training without being meant to (an initialisation, a learning rate, a gain, a
schedule, the order of the data, a loss term) moves these curves by more than TOLERANCE; other versions of torch and
other numbers of threads do not. After a change that is meant to, print the new curves and put them here:

    PYTHONPATH=.:tests python tests/unit/test_trainer_golden.py
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

from small_data_set import texts
from tiny_training import EVERYTHING, PLAIN, losses, parsed, result, settings
from trainer.config import TrainConfig
from trainer.data.describing import Provenance, describe
from trainer.data.shards import BOS, write_shard
from trainer.data.tokenizer import train_tokenizer
from trainer.loop import train
from trainer.report import ExitCode

TOLERANCE = 1e-3
"""Of each loss. Log lines have 4 decimals, which is 1e-5 of these."""

VOCAB = 330
STEPS = {"steps": 12}
BATCH = {"train_batch_tokens": 512, "train_seq_len": 32}
# Fresh output projections are zero and most terms small by default: these rates make each part matter in twelve steps.
CONFIGS: dict[str, TrainConfig] = {
    "plain": settings(
        PLAIN,
        limits=STEPS,
        batch=BATCH,
        model={"model_dim": 32},
        optimizer={"matrix_lr": 0.08, "scalar_lr": 0.08, "muon_momentum_warmup_steps": 5},
        qat={"enabled": True, "start_fraction": 0.5},
        export={"bits": 4},
        log_every_steps=1,
    ),
    "everything": settings(
        EVERYTHING,
        limits=STEPS,
        batch=BATCH | {"warmup_start_tokens": 256},
        model={"model_dim": 32},
        loss={"focal_gamma": 1.5, "z_loss": 0.02},
        optimizer={
            "matrix_lr": 0.08,
            "scalar_lr": 0.1,
            "head_lr": 0.03,
            "weight_decay": 1.0,
            "embed_weight_decay": 0.5,
        },
        averaging={"snapshots": 0},
        qat={"start_fraction": 0.4},
        export={"bits": 4},
        log_every_steps=1,
    ),
}

# Train losses of the twelve steps; validation loss; that of the average, where there is one.
GOLDEN: dict[str, list[float]] = {
    "plain": [5.7892, 4.6224, 3.4081, 3.2439, 3.2308, 3.2493, 3.3247, 3.2575, 3.2464, 3.2014, 3.2109, 3.2583, 3.2405],
    "everything": [
        5.7991,
        5.6749,
        4.6057,
        4.0424,
        3.4702,
        3.3372,
        3.3223,
        3.2859,
        3.3129,
        3.3013,
        3.2198,
        3.2302,
        3.2624,
        3.2693,
    ],
}


def make_tokens(count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Documents of a language of 24 words, most of which follow from the two before them: by Python's own generator,
    which no version changes, and without a tokenizer, which another version of its trainer would make otherwise."""
    choose = random.Random(seed).random
    tokens, before, word = [BOS], 0, 0
    while len(tokens) < count:
        before, word = word, (word + 5 * before + 1) % 24 if choose() < 0.9 else int(choose() * 24)
        tokens.append(BOS if choose() < 0.03 else 260 + word)
    return np.array(tokens, dtype=np.uint16)


def make_data(folder: Path) -> Path:
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts(60, 0), vocab_size=VOCAB))
    for name, count, seed in (("val.bin", 1025, 1), ("train.bin", 4000, 0)):
        write_shard(folder / name, make_tokens(count, seed))
    provenance = Provenance(split="by a generator")
    describe(folder, tokenizer="tokenizer.model", train=["train.bin"], val=["val.bin"], provenance=provenance).save()
    return folder


def curve(config: TrainConfig, data: Path, out: Path) -> list[float]:
    """As GOLDEN has it."""
    with redirect_stdout(StringIO()) as log:
        assert train(config, data, out, out / "checkpoints", None) is ExitCode.OK
    ended = result(out)
    averaged = [] if ended.averaged_val_loss is None else [ended.averaged_val_loss]
    return [*losses(parsed(log.getvalue())).values(), ended.val_loss, *averaged]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("golden"))


@pytest.fixture(autouse=True)
def _one_thread(seeded_on_one_thread: None) -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_curve_is_what_it_was(data: Path, tmp_path: Path, name: str) -> None:
    found = curve(CONFIGS[name], data, tmp_path)
    assert found == pytest.approx(GOLDEN[name], rel=TOLERANCE), found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        corpus = make_data(Path(made))
        for title, config in CONFIGS.items():
            values = ", ".join(f"{value:.4f}" for value in curve(config, corpus, Path(made) / title))
            sys.stdout.write(f'    "{title}": [{values}],\n')
