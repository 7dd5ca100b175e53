"""Scoring the weights within a run: on the way, at its end, and as an average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypedDict

import torch
from torch import Tensor

from trainer.divergence import DivergedError, DivergenceWatch
from trainer.evaluation import Score, UnusableWeightsError, ValidationStream, rehearse, score
from trainer.evaluation_windows import plain
from trainer.interruption import StopRequest
from trainer.ranks import Ranks
from trainer.run_state import RunState


class _How(TypedDict):
    """How every score of a run is made."""

    batch_tokens: int
    device: torch.device
    ranks: Ranks
    boundaries: bool


class Validation:
    """The validation stream of a run; `running` tells whoever catches an error that a score was under way.

    Scores are plain, without fake quantisation: what a reload of the weights would score. The processes share the
    windows. A stop breaks a score off where one process trains alone; several finish it first, for one that left
    early would keep the others waiting.
    """

    def __init__(self, state: RunState, watch: DivergenceWatch, stop: StopRequest) -> None:
        """Raises OSError or InputError for bad data."""
        self._state, self._watch, self._stop = state, watch, stop
        self._stream = ValidationStream.load(state.plan.dataset)
        self._plan = plain(self._stream.positions, seq_len=state.plan.config.batch.train_seq_len)
        self.running = False

    def score(self) -> Score:
        """The score of the model as it stands, outside the training clock. Raises DivergedError or StopAskedError."""
        state = self._state
        self.running = True
        with state.clock.paused(), state.wall.spent("scoring"):
            self._watch.require_finite(state.step, state.model)
            try:
                found = self._score()
            except UnusableWeightsError as error:
                raise DivergedError(state.step, "validation loss not finite") from error
        self.running = False
        return found

    def rehearse(self) -> None:
        """Run one batch as `score` would, so that its graph is there. Raises StopAskedError."""
        self.running = True
        with self._unquantized():
            rehearse(self._plan, self._token_losses, self._stream, **self._how())
        self.running = False

    def _score(self) -> Score:
        with self._unquantized():
            return score(self._plan, self._token_losses, self._stream, **self._how())

    def _how(self) -> _How:
        plan = self._state.plan
        return _How(
            batch_tokens=plan.config.evaluation.batch_tokens,
            device=plan.device,
            ranks=plan.ranks,
            boundaries=plan.config.model.document_attention,
        )

    @contextmanager
    def _unquantized(self) -> Iterator[None]:
        model = self._state.model
        quantizing = model.fake_quant_active
        model.set_fake_quant(False)
        try:
            yield
        finally:
            model.set_fake_quant(quantizing)

    def _token_losses(self, inputs: Tensor, targets: Tensor, _scored: int, **boundaries: Any) -> Tensor:
        """Plain windows score all they run."""
        with self._explaining_errors():
            return self._state.passes.token_losses(inputs, targets, **boundaries)

    def _explaining_errors(self) -> AbstractContextManager[None]:
        return self._stop.explains_errors() if self._state.plan.ranks.world_size == 1 else nullcontext()
