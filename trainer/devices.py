"""Which device a process computes on, and how one says that its memory is full."""

from __future__ import annotations

import torch

from trainer.errors import InputError

_CPU_ALLOCATION_FAILED = ("can't allocate memory", "not enough memory")


def choose_device(asked: str, *, asked_by: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda`; processes of one machine take its GPUs in turn.

    Raises InputError, naming `asked_by`, for another word, or if CUDA is asked for and there is none.
    """
    if asked not in {"auto", "cpu", "cuda"}:
        raise InputError(f"{asked_by} {asked}: use auto, cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{asked_by} cuda: there is no CUDA device here; use auto or cpu")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a type for it; the CPU's allocator raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATION_FAILED)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
