"""Training batches: every input token once an epoch, in an order that the seed decides, resumable to the next batch.

The rows of all epochs are one endless sequence that depends only on the data, the seed, the order and `seq_len`.
Global batch i is its rows `i * n .. (i + 1) * n`, where n is the rows of all ranks together, and rank r takes the
r-th equal part. So a run may go on with another number of ranks, or another batch size, at the very next row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.config import DataOrder
from trainer.data.packing import PackedDocuments, document_lengths, most_pieces
from trainer.data.prefetch import Prefetcher
from trainer.data.shards import BOS, Tokens
from trainer.data.token_stream import TokenStream
from trainer.data.window_order import Pieces, SequentialWindows, ShuffledWindows, WindowOrder
from trainer.errors import InputError

_STATE_VERSION = 2

Cursor = tuple[int, int]
"""Epoch, from 0, and row within it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """`inputs` and `targets` `(rows, seq_len)` int64. The target of a position is the token after it in its document;
    after a document's last token it is the BOS of the next, as scoring counts it.

    `cu_seqlens`, int32, are the starts of the documents' pieces within the flattened rows, ending with
    `rows * seq_len`: the cumulative lengths that FlashAttention's varlen functions take (arXiv:2205.14135). Its shape
    is the same in every batch, the end being repeated. None unless boundaries were asked for.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ready:
    """A batch on the device, the cursor after it, and on CUDA what a stream must wait for before it reads it."""

    batch: Batch
    after: Cursor
    copied: torch.cuda.Event | None


class TokenLoader:
    """Endless batches; one that meets the end of an epoch is filled up from the next. Close it, or use `with`.

    The shards are mapped, never held in memory. With `prefetch_batches` a thread reads ahead; on CUDA the batches lie
    in pinned memory and are copied without waiting. The state is always that of the batch handed out last.
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
        order: DataOrder = "shuffled",
        prefetch_batches: int = 0,
        boundaries: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_tokens` are those of one rank. `boundaries` and the order `documents` read the whole data once.

        Raises ShardError for a bad shard, InputError if there is no window, ValueError for part windows or a rank
        that is none.
        """
        if seq_len < 1 or batch_tokens < seq_len or batch_tokens % seq_len:
            raise ValueError(f"batch_tokens {batch_tokens} is not a positive multiple of seq_len {seq_len}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        self._stream = TokenStream(shards)
        if self._stream.size < seq_len:
            raise InputError(
                f"{len(shards)} train shards hold no window of {seq_len} tokens but {self._stream.size} tokens; "
                "give more text or a smaller train_seq_len"
            )
        self._rows, self._seq_len = batch_tokens // seq_len, seq_len
        self._rank, self._world_size = rank, world_size
        self._seed, self._vocab_size, self._order_name = seed, vocab_size, order
        # With its index, for the current device is another in each thread.
        self._device = torch.empty(0, device=device).device
        starts = self._stream.document_starts() if boundaries or order == "documents" else None
        self._order = _order(order, self._stream.size, seq_len, seed, starts)
        self._boundaries: int | None = None
        if boundaries and starts is not None:
            repeats = -(-self._rows // self._order.rows) + 1  # epochs that one batch can touch
            lengths = document_lengths(starts, self._stream.size)
            self._boundaries = most_pieces(lengths, seq_len, self._rows, repeats)
        self._prefetch_batches = prefetch_batches
        self._copies: torch.cuda.Stream | None = None
        self._prefetcher: Prefetcher[_Ready] | None = None
        self._cursor: Cursor = (0, 0)
        self._reading: Cursor = (0, 0)

    @property
    def windows_per_epoch(self) -> int:
        return self._order.rows

    @property
    def epochs(self) -> float:
        """Windows handed out, of all ranks, over those of an epoch."""
        epoch, row = self._cursor
        return epoch + row / self._order.rows

    def next_batch(self) -> Batch:
        """This rank's part of the next global batch, on the device. Raises ShardError at a token out of range."""
        self._start()
        ready = self._prepare() if self._prefetcher is None else self._prefetcher.get()
        self._cursor = ready.after
        batch = ready.batch
        if ready.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready.copied)
            for tensor in (batch.inputs, batch.targets, batch.cu_seqlens):
                if tensor is not None:
                    tensor.record_stream(stream)  # its memory belongs to the stream that copied it
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """Where the next global batch begins; plain values, the same on every rank."""
        epoch, row = self._cursor
        return {
            "version": _STATE_VERSION,
            "order": self._order_name,
            "seed": self._seed,
            "seq_len": self._seq_len,
            "tokens": self._stream.size,
            "epoch": epoch,
            "position": row,
        }

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Go on where a loader of the same data, order and seed stopped. Raises InputError for any other state."""
        mine = self.state_dict()
        for key in ("version", "order", "seed", "seq_len", "tokens"):
            if state.get(key) != mine[key]:
                remedy = "start without --resume" if key == "version" else "resume with the same data and settings"
                raise InputError(f"the loader's state has {key} {state.get(key)}, this run has {mine[key]}; {remedy}")
        epoch, row = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= row < self._order.rows:
            raise InputError(f"the loader's state points at window {row} of {self._order.rows} in epoch {epoch}")
        self._cursor = (epoch, row)
        self.close()

    def close(self) -> None:
        """End the thread that reads ahead. The next batch is the one after the last handed out, as ever."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._reading = self._cursor

    def __enter__(self) -> Self:
        """Begins to read ahead."""
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        if self._prefetch_batches and self._prefetcher is None:
            self._prefetcher = Prefetcher(self._prepare, self._prefetch_batches)

    def _prepare(self) -> _Ready:
        """Read the next batch. While a thread reads ahead, only that thread calls this."""
        tokens = torch.empty((2, self._rows, self._seq_len), dtype=torch.uint16, pin_memory=self._device.type == "cuda")
        inputs, targets = tokens[0].view(-1).numpy(), tokens[1].view(-1).numpy()
        pieces = self._pieces(self._after(self._reading, self._rank * self._rows))
        self._read(pieces, inputs, targets)
        boundaries = self._cu_seqlens(pieces, inputs)
        self._reading = self._after(self._reading, self._world_size * self._rows)
        if self._device.type != "cuda":
            return _Ready(batch=self._on_device(tokens, boundaries), after=self._reading, copied=None)
        if self._copies is None:
            self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # torch's own
        # Copied here, beside the training, so that nothing is left to the training loop but to wait for an event. The
        # caching host allocator keeps a pinned block until the copy out of it has run.
        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            batch = self._on_device(tokens, boundaries)
            copied = self._copies.record_event()
        return _Ready(batch=batch, after=self._reading, copied=copied)

    def _on_device(self, tokens: Tensor, boundaries: Tensor | None) -> Batch:
        """Copied as the 2 bytes a token that they are, and widened there."""
        inputs, targets = tokens.to(self._device, non_blocking=True).to(torch.int64)
        cu_seqlens = None if boundaries is None else boundaries.to(self._device, non_blocking=True)
        return Batch(inputs=inputs, targets=targets, cu_seqlens=cu_seqlens)

    def _after(self, cursor: Cursor, rows: int) -> Cursor:
        epochs, row = divmod(cursor[1] + rows, self._order.rows)
        return cursor[0] + epochs, row

    def _pieces(self, first: Cursor) -> Pieces:
        """Those of this rank's rows, from a cursor on."""
        (epoch, row), left, parts = first, self._rows, []
        while left:
            stop = min(row + left, self._order.rows)
            parts.append(self._order.pieces(epoch, row, stop))
            left -= stop - row
            epoch, row = epoch + 1, 0
        return np.concatenate(parts)

    def _read(self, pieces: Pieces, inputs: Tokens, targets: Tokens) -> None:
        filled = 0
        for start, stop in pieces.tolist():
            end = filled + stop - start
            self._stream.read(start, inputs[filled:end])
            self._stream.read(start + 1, targets[filled:end])
            filled = end
        if max(int(inputs.max()), int(targets.max())) >= self._vocab_size:
            for start, stop in pieces.tolist():
                self._stream.require_vocabulary(start, stop + 1, self._vocab_size)
            raise self._stream.changed()

    def _cu_seqlens(self, pieces: Pieces, inputs: Tokens) -> Tensor | None:
        if self._boundaries is None:
            return None
        begins = inputs == BOS
        begins[np.cumsum(pieces[:, 1] - pieces[:, 0])[:-1]] = True
        begins[:: self._seq_len] = True
        starts = np.flatnonzero(begins)
        cumulative = torch.full(
            (self._boundaries + 1,), begins.size, dtype=torch.int32, pin_memory=self._device.type == "cuda"
        )
        cumulative.numpy()[: starts.size] = starts
        return cumulative


def _order(name: DataOrder, tokens: int, seq_len: int, seed: int, starts: npt.NDArray[np.int64] | None) -> WindowOrder:
    if name == "sequential":
        return SequentialWindows(tokens, seq_len)
    if name == "documents" and starts is not None:
        return PackedDocuments(starts, tokens, seq_len, seed)
    return ShuffledWindows(tokens, seq_len, seed)
