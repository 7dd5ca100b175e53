"""FlashAttention-2 by document and within windows, as torch has it; imported where it is used: it takes two seconds."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Newer releases of torch want to be asked for grouped heads; older ones take them as they come.
_GROUPS_ARE_ASKED_FOR = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, *, window: int | None = None
) -> Tensor:
    """Causal attention within documents of at most `longest` tokens, over the last `window` positions if it is given.

    (tokens, heads, head_dim), keys and values of as many or fewer heads; `cu_seqlens` (documents + 1,) int32.
    """
    grouping: dict[str, Any] = {"enable_gqa": True} if _GROUPS_ARE_ASKED_FOR and k.shape[1] != q.shape[1] else {}
    sees = (-1, 0) if window is None else (window - 1, 0)
    attended: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=sees, **grouping)
    found: Tensor = attended  # and nothing else, which would have to be asked for
    return found
