"""Per-row symmetric integer rounding: the one rule that the exporter and quantisation-aware training share.

A row w of a matrix becomes integers q in [-Q, Q], Q = 2^(bits-1) - 1, and one fp16 scale s:
`s = fp16(clip * (1 / Q))`, `q = clamp(round_half_even(w / s), -Q, Q)`, with `clip` the row's largest magnitude, or
`k * std(row)` ("SDClip" of the public runs). The scale is rounded to fp16 *before* it is used, so that
nothing is lost between rounding and storing.

Written so that eager and compiled code give the same bits on every device: a constant is multiplied by its
reciprocal (some backends divide, some do not), and fp16 is reached by integer arithmetic, because Inductor removes
a cast to fp16 and back as if it were without effect. Only the `std` of "SDClip" may differ in its last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import InputError

# The smallest positive fp16 (a subnormal; exact in fp32) keeps a row of zeros from dividing by zero.
_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0
_SMALLEST_NORMAL = 2.0**-14
# fp16 keeps 10 of the 23 mantissa bits of fp32.
_DROPPED_BITS = 13
_ALMOST_HALF = (1 << (_DROPPED_BITS - 1)) - 1
_KEPT = ~((1 << _DROPPED_BITS) - 1)


def largest_value(bits: int) -> int:
    """Q, the largest magnitude of a symmetric signed integer of `bits` bits: 31 for int6, 127 for int8."""
    return int(2 ** (bits - 1)) - 1


def row_scales(weight: Tensor, bits: int, clip_sigma: float | None) -> Tensor:
    """Scales `(rows, 1)` in fp32, each of them exactly an fp16 number. `weight` is `(rows, columns)` fp32."""
    if clip_sigma is None:
        clip = weight.abs().amax(dim=1, keepdim=True)
    else:
        clip = weight.std(dim=1, correction=0, keepdim=True) * clip_sigma
    return round_to_half((clip * (1.0 / largest_value(bits))).clamp(_SMALLEST_SCALE, _LARGEST_SCALE))


def round_to_half(scale: Tensor) -> Tensor:
    """fp32 numbers in [0, 65504] to the nearest fp16 number, halves to even, still in fp32; NaN stays NaN."""
    bits = scale.view(torch.int32)
    normal = ((bits + _ALMOST_HALF + ((bits >> _DROPPED_BITS) & 1)) & _KEPT).view(torch.float32)
    # Below, fp16 numbers are the multiples of the smallest one; powers of two scale without error.
    subnormal = (scale * 2.0**24).round() * 2.0**-24
    # Carrying into a NaN's bits could make it a number.
    return torch.where(scale.isnan(), scale, torch.where(scale < _SMALLEST_NORMAL, subnormal, normal))


def round_rows(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Integers as fp32 `(rows, columns)`; `scales` is `(rows, 1)` from `row_scales`."""
    limit = float(largest_value(bits))
    return (weight / scales).round().clamp(-limit, limit)


def quantize(
    weight: Tensor, bits: int, clip_sigma: float | None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(rows, columns)` to int8 values `(rows, columns)` and fp16 scales `(rows,)`: `scales`, where they are given.

    Raises ValueError for anything but a matrix, InputError for one that is not finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"only matrices are quantised, got a tensor of shape {tuple(weight.shape)}")
    weight = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise InputError(
            "a weight that is not finite cannot be quantised; the run diverged, take an earlier checkpoint"
        )
    steps = row_scales(weight, bits, clip_sigma) if scales is None else scales.to(torch.float32).unsqueeze(1)
    return round_rows(weight, steps, bits).to(torch.int8), steps.squeeze(1).to(torch.float16)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """int8 values `(rows, columns)` and fp16 scales `(rows,)` to fp32 `(rows, columns)`."""
    return values.to(torch.float32) * scales.to(torch.float32).unsqueeze(1)
