"""The train shards as one stream of tokens, mapped and never held in memory; a document may span shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.data.shards import BOS, ShardError, Tokens, check_tokens, open_shard

Positions = npt.NDArray[np.int64]

# Tokens compared in one go when documents are looked for: 16 MB of booleans.
_CHUNK_TOKENS = 1 << 24


class TokenStream:
    """Tokens at positions 0..size; position `size`, one past the last, reads as the BOS that would come next."""

    def __init__(self, shards: Sequence[Path]) -> None:
        """Raises OSError, or ShardError for a bad shard."""
        opened = [(path, open_shard(path)) for path in shards]
        held = [(path, tokens) for path, tokens in opened if tokens.size]
        end = np.array([BOS], dtype=np.uint16)
        self._paths = [path for path, _ in held]
        # Plain views: slicing a memmap object costs several times the copy of a short piece.
        self._shards: list[Tokens] = [tokens.view(np.ndarray) for _, tokens in held] + [end]
        self._firsts = [0, *accumulate(tokens.size for tokens in self._shards)][:-1]

    @property
    def size(self) -> int:
        return self._firsts[-1]

    def read(self, start: int, into: Tokens) -> None:
        """Fill `into` `(n,)` with the tokens from `start` on; `start + n` is at most `size + 1`."""
        shard, filled = bisect_right(self._firsts, start) - 1, 0
        while filled < into.size:
            offset = start + filled - self._firsts[shard]
            part = self._shards[shard][offset : offset + into.size - filled]
            into[filled : filled + part.size] = part
            filled += part.size
            shard += 1

    def document_starts(self) -> Positions:
        """Where documents begin, `(documents,)`, ascending: every BOS, and position 0. Reads the whole stream."""
        found = [np.zeros(1 if self.size else 0, dtype=np.int64)]
        for first, tokens in zip(self._firsts[:-1], self._shards[:-1], strict=True):
            for start in range(0, tokens.size, _CHUNK_TOKENS):
                found.append(np.flatnonzero(tokens[start : start + _CHUNK_TOKENS] == BOS) + (first + start))
        starts = np.concatenate(found)
        return starts[1:] if starts.size > 1 and starts[1] == 0 else starts

    def require_vocabulary(self, start: int, stop: int, vocab_size: int) -> None:
        """Raise ShardError, naming the file and the offset, if a token in `start..stop` is out of range."""
        for path, first, tokens in zip(self._paths, self._firsts, self._shards, strict=False):
            inside = slice(max(0, start - first), max(0, stop - first))
            check_tokens(path, tokens[inside], vocab_size, inside.start)

    def changed(self) -> ShardError:
        """For a token that was out of range a moment ago and no longer is."""
        return ShardError(f"{self._paths[0].parent}: a shard changed while it was read; prepare the data set again")
