"""The parts of a pass that a compiler can take one by one.

A whole pass is one graph in which every run of every layer stands for itself: compiling takes as long as the model is
deep, and again for each switch. Its layers are alike, so a graph of one of them serves them all, on each of their
runs, whether a loop is on or off; between the graphs runs plain Python. What that costs is what a compiler would have
fused across the seams, and the calls.

A graph that keeps what its backward pass needs serves a pass without gradients too, if what it kept is let go of at
each seam (`forgetting`): so an evaluation in the shape of training's passes needs no graphs of its own but the losses'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import torch
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

    def forgetting(self) -> Regions:
        """The same functions for a pass that keeps nothing, although gradients are on for them: as far as a compiler's
        guards can see, what they are given is what they were given in training. `row_losses` runs without gradients."""
        forgetful = {field.name: _forgetting(getattr(self, field.name)) for field in fields(self)}
        return replace(Regions(**forgetful), row_losses=torch.no_grad()(self.row_losses))


def _forgetting(part: Part) -> Part:
    @wraps(part)
    def forgetful(*arguments: Any) -> Any:
        return _cut(part(*arguments))

    return forgetful


def _cut(found: Any) -> Any:
    """Each tensor in the (named) tuples of `found` without its history; one that had gradients asks for some still."""
    if isinstance(found, Tensor):
        # A leaf (a parameter that is handed on as it is) has none. And a view is not a leaf, as no activation in
        # training is.
        return found if found.is_leaf else found.detach().requires_grad_().view_as(found)
    if isinstance(found, tuple):
        parts = [_cut(part) for part in found]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
    return found
