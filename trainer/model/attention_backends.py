"""The kernels that causal attention can run on, and where documents begin for them.

- `flash3`: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), if its package `flash_attn_interface` is installed.
- `flash`: FlashAttention-2 (Dao 2023, arXiv:2307.08691) as torch has it; per document, and within a window, by its
  variable-length form.
- `cudnn`: cuDNN's, through torch. It knows nothing of documents, nor of windows.
- `flex`: torch's FlexAttention (arXiv:2412.05496), a Triton kernel that passes over what a mask leaves empty. Here not
  by document either: with a mask for each row that is made within the compiled pass, its kernels met addresses that
  were not theirs (torch 2.11, H100), whether torch's function made the mask or arithmetic did.
- `plain`: whatever `scaled_dot_product_attention` takes; documents are a mask of (time, time) a row, a window is one of
  all rows.

All compute the same function, with grouped heads; `benchmarks/attention.py` holds each of them against float64.

A window (Beltagy et al. 2020, Longformer, arXiv:2004.05150; Jiang et al. 2023, Mistral 7B, arXiv:2310.06825) of w: a
position sees itself and the w - 1 before it, as far as they are in its row and its document.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trainer.data.shards import BOS

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(batch, time, heads, head_dim) queries, then keys and values of fewer heads -> like the queries."""

Backend = Literal["flash3", "flash", "cudnn", "flex", "plain"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# Looked up here, for a compiler that traces a pass could not.
_FLASH3: ModuleType | None = None
with suppress(ImportError):
    _FLASH3 = import_module("flash_attn_interface")


def flash3_version() -> str | None:
    """Of the package, as it says; None if it is not installed, or does not say."""
    return getattr(_FLASH3, "__version__", None)


_DENSE_ONLY: frozenset[Backend] = frozenset({"cudnn", "flex"})
WITHOUT_WINDOW: frozenset[Backend] = frozenset({"cudnn"})


class Segments(NamedTuple):
    """`ids` (batch, time) int32, equal within a document; `cu_seqlens` its starts in the flattened rows."""

    ids: Tensor
    cu_seqlens: Tensor


def segments_of(inputs: Tensor, cu_seqlens: Tensor | None) -> Segments:
    """A document begins with each row, each BOS and each start that is given.

    `inputs` (batch, time). `cu_seqlens` (most documents + 1,) int32 ascending, its end repeated, holds every start of
    the flattened rows; where none are given they are found, as many as there are tokens, most of them repeated.
    """
    batch, time = inputs.shape
    starts = _starts(inputs, cu_seqlens)
    if cu_seqlens is None:
        at = torch.arange(batch * time, device=inputs.device, dtype=torch.int32).view(batch, time)
        first = starts | (at % time == 0)
        cu_seqlens = functional.pad(
            torch.where(first, at, batch * time).flatten().sort().values, (0, 1), value=batch * time
        )
    return Segments(ids=starts.cumsum(1, dtype=torch.int32), cu_seqlens=cu_seqlens.int())


def document_ids(inputs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The `ids` of `segments_of` alone."""
    return _starts(inputs, cu_seqlens).cumsum(1, dtype=torch.int32)


def _starts(inputs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(batch, time) bool: whether a document begins at a position; that one begins with each row is not said."""
    starts = inputs == BOS
    if cu_seqlens is None:
        return starts
    given = torch.zeros(inputs.numel() + 1, dtype=torch.bool, device=inputs.device)
    return starts | given.index_fill(0, cu_seqlens.long(), True)[:-1].view_as(inputs)


def could_run(backend: Backend, device: torch.device, *, documents: bool, window: bool = False) -> bool:
    """Whether it is worth a try: there for this kind of device and of attention. `plain` always is."""
    if backend == "plain":
        return True
    if device.type != "cuda" or (documents and backend in _DENSE_ONLY) or (window and backend in WITHOUT_WINDOW):
        return False
    return backend != "flash3" or _FLASH3 is not None


def attention_of(
    backend: Backend, *, time: int, segments: Segments | None, device: torch.device, window: int | None = None
) -> Attend:
    """Causal attention over `time` positions, within documents if `segments` are given, and over no more than the last
    `window` positions. A window as long as the row is none.

    Raises ValueError for a backend that cannot.
    """
    if window is not None and window >= time:
        window = None
    if segments is not None and backend in _DENSE_ONLY:
        raise ValueError(f"attention backend {backend} knows nothing of documents")
    if window is not None and backend in WITHOUT_WINDOW:
        raise ValueError(f"attention backend {backend} knows nothing of windows")
    if backend == "flash3":
        return _flash3_attention(segments, time, window)
    if backend == "flex":
        return _flex_attention(time, device, window)
    if backend == "flash" and (segments is not None or window is not None):
        return _flash_of_variable_length(segments, time, window)
    return _scaled_dot_product(_KERNELS.get(backend), _mask(segments, time, window, device))


_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def _mask(segments: Segments | None, time: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys (last) each query sees; (time, time), or (batch, 1, time, time) by document. None: all before it."""
    if segments is None and window is None:
        return None
    seen = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    if segments is None:
        return seen
    return ((segments.ids.unsqueeze(2) == segments.ids.unsqueeze(1)) & seen).unsqueeze(1)


def _scaled_dot_product(kernel: SDPBackend | None, mask: Tensor | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (part.transpose(1, 2) for part in (q, k, v))
        grouped = k.shape[2] != q.shape[2]
        if kernel is None:
            attended = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
        else:
            with sdpa_kernel(kernel):
                attended = functional.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, enable_gqa=grouped
                )
        return attended.transpose(1, 2)

    return attend


def _flash_of_variable_length(segments: Segments | None, time: int, window: int | None) -> Attend:
    from trainer.model.varlen_attention import varlen_attention  # noqa: PLC0415 - see there

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (part.flatten(0, 1) for part in (q, k, v))
        if segments is None:
            starts = torch.arange(0, (q.shape[0] + 1) * time, time, dtype=torch.int32, device=q.device)
        else:
            starts = segments.cu_seqlens
        return varlen_attention(queries, keys, values, starts, time, window=window).view(q.shape)

    return attend


def _flash3_attention(segments: Segments | None, time: int, window: int | None) -> Attend:
    package = _FLASH3
    if package is None:
        raise ValueError("attention backend flash3 needs the package flash_attn_interface")
    sees: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if segments is None:
            found = package.flash_attn_func(q, k, v, causal=True, **sees)
        else:
            bounds = segments.cu_seqlens
            flat = (part.flatten(0, 1) for part in (q, k, v))
            found = package.flash_attn_varlen_func(*flat, bounds, bounds, time, time, causal=True, **sees)
        attended: Tensor = found[0] if isinstance(found, tuple) else found  # older ones return the log-sum-exp too
        return attended.view(q.shape)

    return attend


def _flex_attention(time: int, device: torch.device, window: int | None) -> Attend:
    def sees_all(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def sees_window(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < most)

    most = window or time
    sees = sees_all if window is None else sees_window
    mask = create_block_mask(sees, None, None, time, time, device=str(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (part.transpose(1, 2) for part in (q, k, v))
        run: Callable[..., Any] = flex_attention
        # Called without a compiler it would hold all (time, time) scores.
        if q.is_cuda and not torch.compiler.is_compiling():
            run = _compiled_flex()
        attended: Tensor = run(queries, keys, values, block_mask=mask, enable_gqa=k.shape[2] != q.shape[2])
        return attended.transpose(1, 2)

    return attend


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
