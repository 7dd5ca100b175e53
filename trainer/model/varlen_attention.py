"""FlashAttention-2 by document, as torch has it; imported where it is used, for it takes two seconds."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Newer releases of torch want to be asked for grouped heads; older ones take them as they come.
_GROUPS_ARE_ASKED_FOR = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Causal attention within documents of at most `longest` tokens.

    (tokens, heads, head_dim), keys and values of as many or fewer heads; `cu_seqlens` (documents + 1,) int32.
    """
    grouping: dict[str, Any] = {"enable_gqa": True} if _GROUPS_ARE_ASKED_FOR and k.shape[1] != q.shape[1] else {}
    attended: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), **grouping)
    found: Tensor = attended  # and nothing else, which would have to be asked for
    return found
