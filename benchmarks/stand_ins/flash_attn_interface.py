"""Stands in for FlashAttention-3's package where that is not installed: the public scripts import it by this name.

Attention is torch's then: cuDNN's kernel for whole rows, FlashAttention-2 by document.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

_GROUPS_ARE_ASKED_FOR = "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """(batch, time, heads, head_dim); keys and values may have fewer heads."""
    queries, keys, values = (part.transpose(1, 2) for part in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        attended = scaled_dot_product_attention(
            queries, keys, values, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]
        )
    return attended.transpose(1, 2)


def flash_attn_varlen_func(  # noqa: PLR0917 - the package's signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(tokens, heads, head_dim), documents from each start to the next."""
    grouping: dict[str, Any] = {"enable_gqa": True} if _GROUPS_ARE_ASKED_FOR and k.shape[1] != q.shape[1] else {}
    window = (window_size[0], 0) if causal else window_size
    attended: Any = varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=window, **grouping
    )
    found: Tensor = attended
    return found
