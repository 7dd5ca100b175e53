"""Snapshots of a run: model files with the score that their weights had, from which `average` makes a soup."""

from __future__ import annotations

from pathlib import Path

from trainer.config import TrainConfig
from trainer.model.gpt import GPT
from trainer.model_file import Validation, keep_newest, save_model


def keep_snapshot(
    directory: Path,
    model: GPT,
    config: TrainConfig,
    *,
    step: int,
    val_loss: float,
    val_bpb: float,
    tokenizer_sha256: str,
    val_sha256: str,
    keep: int,
) -> Path:
    """Write `snapshot_NNNNNNNN.pt` and remove all but the newest `keep`; the one just written always stays.

    `val_loss` (nats per token) and `val_bpb` are the plain score of these very weights, the loop as it stands now and
    fake quantisation off. Raises OSError.
    """
    path = directory / f"snapshot_{step:08d}.pt"
    save_model(
        path,
        model,
        config,
        tokenizer_sha256=tokenizer_sha256,
        val_sha256=val_sha256,
        validation=Validation(step=step, val_loss=val_loss, val_bpb=val_bpb),
    )
    keep_newest(path, "snapshot_*.pt", keep)
    return path
