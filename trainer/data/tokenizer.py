"""The tokenizer: SentencePiece BPE (Kudo and Richardson 2018, arXiv:1808.06226), trained on train documents only.

U+2581, SentencePiece's space, must be a piece of its own: otherwise a lone space becomes three byte tokens, which
count three bytes for one and deflate bits per byte. Naming it a user-defined symbol would give that piece, but cut
it off from every merge ("▁the" could never form); so it is a *required character*, and every model that is trained
or opened here is checked for it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from trainer.data.byte_table import SPACE
from trainer.data.shards import Tokens
from trainer.errors import InputError

PAD, BOS, EOS, UNK = 0, 1, 2, 3
# Sentences beyond this many bytes would be skipped without a word; the default of 4,192 skips most documents.
_MAX_SENTENCE_BYTES = 1 << 30
_QUIET = 2
_BATCH_DOCUMENTS = 256


class TokenizerError(InputError):
    """No usable tokenizer: the message says what it lacks."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train on the texts; returns the bytes of the `.model` file. Equal texts give equal bytes.

    Raises TokenizerError, such as for a vocabulary that is too large for so little text.
    """
    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            character_coverage=0.999,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            required_chars=SPACE,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=1,  # written into the model: anything else would make its hash depend on the machine
            minloglevel=_QUIET,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text ({' '.join(str(error).split())}); "
            "give more text or a smaller vocabulary"
        ) from error
    model = written.getvalue()
    check_tokenizer(SentencePieceProcessor(model_proto=model), "the trained tokenizer")
    return model


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
    specials = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    if specials != (PAD, BOS, EOS, UNK):
        raise TokenizerError(f"{name} has pad/bos/eos/unk = {specials} instead of {(PAD, BOS, EOS, UNK)}")
    byte_pieces = sum(tokenizer.is_byte(token) for token in range(tokenizer.vocab_size()))
    if byte_pieces != 256:
        raise TokenizerError(f"{name} has {byte_pieces} byte pieces instead of 256; train it with byte fallback")
    space = tokenizer.piece_to_id(SPACE)
    if space == tokenizer.unk_id() or tokenizer.is_control(space) or tokenizer.is_unused(space):
        raise TokenizerError(
            f"{name} has no piece of its own for U+2581: a space would count as three bytes; train it again"
        )


def encode_documents(
    tokenizer: SentencePieceProcessor, texts: Iterable[str], *, threads: int = 1
) -> Iterator[tuple[int, Tokens]]:
    """For each run of documents: (how many, their uint16 tokens), each document after a BOS; in order."""
    for batch in _batches(texts):
        encoded: list[list[int]] = tokenizer.encode(batch, out_type=int, add_bos=True, num_threads=threads)
        yield len(batch), np.concatenate([np.array(tokens, dtype=np.uint16) for tokens in encoded])


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch
