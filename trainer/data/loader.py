"""Training batches: windows of the shards, shuffled anew each epoch from the seed, and resumable to the next batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.shards import ShardError, check_tokens, open_shard
from trainer.errors import InputError

_STATE_VERSION = 1


class TokenLoader:
    """Endless batches of windows `(batch, time)`; every window of an epoch once, then the next epoch.

    A shard of n tokens holds (n - 1) // seq_len windows: `seq_len` inputs, and the same shifted by one as targets.
    A batch that meets the end of an epoch is filled up from the next one. On CUDA the next batch is copied
    (pinned, non-blocking) while the device works on this one.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        batch_tokens: int,
        seq_len: int,
        *,
        seed: int,
        device: torch.device | str,
        vocab_size: int,
    ) -> None:
        """Raises ShardError for a bad shard, InputError if there is no window, ValueError for part windows."""
        if seq_len < 1 or batch_tokens < seq_len or batch_tokens % seq_len:
            raise ValueError(f"batch_tokens {batch_tokens} is not a positive multiple of seq_len {seq_len}")
        self._paths = tuple(shards)
        self._tokens = [open_shard(path) for path in self._paths]
        self._windows_before = np.cumsum([0] + [max(0, tokens.size - 1) // seq_len for tokens in self._tokens])
        self._windows = int(self._windows_before[-1])
        if not self._windows:
            raise InputError(
                f"{len(self._paths)} train shards hold no window of {seq_len} + 1 tokens; "
                "give more text or a smaller train_seq_len"
            )
        self._rows, self._seq_len, self._seed = batch_tokens // seq_len, seq_len, seed
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._epoch, self._position = 0, 0
        self._order = self._permutation(0)
        self._ahead: tuple[Tensor, tuple[int, int]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the next window that will be handed out."""
        return self._epoch

    @property
    def windows_per_epoch(self) -> int:
        return self._windows

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """`(inputs, targets)`, each `(batch, time)` int64 on the device. Raises ShardError at a token out of range."""
        batch, after = self._ahead or self._fetch((self._epoch, self._position))
        self._epoch, self._position = after
        self._ahead = self._fetch(after) if self._device.type == "cuda" else None
        return batch[:, :-1], batch[:, 1:]

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins; plain numbers."""
        return {
            "version": _STATE_VERSION,
            "seed": self._seed,
            "seq_len": self._seq_len,
            "windows": self._windows,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another loader of the same data and seed stopped. Raises InputError for any other state."""
        mine = self.state_dict()
        for key in ("version", "seed", "seq_len", "windows"):
            if state.get(key) != mine[key]:
                raise InputError(
                    f"the loader's state has {key} {state.get(key)}, this run has {mine[key]}; "
                    "resume with the same data"
                )
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self._windows:
            raise InputError(f"the loader's state points at window {position} of {self._windows} in epoch {epoch}")
        self._epoch, self._position, self._ahead = epoch, position, None
        self._order = self._permutation(epoch)

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        self._order_epoch = epoch
        return np.random.default_rng([self._seed, epoch]).permutation(self._windows)

    def _fetch(self, cursor: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """The batch `(rows, seq_len + 1)` at a cursor (epoch, position), on the device, and the cursor after it."""
        epoch, position = cursor
        host = np.empty((self._rows, self._seq_len + 1), dtype=np.int64)
        for row in range(self._rows):
            if self._order_epoch != epoch:
                self._order = self._permutation(epoch)
            self._read_window(int(self._order[position]), host[row])
            position += 1
            if position == self._windows:
                epoch, position = epoch + 1, 0
        batch = torch.from_numpy(host)
        if self._device.type == "cuda":
            # The caching host allocator keeps a pinned block until the copy out of it has run.
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        elif self._device.type != "cpu":
            batch = batch.to(self._device)
        return batch, (epoch, position)

    def _read_window(self, window: int, into: npt.NDArray[np.int64]) -> None:
        shard = int(np.searchsorted(self._windows_before, window, side="right")) - 1
        start = (window - int(self._windows_before[shard])) * self._seq_len
        into[:] = self._tokens[shard][start : start + self._seq_len + 1]
        if int(into.max()) >= self._vocab_size:
            check_tokens(self._paths[shard], self._tokens[shard][start:], self._vocab_size, start)
            raise ShardError(f"{self._paths[shard]} changed while it was read")
