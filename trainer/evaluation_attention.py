"""Which attention kernel an evaluation runs on: one fixed order, so that nothing is measured before a score."""

from __future__ import annotations

import torch

from trainer.attention_choice import AttentionShape, refusal_of
from trainer.model.attention_backends import Backend, could_run
from trainer.model.gpt import GPT

_DENSE: tuple[Backend, ...] = ("cudnn", "flash", "plain")
_DOCUMENTS: tuple[Backend, ...] = ("flash3", "flash", "plain")
_VARIABLE_LENGTH: frozenset[Backend] = frozenset({"flash3", "flash"})
# Which kernels take a shape is a matter of its heads; a short row finds it out.
_TRIED_TIME = 256


def use_best_backend(model: GPT, device: torch.device) -> None:
    """Give `model` the first backend of the order for its kind of attention that runs on `device`."""
    shape = AttentionShape.of(model.config, rows=1, time=_TRIED_TIME)
    order = _DOCUMENTS if shape.documents else _DENSE
    model.attention_backend = next(
        backend
        for backend in order
        if could_run(backend, device, documents=shape.documents) and not refusal_of(backend, shape, device)
    )


def wants_boundaries(model: GPT) -> bool:
    """Whether the model's backend is fast only if it is told where the documents begin."""
    return model.config.document_attention and model.attention_backend in _VARIABLE_LENGTH
