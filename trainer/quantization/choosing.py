"""Which coders make an artifact smallest.

A coder's stream is decoded by code of Caddie's that counts as the artifact's, and by packages that do not: so a coder
is worth taking when it saves more bytes than its own modules have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trainer.export_config import Coder
from trainer.quantization.coders import encode_with
from trainer.quantization.coding import Values
from trainer.sizing import cheapest_coders


class Coded(NamedTuple):
    coder: Coder
    stream: bytes


def encode_all(matrices: Mapping[str, Values], coders: Sequence[Coder]) -> dict[str, Coded]:
    """Each matrix by one of the coders, so that streams and the coders' own code together are as few bytes as any
    choice of these coders makes them."""
    streams = {name: {coder: encode_with(coder, values) for coder in coders} for name, values in matrices.items()}
    chosen = cheapest_coders([{coder: len(stream) for coder, stream in found.items()} for found in streams.values()])
    return {
        name: min((Coded(coder, found[coder]) for coder in chosen), key=lambda coded: len(coded.stream))
        for name, found in streams.items()
    }
