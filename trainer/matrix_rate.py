"""How fast the device multiplies large matrices: the rate that a training step is held against (MFU)."""

from __future__ import annotations

import time

import torch

_CUDA_SIZE = 8192
_CPU_SIZE = 512
_RUNS = 12


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of square products of random matrices, the best of several runs.

    bfloat16 of 8192 x 8192 on CUDA, float32 of 512 x 512 with torch's own threads elsewhere. Random data, because
    zeros draw less power and run at a higher clock. It is what this device does at this moment and not the number in
    its data sheet; takes less than .3 s, and leaves torch's generators as they are.
    """
    on_cuda = device.type == "cuda"
    size, dtype = (_CUDA_SIZE, torch.bfloat16) if on_cuda else (_CPU_SIZE, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = _cuda_seconds if on_cuda else _cpu_seconds
    torch.mm(left, right, out=product)  # the library chooses its kernel, and the clock rises
    return 2.0 * size**3 / min(seconds(left, right, product) for _ in range(_RUNS))


def _cuda_seconds(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    with torch.cuda.device(left.device):
        begin.record()
        torch.mm(left, right, out=product)
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _cpu_seconds(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> float:
    begin = time.perf_counter()
    torch.mm(left, right, out=product)
    return time.perf_counter() - begin
