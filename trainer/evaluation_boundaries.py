"""Where documents begin within batches of windows, for attention that stays within them. Torch-free.

The same as a loader's boundaries: starts in the flattened rows, ending with their number of positions, of one length
for all batches of a group of windows, so that a compiled model is compiled once for them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.data.shards import BOS, Tokens

Positions = npt.NDArray[np.int64]


def beginnings(tokens: Tokens) -> Positions:
    """Positions of the documents' first tokens in a stream, ascending."""
    return np.flatnonzero(tokens == BOS).astype(np.int64)


def batch_boundaries(begins: Positions, starts: Positions, *, context: int, rows: int) -> npt.NDArray[np.int32]:
    """(batches, most documents + 1) for windows of `context` positions at `starts` (batches * rows,).

    A document begins with each window and at each of `begins`, positions in the stream.
    """
    firsts = np.searchsorted(begins, starts, side="right")
    lasts = np.searchsorted(begins, starts + context, side="left")
    batches = starts.size // rows
    most = int((lasts - firsts).reshape(batches, rows).sum(axis=1).max()) + rows
    bounds = np.full((batches, most + 1), rows * context, dtype=np.int32)
    for batch in range(batches):
        windows = range(batch * rows, (batch + 1) * rows)
        parts = [
            np.append(0, begins[firsts[window] : lasts[window]] - starts[window]) + (window - windows.start) * context
            for window in windows
        ]
        joined = np.concatenate(parts)
        bounds[batch, : joined.size] = joined
    return bounds
