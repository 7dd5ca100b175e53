"""Classes of tokens that people speak of: letters that begin a word or go on in one, digits, punctuation, ...

The class is that of the piece's first character after its space; whether letters begin a word also depends on the
token before: "the" after "(" begins one, "ing" after "▁go" does not, and neither does a piece after a byte of a
character that has no piece of its own.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from trainer.data.byte_table import SPACE
from trainer.data.casing import CAP, MARKS

CLASSES = (
    "BOS and control",
    "byte fallback",
    "word-initial letters",
    "word-internal letters",
    "digits",
    "punctuation and symbols",
    "whitespace and other",
    "case marks",
)
_CONTROL, _BYTE, _INITIAL, _INTERNAL, _DIGIT, _PUNCTUATION, _OTHER, _MARK = range(len(CLASSES))
_BY_CATEGORY = {"L": _INTERNAL, "M": _INTERNAL, "N": _DIGIT, "P": _PUNCTUATION, "S": _PUNCTUATION}

Labels = npt.NDArray[np.uint8]
Ids = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenClasses:
    """Per token id: its class `(vocab,)`, and whether it ends inside a word `(vocab,)`."""

    classes: Labels
    ends_in_word: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, tokenizer: SentencePieceProcessor, *, case_folding: bool) -> TokenClasses:
        size = tokenizer.vocab_size()
        classes = np.zeros(size, dtype=np.uint8)
        ends = np.zeros(size, dtype=np.bool_)
        for token in range(size):
            if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
                classes[token] = _CONTROL
            elif tokenizer.is_byte(token):
                classes[token], ends[token] = _BYTE, True
            else:
                classes[token], ends[token] = _class_of(tokenizer.id_to_piece(token), case_folding=case_folding)
        return cls(classes=classes, ends_in_word=ends)

    def label(self, previous: Ids, targets: Ids) -> Labels:
        """The class, an index into CLASSES, of each target `(n,)` given the token before it `(n,)`."""
        labels = self.classes[targets]
        labels[(labels == _INTERNAL) & ~self.ends_in_word[previous]] = _INITIAL
        return labels


def _class_of(piece: str, *, case_folding: bool) -> tuple[int, bool]:
    text = piece.lstrip(SPACE)
    if not text:
        return _OTHER, False
    if case_folding and text in MARKS:
        return _MARK, text == CAP  # the one that stands inside words
    found = _BY_CATEGORY.get(unicodedata.category(text[0])[0], _OTHER)
    if found == _INTERNAL and text != piece:
        found = _INITIAL
    return found, unicodedata.category(text[-1])[0] in "LM"
