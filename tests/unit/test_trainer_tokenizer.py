"""The tokenizer, and that counted bytes are decoded bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from trainer.data.byte_table import SPACE, ByteTable
from trainer.data.tokenizer import (
    BOS,
    TokenizerError,
    check_tokenizer,
    encode_documents,
    open_tokenizer,
    train_tokenizer,
)

CORPUS = [
    f"the cat sat on the mat, and then the {word} sat there; naïve café 12{i}" for i, word in enumerate("abcde" * 40)
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(CORPUS, vocab_size=340)


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=model)


def test_training_is_deterministic_and_words_take_their_space(model: bytes, tokenizer: SentencePieceProcessor) -> None:
    assert train_tokenizer(CORPUS, vocab_size=340) == model
    assert tokenizer.encode("on the mat", out_type=str)[1] == SPACE + "the"
    assert tokenizer.vocab_size() == 340


def test_a_space_is_one_piece_and_one_byte(tokenizer: SentencePieceProcessor) -> None:
    tokens = tokenizer.encode("a 漢", out_type=int, add_bos=True)
    pieces = [tokenizer.id_to_piece(token) for token in tokens]
    assert pieces[2] == SPACE
    assert ByteTable.of(tokenizer).count(tokens[:-1], tokens[1:]).tolist() == [1, 1, 1, 1, 1]


def test_a_long_document_is_not_skipped_in_training() -> None:
    long = "zebra quagga " * 2000
    trained = SentencePieceProcessor(model_proto=train_tokenizer([long, *CORPUS], vocab_size=340))
    assert trained.encode("a zebra", out_type=str)[-1] == SPACE + "zebra"


def test_text_that_cannot_carry_the_vocabulary_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="smaller vocabulary"):
        train_tokenizer(["so little"], vocab_size=5000)


def test_a_model_without_the_space_piece_is_refused(tmp_path: Path) -> None:
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["thecatsatonthematandthen" * 3] * 5),
        model_writer=written,
        model_type="bpe",
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (tmp_path / "m.model").write_bytes(written.getvalue())
    with pytest.raises(TokenizerError, match=r"U\+2581"):
        open_tokenizer(tmp_path / "m.model")
    (tmp_path / "m.model").write_bytes(b"no model")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        open_tokenizer(tmp_path / "m.model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        ByteTable.load(tmp_path / "m.model")


def test_other_special_pieces_are_refused() -> None:
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, model_type="bpe", vocab_size=60, minloglevel=2
    )
    with pytest.raises(TokenizerError, match="pad/bos/eos/unk"):
        check_tokenizer(SentencePieceProcessor(model_proto=written.getvalue()), "it")


any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
texts = any_text | st.text(alphabet="the cat▁sat \t\n on é漢0", max_size=60)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_counted_bytes_are_the_bytes_of_the_normalised_text(tokenizer: SentencePieceProcessor, text: str) -> None:
    tokens = tokenizer.encode(text, out_type=int, add_bos=True)
    normalised = tokenizer.normalize(text).replace(SPACE, " ")
    counted = ByteTable.of(tokenizer).count(tokens[:-1], tokens[1:])
    assert int(counted.sum()) == len(normalised.encode("utf-8"))
    assert int(counted.sum()) == len(tokenizer.decode(tokens).encode("utf-8"))


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=6))
def test_documents_are_encoded_in_order_each_after_a_bos(
    tokenizer: SentencePieceProcessor, documents: list[str]
) -> None:
    encoded = np.concatenate([tokens for _, tokens in encode_documents(tokenizer, documents, threads=2)])
    expected = [token for text in documents for token in [BOS, *tokenizer.encode(text, out_type=int)]]
    assert encoded.tolist() == expected


def test_a_leading_space_after_a_boundary_is_not_counted(tokenizer: SentencePieceProcessor) -> None:
    the = tokenizer.piece_to_id(SPACE + "the")
    letter = tokenizer.piece_to_id("t")
    assert ByteTable.of(tokenizer).count([BOS, letter, letter], [the, the, BOS]).tolist() == [3, 4, 0]
