"""Steps for every row of every matrix, so that an artifact fills its bytes and the loss suffers least.

A step s adds an error of variance s^2 / 12 to each weight, and what an error costs differs from row to row: row r of a
matrix with C columns has the Fisher trace T_r (`trainer.sensitivity`), so a weight of it costs c_r = T_r / C for each
unit of variance, times the share of that which GPTQ leaves (`flatness`). An entropy coder spends -log2 s bits a weight
and what the weight's own distribution takes. Minimising sum c_r s_r^2 for a given sum of log s_r gives s_r = f /
sqrt(c_r), with one factor f for the whole model: reverse water-filling (Cover and Thomas, Elements of Information
Theory, 10.3.3), which comes to more bits for some layers and kinds, and larger steps for rare tokens. f is what fills
the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from trainer.errors import InputError
from trainer.export_config import FITTED_BITS, FITTED_SLACK
from trainer.quantization.rounding import largest_value, round_rows, round_to_half

Weights = Mapping[str, Tensor]
"""By a matrix's name, (rows, columns) float32."""
Costs = Mapping[str, Tensor]
"""What a unit of variance of a weight in each row costs, (rows,)."""
Scales = dict[str, Tensor]
"""Steps of the rows, (rows,) fp16."""

Found = TypeVar("Found")

_AIM = 0.9985
_ROUNDS = 6
_BISECTIONS = 32
# A row that no pass found the loss to mind (a token that never came) counts as this share of its matrix's mean.
_LEAST_COST = 1e-2
_SAMPLED = 1 << 18
"""Weights of a matrix that its entropy is estimated from."""


def steps(weights: Weights, costs: Costs, factor: float) -> Scales:
    """`factor` / sqrt(cost) for each row, but never so fine that its largest weight were beyond the integers."""
    found: Scales = {}
    for name, weight in weights.items():
        cost = costs[name].to(weight.device, torch.float64)
        cost = cost.clamp_min(float(cost.mean()) * _LEAST_COST).clamp_min(torch.finfo(torch.float64).tiny)
        finest = weight.abs().amax(dim=1).double() / largest_value(FITTED_BITS)
        scale = torch.maximum(factor * cost.rsqrt(), finest).clamp(2.0**-24, 65504.0).float()
        found[name] = round_to_half(scale).half()
    return found


def fitted(weights: Weights, costs: Costs, rounded: Callable[[Scales], tuple[Found, int]], target: int) -> Found:
    """What `rounded` made of the steps with which the artifact fills `target` bytes, to half a percent, or as nearly
    as the bytes of so few integers let it.

    `rounded` takes steps and gives anything, and the bytes of the artifact with it. Raises InputError if the bytes are
    too few for any steps.
    """
    beside = 0.0  # what an artifact has beside the integers' entropy
    best: tuple[int, Found] | None = None
    for _ in range(_ROUNDS):
        factor = _factor(weights, costs, _AIM * target - beside)
        scales = steps(weights, costs, factor)
        found, size = rounded(scales)
        finest = steps(weights, costs, 0.0)
        exhausted = all(torch.equal(scales[name], finest[name]) for name in scales)
        if size <= target and (best is None or size > best[0]):
            best = size, found
        if best is not None and (exhausted or best[0] >= (1 - FITTED_SLACK) * target):
            return best[1]
        beside = size - _entropy_bytes(weights, scales)
    if best is not None:
        return best[1]
    raise InputError(
        f"export.target_bytes {target} cannot be met: code, scales and vectors alone take {math.ceil(beside)} bytes; "
        "give more, or train a smaller model"
    )


def _factor(weights: Weights, costs: Costs, target: float) -> float:
    """The one with which the integers' entropy is `target` bytes; the coarsest or finest one tried if none is."""
    low, high = -40.0, 24.0  # log2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _entropy_bytes(weights, steps(weights, costs, 2.0**middle)) > target:
            low = middle
        else:
            high = middle
    return float(2.0**high)


def _entropy_bytes(weights: Weights, scales: Scales) -> float:
    """Of the nearest integers, each matrix by itself, from a sample of their columns."""
    total = 0.0
    width = 2 * largest_value(FITTED_BITS) + 1
    for name, weight in weights.items():
        stride = max(1, weight.numel() // _SAMPLED)
        sample = weight[:, ::stride] if stride < weight.shape[1] else weight
        integers = round_rows(sample, scales[name].float().unsqueeze(1), FITTED_BITS)
        counts = torch.bincount(integers.flatten().long() + largest_value(FITTED_BITS), minlength=width).double()
        shares = counts[counts > 0] / integers.numel()
        total += float(-(shares * shares.log2()).sum()) * weight.numel() / 8
    return total
