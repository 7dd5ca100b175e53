"""The processes that `torchrun` starts side by side: which of them this one is, and sums over all of them.

Only a few float64 numbers ever travel, so the processes always speak gloo over the CPU, on CUDA too: two of them
may then share one GPU, which NCCL refuses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.errors import InputError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RanksError(InputError):
    """An environment that does not say which process this is, or a process that is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process is `rank` of `world_size`, and `local_rank` of those on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes results."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """What torchrun's variables say; without RANK and WORLD_SIZE one process alone. Raises RanksError."""
        given = os.environ if environment is None else environment
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls()
        if "RANK" in given and given.get("WORLD_SIZE") == "1":
            return cls()  # one process needs nobody's address
        missing = [name for name in _VARIABLES if name not in given]
        if missing:
            raise RanksError(
                f"the environment sets RANK or WORLD_SIZE but not {', '.join(missing)}; start with torchrun, "
                "or unset both to run one process"
            )
        rank, world_size, local_rank, _ = (_count(given, name) for name in (*_VARIABLES[:3], "MASTER_PORT"))
        if rank >= world_size:
            raise RanksError(f"RANK={rank} is not below WORLD_SIZE={world_size}; ranks count from 0")
        return cls(rank=rank, world_size=world_size, local_rank=local_rank)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Meet the other processes, and part from them at the end. Raises RanksError if they cannot be met."""
        if self.world_size == 1:
            yield
            return
        from torch import distributed  # noqa: PLC0415 - torch only where there is more than one process

        try:
            distributed.init_process_group("gloo", rank=self.rank, world_size=self.world_size)
        except (RuntimeError, ValueError) as error:
            raise RanksError(
                f"rank {self.rank} of {self.world_size} cannot meet the others at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}"
            ) from error
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def sum_float64(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, each number for itself; waits for them all. Raises RanksError if one is gone."""
        if self.world_size == 1:
            return list(values)
        import torch  # noqa: PLC0415

        total = torch.tensor(values, dtype=torch.float64)
        try:
            torch.distributed.all_reduce(total)
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.rank} of {self.world_size} lost another one while adding up: {error}; "
                "what the other one said tells why"
            ) from error
        return [float(value) for value in total]


ALONE = Ranks()


def _count(given: Mapping[str, str], name: str) -> int:
    try:
        value = int(given[name])
    except ValueError:
        value = -1
    if value < 0:
        raise RanksError(f"{name}={given[name]!r} is not a count; start with torchrun, or unset RANK and WORLD_SIZE")
    return value
