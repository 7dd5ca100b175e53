"""Tokens back to text: exactly the bytes that the byte table counts, or with case folding the byte sidecar.

This is not SentencePiece's `decode`: that replaces bytes that are no UTF-8 by U+FFFD, writes " ⁇ " for an unknown
token, and depends on flags of the normaliser for spaces (see `trainer.data.byte_table`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from trainer.data.byte_table import SPACE, ByteTable
from trainer.data.casing import unfold
from trainer.data.shards import BOS, Tokens, open_shard
from trainer.data.tokenizer import MarkIds, open_tokenizer

# Tokens searched for BOS in one go.
_CHUNK_TOKENS = 1 << 22


class Decoder:
    """One document's tokens, without its BOS, to bytes."""

    def __init__(self, tokenizer: Path, *, case_folding: bool) -> None:
        """Raises OSError or TokenizerError."""
        model = open_tokenizer(tokenizer)
        if case_folding:
            MarkIds.of(model, str(tokenizer))
        self._case_folding = case_folding
        self._table = ByteTable.of(model)
        pieces: list[str] = [model.id_to_piece(token) for token in range(self._table.vocab_size)]
        self._bytes = [
            b""
            if self._table.boundary[token]
            else bytes([int(piece[3:5], 16)])  # <0x0A>
            if model.is_byte(token)
            else piece.replace(SPACE, " ").encode("utf-8")
            for token, piece in enumerate(pieces)
        ]

    def decode(self, tokens: Tokens) -> bytes:
        """The text of `(n,)` tokens. Control, unknown and unused tokens give no bytes.

        Raises CasingError where marks of case stand as folding never writes them, IndexError outside the vocabulary.
        """
        parts = [self._bytes[token] for token in tokens.tolist()]
        after_boundary = np.ones(tokens.size, dtype=np.bool_)
        after_boundary[1:] = self._table.boundary[tokens[:-1]]
        for at in np.flatnonzero(after_boundary & self._table.leading_space[tokens]):
            parts[at] = parts[at][1:]
        text = b"".join(parts)
        if not self._case_folding:
            return text
        return unfold(text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def documents_in(tokens: Iterable[Tokens]) -> Iterator[Tokens]:
    """The documents of a stream `(n,)`, given in pieces such as shards; a document may span them. See `cut`."""
    return (document for _, _, document in cut(tokens))


def cut(tokens: Iterable[Tokens]) -> Iterator[tuple[int, int, Tokens]]:
    """Cut a stream at each BOS, which is left out: in which piece, at which index a document begins, its tokens.

    Tokens before the first BOS are a document too; a BOS right before another, or at the end, one without tokens.
    """
    piece_at = index_at = 0
    parts: list[Tokens] = []
    begun = False
    for piece, array in enumerate(tokens):
        for start in range(0, array.size, _CHUNK_TOKENS):
            # A plain array: each slice of a memory map costs several times as much.
            chunk = np.asarray(array[start : start + _CHUNK_TOKENS])
            at = 0
            for boundary in np.flatnonzero(chunk == BOS).tolist():
                if boundary > at or begun:
                    parts.append(chunk[at:boundary])
                    yield piece_at, index_at, _joined(parts)
                parts, begun, at = [], True, boundary + 1
                piece_at, index_at = piece, start + boundary + 1
            if at < chunk.size:
                if not begun:
                    piece_at, index_at, begun = piece, start, True
                parts.append(chunk[at:])
    if begun:
        yield piece_at, index_at, _joined(parts)


def validation_documents(shards: Sequence[Path], decoder: Decoder) -> Iterator[bytes]:
    """The texts of the documents in the shards, in order. Raises OSError, ShardError, and what `decode` raises."""
    return (decoder.decode(tokens) for tokens in documents_in(map(open_shard, shards)))


def _joined(parts: Sequence[Tokens]) -> Tokens:
    if not parts:
        return np.zeros(0, dtype=np.uint16)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
