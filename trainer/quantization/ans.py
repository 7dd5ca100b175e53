"""Integers by asymmetric numeral systems (Duda 2013, arXiv:1311.2540; constriction), a few frequency tables a matrix.

Where Huffman codes give every value whole bits, this coder comes within a thousandth of the entropy under its tables.
The columns of a matrix (or its rows) are put into classes by how large their integers are, with a table each: hidden
units of an MLP that came to matter little have columns of small integers in the matrix that reads them. How many
classes, and of which axis, is what makes the stream shortest.

    1 byte    axis of the classes: 0 rows, 1 columns
    1 byte    number of classes
    2 bytes   least and largest integer, signed
    4 bytes   little-endian length of the side information
              class of each row or column, a byte each, deflated, after 4 bytes that give the length
              tables: a 16-bit frequency per class and integer, as `encode_halves` has them
    rest      32-bit words of the coder, class by class, rows first
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

import constriction
import numpy as np
from numpy.typing import NDArray

from trainer.quantization.coding import CodingError, decode, decode_halves, encode, encode_halves

Values = NDArray[np.int8]
_Counts = NDArray[np.int64]

_HEAD = struct.Struct("<BBbbI")
_LENGTH = struct.Struct("<I")
_CLASSES = (1, 2, 4, 8, 16, 32)
_WORD = np.dtype("<u4")
_LARGEST_FREQUENCY = 2**16 - 1


class _Plan(NamedTuple):
    axis: int
    labels: NDArray[np.uint8]
    """Class of each row or column."""
    tables: NDArray[np.uint16]
    """(classes, integers) relative frequencies, none of them 0."""
    side: bytes


def encode_ans(values: Values) -> bytes:
    """(rows, columns), neither of them 0 -> the shortest stream of all the plans tried."""
    low, high = int(values.min()), int(values.max())
    _, plan = min(_plans(values, low, high - low + 1), key=itemgetter(0))
    coder = constriction.stream.stack.AnsCoder()
    classes = len(plan.tables)
    if high > low:  # else the head says it all
        for label in reversed(range(classes)):  # a stack: what is coded last is read first
            chosen = np.compress(plan.labels == label, values, axis=plan.axis)
            coder.encode_reverse(chosen.astype(np.int32).ravel() - low, _model(plan.tables[label]))
    words: bytes = coder.get_compressed().astype(_WORD).tobytes()
    return _HEAD.pack(plan.axis, classes, low, high, len(plan.side)) + plan.side + words


def decode_ans(stream: bytes, rows: int, columns: int) -> Values:
    """What `encode_ans` was given, (rows, columns). Raises CodingError for a stream that is not one of these."""
    if len(stream) < _HEAD.size:
        raise CodingError(f"a stream of {len(stream)} bytes is too short to be one of ANS")
    axis, classes, low, high, length = _HEAD.unpack_from(stream)
    end = _HEAD.size + length
    if axis not in {0, 1} or not classes or low > high or end > len(stream) or (len(stream) - end) % _WORD.itemsize:
        raise CodingError("the head of a stream of ANS contradicts itself")
    width = high - low + 1
    labels, tables = _read_side(stream[_HEAD.size : end], rows if axis == 0 else columns, classes, width)
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(stream, _WORD, offset=end).astype(np.uint32))
    except ValueError as error:
        raise CodingError(f"the words of a stream of ANS are none: {error}") from error
    values = np.full((rows, columns), low, np.int8)
    for label in range(classes if high > low else 0):
        chosen = np.flatnonzero(labels == label)
        shape = (len(chosen), columns) if axis == 0 else (rows, len(chosen))
        symbols = coder.decode(_model(tables[label]), shape[0] * shape[1])
        part = (symbols + low).astype(np.int8).reshape(shape)
        if axis == 0:
            values[chosen] = part
        else:
            values[:, chosen] = part
    if not coder.is_empty():
        raise CodingError(f"a stream of ANS does not hold exactly {rows} x {columns} integers")
    return values


def _plans(values: Values, low: int, width: int) -> Iterator[tuple[float, _Plan]]:
    """Bytes of the stream that each would give, all but exactly; and the plan."""
    for axis in (1, 0):
        counts = _counts(values, axis, low, width)
        order = np.argsort(counts @ np.abs(np.arange(low, low + width)), kind="stable")
        for classes in _CLASSES if axis == 1 else _CLASSES[1:]:
            if classes > len(order):
                break
            labels = np.empty(len(order), np.uint8)
            labels[order] = np.arange(len(order)) * classes // len(order)
            found = np.zeros((classes, width), np.int64)
            np.add.at(found, labels, counts)
            tables = _frequencies(found)
            shares = tables / tables.sum(axis=1, keepdims=True)
            side = _side(labels, tables)
            yield len(side) - float((found * np.log2(shares)).sum()) / 8, _Plan(axis, labels, tables, side)


def _counts(values: Values, axis: int, low: int, width: int) -> _Counts:
    """How often each integer is in each row (axis 0) or column: (rows or columns, width)."""
    places = np.arange(values.shape[axis], dtype=np.int64) * width - low
    found = values + (places[:, None] if axis == 0 else places[None, :])
    return np.bincount(found.ravel(), minlength=values.shape[axis] * width).reshape(-1, width)


def _frequencies(counts: _Counts) -> NDArray[np.uint16]:
    """Counts by class as 16-bit frequencies; none is 0, so that every integer can be coded."""
    largest = counts.max(axis=1, keepdims=True)
    frequencies: NDArray[np.uint16] = np.maximum(np.rint(counts / largest * _LARGEST_FREQUENCY), 1).astype(np.uint16)
    return frequencies


def _side(labels: NDArray[np.uint8], tables: NDArray[np.uint16]) -> bytes:
    packed = encode(labels.tobytes())
    return _LENGTH.pack(len(packed)) + packed + encode_halves(tables.astype("<u2").tobytes())


def _read_side(side: bytes, count: int, classes: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    if len(side) < _LENGTH.size:
        raise CodingError("a stream of ANS has no tables")
    end = _LENGTH.size + _LENGTH.unpack_from(side)[0]
    labels = np.frombuffer(decode(side[_LENGTH.size : end], count), np.uint8)
    tables = np.frombuffer(decode_halves(side[end:], classes * width), "<u2").astype(np.uint16)
    if labels.max(initial=0) >= classes or not tables.all():
        raise CodingError("the tables of a stream of ANS contradict its head")
    return labels, tables.reshape(classes, width)


def _model(table: NDArray[np.uint16]) -> object:
    """Of whole numbers, so that every machine gets the same one."""
    return constriction.stream.model.Categorical(table / table.sum(dtype=np.float64), perfect=False)
