"""How many bytes of text a token stands for: the denominator of bits per byte.

The rule of the public competition. A byte piece is 1 byte; control, unknown and unused pieces are 0; any other piece,
user-defined symbols among them, is the UTF-8 length of its text without a leading U+2581, plus 1 for the space that
U+2581 stands for, unless the previous token is a boundary (control, unknown, unused), where that space is dropped.
What is counted is the *normalised* text, the one that decoding gives back.

For what an encoder makes of a text, the sum is the length of SentencePiece's decoded text. For other sequences of
tokens, such as a model's own, the rule stays as above where SentencePiece's decoder differs from it:

- Bytes that are no UTF-8 count 1 each; SentencePiece shows each as U+FFFD (3 bytes).
- An unknown token counts 0; SentencePiece shows " ⁇ " (5 bytes).
- A leading space is dropped after any boundary, and one only; SentencePiece drops none after a boundary in the
  middle, and at the start every leading space, or none at all, depending on two flags of the normaliser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from trainer.errors import InputError

SPACE = "\u2581"

Ids = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteTable:
    """Per token id: bytes without a leading space `(vocab,)`, leading space `(vocab,)`, boundary `(vocab,)`."""

    base_bytes: npt.NDArray[np.int64]
    leading_space: npt.NDArray[np.bool_]
    boundary: npt.NDArray[np.bool_]

    @property
    def vocab_size(self) -> int:
        return int(self.base_bytes.size)

    @classmethod
    def of(cls, tokenizer: SentencePieceProcessor) -> ByteTable:
        size = tokenizer.vocab_size()
        base = np.zeros(size, dtype=np.int64)
        leading = np.zeros(size, dtype=np.bool_)
        boundary = np.zeros(size, dtype=np.bool_)
        for token in range(size):
            if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
                boundary[token] = True
            elif tokenizer.is_byte(token):
                base[token] = 1
            else:
                piece: str = tokenizer.id_to_piece(token)
                leading[token] = piece.startswith(SPACE)
                # A U+2581 inside a piece is one byte of text as well: a space.
                base[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode("utf-8"))
        return cls(base_bytes=base, leading_space=leading, boundary=boundary)

    @classmethod
    def load(cls, tokenizer_path: Path) -> ByteTable:
        """Raises InputError, naming the file, if it is not a SentencePiece model."""
        try:
            return cls.of(SentencePieceProcessor(model_proto=tokenizer_path.read_bytes()))
        except RuntimeError as error:
            raise InputError(f"{tokenizer_path} is not a SentencePiece model: {error}") from error

    def count(self, previous: Ids | Sequence[int], targets: Ids | Sequence[int]) -> npt.NDArray[np.int64]:
        """Bytes of each target `(n,)`, given the token before it `(n,)`. Raises IndexError outside the vocabulary."""
        before, at = np.asarray(previous, dtype=np.int64), np.asarray(targets, dtype=np.int64)
        counted: npt.NDArray[np.int64] = self.base_bytes[at] + (self.leading_space[at] & ~self.boundary[before])
        return counted
