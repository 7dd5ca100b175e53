"""The pass over the layers: which run when, what passes from one to another, and how two lanes become one.

- Depth recurrence with a gate g: the first pass over the span is x <- span(x), each further one
  x <- x + g (span(x) - x), so that g = 0 is the model without the loop and g = 1 the one with it, and a run can go
  from one to the other without a jump.
- U-net skips (Ronneberger et al. 2015, arXiv:1505.04597; in decoders first in the public modded-nanogpt runs): before
  its first run layer n//2 + i takes x <- x + skip_i * y, with y the latest output of layer n//2 - 1 - i, dimension by
  dimension; skip begins at 1. A repeated pass blends y with g as it does x.
- Parallel residuals: from `parallel_from` on there are two lanes, the attention's and the MLP's, both x at first;
  see `trainer.model.blocks`. After the last layer x = merge * a + (1 - merge) * m, with merge .5 at first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model.recurrence import layer_runs

Lanes = tuple[Tensor, ...]
"""The residual stream: one tensor (batch, time, dim), or the attention's lane and the MLP's."""

RunLayer = Callable[[int, Lanes], Lanes]


def with_skip(lanes: Lanes, skipped: Lanes, weight: Tensor) -> Lanes:
    """Lane by lane, or one lane's output into both."""
    sources = skipped if len(skipped) == len(lanes) else skipped * len(lanes)
    return tuple(torch.addcmul(lane, source, weight) for lane, source in zip(lanes, sources, strict=True))


def merged(lanes: Lanes, share: Tensor) -> Tensor:
    """Two lanes to one, `share` (1,) of it the attention's."""
    attention, mlp = lanes
    return torch.lerp(mlp, attention, share)


def run_layers(
    x: Tensor,
    run_layer: RunLayer,
    config: ModelConfig,
    *,
    looped: bool,
    gate: Tensor | None = None,
    skip_weights: Tensor | None = None,
    lane_merge: Tensor | None = None,
    skipping: Callable[[Lanes, Lanes, Tensor], Lanes] = with_skip,
    merging: Callable[[Lanes, Tensor], Tensor] = merged,
) -> Tensor:
    """(batch, time, dim) -> the same shape, after every run of `run_layer(index, lanes)` that the config asks for.

    `gate` is 0-d, `skip_weights` (skips, dim), `lane_merge` (1,), all in the dtype of `x`; None where the config has
    none. Without a gate repeated passes count in full. `skipping` and `merging` may be what a compiler made of
    theirs.
    """
    loop, middle = config.recurrence, config.num_layers // 2
    lanes: Lanes = _apart((x,))
    before: Lanes = lanes
    given: dict[int, Lanes] = {}
    for index, repeat in layer_runs(config, looped):
        if index == config.parallel_from and repeat == 0:
            lanes = (*_apart(lanes), *_apart(lanes))
        if loop is not None and index == loop.first and repeat:
            before = lanes
        if skip_weights is not None and repeat == 0 and 0 <= index - middle < skip_weights.shape[0]:
            lanes = skipping(lanes, _apart(given[2 * middle - 1 - index]), skip_weights[index - middle])
        lanes = run_layer(index, lanes)
        output = lanes
        if loop is not None and repeat and gate is not None:
            if index == loop.last:
                output = lanes = _blended(before, lanes, gate)
            elif index in given:
                output = _blended(given[index], lanes, gate)
        if skip_weights is not None and index < middle:
            given[index] = output
    return lanes[0] if lane_merge is None else merging(lanes, lane_merge)


def _apart(lanes: Lanes) -> Lanes:
    """The same numbers as other objects: two arguments that are one tensor would be a compiled graph of their own."""
    return tuple(lane.view_as(lane) for lane in lanes)


def _blended(before: Lanes, after: Lanes, gate: Tensor) -> Lanes:
    """`torch.lerp` is exact at both ends."""
    return tuple(torch.lerp(one, other, gate) for one, other in zip(before, after, strict=True))
