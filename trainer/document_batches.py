"""Documents of a validation stream side by side, and the chunks in which they are gone through. Torch-free.

A position belongs to the document of its input token, so the BOS that ends a document is the last target of that
document, as in the plain metric; the documents' positions are the stream's, each once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data.shards import BOS, Tokens

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentBatch:
    """Documents that go side by side: positions `starts` to `ends` (exclusive) of the stream, each `(rows,)`.

    A row that is only there to fill up the batch is empty.
    """

    starts: Positions
    ends: Positions

    def chunks(self, chunk_tokens: int) -> int:
        """Chunks of the longest."""
        return int(-(-(self.ends - self.starts).max() // chunk_tokens))


def document_bounds(tokens: Tokens) -> tuple[Positions, Positions]:
    """Starts and ends `(documents,)` of a stream `(positions + 1,)`; what lies before the first BOS is one too."""
    positions = int(tokens.size) - 1
    starts = np.flatnonzero(tokens[:-1] == BOS).astype(np.int64)
    if starts.size == 0 or starts[0] != 0:
        starts = np.insert(starts, 0, 0)
    return starts, np.append(starts[1:], positions)


def document_batches(tokens: Tokens, *, rows: int) -> list[DocumentBatch]:
    """All documents, the longest first so that those side by side end together, in batches of exactly `rows`."""
    starts, ends = document_bounds(tokens)
    order = np.argsort(starts - ends, kind="stable")
    missing = -order.size % rows
    filler = np.zeros(missing, dtype=np.int64)
    sorted_starts = np.append(starts[order], filler).reshape(-1, rows)
    sorted_ends = np.append(ends[order], filler).reshape(-1, rows)
    return [DocumentBatch(starts=first, ends=last) for first, last in zip(sorted_starts, sorted_ends, strict=True)]
