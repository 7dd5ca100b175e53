"""Depth recurrence: the order in which physical layers run. Pure, torch-free.

A span of layers runs several times with the same weights (Universal Transformers, Dehghani et al. 2018,
arXiv:1807.03819; as a mid-run switch in the public parameter-golf runs). It buys depth without bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from trainer.config import ModelConfig


class LayerRun(NamedTuple):
    """One run of a physical layer; `repeat` is 0 in its first one."""

    layer: int
    repeat: int


def layer_runs(model: ModelConfig, active: bool) -> tuple[LayerRun, ...]:
    """Without recurrence, or with it switched off, each layer runs once. Switched on, the whole span `first..last`
    runs `loops` times in a row: layers 0..5 with span 3..4 and 2 loops give 0 1 2 3 4 3 4 5."""
    once = tuple(LayerRun(layer, 0) for layer in range(model.num_layers))
    recurrence = model.recurrence
    if recurrence is None or not active:
        return once
    span = once[recurrence.first : recurrence.last + 1]
    repeats = tuple(LayerRun(run.layer, repeat) for repeat in range(recurrence.loops) for run in span)
    return once[: recurrence.first] + repeats + once[recurrence.last + 1 :]


def execution_order(model: ModelConfig, active: bool) -> tuple[int, ...]:
    """Indices of the physical layers in the order they run."""
    return tuple(run.layer for run in layer_runs(model, active))
