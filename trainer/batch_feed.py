"""The loader as the training loop meets it: how long the loop waits for it, and which epoch it has come to."""

from __future__ import annotations

import math

import torch

from trainer.clock import TrainingClock
from trainer.config import TrainConfig
from trainer.data.loader import Batch, TokenLoader
from trainer.data.manifest import DataSet
from trainer.ranks import ALONE, Ranks
from trainer.report import Event


def open_loader(
    config: TrainConfig,
    dataset: DataSet,
    device: torch.device,
    *,
    micro_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> TokenLoader:
    """This process's micro-batches of the train shards as the configuration wants them, with the documents'
    boundaries where attention stays within them, or where a cut document may begin in mid-row for the smear gate.
    `micro_tokens` are those of one process; default: the configuration's. Raises OSError or InputError.
    """
    packed = config.data.order == "documents"
    return TokenLoader(
        dataset.train_shards,
        config.batch.micro_tokens if micro_tokens is None else micro_tokens,
        config.batch.train_seq_len,
        seed=config.seed,
        device=device,
        vocab_size=config.model.vocab_size,
        order=config.data.order,
        prefetch_batches=config.data.prefetch_batches,
        boundaries=config.model.document_attention or (config.model.looks_at_the_token_before and packed),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


class BatchFeed:
    """Hands out batches and counts the seconds of the training clock that the host spends in getting them.

    On CUDA the copy to the device is queued and not waited for, so these are the seconds in which the host could give
    the device nothing to do. They bound the time that the device stood idle for want of data from above: the host
    runs up to one step ahead of it (see `TrainingClock.tick`), so of a wait the device notices only what goes beyond
    the work still queued. A share near zero therefore proves that it never starved; no probe of the device is needed.
    """

    def __init__(self, loader: TokenLoader, clock: TrainingClock, *, waited_seconds: float = 0.0) -> None:
        """`waited_seconds` is what a resumed run had waited before, as `clock` has its seconds."""
        self._loader, self._clock = loader, clock
        self.waited_seconds = waited_seconds
        self._told_seconds, self._told_waited = clock.seconds, waited_seconds
        self._told_epoch = self._epoch()

    def next_batch(self) -> Batch:
        before = self._clock.seconds
        batch = self._loader.next_batch()
        self.waited_seconds += self._clock.seconds - before
        return batch

    def first_batch(self) -> Batch:
        """What `next_batch` will give, which it does not take away."""
        state = self._loader.state_dict()
        batch = self._loader.next_batch()
        self._loader.load_state_dict(state)
        return batch

    def wait_share(self) -> float:
        """Of all of the training clock."""
        return self.waited_seconds / max(self._clock.seconds, 1e-9)

    def new_wait_share(self) -> float:
        """Of the training clock since this was asked last."""
        seconds = self._clock.seconds
        share = (self.waited_seconds - self._told_waited) / max(seconds - self._told_seconds, 1e-9)
        self._told_seconds, self._told_waited = seconds, self.waited_seconds
        return share

    def new_epoch(self, step: int) -> Event | None:
        """The event of an epoch, from the second on, whose first window was handed out since this was asked last."""
        epoch = self._epoch()
        if epoch == self._told_epoch:
            return None
        self._told_epoch = epoch
        return Event(kind="epoch", step=step, detail=f"{epoch} windows:{self._loader.windows_per_epoch}")

    def _epoch(self) -> int:
        """Counted from 1: the epoch of the window handed out last."""
        return max(1, math.ceil(self._loader.epochs))
