"""Low-rank additions to a pass, one set for each row of the batch: what test-time training moves.

LoRA (Hu et al. 2021, arXiv:2106.09685): a matrix product x W^T becomes x W^T + (x down^T) up^T. With `up` zero the
model is as it was. Each row of a batch has adapters of its own, so that documents side by side cannot see each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import ModelConfig


class LowRank(NamedTuple):
    """`down` (batch, rank, in) and `up` (batch, out, rank), float32 masters."""

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, time, in) -> (batch, time, out) in the dtype of `x`, to be added to what the matrix gives."""
        narrow = torch.bmm(x, self.down.to(x.dtype).transpose(1, 2))
        return torch.bmm(narrow, self.up.to(x.dtype).transpose(1, 2))


class BlockAdapters(NamedTuple):
    """Of one physical layer: added to its queries, before the QK norm, and to its values."""

    q: LowRank
    v: LowRank


class Adapters(NamedTuple):
    """Of a whole model: `hidden` (dim to dim) is added to the normed last hidden state, before the head."""

    blocks: tuple[BlockAdapters, ...]
    hidden: LowRank

    def tensors(self) -> Iterator[Tensor]:
        """Each `down` and `up`, in one order."""
        for pair in (*(low_rank for block in self.blocks for low_rank in block), self.hidden):
            yield from pair


def fresh_adapters(
    config: ModelConfig, *, rows: int, rank: int, device: torch.device | str, generator: torch.Generator
) -> Adapters:
    """Adapters that change nothing yet: `up` zero, `down` uniform of standard deviation 1 / sqrt(in).

    Every row begins alike, so that a document's score does not depend on the row it lies in. They ask for gradients.
    `generator` is one of the CPU: the same numbers on any device.
    """
    dim = config.model_dim

    def low_rank(out: int) -> LowRank:
        bound = math.sqrt(3.0 / dim)
        drawn = torch.empty(rank, dim).uniform_(-bound, bound, generator=generator)
        down = drawn.to(device).expand(rows, rank, dim).clone().requires_grad_()
        return LowRank(down=down, up=torch.zeros(rows, out, rank, device=device, requires_grad=True))

    blocks = tuple(BlockAdapters(q=low_rank(dim), v=low_rank(config.kv_dim)) for _ in range(config.num_layers))
    return Adapters(blocks=blocks, hidden=low_rank(dim))
