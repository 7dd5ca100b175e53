"""The parts of a pass that a compiler can take one by one.

A whole pass is one graph in which every run of every layer stands for itself: compiling takes as long as the model is
deep, and again for each switch. Its layers are alike, so a graph of one of them serves them all, on each of their
runs, whether a loop is on or off; between the graphs runs plain Python. What that costs is what a compiler would have
fused across the seams, and the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from trainer.model.blocks import Block
from trainer.model.head import mean_loss, objective, row_losses
from trainer.model.stack import merged, with_skip

Part = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Regions:
    """Functions of a pass, each as it is or compiled; they are called alike."""

    block: Part = Block.forward
    with_skip: Part = with_skip
    merged: Part = merged
    mean_loss: Callable[..., Tensor] = mean_loss
    objective: Callable[..., tuple[Tensor, Tensor]] = objective
    row_losses: Callable[..., Tensor] = row_losses
    begin: Part
    """What comes before the layers, `prepare` a layer's matrices, and `finish` what comes after: the model's own."""
    prepare: Part
    finish: Part

    def compiled(self, compiling: Callable[[Part], Part]) -> Regions:
        """Each of them after `compiling`."""
        return Regions(**{field.name: compiling(getattr(self, field.name)) for field in fields(self)})
