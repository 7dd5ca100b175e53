"""Bytes of quantised values: one value a byte, then deflate (zlib level 9).

Values are never bit-packed: a general compressor does worse on 6-bit seams than on bytes. Quantised weights are as
good as independent draws, so looking for repeats only costs: Huffman codes alone come within .05 bits per value of
the order-0 entropy, where the default strategy is .15 to .5 bits above it. Both are tried and the shorter one kept
(a tensor of zeros repeats); any zlib reads either.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.int8]
"""Integers of a matrix, (rows, columns)."""

LEVEL = 9
_MEMORY_LEVEL = 9
_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
# Deflate cannot shrink further than this (RFC 1951: 258 bytes from 2 bits), so a short stream cannot claim much.
_LARGEST_RATIO = 1032
_SLACK_BYTES = 1032


class CodingError(ValueError):
    """A stream that is not what it claims to be."""


def encode(values: bytes) -> bytes:
    """The shorter of the two deflate codings."""
    return min((_deflate(values, strategy) for strategy in _STRATEGIES), key=len)


def decode(stream: bytes, count: int) -> bytes:
    """Exactly `count` bytes, or CodingError; never holds more than `count` + 1 bytes of output."""
    if not 0 <= count <= len(stream) * _LARGEST_RATIO + _SLACK_BYTES:
        raise CodingError(f"a stream of {len(stream)} bytes cannot hold the {count} bytes it claims")
    inflate = zlib.decompressobj()
    try:
        values = inflate.decompress(stream, count + 1)
        if len(values) == count and not inflate.eof:
            values += inflate.decompress(inflate.unconsumed_tail, 1)  # the checksum may still be unread
    except zlib.error as error:
        raise CodingError(f"the stream does not inflate: {error}") from error
    if len(values) != count or not inflate.eof or inflate.unused_data:
        raise CodingError(f"the stream does not hold exactly {count} bytes")
    return values


def encode_halves(numbers: bytes) -> bytes:
    """Little-endian 16-bit numbers, all low bytes first and then all high bytes, which repeat.

    On the row scales of trained models the two planes take a fifth less than the numbers as they stand.
    """
    return encode(numbers[0::2] + numbers[1::2])


def decode_halves(stream: bytes, count: int) -> bytes:
    """`count` little-endian 16-bit numbers, `2 * count` bytes, or CodingError."""
    planes = decode(stream, 2 * count)
    numbers = bytearray(2 * count)
    numbers[0::2], numbers[1::2] = planes[:count], planes[count:]
    return bytes(numbers)


def _deflate(values: bytes, strategy: int) -> bytes:
    deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, _MEMORY_LEVEL, strategy)
    return deflate.compress(values) + deflate.flush()
