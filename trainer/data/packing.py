"""Document-aware packing: windows of whole documents, with no padding, no token lost and few documents cut.

Best-fit packing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830) puts each
document, longest first, into the fullest window that still holds it. There, windows that do not fill up are padded
and their number is free. Here a window is always full: the documents of an epoch, shuffled by the seed, are taken
in blocks of a whole number of windows, and the few documents that find no room in a block fill its gaps, the head
of one in one gap and its tail in the next.

A block depends on nothing but the seed, the epoch and its number, so a run resumes by planning one block.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

from trainer.data.window_order import Pieces

Lengths = npt.NDArray[np.int64]

# Windows planned together: fewer would cut more documents at the borders, more would take longer to plan at once.
BLOCK_ROWS = 1024


class PackedDocuments:
    """Rows of whole documents where they fit; a document longer than a row is cut into whole rows and a rest."""

    def __init__(self, starts: Lengths, tokens: int, seq_len: int, seed: int) -> None:
        """`starts` are the positions `(documents,)` of the documents in the stream of `tokens`, ascending from 0."""
        self.rows = tokens // seq_len
        self._seq_len, self._seed = seq_len, seed
        self._starts, self._lengths = starts, document_lengths(starts, tokens)
        self._epoch = -1
        self._order = self._ends = np.zeros(0, dtype=np.int64)
        self._planned = (-1, -1)
        self._pieces = np.zeros((0, 2), dtype=np.int64)
        self._firsts = np.zeros(1, dtype=np.int64)

    def pieces(self, epoch: int, first: int, stop: int) -> Pieces:
        """The pieces of the rows `first..stop`: whole documents, and parts of those that are cut."""
        parts = []
        while first < stop:
            block = first // BLOCK_ROWS
            self._plan(epoch, block)
            row, last = first - block * BLOCK_ROWS, min(stop - block * BLOCK_ROWS, BLOCK_ROWS)
            parts.append(self._pieces[self._firsts[row] : self._firsts[last]])
            first = block * BLOCK_ROWS + last
        return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)

    def _plan(self, epoch: int, block: int) -> None:
        if self._planned == (epoch, block):
            return
        if self._epoch != epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._starts.size)
            self._ends = np.cumsum(self._lengths[self._order])
            self._epoch = epoch
        rows = min(BLOCK_ROWS, self.rows - block * BLOCK_ROWS)
        begin = block * BLOCK_ROWS * self._seq_len
        end = begin + rows * self._seq_len
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end, side="left"))
        documents = self._order[first : last + 1]
        starts, lengths = self._starts[documents], self._lengths[documents]
        # The documents at the borders are shared with the neighbouring blocks (or with the tail of the epoch).
        lengths[-1] -= int(self._ends[last]) - end
        behind = begin - (int(self._ends[first]) - int(self._lengths[documents[0]]))
        starts[0] += behind
        lengths[0] -= behind
        generator = np.random.default_rng([self._seed, epoch, block + 1])
        self._pieces, self._firsts = pack(starts, lengths, self._seq_len, generator)
        self._planned = (epoch, block)


def document_lengths(starts: Lengths, tokens: int) -> Lengths:
    """Tokens of each document `(documents,)`, its BOS among them."""
    return np.diff(starts, append=tokens)


def pack(
    starts: Lengths, lengths: Lengths, seq_len: int, generator: np.random.Generator
) -> tuple[Pieces, npt.NDArray[np.int64]]:
    """Pack documents, whose lengths sum up to a multiple of `seq_len`, into that many full rows.

    Returns the pieces row by row, and where each row begins among them `(rows + 1,)`. The rows, and the pieces of a
    row, come in random order.
    """
    whole = lengths // seq_len
    within = np.arange(int(whole.sum())) - np.repeat(np.cumsum(whole) - whole, whole)
    full = np.repeat(starts, whole) + seq_len * within
    rest_starts, rests = (starts + seq_len * whole), lengths % seq_len
    by_length = np.argsort(-rests, kind="stable")[: int(np.count_nonzero(rests))]
    rest_starts, rests = rest_starts[by_length], rests[by_length]

    rows, gaps = _best_fit(rests, int(rests.sum()) // seq_len, seq_len)
    fits = rows >= 0
    cut_pieces, cut_rows = _fill(rest_starts[~fits], rests[~fits], gaps)
    pieces = np.concatenate(
        [
            np.stack([full, full + seq_len], axis=1),
            np.stack([rest_starts[fits], rest_starts[fits] + rests[fits]], axis=1),
            cut_pieces,
        ]
    )
    row_of = np.concatenate([np.arange(full.size), full.size + rows[fits], full.size + cut_rows])
    count = int(lengths.sum()) // seq_len
    row_of = generator.permutation(count)[row_of]
    order = np.lexsort((generator.random(row_of.size), row_of))
    return pieces[order], np.searchsorted(row_of[order], np.arange(count + 1))


def most_pieces(lengths: Lengths, seq_len: int, rows: int, repeats: int) -> int:
    """An upper bound of the document pieces in any `rows` rows in any order, if each document comes `repeats` times.

    It is the number of the shortest documents that `rows` rows can hold, and four parts of documents a row: two
    where it is cut or filled up, two where it stands at the border of a block.
    """
    rests = np.bincount(lengths % seq_len, minlength=seq_len)[1:] * repeats
    sizes = np.arange(1, seq_len)
    before = np.cumsum(rests * sizes) - rests * sizes
    room = np.maximum(rows * seq_len - before, 0)
    return min(rows * seq_len, int(np.minimum(rests, room // sizes).sum()) + 4 * rows)


def _best_fit(lengths: Lengths, rows: int, seq_len: int) -> tuple[Lengths, list[tuple[int, int]]]:
    """Longest first, each length into the fullest row that still holds it.

    Returns the row of each length, -1 where none held it, and the (gap, row) that are left, largest first. No gap is
    as large as a length that found no row.
    """
    row_of = np.full(lengths.size, -1, dtype=np.int64)
    keys = [seq_len * rows + row for row in range(rows)]  # gap * rows + row, ascending
    for index, length in enumerate(lengths.tolist()):
        at = bisect_left(keys, length * rows)
        if at == len(keys):
            continue
        gap, row = divmod(keys.pop(at), rows)
        row_of[index] = row
        if gap > length:
            insort(keys, (gap - length) * rows + row, hi=at)
    return row_of, [divmod(key, rows) for key in reversed(keys)]


def _fill(starts: Lengths, lengths: Lengths, gaps: list[tuple[int, int]]) -> tuple[Pieces, Lengths]:
    """Lay the documents one after the other through the gaps (they sum up to the same), cutting where a gap ends.

    Returns pieces and their rows. Every document being longer than every gap, a gap gets at most two pieces.
    """
    pieces, rows = [], []
    documents = iter(zip(starts.tolist(), lengths.tolist(), strict=True))
    start = left = 0
    for room, row in gaps:
        gap = room
        while gap:
            if not left:
                start, left = next(documents)
            taken = min(left, gap)
            pieces.append((start, start + taken))
            rows.append(row)
            start, left, gap = start + taken, left - taken, gap - taken
    return np.array(pieces, dtype=np.int64).reshape(-1, 2), np.array(rows, dtype=np.int64)
