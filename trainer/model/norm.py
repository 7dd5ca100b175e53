"""RMS norm without weights: x / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from trainer.model.eager import EPS, RmsNorm, eager_cpu


def rms_norm(x: Tensor) -> Tensor:
    """(..., dim) -> (..., dim), same dtype."""
    if eager_cpu(x):
        normed: Tensor = RmsNorm.apply(x)  # type: ignore[no-untyped-call]  # torch's own
        return normed
    return functional.rms_norm(x, (x.shape[-1],), eps=EPS)
