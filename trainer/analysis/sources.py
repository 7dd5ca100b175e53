"""Whose text the validation documents are: sums by source, one contiguous range of tokens a document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.analysis.findings import AnalysisError, Group
from trainer.analysis.token_statistics import Counts, GroupSums, Losses
from trainer.data.manifest import DataSet
from trainer.data.shards import BOS, Tokens

TOP_SOURCES = 20
UNKNOWN = "(unknown)"


def source_group(src: str) -> str:
    """What a source is counted under: the host of an address, else what stands before the first "/" or ":".

    `owner/repository` and `collection:volume` are counted under their first part.
    """
    _, scheme, rest = src.partition("://")
    name = (rest if scheme else src).replace(":", "/").split("/", 1)[0].strip()
    return name or UNKNOWN


def read_sources(dataset: DataSet) -> list[str] | None:
    """Where each validation document is from; None if the data set does not say. Raises OSError, AnalysisError."""
    entry = dataset.manifest.val_sources
    if entry is None:
        return None
    path = dataset.path / entry.file
    return _checked(path, dataset.manifest.val_documents)


def by_source(
    sources: Sequence[str], tokens: Tokens, losses: Losses, target_bytes: Counts, *, top: int = TOP_SOURCES
) -> tuple[Group, ...]:
    """The `top` sources by bytes, and the rest as one. `tokens` (n + 1,) is the stream that `losses` (n,) scored.

    A document's BOS counts with it. Raises AnalysisError if there are not as many sources as documents.
    """
    begins = np.flatnonzero(tokens == BOS)
    if begins.size != len(sources) or tokens[0] != BOS:
        raise AnalysisError(
            f"{len(sources)} sources are named for a validation stream of {begins.size} documents; "
            "prepare the data set again"
        )
    names = [source_group(src) for src in sources]
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    sums = GroupSums(groups=len(index))
    # Target i is token i + 1; the first document's BOS is no target, so an empty first document has none at all.
    edges = np.append(np.maximum(begins - 1, 0), losses.size)
    lengths = np.diff(edges)
    filled = lengths > 0
    owners = np.array([index[name] for name in names])[filled]
    firsts = edges[:-1][filled]
    np.add.at(sums.tokens, owners, lengths[filled])
    np.add.at(sums.bytes, owners, np.add.reduceat(target_bytes, firsts, dtype=np.int64))
    np.add.at(sums.nats, owners, np.add.reduceat(losses, firsts, dtype=np.float64))
    order = np.argsort(-sums.bytes, kind="stable")
    kept = order[: top if order.size > top + 1 else order.size]
    rest = order[kept.size :]
    shown = GroupSums(groups=kept.size + bool(rest.size))
    for target, summed in ((shown.tokens, sums.tokens), (shown.bytes, sums.bytes), (shown.nats, sums.nats)):
        target[: kept.size] = summed[kept]
        if rest.size:
            target[kept.size] = summed[rest].sum()
    every = list(index)
    labels = [every[number] for number in kept]
    return shown.named([*labels, f"({rest.size} others)"] if rest.size else labels, empty=True)


def _checked(path: Path, documents: int) -> list[str]:
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AnalysisError(f"{path} is not JSON: {error}; prepare the data set again") from error
    if not isinstance(sources, list) or not all(isinstance(src, str) for src in sources):
        raise AnalysisError(f"{path} is not a list of names; prepare the data set again")
    if len(sources) != documents:
        raise AnalysisError(
            f"{path} names {len(sources)} sources for {documents} documents; prepare the data set again"
        )
    return sources
