"""Noticing that a run has diverged, without making the device wait for the answer at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DivergedError(ArithmeticError):
    """A loss or a weight is no longer finite."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"{what} at step {step}")
        self.step, self.what = step, what


class DivergenceWatch:
    """Remembers, on the device, the first step whose loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._bad_step = torch.full((), -1, device=device, dtype=torch.int64)

    def observe(self, step: int, loss: Tensor) -> None:
        """`loss` is 0-d and on the device. Never waits."""
        bad = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(bad, step, self._bad_step)

    def require_finite_losses(self) -> None:
        """Waits for the device. Raises DivergedError."""
        if (bad_step := int(self._bad_step)) >= 0:
            raise DivergedError(bad_step, "training loss not finite")

    def require_finite(self, step: int, model: nn.Module) -> None:
        """Before anything is written that others will build on. Waits for the device. Raises DivergedError."""
        self.require_finite_losses()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
            raise DivergedError(step, "weights not finite")
