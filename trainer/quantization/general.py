"""Integers through compressors of text: brotli, zstd, lzma. One value a byte, rows first.

They look for repeats, of which trained weights have none, and code bytes about as well as Huffman does, or a little
better: 1 to 2% above the entropy. They are here to be held against, and for matrices that do repeat.
"""

from __future__ import annotations

import lzma

import brotli
import numpy as np
import zstandard

from trainer.quantization.coding import CodingError, Values

_BROTLI_QUALITY, _BROTLI_WINDOW = 11, 24
_ZSTD_LEVEL = 22
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
_LZMA_MEMORY = 1 << 30
# Of a decoder's window: what its encoder above may have used, and no more of a stream that asks for it.
_ZSTD_WINDOW = 1 << 27


def encode_brotli(values: Values) -> bytes:
    """(rows, columns) -> its stream."""
    packed: bytes = brotli.compress(values.tobytes(), quality=_BROTLI_QUALITY, lgwin=_BROTLI_WINDOW)
    return packed


def decode_brotli(stream: bytes, rows: int, columns: int) -> Values:
    """What `encode_brotli` was given. Raises CodingError."""
    decoder, found = brotli.Decompressor(), bytearray()
    try:
        found += decoder.process(stream, output_buffer_limit=rows * columns + 1)
        while len(found) <= rows * columns and not decoder.is_finished():
            more = decoder.process(b"", output_buffer_limit=rows * columns + 1 - len(found))
            if not more:
                break
            found += more
    except brotli.error as error:
        raise CodingError(f"the stream is not one of brotli: {error}") from error
    return _whole(bytes(found), rows, columns, finished=decoder.is_finished())


def encode_zstd(values: Values) -> bytes:
    """(rows, columns) -> its stream."""
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(values.tobytes())


def decode_zstd(stream: bytes, rows: int, columns: int) -> Values:
    """What `encode_zstd` was given. Raises CodingError."""
    try:
        if zstandard.frame_content_size(stream) != rows * columns:
            raise CodingError(f"a frame of zstd does not hold {rows} x {columns} integers")
        decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        found = decoder.decompress(stream, max_output_size=rows * columns, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodingError(f"the stream is not one of zstd: {error}") from error
    return _whole(found, rows, columns, finished=True)


def encode_lzma(values: Values) -> bytes:
    """(rows, columns) -> its stream, an .xz file."""
    return lzma.compress(values.tobytes(), format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=_LZMA)


def decode_lzma(stream: bytes, rows: int, columns: int) -> Values:
    """What `encode_lzma` was given. Raises CodingError."""
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)
    try:
        found = decoder.decompress(stream, max_length=rows * columns + 1)
        if len(found) == rows * columns and not decoder.eof:
            found += decoder.decompress(b"", max_length=1)
    except (lzma.LZMAError, EOFError) as error:
        raise CodingError(f"the stream is not one of lzma: {error}") from error
    return _whole(found, rows, columns, finished=decoder.eof and not decoder.unused_data)


def _whole(found: bytes, rows: int, columns: int, *, finished: bool) -> Values:
    if len(found) != rows * columns or not finished:
        raise CodingError(f"the stream does not hold exactly {rows} x {columns} integers")
    return np.frombuffer(found, np.int8).reshape(rows, columns)
