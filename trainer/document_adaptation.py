"""Test-time training document by document, score first: low-rank adapters that learn within one document.

Each document begins with fresh adapters that change nothing (`trainer.model.adapters`). It is gone through in chunks:
a chunk is scored with the adapters as they are, having learnt from the document's earlier chunks; then they take Adam
steps on it. The model itself never moves, and no document learns from another, so documents go side by side, each row
of a batch with adapters of its own, and the processes share the batches. Chunks are seen after up to
`context - chunk` tokens of their document.

The pass that scores a chunk is the one whose gradient the first step takes, so scoring first costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.document_batches import DocumentBatch, document_batches, document_bounds
from trainer.errors import InputError
from trainer.evaluation import OnScored, Score, ScoredBatch, ValidationStream, score_of
from trainer.model.adapters import Adapters, fresh_adapters
from trainer.model.gpt import GPT
from trainer.ranks import ALONE, Ranks
from trainer.test_time_settings import AdaptationSettings

_BETAS = (0.9, 0.95)
_SEED = 20240520
_PADDING = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """One chunk of each row: `inputs`, `targets` `(rows, width)` end with it; `positions`, `valid` `(rows, chunk)`."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    valid: Tensor
    more: bool
    """Whether a chunk follows in some row."""


def require_fitting_chunk(settings: AdaptationSettings, context: int) -> None:
    """Raise InputError for a chunk that is longer than a window."""
    if settings.chunk_tokens > context:
        raise InputError(
            f"--ttt-chunk {settings.chunk_tokens} does not fit into a context of {context} tokens; give at most "
            f"{context}, or a longer --context"
        )


class DocumentAdaptation:
    """Scores a stream by lora mode's settings, with windows of at most `context` tokens.

    Batches are of one number of rows, as many as `batch_tokens` allows; windows have `context // chunk` widths, for
    each of which `compiled` makes its graphs. Raises InputError for a chunk that does not fit into the context.
    """

    def __init__(
        self,
        model: GPT,
        settings: AdaptationSettings,
        *,
        context: int,
        batch_tokens: int,
        device: torch.device | str,
        compiled: bool = False,
    ) -> None:
        require_fitting_chunk(settings, context)
        self._model, self._settings, self._device = model, settings, device
        self._chunk = settings.chunk_tokens
        self._widest = context // self._chunk
        self._most_rows = max(1, batch_tokens // (self._widest * self._chunk))
        if compiled:
            # A graph for each width, with gradients and without, may be more than dynamo's limit: that is an error.
            torch._dynamo.config.recompile_limit = max(2 * self._widest, torch._dynamo.config.recompile_limit)
        self._token_losses: Callable[..., Tensor] = (
            torch.compile(model.token_losses, dynamic=False, fullgraph=True) if compiled else model.token_losses
        )

    def score(self, validation: ValidationStream, *, on_scored: Sequence[OnScored] = (), ranks: Ranks = ALONE) -> Score:
        """The score of the whole stream. The model is as it was afterwards.

        `on_scored` is called after each pass, before the adapters learn from it. Raises UnusableWeightsError if a loss
        is not finite.
        """
        trained = [parameter.requires_grad for parameter in self._model.parameters()]
        self._model.requires_grad_(requires_grad=False)
        try:
            nats, count = self._run(validation, on_scored, ranks)
        finally:
            for parameter, asked in zip(self._model.parameters(), trained, strict=True):
                parameter.requires_grad_(asked)
        total_nats, total_count = ranks.sum_float64([float(nats), float(count)])
        if total_count != validation.positions:
            raise RuntimeError(f"{total_count:.0f} of {validation.positions} positions were scored")
        return score_of(total_nats, validation)

    def _run(self, validation: ValidationStream, on_scored: Sequence[OnScored], ranks: Ranks) -> tuple[Tensor, Tensor]:
        documents = document_bounds(validation.tokens)[0].size
        rows = min(self._most_rows, -(-documents // ranks.world_size))
        own = document_batches(validation.tokens, rows=rows)[ranks.rank :: ranks.world_size]
        batches = sum(batch.chunks(self._chunk) for batch in own)
        stream = torch.from_numpy(validation.tokens.astype(np.int32)).to(self._device)
        adapters = fresh_adapters(
            self._model.config,
            rows=rows,
            rank=self._settings.rank or 1,
            device=self._device,
            generator=torch.Generator().manual_seed(_SEED),
        )
        tensors = list(adapters.tensors())
        fresh = [tensor.detach().clone() for tensor in tensors]
        nats = torch.zeros((), dtype=torch.float64, device=self._device)
        count = torch.zeros((), dtype=torch.int64, device=self._device)
        number = 0
        for batch in own:
            with torch.no_grad():
                torch._foreach_copy_(tensors, fresh)
            optimizer = torch.optim.Adam(tensors, lr=self._settings.lr, betas=_BETAS)
            for chunk in self._chunks(batch, stream):
                # What nothing follows teaches nobody: without its gradient a pass costs a third.
                with nullcontext() if chunk.more else torch.no_grad():
                    losses = self._losses(chunk, adapters)
                scored = losses.detach()
                nats += torch.where(chunk.valid, scored, 0.0).sum(dtype=torch.float64)
                count += chunk.valid.sum()
                for observe in on_scored:
                    observe(
                        ScoredBatch(
                            number=number,
                            batches=batches,
                            inputs=chunk.inputs,
                            targets=chunk.targets,
                            positions=chunk.positions,
                            valid=chunk.valid,
                            losses=scored,
                        )
                    )
                number += 1
                if chunk.more:
                    self._learn(chunk, losses, adapters, optimizer)
        return nats, count

    def _learn(self, chunk: _Chunk, losses: Tensor, adapters: Adapters, optimizer: torch.optim.Optimizer) -> None:
        """Steps on each row's own mean loss: a sum over rows, whose gradients do not meet, and neither do Adam's."""
        weights = chunk.valid / chunk.valid.sum(dim=1, keepdim=True).clamp(min=1)
        for epoch in range(self._settings.epochs):
            current = losses if epoch == 0 else self._losses(chunk, adapters)
            optimizer.zero_grad()
            torch.autograd.backward((current * weights).sum())
            optimizer.step()

    def _losses(self, chunk: _Chunk, adapters: Adapters) -> Tensor:
        rows, width = chunk.inputs.shape
        # A row is one document, and where that is known nothing need be looked for.
        cu_seqlens = (
            torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device=self._device)
            if self._model.config.document_attention
            else None
        )
        return self._token_losses(chunk.inputs, chunk.targets, self._chunk, cu_seqlens=cu_seqlens, adapters=adapters)

    def _chunks(self, batch: DocumentBatch, stream: Tensor) -> Iterator[_Chunk]:
        """Chunk after chunk of all rows; all that lies behind a document's end is padding."""
        starts, ends = (torch.from_numpy(array).to(self._device).view(-1, 1) for array in (batch.starts, batch.ends))
        chunks = batch.chunks(self._chunk)
        for index in range(chunks):
            width = min(index + 1, self._widest) * self._chunk
            first = (index + 1) * self._chunk - width
            at = starts + torch.arange(first, first + width, device=self._device)
            inside = at < ends
            place = torch.where(inside, at, 0)
            yield _Chunk(
                inputs=torch.where(inside, stream[place], _PADDING).long(),
                targets=torch.where(inside, stream[place + 1], _PADDING).long(),
                positions=at[:, -self._chunk :],
                valid=inside[:, -self._chunk :],
                more=index + 1 < chunks,
            )
