"""Which attention kernel a training run uses: asked for, or the fastest of those that are there, by measurement.

Measured is a forward and a backward pass at the shape of the run's own micro-batches, before the clock starts, on
random numbers; with attention by document on documents of random lengths. Layers with a window have a choice of their
own, measured with the window. What was measured is kept for later runs on this machine (`trainer.kept_timings`): they
start sooner, and get the same kernel. For scores `trainer.evaluation_attention` chooses, without a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trainer.config import AttentionBackend, ModelConfig
from trainer.errors import InputError
from trainer.kept_timings import BackendTiming, keep, recall
from trainer.model.attention_backends import (
    BACKENDS,
    WITHOUT_WINDOW,
    Attend,
    Backend,
    Segments,
    attention_of,
    could_run,
    flash3_version,
    segments_of,
)

_WARM_RUNS, _TIMED_RUNS = 3, 7
# Of documents in the measurement: about what English web text has in tokens of a 4,096 vocabulary.
_MEAN_DOCUMENT_TOKENS = 1000
# It was behind cuDNN wherever it was measured, and 15 s of compiling showed no more than that.
_ONLY_IF_ASKED: frozenset[Backend] = frozenset({"flex"})
# Two measurements of one kernel were up to 7% apart.
_ABOUT_AS_FAST = 1.1
# A thing that cannot run says so in one of these; torch's compiler and CUDA raise kinds of RuntimeError.
_REFUSALS = (RuntimeError, ValueError, AssertionError, ImportError)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Of one call: `rows` of `time` positions, in `heads` queries and `kv_heads` keys of `head_dim`; with a `window`,
    which is shorter than a row, over no more than so many positions."""

    rows: int
    time: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: bool
    window: int | None = None

    @classmethod
    def of(cls, model: ModelConfig, *, rows: int, time: int, windowed: bool = False) -> AttentionShape:
        """Of a layer that sees whole rows, or of one with the window."""
        return cls(
            rows=rows,
            time=time,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            documents=model.document_attention,
            window=model.window_at(time) if windowed else None,
        )

    def could_run(self, backend: Backend, device: torch.device) -> bool:
        return could_run(backend, device, documents=self.documents, window=self.window is not None)


def choose_backend(
    asked: AttentionBackend, model: ModelConfig, *, rows: int, time: int, device: torch.device
) -> tuple[Backend, tuple[BackendTiming, ...]]:
    """The backend for micro-batches of `rows` windows of `time` tokens, and what was measured, fastest first.

    `auto` is `plain` without CUDA, where nothing is measured. Raises InputError, with the reason, for one that is
    asked for and cannot run here.
    """
    shape = AttentionShape.of(model, rows=rows, time=time)
    if asked != "auto":
        _require(asked, shape, device, f"attention_backend {asked}")
        return asked, ()
    return _fastest(shape, device)


def choose_window_backend(
    asked: AttentionBackend, model: ModelConfig, *, rows: int, time: int, device: torch.device
) -> tuple[Backend, tuple[BackendTiming, ...]]:
    """The same for layers with a window: the backend that was asked for, or `flash` instead of one without windows.

    `plain` where no layer sees less than its row, which nothing is measured for.
    """
    shape = AttentionShape.of(model, rows=rows, time=time, windowed=True)
    if shape.window is None:
        return "plain", ()
    if asked == "auto":
        return _fastest(shape, device)
    if asked in WITHOUT_WINDOW:
        _require("flash", shape, device, f"attention_backend {asked} knows nothing of windows, and flash instead of it")
        return "flash", ()
    _require(asked, shape, device, f"attention_backend {asked} with the window of model.attention_window")
    return asked, ()


def _fastest(shape: AttentionShape, device: torch.device) -> tuple[Backend, tuple[BackendTiming, ...]]:
    if device.type != "cuda":
        return "plain", ()
    tried = [backend for backend in BACKENDS if backend not in _ONLY_IF_ASKED and shape.could_run(backend, device)]
    key = _key(shape, tried, device)
    timings = None if key is None else recall(key)
    if timings is None:
        timings = tuple(timing_of(backend, shape, device) for backend in tried)
        if key is not None and _lasting(timings):
            keep(key, timings)
    ordered = sorted(timings, key=lambda timing: (timing.milliseconds is None, timing.milliseconds))
    return preferred(ordered), tuple(ordered)


def _key(shape: AttentionShape, tried: Sequence[Backend], device: torch.device) -> dict[str, Any] | None:
    """What a timing depends on; None where the device does not say what it is."""
    try:
        card = torch.cuda.get_device_name(device)
    except _REFUSALS:
        return None
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch's own
    versions = {"torch": str(torch.__version__), "cudnn": cudnn, "flash_attn_interface": flash3_version()}
    return {"card": card, **versions, "tried": list(tried), **asdict(shape)}


