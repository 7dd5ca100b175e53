"""What training minimises: nats per token, or a loss weighted by the bytes that the targets stand for.

Let target i cost n_i nats and stand for b_i bytes. The score is

    BPB = sum n_i / (ln 2 * sum b_i).

Over fixed data sum b_i is a constant, so BPB is the plain sum of nats times a constant: *the weighting that makes the
objective equal to BPB is weight 1 for every token, over the sum of bytes*. Hence

- `tokens`, the mean of n_i, already has the gradient of BPB in full batch, times (ln 2 * bytes per token). As all
  micro-batches hold equally many tokens, its expectation over random ones is that of the full batch.
- `bpb`, (sum n_i / sum b_i) * B with both sums over the micro-batch and B the mean bytes per token of the training
  data: each micro-batch's own bits per byte but for the constant B ln 2, which keeps its size that of `tokens`. In full
  batch it has the gradient of BPB as well. In small batches it is a ratio estimator (its expectation is off by a share
  of O(1 / batch), Cochran 1977, section 6.8) that weighs batches of long tokens less: sum b_i is another in each.
- `bytes`, sum b_i n_i / sum b_i: every nat weighted by the length of its token. This is *not* BPB, and its gradient
  does not point where that of BPB does: it spends the model's capacity on long tokens at the cost of short ones.

Targets that stand for no bytes (BOS, other control tokens, case marks) count with weight 1 in `tokens` and `bpb`, as
in the score, and with weight 0 in `bytes`. The rule of counting is `trainer.data.byte_table`'s; under case folding a
literal mark in the text, which an escape mark precedes, is taken for a mark: it counts 0 instead of its 3 bytes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.config import LossConfig
from trainer.data.byte_table import ByteTable
from trainer.data.casing import MARKS
from trainer.data.manifest import DataSet
from trainer.data.tokenizer import open_tokenizer
from trainer.model.gpt import GPT
from trainer.model.head import PLAIN, LossTerms


class ByteWeightedLoss(nn.Module):
    """`bpb` or `bytes` of `model`; called like it, and compiled like it: static shapes, one graph."""

    base_bytes: Tensor
    leading_space: Tensor
    boundary: Tensor

    def __init__(
        self,
        model: GPT,
        table: ByteTable,
        weighting: Literal["bpb", "bytes"],
        *,
        bytes_per_token: float,
        terms: LossTerms = PLAIN,
    ) -> None:
        """`bytes_per_token` is the mean of the training data. The tables go to the device of the model's weights."""
        super().__init__()
        self._terms = terms
        self._model, self._weighting, self._bytes_per_token = model, weighting, bytes_per_token
        device = model.tok_emb.weight.device
        for name in ("base_bytes", "leading_space", "boundary"):
            self.register_buffer(name, torch.from_numpy(getattr(table, name)).to(device), persistent=False)

    def target_bytes(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Bytes of each target, the input at its position being the token before it; (batch, time) int64, all three."""
        return self.base_bytes[targets] + (self.leading_space[targets] & ~self.boundary[inputs])

    def forward(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weighted loss with its other terms, and the mean nats per token without gradients; each 0-d float32."""
        counted = self.target_bytes(inputs, targets)
        total = counted.sum().clamp_min(1).float()  # a micro-batch may be all BOS
        if self._weighting == "bytes":
            weights = counted.float() / total
        else:
            weights = (self._bytes_per_token / total).expand(targets.shape)
        return self._model.train_loss(inputs, targets, terms=self._terms, weights=weights, cu_seqlens=cu_seqlens)


def byte_weighting(config: LossConfig, model: GPT, dataset: DataSet) -> ByteWeightedLoss | None:
    """The loss that the configuration asks for; None for the plain mean over tokens.

    Raises OSError, or InputError for a tokenizer that cannot be read.
    """
    if config.weighting == "tokens":
        return None
    manifest = dataset.manifest
    table = ByteTable.load(dataset.tokenizer_path)
    if manifest.case_folding:
        table = without_marks(table, dataset.tokenizer_path)
    return ByteWeightedLoss(
        model,
        table,
        config.weighting,
        bytes_per_token=manifest.train_bytes / manifest.train_tokens,
        terms=LossTerms(config.focal_gamma, config.z_loss),
    )


def without_marks(table: ByteTable, tokenizer: Path) -> ByteTable:
    """The table of a case-folding tokenizer: its marks stand for no text. Raises OSError or InputError."""
    model = open_tokenizer(tokenizer)
    base_bytes = table.base_bytes.copy()
    base_bytes[[model.piece_to_id(mark) for mark in MARKS]] = 0
    return replace(table, base_bytes=base_bytes)
