"""Bits per byte on the validation stream: every token scored once, sums in float64.

`bpb = (sum of nats / ln 2) / sum of bytes`. The stream is cut into windows of `seq_len` that do not overlap; the
last one is padded and masked, so that no tail is dropped. Only the stream's very first token, which has nothing
before it, is not scored. BOS targets count in the loss and stand for no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.byte_table import ByteTable
from trainer.data.manifest import DataSet, DataSetError
from trainer.data.shards import check_tokens, open_shard

TokenLosses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """`loss` in nats per token, `bpb` in bits per byte, over `tokens` scored tokens that stand for `bytes` bytes."""

    loss: float
    bpb: float
    tokens: int
    bytes: int


def evaluate(
    token_losses: TokenLosses,
    dataset: DataSet,
    *,
    seq_len: int,
    batch_tokens: int,
    device: torch.device | str,
) -> Score:
    """Score the validation shards with `token_losses(inputs, targets)`: `(batch, time)` int64, to nats of that shape.

    Every call has the same shape, `(max(1, batch_tokens // seq_len), seq_len)` (fewer rows if the whole stream
    needs fewer), so that a compiled model is compiled once. Raises DataSetError or ShardError for bad data, and
    ValueError if a loss is not finite.
    """
    stream = _validation_stream(dataset)
    table = ByteTable.load(dataset.tokenizer_path)
    scored = stream.size - 1
    total_bytes = int(table.count(stream[:-1], stream[1:]).sum())
    if (scored, total_bytes) != (dataset.manifest.val_tokens, dataset.manifest.val_bytes):
        raise DataSetError(
            f"{dataset.path}: the validation stream has {scored} tokens for {total_bytes} bytes, the manifest says "
            f"{dataset.manifest.val_tokens} for {dataset.manifest.val_bytes}; prepare the data set again"
        )

    windows = -(-scored // seq_len)
    rows = min(max(1, batch_tokens // seq_len), windows)
    per_call = rows * seq_len
    nats = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():  # not inference mode: what a model caches in there could not be trained with afterwards
        for start in range(0, scored, per_call):
            count = min(per_call, scored - start)
            inputs, targets = (np.zeros(per_call, dtype=np.int64) for _ in range(2))
            inputs[:count] = stream[start : start + count]
            targets[:count] = stream[start + 1 : start + 1 + count]
            losses = token_losses(
                torch.from_numpy(inputs).view(rows, seq_len).to(device),
                torch.from_numpy(targets).view(rows, seq_len).to(device),
            )
            # The padding lies after the last scored token, which causal attention keeps from seeing it.
            nats += losses.reshape(-1)[:count].sum(dtype=torch.float64)
    total_nats = float(nats)
    if not math.isfinite(total_nats):
        raise ValueError(f"the validation loss is {total_nats}: the weights are not usable")
    return Score(
        loss=total_nats / scored,
        bpb=total_nats / math.log(2) / total_bytes,
        tokens=scored,
        bytes=total_bytes,
    )


def _validation_stream(dataset: DataSet) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    shards = []
    for path in dataset.val_shards:
        tokens = open_shard(path)
        check_tokens(path, tokens, dataset.manifest.vocab_size)
        shards.append(tokens)
    stream: np.ndarray[tuple[int], np.dtype[np.uint16]] = shards[0] if len(shards) == 1 else np.concatenate(shards)
    return stream
