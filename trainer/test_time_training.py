"""Test-time training along the stream, score first: SGD on tokens that have been scored already.

A chunk of the validation stream is scored with the weights as they are; then they take a few SGD steps on that chunk,
and the next chunk is scored. So the loss of a token depends on the tokens before it alone, as in dynamic evaluation
(Krause et al. 2018, arXiv:1709.07432), and the sum of those losses is a code length like any other. The order of
the stream is the order of learning: one process.

`trainer.document_adaptation` has the other mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.evaluation import ScoredBatch, ValidationStream, batch_rows
from trainer.evaluation_windows import WindowPlan
from trainer.model.gpt import GPT
from trainer.parameters import parameters
from trainer.test_time_settings import AdaptationSettings, Moved


def require_whole_windows(settings: AdaptationSettings, plan: WindowPlan) -> None:
    """Raise InputError for a chunk that is smaller than what one window scores."""
    if settings.chunk_tokens < plan.stride:
        raise InputError(
            f"--ttt-chunk {settings.chunk_tokens} is less than the {plan.stride} tokens that a window scores; "
            f"give at least {plan.stride}, or a smaller --stride"
        )


class StreamTraining:
    """An observer of `trainer.evaluation.score` that trains `model` on what was scored, in sgd mode's settings.

    `batch_tokens` must be given to `score`: it is no more than what is asked for here, and such that batches end
    where chunks do. So neither it nor `micro_tokens`, the tokens of a training pass, changes the score but by
    rounding. The last chunk is not trained on, for nothing follows. Raises InputError for a chunk that is smaller than
    what one window scores.
    """

    def __init__(
        self,
        model: GPT,
        settings: AdaptationSettings,
        *,
        plan: WindowPlan,
        validation: ValidationStream,
        batch_tokens: int,
        micro_tokens: int,
        device: torch.device | str,
        compiled: bool = False,
    ) -> None:
        require_whole_windows(settings, plan)
        windows = settings.chunk_tokens // plan.stride
        most = max(1, batch_tokens // plan.context)
        rows = max(count for count in range(1, min(windows, most) + 1) if windows % count == 0)
        self.batch_tokens = rows * plan.context
        self._updates = _updates(plan, self.batch_tokens, windows, validation.positions)
        self._settings, self._width, self._device = settings, plan.context, device
        self._micro_rows = min(max(1, micro_tokens // plan.context), -(-windows * plan.stride // plan.context))
        self._stream = torch.from_numpy(validation.tokens.astype(np.int32)).to(device)
        self._trained_to = 0
        self._train_loss = (
            torch.compile(model.train_loss, dynamic=False, fullgraph=True) if compiled else model.train_loss
        )
        self._weights = _moved(model, settings.moved or "all")
        self._optimizer = torch.optim.SGD(self._weights, lr=settings.lr, momentum=settings.momentum or 0.0)

    @property
    def learns(self) -> bool:
        """Whether any chunk is trained on: the last one is not, and it may be the only one."""
        return bool(self._updates)

    def __call__(self, batch: ScoredBatch) -> None:
        """Train on the chunk that this batch completes, if it completes one."""
        scored_to = self._updates.get(batch.number)
        if scored_to is None:
            return
        for _ in range(self._settings.epochs):
            for inputs, targets, weights in self._passes(self._trained_to, scored_to):
                loss, _ = self._train_loss(inputs, targets, weights=weights)
                torch.autograd.backward(loss)
            if self._settings.grad_clip_norm:
                nn.utils.clip_grad_norm_(self._weights, self._settings.grad_clip_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()
        self._trained_to = scored_to

    def _passes(self, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, targets and weights `(rows, width)` of windows over positions `begin` to `end`, each counted once.

        The weights add up to 1 over all passes. The last window is moved back to end at `end`; windows that fill up a
        pass weigh nothing. No position at or behind `end` is in a window that has as many before it.
        """
        score_froms = np.arange(begin, end, self._width, dtype=np.int64)
        ends = np.minimum(score_froms + self._width, end)
        starts = np.maximum(ends - self._width, 0)
        missing = -starts.size % self._micro_rows
        filled = (
            np.append(starts, np.repeat(starts[-1:], missing)),
            np.append(score_froms, np.repeat(ends[-1:], missing)),
            np.append(ends, np.repeat(ends[-1:], missing)),
        )
        columns = torch.arange(self._width, device=self._device)
        for start, score_from, stop in zip(*(self._rows(array) for array in filled), strict=True):
            at = start + columns
            inside = at < stop
            inputs = torch.where(inside, self._stream[torch.where(inside, at, 0)], 0).long()
            targets = torch.where(inside, self._stream[torch.where(inside, at + 1, 0)], 0).long()
            yield inputs, targets, (inside & (at >= score_from)).float() / (end - begin)

    def _rows(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device).view(-1, self._micro_rows, 1)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """After the block the model's parameters are what they were, and ask for gradients if they did."""
    kept = [(parameter, parameter.detach().clone(), parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight, trained in kept:
                parameter.copy_(weight)
                parameter.requires_grad_(trained)
                parameter.grad = None


def _moved(model: GPT, which: Moved) -> list[nn.Parameter]:
    """The parameters that move; the others ask for no gradient."""
    kinds = parameters(model.config)
    moved = []
    for name, parameter in model.named_parameters():
        control = kinds[name].kind == "control"
        parameter.requires_grad_(which == "all" or (which == "controls") == control)
        if parameter.requires_grad:
            moved.append(parameter)
    return moved


def _updates(plan: WindowPlan, batch_tokens: int, chunk_windows: int, positions: int) -> dict[int, int]:
    """Number of each batch that completes a chunk -> the position up to which all is scored by then (exclusive).

    A group of the plan, such as the first window of sliding ones, completes a chunk wherever it ends.
    """
    updates: dict[int, int] = {}
    number = 0
    for _, group in plan.groups():
        rows = batch_rows(group, batch_tokens)
        for first in range(0, len(group), rows):
            done = min(first + rows, len(group))
            scored_to = int(group.ends[done - 1])
            if (done % chunk_windows == 0 or done == len(group)) and scored_to < positions:
                updates[number] = scored_to
            number += 1
    return updates
