"""Second moments of what a matrix is multiplied with: running ones for the input-aware Muon, whole ones for GPTQ.

A running one is the exponential moving average of E[x x^T] over training passes, from a sample of the rows, kept with
the sum of its weights so that it can be debiased as Adam's moments are (Kingma and Ba, arXiv:1412.6980). Both are kept
in float32: rounded to bfloat16 they would be off by more than the damping that is added before they are inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

SAMPLED_ROWS = 4096
"""Rows of one pass that are looked at, evenly strided: enough for a covariance of some thousand dimensions."""


class InputCovariance(nn.Module):
    """`covariance / mass` is the debiased estimate of E[x x^T], once `mass` is not 0. No part of the state dict."""

    covariance: Tensor
    mass: Tensor

    def __init__(self, dim: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("covariance", torch.zeros(dim, dim), persistent=False)
        self.register_buffer("mass", torch.zeros(()), persistent=False)

    def observe(self, x: Tensor) -> None:
        """Take in `x` (..., dim), if this is a training pass (gradients are on). Never waits for the device.

        A looped layer observes each of its runs.
        """
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            rows = x.detach().flatten(0, -2)
            rows = rows[:: -(-rows.shape[0] // SAMPLED_ROWS)].float()
            self.covariance.lerp_(rows.t() @ rows / rows.shape[0], 1 - self.decay)
            # (mass lerp 1) in plain arithmetic: lerp_ takes no number for its end.
            self.mass.mul_(self.decay).add_(1 - self.decay)


class WholeInputCovariance(InputCovariance):
    """The plain mean over all rows of all passes, whether gradients are on or not."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 0.0)

    def observe(self, x: Tensor) -> None:
        """Take in all of `x` (..., dim). Never waits for the device."""
        with torch.no_grad():
            rows = x.detach().flatten(0, -2).float()
            self.covariance.addmm_(rows.t(), rows)
            self.mass.add_(rows.shape[0])


MakeInputStatistics = Callable[[int], InputCovariance]
"""The width of an input -> what watches it."""


def watching(track_inputs: float | Literal["all"] | None) -> MakeInputStatistics | None:
    """Running ones that decay so fast, or whole ones of `all` passes; None for none."""
    if track_inputs is None:
        return None
    return WholeInputCovariance if track_inputs == "all" else partial(InputCovariance, decay=track_inputs)
