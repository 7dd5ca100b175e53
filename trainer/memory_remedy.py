"""What to tell someone whose run did not fit into memory: the largest setting that would."""

from __future__ import annotations

import os

import torch

from trainer.config import TrainConfig
from trainer.memory import peak_memory_bytes
from trainer.ranks import ALONE, Ranks

_NOTHING_SMALLER = "shorten train_seq_len or shrink the model"


def micro_batch_remedy(
    config: TrainConfig,
    micro_tokens: int,
    device: torch.device,
    ranks: Ranks = ALONE,
    *,
    free_bytes: int | None = None,
) -> str:
    """What did not fit, and the largest valid micro-batch below it that is predicted to; if none is, the next smaller
    one, for a prediction may err. `free_bytes` were there before the run; default: all of the device's memory."""
    smaller = [tokens for tokens in config.batch.micro_choices(ranks.world_size) if tokens < micro_tokens]
    there = _total_bytes(device) if free_bytes is None else free_bytes
    fitting = [
        tokens
        for tokens in smaller
        if peak_memory_bytes(config, micro_tokens=tokens, world_size=ranks.world_size) <= there
    ]
    best = max(fitting or smaller, default=None)
    remedy = _NOTHING_SMALLER if best is None else f"set batch.micro_batch_tokens to {best}"
    return f"a micro-batch of {micro_tokens} tokens does not fit; {remedy}"


def evaluation_remedy(config: TrainConfig) -> str:
    """The same for an evaluation: half of what did not fit."""
    tokens, seq_len = config.evaluation.batch_tokens, config.batch.train_seq_len
    half = tokens // 2 // seq_len * seq_len
    remedy = f"set evaluation.batch_tokens to {half}" if half else _NOTHING_SMALLER
    return f"an evaluation batch of {tokens} tokens does not fit; {remedy}"


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
