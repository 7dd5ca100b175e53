"""From a scored model to what an analysis found: collect every token's loss, then add up by many a grouping."""

from __future__ import annotations

import math

import numpy as np
import torch

from trainer.analysis.findings import Analysis, Group
from trainer.analysis.sources import by_source, read_sources
from trainer.analysis.token_classes import CLASSES, TokenClasses
from trainer.analysis.token_statistics import (
    GroupSums,
    Losses,
    byte_leverage,
    loss_distribution,
    require_whole,
)
from trainer.data.manifest import DataSet
from trainer.data.tokenizer import open_tokenizer
from trainer.evaluation import ScoredBatch, ValidationStream
from trainer.evaluation_windows import WindowPlan
from trainer.report import EvaluateResult

_CHUNK_TOKENS = 1_000_000
_LONGEST = 16


class LossCollector:
    """Keeps each scored token's loss on the device, `(positions,)` float32; an observer of `score`."""

    def __init__(self, positions: int, device: torch.device | str) -> None:
        # One place more than there are positions, for what does not count: no batch waits for a selection.
        self._losses = torch.full((positions + 1,), math.nan, dtype=torch.float32, device=device)

    def __call__(self, batch: ScoredBatch) -> None:
        spare = self._losses.numel() - 1
        places = torch.where(batch.valid, batch.positions, spare)
        self._losses[places.flatten()] = batch.losses.float().flatten()

    def losses(self) -> Losses:
        """Raises RuntimeError if a position was not scored."""
        losses: Losses = self._losses[:-1].cpu().numpy()
        if np.isnan(losses).any():
            raise RuntimeError(f"{int(np.isnan(losses).sum())} of {losses.size} tokens have no loss")
        return losses


def analyse(
    result: EvaluateResult, losses: Losses, *, plan: WindowPlan, validation: ValidationStream, dataset: DataSet
) -> Analysis:
    """What the score is made of; every grouping adds up to it, which is checked to 1e-9.

    `losses` (positions,) float32 are those the score was taken from. Raises OSError or InputError for bad data,
    RuntimeError if a sum does not meet the score.
    """
    classes = TokenClasses.of(open_tokenizer(dataset.tokenizer_path), case_folding=dataset.manifest.case_folding)
    widest = int(plan.context).bit_length()
    sums = {"length": GroupSums(groups=_LONGEST + 1), "context": GroupSums(groups=widest)}
    sums["class"] = GroupSums(groups=len(CLASSES))
    for start in range(0, losses.size, _CHUNK_TOKENS):
        end = min(start + _CHUNK_TOKENS, losses.size)
        tokens = validation.tokens[start : end + 1]
        some, size = losses[start:end], validation.target_bytes[start:end]
        seen = plan.context_lengths(np.arange(start, end, dtype=np.int64))
        sums["length"].add(np.minimum(size, _LONGEST), some, size)
        sums["context"].add(np.frexp(seen)[1] - 1, some, size)  # the exponent of a power of two, exactly
        sums["class"].add(classes.label(tokens[:-1], tokens[1:]), some, size)
    sources = read_sources(dataset)
    named = None if sources is None else by_source(sources, validation.tokens, losses, validation.target_bytes)
    lengths = [*map(str, range(_LONGEST)), f"{_LONGEST} and more"]
    found = Analysis(
        score=result,
        losses=loss_distribution(losses),
        leverage=byte_leverage(validation.target_bytes),
        by_length=sums["length"].named(lengths),
        by_context=sums["context"].named(_context_names(widest, plan.context)),
        by_class=sums["class"].named(CLASSES),
        by_source=named,
    )
    for groups in (found.by_length, found.by_context, found.by_class, found.by_source):
        if groups is not None:
            _require_score(groups, found.score)
    return found


def _require_score(groups: tuple[Group, ...], score: EvaluateResult) -> None:
    require_whole(groups, tokens=score.val_tokens, size=score.val_bytes, nats=score.val_loss * score.val_tokens)


def _context_names(bins: int, widest: int) -> list[str]:
    """Context lengths in tokens, each bin twice as wide as the one before: 1, 2-3, 4-7, ..."""
    spans = [(1 << number, min((2 << number) - 1, widest)) for number in range(bins)]
    return [str(first) if first == last else f"{first}-{last}" for first, last in spans]
