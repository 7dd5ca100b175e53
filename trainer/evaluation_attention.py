"""Which attention kernel an evaluation runs on: one fixed order, so that nothing is measured before a score."""

from __future__ import annotations

from dataclasses import replace

import torch

from trainer.attention_choice import AttentionShape, refusal_of
from trainer.model.attention_backends import Backend
from trainer.model.gpt import GPT

_DENSE: tuple[Backend, ...] = ("cudnn", "flash", "plain")
_DOCUMENTS_OR_WINDOW: tuple[Backend, ...] = ("flash3", "flash", "plain")
_VARIABLE_LENGTH: frozenset[Backend] = frozenset({"flash3", "flash"})
# Which kernels take a shape is a matter of its heads; a short row finds it out.
_TRIED_TIME = 256


def use_best_backend(model: GPT, device: torch.device) -> None:
    """Give `model` the first backends of the orders for its kinds of attention that run on `device`."""
    shape = AttentionShape.of(model.config, rows=1, time=_TRIED_TIME)
    model.attention_backend = _first(shape, device)
    window = model.config.attention_window
    if window is not None:
        model.window_backend = _first(replace(shape, window=min(window, _TRIED_TIME // 2)), device)


def _first(shape: AttentionShape, device: torch.device) -> Backend:
    order = _DENSE if not shape.documents and shape.window is None else _DOCUMENTS_OR_WINDOW
    return next(
        backend for backend in order if shape.could_run(backend, device) and not refusal_of(backend, shape, device)
    )


def wants_boundaries(model: GPT) -> bool:
    """Whether one of the model's backends is fast only if it is told where the documents begin."""
    backends = {model.attention_backend, model.window_backend}
    return model.config.document_attention and not backends.isdisjoint(_VARIABLE_LENGTH)