def _lasting(timings: Sequence[BackendTiming]) -> bool:
    """Whether they will be the same next time. A kernel that refused may have lacked memory or a compiler just now."""
    return all(timing.milliseconds is not None for timing in timings)


def preferred(timings: Sequence[BackendTiming]) -> Backend:
    """The first, in the order of `BACKENDS`, of those that are about as fast as the fastest: so a run that is started
    again gets the same kernel, and the graphs that were compiled for it. `plain` if none ran: whatever it is, the run's
    own first pass says it better."""
    ran = {timing.backend: timing.milliseconds for timing in timings if timing.milliseconds is not None}
    close = [backend for backend, needed in ran.items() if needed <= _ABOUT_AS_FAST * min(ran.values())]
    return min(close, key=BACKENDS.index, default="plain")


def summary(chosen: Backend, timings: tuple[BackendTiming, ...]) -> str:
    """In one line for the log."""
    told = (
        f"{timing.backend}:{'none' if timing.milliseconds is None else f'{timing.milliseconds:.2f}ms'}"
        for timing in timings
    )
    return " ".join((chosen, *told, *(["kept"] if any(timing.kept for timing in timings) else [])))


def timing_of(backend: Backend, shape: AttentionShape, device: torch.device) -> BackendTiming:
    """How long it takes on `device`, a CUDA one."""
    try:
        passes = _passes(backend, shape, device)
        for _ in range(_WARM_RUNS):
            next(passes)
        return BackendTiming(backend=backend, milliseconds=median(next(passes) for _ in range(_TIMED_RUNS)))
    except _REFUSALS as error:
        return BackendTiming(backend=backend, milliseconds=None, refusal=_first_line(error))


def random_segments(shape: AttentionShape, device: torch.device, generator: torch.Generator) -> Segments:
    """Documents of geometric lengths in random rows, their starts given as the loader gives them."""
    begins = torch.rand(shape.rows, shape.time, device=device, generator=generator) < 1 / _MEAN_DOCUMENT_TOKENS
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten().int()
    end = torch.tensor([shape.rows * shape.time], dtype=torch.int32, device=device)
    return segments_of(torch.zeros_like(begins, dtype=torch.int64), torch.cat((starts, end)))


def random_heads(
    shape: AttentionShape, device: torch.device, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (rows, time, heads, head_dim), which ask for gradients."""
    return tuple(  # type: ignore[return-value] # three of them
        torch.randn(
            (shape.rows, shape.time, heads, shape.head_dim), device=device, generator=generator, dtype=torch.float32
        )
        .to(dtype)
        .requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )


def _passes(backend: Backend, shape: AttentionShape, device: torch.device) -> Iterator[float]:
    """Runs without end, each with its milliseconds."""
    generator = torch.Generator(device).manual_seed(0)
    heads = random_heads(shape, device, generator, torch.bfloat16)
    segments = random_segments(shape, device, generator) if shape.documents else None
    attend: Attend = attention_of(backend, time=shape.time, segments=segments, device=device, window=shape.window)
    upstream = torch.randn(heads[0].shape, device=device, generator=generator).bfloat16()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call] # torch's
    with torch.cuda.device(device):
        while True:
            begin.record()
            torch.autograd.grad(attend(*heads), heads, upstream)
            end.record()
            end.synchronize()
            yield float(begin.elapsed_time(end))


def _require(backend: Backend, shape: AttentionShape, device: torch.device, subject: str) -> None:
    """`subject` is what an error says of whom."""
    if shape.could_run(backend, device):
        refusal = refusal_of(backend, shape, device)
    elif device.type != "cuda":
        refusal = f"it needs CUDA, and the device is {device.type}"
    elif backend == "flash3":
        refusal = "the package flash_attn_interface is not installed"
    else:
        refusal = "it knows nothing of documents, which model.document_attention asks for"
    if refusal:
        raise InputError(f"{subject} cannot run here: {refusal}; give auto, or another one")


def refusal_of(backend: Backend, shape: AttentionShape, device: torch.device) -> str:
    """Why a backend that could run does not at this shape; empty if it does. `plain` does."""
    return "" if backend == "plain" else _refusal(backend, shape, device)


@cache
def _refusal(backend: Backend, shape: AttentionShape, device: torch.device) -> str:
    """Found out by a pass over one row."""
    return timing_of(backend, replace(shape, rows=1), device).refusal


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200].rstrip('. ')}" if lines else type(error).__name__
