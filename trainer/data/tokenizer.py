"""The tokenizer: SentencePiece BPE (Kudo and Richardson 2018, arXiv:1808.06226), trained on train documents only.

U+2581, SentencePiece's space, must be a piece of its own: otherwise a lone space becomes three byte tokens, which
count three bytes for one and deflate bits per byte. Naming it a user-defined symbol would give that piece, but cut
it off from every merge ("▁the" could never form); so it is a *required character*, and every model that is trained
or opened here is checked for it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from trainer.data.byte_table import SPACE
from trainer.data.casing import ESC, MARKS, fold
from trainer.data.normalization import RULE, normalized_for_training
from trainer.data.shards import BOS
from trainer.errors import InputError

PAD, EOS, UNK = 0, 2, 3
# Sentences beyond this many bytes would be skipped without a word; the default of 4,192 skips most documents.
_MAX_SENTENCE_BYTES = 1 << 30
_QUIET = 2
_TOO_FEW_PIECES = "size is smaller than required_chars"
_MOST_PIECES = 1 << 16  # tokens are stored as uint16


class TokenizerError(InputError):
    """No usable tokenizer: the message says what it lacks."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, case_folding: bool = False) -> bytes:
    """Train on the texts; returns the bytes of the `.model` file. Equal texts give equal bytes.

    With case folding it is trained on the folded normalised texts, and the four marks are pieces of their own among
    the `vocab_size`. Raises TokenizerError, such as for a vocabulary that is too large for so little text, and
    whatever the iteration over the texts raises.
    """
    written = io.BytesIO()
    failures: list[BaseException] = []
    if case_folding:
        texts = map(fold, normalized_for_training(iter(texts)))
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_noting(texts, failures),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=RULE,
            add_dummy_prefix=False,
            character_coverage=0.999,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            required_chars=SPACE,
            user_defined_symbols=list(MARKS) if case_folding else [],
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=1,  # written into the model: anything else would make its hash depend on the machine
            minloglevel=_QUIET,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        remedy = "a larger vocabulary" if _TOO_FEW_PIECES in str(error) else "more text or a smaller vocabulary"
        raise TokenizerError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text ({' '.join(str(error).split())}); "
            f"give {remedy}"
        ) from error
    model = written.getvalue()
    check_tokenizer(SentencePieceProcessor(model_proto=model), "the trained tokenizer")
    return model


def _noting(texts: Iterable[str], failures: list[BaseException]) -> Iterator[str]:
    """The texts; what breaks them off is noted, because SentencePiece turns it into a RuntimeError."""
    try:
        yield from texts
    except BaseException as error:
        failures.append(error)
        raise


def open_tokenizer(path: Path) -> SentencePieceProcessor:
    """Load and check a tokenizer. Raises OSError, or TokenizerError naming the file."""
    try:
        tokenizer = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise TokenizerError(f"{path} is not a SentencePiece model: {error}") from error
    check_tokenizer(tokenizer, str(path))
    return tokenizer


def check_tokenizer(tokenizer: SentencePieceProcessor, name: str) -> None:
    """Raise TokenizerError unless the special pieces, the bytes and U+2581 are what counting bytes relies on."""
    if tokenizer.vocab_size() == 0:  # what an empty file is taken for
        raise TokenizerError(f"{name} is not a SentencePiece model: it has no pieces; give a .model file")
    specials = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    if specials != (PAD, BOS, EOS, UNK):
        raise TokenizerError(
            f"{name} has pad/bos/eos/unk = {specials} instead of {(PAD, BOS, EOS, UNK)}; train it again"
        )
    if tokenizer.vocab_size() > _MOST_PIECES:
        raise TokenizerError(f"{name} has {tokenizer.vocab_size()} pieces; shards hold tokens below {_MOST_PIECES}")
    byte_pieces = sum(tokenizer.is_byte(token) for token in range(tokenizer.vocab_size()))
    if byte_pieces != 256:
        raise TokenizerError(f"{name} has {byte_pieces} byte pieces instead of 256; train it with byte fallback")
    try:
        tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{name} is damaged: a piece is not UTF-8 ({error}); get it again") from error
    space = tokenizer.piece_to_id(SPACE)
    if space == tokenizer.unk_id() or tokenizer.is_control(space) or tokenizer.is_unused(space):
        raise TokenizerError(
            f"{name} has no piece of its own for U+2581: a space would count as three bytes; train it again"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkIds:
    """The tokens of the four marks of case folding, `all` `(4,)`, and the one that makes a mark literal."""

    all: npt.NDArray[np.uint16]
    escape: int

    @classmethod
    def of(cls, tokenizer: SentencePieceProcessor, name: str) -> Self:
        """Raises TokenizerError unless each mark is a piece of its own, and part of no other."""
        ids = {mark: tokenizer.piece_to_id(mark) for mark in MARKS}
        for mark, token in ids.items():
            holders = [at for at in range(tokenizer.vocab_size()) if mark in tokenizer.id_to_piece(at)]
            if holders != [token] or tokenizer.is_control(token) or tokenizer.is_unused(token):
                raise TokenizerError(
                    f"{name} does not have the case mark U+{ord(mark):04X} as a piece of its own; "
                    "train a tokenizer with case folding, or encode without it"
                )
        return cls(all=np.array(list(ids.values()), dtype=np.uint16), escape=ids[ESC])
