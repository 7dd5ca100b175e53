"""Depth recurrence: the order in which physical layers run. Pure, torch-free.

A span of layers runs several times with the same weights (Universal Transformers, Dehghani et al. 2018,
arXiv:1807.03819; as a mid-run switch in the public parameter-golf runs). It buys depth without bytes.
"""

from __future__ import annotations

from trainer.config import ModelConfig


def execution_order(model: ModelConfig, active: bool) -> tuple[int, ...]:
    """Indices of the physical layers in the order they run.

    Without recurrence, or with it switched off, each layer runs once. Switched on, the whole span
    `first..last` runs `loops` times in a row: layers 0..5 with span 3..4 and 2 loops give 0 1 2 3 4 3 4 5.
    """
    layers = tuple(range(model.num_layers))
    recurrence = model.recurrence
    if recurrence is None or not active:
        return layers
    span = layers[recurrence.first : recurrence.last + 1]
    return layers[: recurrence.first] + span * recurrence.loops + layers[recurrence.last + 1 :]
