"""Which coders make an artifact smallest.

A coder's stream is decoded by code of Caddie's that counts as the artifact's, and by packages that do not: so a coder
is worth taking when it saves more bytes than its own modules have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from trainer.config import Coder
from trainer.quantization.coders import Values, encode_with
from trainer.sizing import coder_bytes


class Coded(NamedTuple):
    coder: Coder
    stream: bytes


def encode_all(matrices: Mapping[str, Values], coders: Sequence[Coder]) -> dict[str, Coded]:
    """Each matrix by one of the coders, so that streams and the coders' own code together are as few bytes as any
    choice of these coders makes them."""
    streams = {name: {coder: encode_with(coder, values) for coder in coders} for name, values in matrices.items()}
    choices = [chosen for count in range(1, len(coders) + 1) for chosen in combinations(coders, count)]
    chosen = min(choices, key=lambda choice: _total(streams, choice))
    return {
        name: min((Coded(coder, found[coder]) for coder in chosen), key=lambda coded: len(coded.stream))
        for name, found in streams.items()
    }


def _total(streams: Mapping[str, Mapping[Coder, bytes]], choice: Collection[Coder]) -> int:
    return coder_bytes(choice) + sum(min(len(found[coder]) for coder in choice) for found in streams.values())
