"""An average of the weights along a run, kept beside them.

- `ema`: the mean under the kernel exp(-age / horizon), age being progress (the share of the run) since a weight was
  left behind. Progress counts and not steps, so a run of another length or batch averages over the same share of
  itself. The mean is normalised by what the kernel weighs so far (the bias correction of Adam, arXiv:1412.6980), so it
  holds nothing of the weights before the first step, however short the run.
- `swa`: the plain mean of the weights after each step from `start_fraction` on (arXiv:1803.05407).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer.errors import InputError
from trainer.optimization_config import AveragingConfig


class WeightAverage:
    """The average of a model's parameters, float32, on their device; with `kind` none it holds nothing."""

    def __init__(self, model: nn.Module, config: AveragingConfig) -> None:
        self._config = config
        self._parameters = dict(model.named_parameters()) if config.kind != "none" else {}
        # There from the beginning: a device that is too small for them says so before a long run.
        self._averages = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()}
        self._count = 0
        self._progress = 0.0
        self._lent = False

    @property
    def ready(self) -> bool:
        """Whether there is an average: it holds the weights of one step at least."""
        return self._count > 0

    def update(self, done_before: float, done: float) -> None:
        """Take in the weights as they are after a step that moved the run from `done_before` to `done` of itself.

        Never waits for the device.
        """
        if self._config.kind == "none":
            return
        self._require_at_home()
        share = self._ema_share(done - done_before) if self._config.kind == "ema" else self._swa_share(done)
        if share is None:
            return
        self._count += 1
        weights = [parameter.detach() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average within the block, and the very weights it had after it.

        Raises RuntimeError without an average, and within such a block.
        """
        if not self.ready:
            raise RuntimeError("there is no average of weights yet")
        self._require_at_home()
        self._swap()
        self._lent = True
        try:
            yield
        finally:
            self._swap()
            self._lent = False

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes into a checkpoint."""
        self._require_at_home()
        return {
            "kind": self._config.kind,
            "count": self._count,
            "progress": self._progress,
            "average": {name: average.cpu() for name, average in self._averages.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises InputError if it is not of this average and this model."""
        self._require_at_home()
        averages = state.get("average", {})
        found = {name: tuple(average.shape) for name, average in averages.items()}
        wanted = {name: tuple(average.shape) for name, average in self._averages.items()}
        if state.get("kind") != self._config.kind or found != wanted:
            raise InputError(
                f"the checkpoint holds an average of kind {state.get('kind')} over {len(found)} tensors, and the run "
                f"asks for {self._config.kind} over {len(wanted)} with other names or shapes; start without --resume"
            )
        for name, average in self._averages.items():
            average.copy_(averages[name])
        self._count, self._progress = int(state["count"]), float(state["progress"])

    def _ema_share(self, passed: float) -> float | None:
        """(1 - d) / (1 - product of all d), d = exp(-passed / horizon): 1 at first, so nothing of the zeros stays."""
        if passed <= 0.0:
            return None
        horizon = self._config.horizon_fraction
        self._progress += passed
        return math.expm1(-passed / horizon) / math.expm1(-self._progress / horizon)

    def _swa_share(self, done: float) -> float | None:
        return 1.0 / (self._count + 1) if done >= self._config.start_fraction else None

    def _swap(self) -> None:
        """In place and tensor by tensor: compiled graphs keep their addresses, and no second copy is held."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                kept = parameter.clone()
                parameter.copy_(self._averages[name])
                self._averages[name].copy_(kept)

    def _require_at_home(self) -> None:
        if self._lent:
            raise RuntimeError("the average is in the model now: leave the block of in_place() first")
