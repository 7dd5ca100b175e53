"""Integers by asymmetric numeral systems (Duda 2013, arXiv:1311.2540; constriction), a few frequency tables a matrix.

Where Huffman codes give every value whole bits, this coder comes within a thousandth of the entropy under its tables.
Rows and columns of a matrix are put into classes by how large their integers are, and each pair of classes has a table:
hidden units of an MLP that came to matter little have columns of small integers in the matrix that reads them, and rows
whose steps are fine have large ones. How many classes there are is what makes the stream shortest.

    2 bytes   numbers of classes of rows and of columns
    2 bytes   least and largest integer, signed
    4 bytes   little-endian length of the side information
              class of each row and then of each column, a byte each, deflated, after 4 bytes that give the length
              tables: a 16-bit frequency per pair of classes and integer, as `encode_halves` has them
    rest      32-bit words of the coder, pair by pair, rows first
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

import constriction
import numpy as np
from numpy.typing import NDArray

from trainer.quantization.coding import CodingError, Values, decode, decode_halves, encode, encode_halves

_Counts = NDArray[np.int64]

_HEAD = struct.Struct("<BBbbI")
_LENGTH = struct.Struct("<I")
_MOST_CLASSES = (16, 16)
_MOST_TABLES = 64
_WORD = np.dtype("<u4")
_LARGEST_FREQUENCY = 2**16 - 1


class _Plan(NamedTuple):
    rows: NDArray[np.uint8]
    """Class of each row."""
    columns: NDArray[np.uint8]
    tables: NDArray[np.uint16]
    """(classes of rows, classes of columns, integers) relative frequencies, none of them 0."""
    side: bytes


def encode_ans(values: Values) -> bytes:
    """(rows, columns), neither of them 0 -> the shortest stream of all the plans tried."""
    low, high = int(values.min()), int(values.max())
    _, plan = min(_plans(values, low, high - low + 1), key=itemgetter(0))
    coder = constriction.stream.stack.AnsCoder()
    row_classes, column_classes, _ = plan.tables.shape
    if high > low:  # else the head says it all
        for pair in reversed(range(row_classes * column_classes)):  # a stack: what is coded last is read first
            row, column = divmod(pair, column_classes)
            chosen = values[np.ix_(plan.rows == row, plan.columns == column)]
            coder.encode_reverse(chosen.astype(np.int32).ravel() - low, _model(plan.tables[row, column]))
    words: bytes = coder.get_compressed().astype(_WORD).tobytes()
    return _HEAD.pack(row_classes, column_classes, low, high, len(plan.side)) + plan.side + words


def decode_ans(stream: bytes, rows: int, columns: int) -> Values:
    """What `encode_ans` was given, (rows, columns). Raises CodingError for a stream that is not one of these."""
    if len(stream) < _HEAD.size:
        raise CodingError(f"a stream of {len(stream)} bytes is too short to be one of ANS")
    row_classes, column_classes, low, high, length = _HEAD.unpack_from(stream)
    end, pairs = _HEAD.size + length, row_classes * column_classes
    whole = 0 < pairs <= _MOST_TABLES and low <= high and end <= len(stream)
    if not whole or (len(stream) - end) % _WORD.itemsize:
        raise CodingError("the head of a stream of ANS contradicts itself")
    labels, tables = _read_side(stream[_HEAD.size : end], rows + columns, pairs, high - low + 1)
    own, across = labels[:rows], labels[rows:]
    if own.max(initial=0) >= row_classes or across.max(initial=0) >= column_classes:
        raise CodingError("the tables of a stream of ANS contradict its head")
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(stream, _WORD, offset=end).astype(np.uint32))
    except ValueError as error:
        raise CodingError(f"the words of a stream of ANS are none: {error}") from error
    values = np.full((rows, columns), low, np.int8)
    for pair in range(pairs if high > low else 0):
        place = np.ix_(own == pair // column_classes, across == pair % column_classes)
        shape = (len(place[0]), place[1].shape[1])
        symbols = coder.decode(_model(tables[pair]), shape[0] * shape[1])
        values[place] = (symbols + low).astype(np.int8).reshape(shape)
    if not coder.is_empty():
        raise CodingError(f"a stream of ANS does not hold exactly {rows} x {columns} integers")
    return values


def _plans(values: Values, low: int, width: int) -> Iterator[tuple[float, _Plan]]:
    """Bytes of the stream that each would give, all but exactly; and the plan."""
    sizes = np.abs(values.astype(np.int16))
    finest = [_classes(sizes.sum(axis=1 - axis), most) for axis, most in enumerate(_MOST_CLASSES)]
    most = [int(labels.max()) + 1 for labels in finest]
    pairs = finest[0].astype(np.int64)[:, None] * most[1] + finest[1]
    counts = np.bincount((pairs * width + (values.astype(np.int64) - low)).ravel(), minlength=most[0] * most[1] * width)
    counts = counts.reshape(*most, width)
    for row_classes in _powers(most[0]):
        for column_classes in _powers(most[1]):
            if row_classes * column_classes > _MOST_TABLES:
                break
            # Classes of ranks are nested: coarser ones are neighbours put together.
            merges = (most[0] // row_classes, most[1] // column_classes)
            found = counts.reshape(row_classes, merges[0], column_classes, merges[1], width).sum(axis=(1, 3))
            rows, columns = (labels // merge for labels, merge in zip(finest, merges, strict=True))
            tables = _frequencies(found)
            shares = tables / tables.sum(axis=-1, keepdims=True)
            side = _side(np.concatenate((rows, columns)).astype(np.uint8), tables)
            size = len(side) - float((found * np.log2(shares)).sum()) / 8
            yield size, _Plan(rows.astype(np.uint8), columns.astype(np.uint8), tables, side)


def _classes(sizes: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Class of each of these sizes by rank, as many equal ones as a power of two allows, at most `most`."""
    count = min(most, 1 << (len(sizes).bit_length() - 1))
    labels = np.empty(len(sizes), np.int64)
    labels[np.argsort(sizes, kind="stable")] = np.arange(len(sizes)) * count // len(sizes)
    return labels


def _powers(most: int) -> list[int]:
    """Of two, up to `most`, which is one."""
    return [1 << power for power in range(most.bit_length())]


def _frequencies(counts: _Counts) -> NDArray[np.uint16]:
    """Counts by class as 16-bit frequencies; none is 0, so that every integer can be coded."""
    largest = counts.max(axis=-1, keepdims=True)
    frequencies: NDArray[np.uint16] = np.maximum(np.rint(counts / largest * _LARGEST_FREQUENCY), 1).astype(np.uint16)
    return frequencies


def _side(labels: NDArray[np.uint8], tables: NDArray[np.uint16]) -> bytes:
    packed = encode(labels.tobytes())
    return _LENGTH.pack(len(packed)) + packed + encode_halves(tables.astype("<u2").tobytes())


def _read_side(side: bytes, count: int, pairs: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    if len(side) < _LENGTH.size:
        raise CodingError("a stream of ANS has no tables")
    end = _LENGTH.size + _LENGTH.unpack_from(side)[0]
    labels = np.frombuffer(decode(side[_LENGTH.size : end], count), np.uint8)
    tables = np.frombuffer(decode_halves(side[end:], pairs * width), "<u2").astype(np.uint16)
    if not tables.all():
        raise CodingError("a table of a stream of ANS has a frequency of 0")
    return labels, tables.reshape(pairs, width)


def _model(table: NDArray[np.uint16]) -> object:
    """Of whole numbers, so that every machine gets the same one."""
    return constriction.stream.model.Categorical(table / table.sum(dtype=np.float64), perfect=False)
