"""Bigram embeddings: what a pair of tokens means, looked up instead of computed.

    e_t <- e_t + scale * W B[h(token_{t-1}, token_t)]

with a table B (rows, width) that pairs share as a hash h falls, and one W (dim, width); scale is 0 at first. There is
no share at a document's first token. Hashed n-gram tables: Huang et al. 2025, arXiv:2501.16975; of bigrams in the
public modded-nanogpt and parameter-golf runs. Lookups take parameters and no work, which a short clock has less of.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_WORD = 0xFFFFFFFF
# Odd constants of 32 bits (Knuth's multiplicative hash; xxHash): their products spread small numbers over the word.
_BEFORE, _OWN = 0x9E3779B1, 0x85EBCA77
# The low bits of a product depend on the low bits of its factor alone.
_SPREAD = 8


def bigram_rows(inputs: Tensor, rows: int) -> Tensor:
    """(batch, time) int64 tokens -> (batch, time) int64, each pair's row of the table. A row's first token has token 0
    before it."""
    before = functional.pad(inputs[:, :-1], (1, 0))
    mixed = ((before * _BEFORE) ^ (inputs * _OWN)) & _WORD
    return (mixed >> _SPREAD) % rows
