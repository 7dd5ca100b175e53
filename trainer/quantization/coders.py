"""The coders of a matrix of integers, by name."""

from __future__ import annotations

from importlib import import_module

import numpy as np

from trainer.export_config import CODER_MODULES, Coder
from trainer.quantization.coding import CodingError, Values, decode, encode


def encode_with(coder: Coder, values: Values) -> bytes:
    """The stream of one coder. Raises CodingError if a package that it needs is missing."""
    if coder == "zlib":
        return encode(values.tobytes())
    stream: bytes = getattr(_module_of(coder), f"encode_{coder}")(np.ascontiguousarray(values))
    return stream


def decode_with(coder: Coder, stream: bytes, rows: int, columns: int) -> Values:
    """Exactly the integers that `encode_with` was given. Raises CodingError for a stream that is not whole, and if a
    package is missing."""
    if coder == "zlib":
        return np.frombuffer(decode(stream, rows * columns), np.int8).reshape(rows, columns)
    values: Values = getattr(_module_of(coder), f"decode_{coder}")(stream, rows, columns)
    return values


def _module_of(coder: Coder) -> object:
    try:
        return import_module(CODER_MODULES[coder][0])
    except ImportError as error:
        raise CodingError(
            f"the coder {coder} needs the package {error.name}, which is not installed: install it, or leave {coder} "
            "out of export.coders"
        ) from error
