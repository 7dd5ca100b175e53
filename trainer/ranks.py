"""The processes that `torchrun` starts side by side: which of them this one is, and what they tell each other.

Numbers and tensors on the CPU travel by gloo. CUDA tensors travel by NCCL where each process has a GPU of its own;
where some share one, which NCCL refuses, they go through the CPU. Every collective must be called by all processes,
in the same order and with the same shapes; alone, each is free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import InputError

if TYPE_CHECKING:  # torch only where there is more than one process
    import torch
    from torch import Tensor

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GLOO, _GLOO_AND_NCCL = "gloo", "cpu:gloo,cuda:nccl"
_LETTING_GO_SECONDS = 0.1  # for gloo's threads, when they are not joined, to drop the last collective's tensors


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
    def joined(self, device: torch.device | None = None) -> Iterator[None]:
        """Meet the other processes, and part from them at the end; `device` is where this one's tensors will be.

        Raises RanksError if they cannot be met. After an error there is no parting, for that could wait for processes
        that wait for this one: its end tells them.
        """
        if self.world_size == 1:
            yield
            return
        # Its functions keep, as default arguments, the group that exists when they are imported, and torch._dynamo
        # imports them. A group kept at the interpreter's end aborts the process now and then: gloo's threads live
        # on, and one that lets go of a tensor's Python object finds no interpreter. So: before there is a group.
        import torch.distributed.nn.functional  # noqa: F401, PLC0415 - torch only with more than one process
        from torch import distributed  # noqa: PLC0415 - as above

        backend = self._backend(device)
        try:
            distributed.init_process_group(backend, rank=self.rank, world_size=self.world_size)
        except (RuntimeError, ValueError) as error:
            raise RanksError(
                f"rank {self.rank} of {self.world_size} cannot meet the others at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}"
            ) from error
        with ExitStack() as after_an_error:
            after_an_error.callback(time.sleep, _LETTING_GO_SECONDS)
            self._require_one_backend(backend)
            yield
            after_an_error.pop_all()
        distributed.destroy_process_group()

    def _require_one_backend(self, backend: str) -> None:
        (with_nccl,) = self.sum_float64([float(backend == _GLOO_AND_NCCL)])
        if with_nccl not in {0.0, float(self.world_size)}:
            raise RanksError(
                f"{with_nccl:.0f} of {self.world_size} processes have a GPU of their own; start as many on each "
                "machine as it has GPUs, or set the configuration's device to cpu"
            )

    def local_world_size(self) -> int:
        """Processes on this machine, as torchrun says; where nobody does, all of them."""
        return 1 if self.world_size == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def _backend(self, device: torch.device | None) -> str:
        if device is None or device.type != "cuda":
            return _GLOO
        import torch  # noqa: PLC0415 - as above

        own_gpu = torch.cuda.device_count() >= self.local_world_size() and torch.distributed.is_nccl_available()
        return _GLOO_AND_NCCL if own_gpu else _GLOO

    def sum_float64(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, each number for itself; waits for them all. Raises RanksError if one is gone."""
        if self.world_size == 1:
            return list(values)
        import torch  # noqa: PLC0415 - as above

        total = torch.tensor(values, dtype=torch.float64)
        with self._naming_a_loss("adding up"):
            torch.distributed.all_reduce(total)
        return [float(value) for value in total]

    def first_says(self, values: Sequence[float]) -> list[float]:
        """The first process's values, at every process (the others' count only); so all decide alike. Cheap.

        Raises RanksError if one is gone.
        """
        if self.world_size == 1:
            return list(values)
        import torch  # noqa: PLC0415 - as above

        said = torch.tensor(values, dtype=torch.float64)
        with self._naming_a_loss("agreeing on a step"):
            torch.distributed.broadcast(said, src=0)
        return [float(value) for value in said]

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor, in place, by its mean over all processes, to the last bit the same at each."""
        if self.world_size == 1:
            return tensor
        import torch  # noqa: PLC0415 - as above

        with self._naming_a_loss("averaging"):
            carried = _travelling(tensor)
            torch.distributed.all_reduce(carried)
        return tensor.copy_(carried.div_(self.world_size))

    def from_first_(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by that of the first process."""
        if self.world_size == 1:
            return
        import torch  # noqa: PLC0415 - as above

        with self._naming_a_loss("sending weights"):
            carried = _travelling(tensor)
            torch.distributed.broadcast(carried, src=0)
        tensor.copy_(carried)

    def mean_shard(self, tensor: Tensor) -> Tensor:
        """(world_size * n, ...) -> (n, ...): this process's share of the mean over all (a reduce-scatter)."""
        if self.world_size == 1:
            return tensor
        import torch  # noqa: PLC0415 - as above

        carried = _travelling(tensor)
        own = torch.empty_like(carried[: carried.shape[0] // self.world_size])
        with self._naming_a_loss("averaging"):
            _by_either_name("reduce_scatter_single", "reduce_scatter_tensor")(own, carried.contiguous())
        return own.div_(self.world_size).to(tensor.device)

    def all_shards(self, shard: Tensor) -> Tensor:
        """(n, ...) of each process -> (world_size * n, ...) at every one, in the order of ranks (an all-gather)."""
        if self.world_size == 1:
            return shard
        carried = _travelling(shard).contiguous()
        whole = carried.new_empty((self.world_size * carried.shape[0], *carried.shape[1:]))
        with self._naming_a_loss("gathering"):
            _by_either_name("all_gather_single", "all_gather_into_tensor")(whole, carried)
        return whole.to(shard.device)

    def barrier(self) -> None:
        """Wait until every process is here. Raises RanksError if one is gone."""
        if self.world_size > 1:
            self.sum_float64([0.0])

    @contextmanager
    def _naming_a_loss(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.rank} of {self.world_size} lost another one while {doing}: {error}; "
                "what the other one said tells why"
            ) from error


ALONE = Ranks()


def _travelling(tensor: Tensor) -> Tensor:
    """The tensor itself where its device has a way to the others, or a copy on the CPU."""
    import torch  # noqa: PLC0415 - torch only where there is more than one process

    if tensor.is_cuda and "nccl" not in torch.distributed.get_backend_config():
        return tensor.cpu()
    return tensor


def _by_either_name(new: str, old: str) -> Callable[[Tensor, Tensor], object]:
    """A collective of torch, whose name changed with torch 2.13 (the old one warns there)."""
    from torch import distributed  # noqa: PLC0415 - as above

    found: Callable[[Tensor, Tensor], object] = getattr(distributed, new if hasattr(distributed, new) else old)
    return found


def _count(given: Mapping[str, str], name: str) -> int:
    try:
        value = int(given[name])
    except ValueError:
        value = -1
    if value < 0:
        raise RanksError(f"{name}={given[name]!r} is not a count; start with torchrun, or unset RANK and WORLD_SIZE")
    return value
