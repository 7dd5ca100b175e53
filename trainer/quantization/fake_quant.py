"""Fake quantisation for training: the forward pass sees rounded weights, the backward pass sees the identity.

Straight-through estimator (Bengio, Leonard, Courville 2013, arXiv:1308.3432) over the exporter's own rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.quantization.rounding import round_rows, row_scales


def fake_quantize(weight: Tensor, bits: int, clip_sigma: float | None) -> Tensor:
    """`(rows, columns)` to its dequantised self, of the same dtype and with the gradient of the identity.

    Equal bit for bit to `dequantize(*quantize(weight, ...))` on fp32 weights. Pure tensor arithmetic without
    data-dependent control flow, so that torch.compile takes it whole.
    """
    with torch.no_grad():
        master = weight.detach().to(torch.float32)
        scales = row_scales(master, bits, clip_sigma)
        rounded = (round_rows(master, scales, bits) * scales).to(weight.dtype)
    # The bracket is exactly zero and carries the gradient. Written as `weight + (rounded - weight)` the sum
    # would be rounded once more, and training would see other weights than the artifact holds.
    return rounded + (weight - weight.detach())
