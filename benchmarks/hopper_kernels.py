"""What libraries of kernels for Hopper would gain over what a training step runs now, and whether they are right.

    python -m benchmarks.hopper_kernels [--model-dim 768] [--heads 6] [--kv-heads 3] [--tokens 65536] [--time 2048]
        [--parts attention mlp symmetric norm]

Each part is tried by itself, and says so if its library is not there or fails:

- attention: cuDNN and torch's FlashAttention-2 against FlashAttention-4 (`flash-attn-4`), whole rows and windows;
- mlp: two products and LeakyReLU(.5)^2 or ReLU^2 as the compiler has them, against QuACK's products that end in an
  activation (`quack-kernels`), which knows ReLU^2;
- symmetric: X X^T of a batch of matrices, against QuACK's product that computes one half of it;
- norm: RMS norm as the compiler has it against QuACK's.

Milliseconds are medians of forward and backward passes (of the product alone for `symmetric`), `first` the seconds of
the first call, which compiles; errors are ||found - exact|| / ||exact|| of output and gradient, bfloat16 against
float64 on fewer rows. The packages are flash-attn-4 (a pre-release) and quack-kernels, with nvidia-cutlass-dsl[cu13].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.attention import exact

_WARM, _TIMED = 3, 15
_ERROR_ROWS = 2048

Function = Callable[..., Tensor]


def milliseconds(run: Callable[[], object]) -> float:
    for _ in range(_WARM):
        run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    taken = []
    for _ in range(_TIMED):
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return median(taken)


def leaves(*shapes: Sequence[int], scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(*shape, device="cuda")).bfloat16().requires_grad_() for shape in shapes]


def tell(name: str, function: Function, given: Sequence[Tensor], exact: Function, few: Sequence[Tensor]) -> None:
    """One line: `function` of `given` timed, and of `few` held against `exact` in float64."""
    try:
        began = time.perf_counter()
        upstream = torch.randn_like(function(*given))
        torch.autograd.grad(function(*given), given, upstream)
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        both = milliseconds(lambda: torch.autograd.grad(function(*given), given, upstream))
        with torch.no_grad():
            forward = milliseconds(lambda: function(*given))
        found = function(*few)
        precise = [tensor.detach().double().requires_grad_() for tensor in few]
        wanted = exact(*precise)
        back = torch.randn_like(found)
        pairs = [
            (found, wanted),
            *zip(
                torch.autograd.grad(found, few, back), torch.autograd.grad(wanted, precise, back.double()), strict=True
            ),
        ]
        errors = [float((one.double() - other).norm() / other.norm()) for one, other in pairs]
    except Exception as error:  # noqa: BLE001 - a library may fail in any way, and the others are still to be told
        print(f"  {name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True)
        return
    print(
        f"  {name}: {both:.3f} ms, forward {forward:.3f}; first {first:.1f} s; errors "
        + " ".join(f"{error:.4f}" for error in errors),
        flush=True,
    )


def attention(asked: argparse.Namespace) -> None:
    from trainer.model.attention_backends import attention_of  # noqa: PLC0415 - parts stand for themselves

    device = torch.device("cuda")
    head_dim = asked.model_dim // asked.heads
    shapes = [(asked.time, count, head_dim) for count in (asked.heads, asked.kv_heads, asked.kv_heads)]
    given = leaves(*((asked.tokens // asked.time, *shape) for shape in shapes))
    few = leaves(*((1, *shape) for shape in shapes))
    for window in (None, 1024, 512, 256):
        for backend in ("cudnn", "flash") if window is None else ("flash",):
            attend = attention_of(backend, time=asked.time, segments=None, device=device, window=window)
            tell(f"{backend}, window {window}", attend, given, partial(exact, segments=None, window=window), few)
        try:
            from flash_attn.cute.interface import flash_attn_func  # type: ignore[import-not-found]  # noqa: PLC0415
        except Exception as error:  # noqa: BLE001
            print(f"  flash-attn-4: {type(error).__name__}: {error}", flush=True)
            continue

        def flash4(q: Tensor, k: Tensor, v: Tensor, window: int | None = window) -> Tensor:
            size = (None, None) if window is None else (window - 1, 0)
            found = flash_attn_func(q, k, v, causal=True, window_size=size)
            attended: Tensor = found[0] if isinstance(found, tuple) else found
            return attended

        tell(f"flash-attn-4, window {window}", flash4, given, partial(exact, segments=None, window=window), few)


def mlp(asked: argparse.Namespace) -> None:
    dim, hidden = asked.model_dim, 4 * asked.model_dim
    weights = leaves((hidden, dim), (dim, hidden), scale=dim**-0.5)
    given = [*leaves((asked.tokens, dim)), *weights]
    few = [*leaves((_ERROR_ROWS, dim)), *weights]

    def plain(slope: float) -> Function:
        def run(x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
            return functional.linear(functional.leaky_relu(functional.linear(x, fc), slope).square(), proj)

        return run

    for name, slope in (("LeakyReLU(.5)^2", 0.5), ("ReLU^2", 0.0)):
        tell(f"compiled, {name}", torch.compile(plain(slope), dynamic=False), given, plain(slope), few)
    try:
        from quack.mlp import mlp_func  # type: ignore[import-not-found]  # noqa: PLC0415
    except Exception as error:  # noqa: BLE001
        print(f"  quack-kernels: {type(error).__name__}: {error}", flush=True)
        return
    for tuned in (False, True):

        def fused(x: Tensor, fc: Tensor, proj: Tensor, tuned: bool = tuned) -> Tensor:
            found: Tensor = mlp_func(x, fc, proj, "relu_sq", tuned=tuned)
            return found

        tell(f"QuACK, ReLU^2, tuned {tuned}", fused, given, plain(0.0), few)


def symmetric(asked: argparse.Namespace) -> None:
    batch = torch.randn(10, asked.model_dim, 4 * asked.model_dim, device="cuda").bfloat16()
    print(f"  bmm: {milliseconds(lambda: batch @ batch.mT):.3f} ms", flush=True)
    try:
        from quack.gemm_interface import gemm_symmetric  # type: ignore[import-not-found]  # noqa: PLC0415

        found = gemm_symmetric(batch, batch.mT)
        found = found[0] if isinstance(found, tuple) else found
        exact = batch.double() @ batch.mT.double()
        error = float((found.double() - exact).norm() / exact.norm())
        needed = milliseconds(lambda: gemm_symmetric(batch, batch.mT))
    except Exception as error:  # noqa: BLE001
        print(f"  QuACK: {type(error).__name__}: {error}", flush=True)
        return
    print(f"  QuACK: {needed:.3f} ms, error {error:.4f}", flush=True)


def norm(asked: argparse.Namespace) -> None:
    def plain(x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), eps=1e-7)

    given, few = leaves((asked.tokens, asked.model_dim)), leaves((_ERROR_ROWS, asked.model_dim))
    tell("compiled", torch.compile(plain, dynamic=False), given, plain, few)
    try:
        from quack.rmsnorm import rmsnorm  # type: ignore[import-not-found]  # noqa: PLC0415
    except Exception as error:  # noqa: BLE001
        print(f"  quack-kernels: {type(error).__name__}: {error}", flush=True)
        return
    tell("QuACK", lambda x: rmsnorm(x, eps=1e-7), given, plain, few)


PARTS = {"attention": attention, "mlp": mlp, "symmetric": symmetric, "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dim", type=int, default=768)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--time", type=int, default=2048)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for part in asked.parts:
        print(part, flush=True)
        PARTS[part](asked)


if __name__ == "__main__":
    main()
