"""Whole runs of a tiny model: two configurations, and what a run said and left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.loop import train
from trainer.model_file import load_model
from trainer.optim import Optimizers
from trainer.report import ExitCode, Line, TrainPoint, TrainResult, ValPoint, parse_line, read_result

Settings = dict[str, Any]

PLAIN: Settings = {
    "limits": {"steps": 8},
    "model": {"vocab_size": 330, "num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1},
    "batch": {"train_batch_tokens": 128, "train_seq_len": 16},
    "evaluation": {"every_fraction": 0.4, "batch_tokens": 512},
    "qat": {"enabled": False},
    "device": "cpu",
}

EVERYTHING: Settings = PLAIN | {
    "model": PLAIN["model"]
    | {
        "num_layers": 5,
        "activation": "swiglu",
        "rope_fraction": 0.5,
        "xsa_last_layers": 1,
        "attention_gate": "sparse",
        "document_attention": True,
        "smear_gate": True,
        "bigram_embedding": {"rows": 50, "dim": 8},
        "value_embedding": {"layers": [0, 4], "dim": 8},
        "ln_scale": True,
        "unet_skips": True,
        "residual_mix": True,
        "parallel_from": 3,
        "tie_embeddings": False,
        "matrix_init": "orthogonal",
        "recurrence": {"first": 1, "last": 2, "start_fraction": 0.25, "gate_fraction": 0.5},
    },
    "batch": PLAIN["batch"] | {"warmup_start_tokens": 64, "warmup_fraction": 0.3},
    "data": {"order": "documents"},
    "loss": {"focal_gamma": 0.5, "z_loss": 1e-3},
    "optimizer": {
        "muon_momentum_warmup_steps": 5,
        "muon_coefficients": "polar_express",
        "muon_row_normalize": True,
        "weight_decay": 0.1,
        "embed_weight_decay": 0.05,
        "weight_decay_taper": 0.4,
        "grad_clip_norm": 0.3,
        "embed_lr": 0.1,
    },
    "schedule": {"warmup_steps": 2, "warmdown_fraction": 0.5, "warmdown_shape": "cosine", "min_lr_fraction": 0.1},
    "averaging": {"kind": "ema", "horizon_fraction": 0.3, "snapshots": 2},
    "qat": {"enabled": True, "start_fraction": 0.6},
    "export": {"bits": 5},
}


def settings(base: Settings, **changed: Any) -> TrainConfig:
    """`base` with its sections' fields, or whole plain values, changed."""
    merged = {name: base.get(name, {}) | to if isinstance(to, dict) else to for name, to in changed.items()}
    return TrainConfig.model_validate(base | merged)


def parsed(log: str) -> list[Line]:
    """A log's lines. Every one of them must be readable."""
    lines = [(line, parse_line(line)) for line in log.splitlines()]
    unknown = [line for line, known in lines if known is None]
    assert not unknown, unknown
    return [known for _, known in lines if known is not None]


def run(
    config: TrainConfig,
    data: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    resume: str | None = None,
    init_from: Path | None = None,
) -> tuple[ExitCode, list[Line]]:
    """Train in this process; the checkpoints lie in `out/checkpoints`."""
    code = train(config, data, out, out / "checkpoints", resume, init_from=init_from)
    return code, parsed(capsys.readouterr().out)


def losses(lines: Sequence[Line]) -> dict[int, float]:
    """Train loss after each step that was told."""
    return {line.step: line.train_loss for line in lines if isinstance(line, TrainPoint)}


def scores(lines: Sequence[Line]) -> list[tuple[int, float, float]]:
    """Step, validation loss and bits per byte of each validation."""
    return [(line.step, line.val_loss, line.val_bpb) for line in lines if isinstance(line, ValPoint)]


def result(out: Path) -> TrainResult:
    """What a finished run left in its folder."""
    found = read_result(out / "result.json")
    assert isinstance(found, TrainResult)
    return found


def weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a model file."""
    return load_model(path, "cpu").model.state_dict()


def same_weights(one: Path, other: Path) -> bool:
    """Whether two model files hold the same bits."""
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def stop_at_step(patched: pytest.MonkeyPatch, step: int) -> None:
    """A real SIGTERM to this process in the middle of a step."""
    plain = Optimizers.step

    def stopping(self: Optimizers, steps_done: int, *multipliers: float) -> None:
        plain(self, steps_done, *multipliers)
        if steps_done + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patched.setattr(Optimizers, "step", stopping)
