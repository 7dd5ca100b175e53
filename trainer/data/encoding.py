"""Texts to tokens, in one thread; work is spread over processes, each with an encoder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from trainer.data.byte_table import SPACE, ByteTable
from trainer.data.casing import escaped, fold_all
from trainer.data.normalization import adds_dummy_prefix, literal_model, normalized
from trainer.data.shards import Tokens
from trainer.data.tokenizer import MarkIds, open_tokenizer
from trainer.data.word_cache import WordCache, encodes_by_words


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Documents one after the other: tokens `(n,)`, each document after a BOS.

    `original_bytes` `(n,)` is there with case folding only: the bytes of the normalised text before folding that
    each token stands for. `text_bytes` are the UTF-8 bytes of the texts as given.
    """

    tokens: Tokens
    original_bytes: Tokens | None
    documents: int
    text_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSettings:
    """`normalized`: the texts are normalised already and are taken to the letter, but for U+2581, which is a space."""

    tokenizer: Path
    case_folding: bool = False
    normalized: bool = False


class Encoder:
    """What `Decoder.decode` gives back of each document is its normalised text, exactly."""

    def __init__(self, settings: EncoderSettings) -> None:
        """Raises OSError, or TokenizerError for a tokenizer that cannot be used, such as one without case marks."""
        self._settings = settings
        self._tokenizer = open_tokenizer(settings.tokenizer)
        self._table = ByteTable.of(self._tokenizer)
        self._marks = MarkIds.of(self._tokenizer, str(settings.tokenizer)) if settings.case_folding else None
        self._literal = SentencePieceProcessor(model_proto=literal_model(settings.tokenizer.read_bytes()))
        self._dummy_prefix = adds_dummy_prefix(self._tokenizer)
        self._words = WordCache(self._literal) if encodes_by_words(self._tokenizer) else None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Raises UnicodeEncodeError for lone surrogates, which are no text."""
        tokens = self._tokens(texts)
        return Encoded(
            tokens=tokens,
            original_bytes=None if self._marks is None else self._counted(tokens).astype(np.uint16),
            documents=len(texts),
            text_bytes=sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts),
        )

    def bytes_of(self, encoded: Encoded) -> int:
        """Bytes of the normalised text that this encoder's result stands for, as scores count them."""
        if encoded.original_bytes is not None:
            return int(encoded.original_bytes.sum(dtype=np.int64))
        return int(self._counted(encoded.tokens).sum())

    def _counted(self, tokens: Tokens) -> npt.NDArray[np.int64]:
        return original_bytes(tokens, self._table, self._marks)

    def _tokens(self, texts: Sequence[str]) -> Tokens:
        if not texts:
            return np.zeros(0, dtype=np.uint16)
        literal = self._settings.normalized or self._marks is not None
        if literal:
            if not self._settings.normalized:
                texts = normalized(self._tokenizer, texts)
            if self._marks is not None:
                texts = fold_all(texts)
            if not self._dummy_prefix:
                # Decoding drops a space right after BOS, so a text that begins with one needs another to lose.
                texts = [" " + text if text.startswith((" ", SPACE)) else text for text in texts]
        if self._words is not None:
            escaped_texts = (
                [text.replace(" ", SPACE) for text in texts] if literal else self._tokenizer.normalize(texts)
            )
            return self._words.encode(escaped_texts)
        tokenizer = self._literal if literal else self._tokenizer
        # Arrays: making Python lists of the tokens first takes a fifth of the time again.
        each = tokenizer.encode(list(texts), return_type="numpy", add_bos=True, num_threads=1)
        return np.concatenate(each, dtype=np.uint16, casting="unsafe")


def original_bytes(tokens: Tokens, table: ByteTable, marks: MarkIds | None) -> npt.NDArray[np.int64]:
    """Bytes of the normalised text, before any case folding, that each token `(n,)` of a stream stands for.

    A mark of case stands for nothing, an escaped one for itself; folding changes no other length. Before the first
    token another of its kind is assumed, which is right for a BOS; of any other first token the count means nothing.
    """
    counted = table.count(np.concatenate([tokens[:1], tokens[:-1]]), tokens)
    if marks is not None:
        counted[np.isin(tokens, marks.all) & ~escaped(tokens, marks.escape)] = 0
    return counted
