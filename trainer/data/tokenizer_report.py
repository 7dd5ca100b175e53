"""How well a tokenizer fits given texts: bytes per token, and what had to be spelled byte by byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.byte_table import ByteTable
from trainer.data.encoding import Encoder, EncoderSettings
from trainer.data.tokenizer import MarkIds, open_tokenizer
from trainer.errors import InputError

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerReport:
    """Over all documents, each with its BOS, which counts as a token and in no share of bytes.

    `bytes` are those of the normalised text before folding. Shares are of `tokens` unless they say bytes.
    `unused_pieces` are those of the vocabulary that the texts never needed, not counting bytes and
    control pieces.
    """

    vocab_size: int
    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    byte_fallback_share: float
    byte_fallback_bytes_share: float
    unknown_share: float
    mark_share: float
    unused_pieces: int


def tokenizer_report(tokenizer: Path, texts: Iterable[str], *, case_folding: bool = False) -> TokenizerReport:
    """Encode the texts and count. Raises OSError, TokenizerError, or InputError if there is no text in them."""
    encoder = Encoder(EncoderSettings(tokenizer=tokenizer, case_folding=case_folding))
    model = open_tokenizer(tokenizer)
    table = ByteTable.of(model)
    counts = np.zeros(table.vocab_size, dtype=np.int64)
    documents = text_bytes = 0
    for batch in _batches(texts):
        encoded = encoder.encode(batch)
        counts += np.bincount(encoded.tokens, minlength=counts.size)
        documents += encoded.documents
        text_bytes += encoder.bytes_of(encoded)
    if text_bytes == 0:
        raise InputError(f"{tokenizer}: {documents} documents without any text tell nothing; give some with text")
    tokens = int(counts.sum())
    spelled = sum(int(counts[token]) for token in range(counts.size) if model.is_byte(token))
    words = np.array([not model.is_byte(token) for token in range(counts.size)]) & ~table.boundary
    marks: list[int] = MarkIds.of(model, str(tokenizer)).all.tolist() if case_folding else []
    return TokenizerReport(
        vocab_size=table.vocab_size,
        documents=documents,
        tokens=tokens,
        bytes=text_bytes,
        bytes_per_token=text_bytes / tokens,
        byte_fallback_share=spelled / tokens,
        byte_fallback_bytes_share=spelled / text_bytes,
        unknown_share=int(counts[model.unk_id()]) / tokens,
        mark_share=sum(int(counts[mark]) for mark in marks) / tokens,
        unused_pieces=int(np.count_nonzero(words & (counts == 0))),
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
