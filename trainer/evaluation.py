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
from trainer.data.shards import Tokens, check_tokens, open_shard
from trainer.errors import InputError

TokenLosses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """`loss` in nats per token, `bpb` in bits per byte, over `tokens` scored tokens that stand for `bytes` bytes."""

    loss: float
    bpb: float
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationStream:
    """The validation shards as one stream `(count,)` of tokens, and the bytes of all of them but the first.

    Counting bytes reads the whole stream; a run that validates often loads it once.
    """

    tokens: Tokens
    bytes: int

    @classmethod
    def load(cls, dataset: DataSet) -> ValidationStream:
        """Raises DataSetError, ShardError or InputError for bad data."""
        shards = []
        for path in dataset.val_shards:
            shard = open_shard(path)
            check_tokens(path, shard, dataset.manifest.vocab_size)
            shards.append(shard)
        stream = shards[0] if len(shards) == 1 else np.concatenate(shards)
        counted = int(ByteTable.load(dataset.tokenizer_path).count(stream[:-1], stream[1:]).sum())
        scored, manifest = stream.size - 1, dataset.manifest
        if (scored, counted) != (manifest.val_tokens, manifest.val_bytes):
            raise DataSetError(
                f"{dataset.path}: the validation stream has {scored} tokens for {counted} bytes, the manifest says "
                f"{manifest.val_tokens} for {manifest.val_bytes}; prepare the data set again"
            )
        return cls(tokens=stream, bytes=counted)


def evaluate(
    token_losses: TokenLosses,
    validation: ValidationStream,
    *,
    seq_len: int,
    batch_tokens: int,
    device: torch.device | str,
) -> Score:
    """Score the validation stream with `token_losses(inputs, targets)`: `(batch, time)` int64, to nats of that shape.

    Every call has the same shape, `(max(1, batch_tokens // seq_len), seq_len)` (fewer rows if the whole stream
    needs fewer), so that a compiled model is compiled once. Raises InputError if a loss is not finite.
    """
    stream = validation.tokens
    scored = stream.size - 1
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
        raise InputError(f"the validation loss is {total_nats}: the weights are not usable")
    return Score(
        loss=total_nats / scored,
        bpb=total_nats / math.log(2) / validation.bytes,
        tokens=scored,
        bytes=validation.bytes,
    )
