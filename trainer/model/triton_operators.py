"""Where Caddie's own Triton kernels can run, and how they become operators of torch.

The modules of operators, `fused_*`, are imported where `HAS_KERNELS` says so and nowhere else: making an operator
imports torch's compiler, which costs a process on a CPU two seconds.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

SWITCH = "CADDIE_KERNELS"
HAS_KERNELS = (
    torch.version.cuda is not None and find_spec("triton") is not None and os.environ.get(SWITCH, "on") != "off"
)
"""Whether this torch is one for CUDA, with the Triton that it brings, and CADDIE_KERNELS=off does not say no."""

_TMA_BYTES = 16  # what a row of a descriptor's tensor must be a multiple of


def fusible(x: Tensor) -> bool:
    """Whether the kernels can take `x`: on CUDA, in bfloat16."""
    return HAS_KERNELS and x.is_cuda and x.dtype == torch.bfloat16


def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


if HAS_KERNELS:
    # A compiler could not look into it. (To say so imports the compiler.)
    _is_hopper = torch.compiler.assume_constant_result(_is_hopper)  # type: ignore[no-untyped-call]  # torch's own


def fusible_mlp(x: Tensor, fc: Tensor) -> bool:
    """Whether `trainer.model.fused_mlp` can take `x` and a `fc` (hidden, dim): on Hopper."""
    if not fusible(x) or not _is_hopper(x.device.index):
        return False
    return all(size * x.element_size() % _TMA_BYTES == 0 for size in fc.shape)


def operator(name: str) -> Any:
    """A decorator: a function of tensors that launches kernels, which a compiler sees, becomes the operator `name`."""
    return triton_op(name, mutates_args={})


def launch(module: str, kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of `trainer.model.MODULE`, which is imported here and not before, as it imports Triton."""
    found = getattr(import_module(f"trainer.model.{module}"), kernel)
    wrap_triton(found)[(programs,)](*arguments, **constants)
