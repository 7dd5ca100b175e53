"""Work of a training step in floating-point operations, by count. Torch-free; what MFU is measured against.

As in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): six operations for each weight of a matrix product and
token (a multiplication and an addition, forward, and twice that backward), and the products of the attention with
itself. What an implementation computes over again is not counted, nor are lookups, norms and other elementwise work.
"""

from __future__ import annotations

from trainer.model.recurrence import execution_order
from trainer.model_config import ModelConfig
from trainer.parameters import parameters

_PER_WEIGHT = 6
_PER_POSITION = 6
"""Queries with keys and weights with values, 2 operations each and dimension over half of the positions (causal), and
twice that backward: 6 * time * dim per token. With a window of w the average position sees w - w^2 / (2 time) others,
which is the half where w is a row: 6 * dim * w * (2 - w / time)."""


def runs_per_layer(model: ModelConfig, *, loop_active: bool = True) -> tuple[int, ...]:
    """How many times each physical layer runs in one pass."""
    order = execution_order(model, loop_active)
    return tuple(order.count(layer) for layer in range(model.num_layers))


def train_flops_per_token(model: ModelConfig, seq_len: int, *, loop_active: bool) -> float:
    """Of the forward and the backward pass, at `seq_len` positions a row.

    Looped layers count each time they run. With `document_attention` a position sees its own document only, which is
    less work than this says: how much less depends on the text, so the attention is counted as over the whole row, or
    the whole window.
    """
    runs = runs_per_layer(model, loop_active=loop_active)
    window = model.window_at(seq_len) or seq_len
    within = window * (2 - window / seq_len)
    seen = sum(count * (within if model.windowed(layer) else seq_len) for layer, count in enumerate(runs))
    return float(_PER_WEIGHT * _multiplied_weights(model, runs) + _PER_POSITION * model.model_dim * seen)


def _multiplied_weights(model: ModelConfig, runs: tuple[int, ...]) -> int:
    """Weights that a token is multiplied with, as often as it is. Tables that are looked up in are none, but the head,
    tied or not, is one."""
    total = model.vocab_size * model.model_dim
    for name, parameter in parameters(model).items():
        if parameter.kind in {"embedding", "head"}:
            continue
        if name.startswith("blocks."):
            if parameter.kind != "control" or name.endswith(".attn.gate"):
                total += parameter.count * runs[int(name.split(".")[1])]
        elif name in {"bigram_proj.weight", "value_proj.weight", "smear_gate"}:
            total += parameter.count
    return total
