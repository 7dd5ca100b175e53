"""What a run decides on the machine it finds, before its clock starts: the micro-batch, the attention kernel, and the
matrix rate that its speed is held against. None of it belongs to the configuration, or decides what is learnt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import get_args

import torch

from trainer.attention_choice import choose_backend, choose_window_backend, summary
from trainer.config import TrainConfig
from trainer.data.manifest import DataSet
from trainer.errors import InputError
from trainer.kept_timings import BackendTiming
from trainer.matrix_rate import matrix_rate
from trainer.memory import USABLE_SHARE, chosen_micro_tokens, default_micro_tokens, peak_memory_bytes
from trainer.model.attention_backends import Backend
from trainer.model.eager import has_bfloat16_units
from trainer.ranks import ALONE, Ranks
from trainer.report import Event


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A configuration, its data, and what was decided about running it here; the same on all processes."""

    config: TrainConfig
    dataset: DataSet
    device: torch.device
    ranks: Ranks
    micro_tokens: int
    """Tokens per forward pass of one process."""
    backend: Backend
    timings: tuple[BackendTiming, ...]
    window_backend: Backend
    """Of layers with a window, if there are any."""
    window_timings: tuple[BackendTiming, ...]
    matrix_rate: float
    """FLOP/s of one device."""
    free_bytes: int | None
    """CUDA memory that was free before anything was built, of the process that had least."""

    @classmethod
    def make(cls, config: TrainConfig, dataset: DataSet, device: torch.device, ranks: Ranks = ALONE) -> RunPlan:
        """Measure and decide. Raises InputError if the processes cannot share the batch, or for an attention kernel
        that is not there."""
        require_shared_batch(config, ranks)
        free = _least_free_bytes(device, ranks)
        micro_tokens = _micro_tokens(config, device, ranks, free)
        (backend, timings), (window_backend, window_timings) = _backends(config, micro_tokens, device, ranks)
        (rate,) = ranks.first_says([_measured_rate(device)])
        return cls(
            config=config,
            dataset=dataset,
            device=device,
            ranks=ranks,
            micro_tokens=micro_tokens,
            backend=backend,
            timings=timings,
            window_backend=window_backend,
            window_timings=window_timings,
            matrix_rate=rate,
            free_bytes=free,
        )

    @property
    def compiled(self) -> bool:
        return self.device.type == "cuda" if self.config.compile is None else self.config.compile

    @property
    def rounds_products(self) -> bool:
        """Whether matrix products of a training step round their inputs: uncompiled, on a CPU that gains by it."""
        asked = self.config.cpu_matmul_precision == "bfloat16"
        return asked and self.device.type == "cpu" and not self.compiled and has_bfloat16_units()

    @property
    def micro_global(self) -> int:
        """Tokens of one forward pass of all processes together: what a batch is made of."""
        return self.micro_tokens * self.ranks.world_size

    def events(self, step: int) -> list[Event]:
        """What the log says of it."""
        batch = self.config.batch.train_batch_tokens
        detail = f"tokens:{self.micro_tokens} accumulation:{batch // self.micro_global}"
        if self.free_bytes is not None:
            predicted = self._predicted_bytes() / 1e9
            detail += f" predicted:{predicted:.1f}GB free:{self.free_bytes / 1e9:.1f}GB"
        told = [Event(kind="micro_batch", step=step, detail=detail)]
        windowed = self.config.model.window_at(self.config.batch.train_seq_len) is not None
        if self.timings or windowed:
            detail = summary(self.backend, self.timings)
            if windowed:
                detail += f" window:{summary(self.window_backend, self.window_timings)}"
            told.append(Event(kind="attention", step=step, detail=detail))
        return told

    def _predicted_bytes(self) -> int:
        return peak_memory_bytes(self.config, micro_tokens=self.micro_tokens, world_size=self.ranks.world_size)


def require_shared_batch(config: TrainConfig, ranks: Ranks) -> None:
    """Raise InputError unless each process gets equally many micro-batches of the configuration's batch."""
    batch, world_size = config.batch, ranks.world_size
    choices = batch.micro_choices(world_size)
    if not choices:
        raise InputError(
            f"{world_size} processes cannot share batch.train_batch_tokens {batch.train_batch_tokens}, which is "
            f"{batch.train_batch_tokens // batch.train_seq_len} windows of {batch.train_seq_len} tokens"
            + (
                f" and begins with {batch.warmup_start_tokens // batch.train_seq_len}"
                if batch.warmup_start_tokens is not None
                else ""
            )
            + "; give a multiple of world size x train_seq_len, or start another number of processes"
        )
    if batch.micro_batch_tokens is not None and batch.micro_batch_tokens not in choices:
        raise InputError(
            f"batch.micro_batch_tokens {batch.micro_batch_tokens} of each of {world_size} processes does not divide "
            f"the batch; give {' or '.join(map(str, choices[-3:]))}, or leave it out"
        )


def _least_free_bytes(device: torch.device, ranks: Ranks) -> int | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    sharing = -(-ranks.local_world_size() // torch.cuda.device_count())  # processes on one card
    own = [0.0] * ranks.world_size
    own[ranks.rank] = min(free, USABLE_SHARE * total) / sharing
    return math.floor(min(ranks.sum_float64(own)))


def _micro_tokens(config: TrainConfig, device: torch.device, ranks: Ranks, free: int | None) -> int:
    """Those asked for; else on CUDA what `trainer.memory` chooses; elsewhere the configuration's own default, as far as
    the processes can share."""
    batch = config.batch
    if batch.micro_batch_tokens is not None:
        return batch.micro_batch_tokens
    if device.type == "cuda" and free is not None:
        return chosen_micro_tokens(config, free, world_size=ranks.world_size)
    return default_micro_tokens(config, ranks.world_size)


def _backends(
    config: TrainConfig, micro_tokens: int, device: torch.device, ranks: Ranks
) -> Iterator[tuple[Backend, tuple[BackendTiming, ...]]]:
    """Of whole rows and of windows. All processes take what the first one found: near a tie their own measurements
    could differ."""
    seq_len = config.batch.train_seq_len
    known: tuple[Backend, ...] = get_args(Backend)
    for choose in (choose_backend, choose_window_backend):
        found, timings = choose(
            config.attention_backend, config.model, rows=micro_tokens // seq_len, time=seq_len, device=device
        )
        (index,) = ranks.first_says([float(known.index(found))])
        yield known[int(index)], timings


@cache
def _measured_rate(device: torch.device) -> float:
    """Once a process: the device stays the same."""
    return matrix_rate(device)
