"""The tokenizer, and that counted bytes are decoded bytes."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from odd_tokenizers import bpe_model
from trainer.data.byte_table import SPACE, ByteTable
from trainer.data.casing import MARKS
from trainer.data.decoding import Decoder
from trainer.data.normalization import RULE
from trainer.data.prose import gather
from trainer.data.shards import BOS
from trainer.data.tokenizer import TokenizerError, check_tokenizer, open_tokenizer, train_tokenizer
from trainer.data.tokenizer_report import tokenizer_report
from trainer.errors import InputError

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


@pytest.mark.parametrize("case_folding", [False, True])
def test_what_breaks_the_texts_off_is_raised_as_itself(case_folding: bool) -> None:
    def texts() -> Iterator[str]:
        yield from CORPUS
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_tokenizer(texts(), vocab_size=340, case_folding=case_folding)


def test_a_vocabulary_that_has_no_room_for_the_characters_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="larger vocabulary"):
        train_tokenizer(CORPUS, vocab_size=262)


def test_a_model_without_the_space_piece_is_refused(tmp_path: Path) -> None:
    model = bpe_model(["thecatsatonthematandthen" * 3] * 5, 270, hard_vocab_limit=False)
    (tmp_path / "m.model").write_bytes(model)
    with pytest.raises(TokenizerError, match=r"U\+2581"):
        open_tokenizer(tmp_path / "m.model")
    for nothing in (b"", b"no model"):
        (tmp_path / "m.model").write_bytes(nothing)
        with pytest.raises(TokenizerError, match="not a SentencePiece model"):
            open_tokenizer(tmp_path / "m.model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        ByteTable.load(tmp_path / "m.model")


def test_a_damaged_piece_is_told(tmp_path: Path) -> None:
    model = train_tokenizer(["some words of some text "] * 20, vocab_size=280)
    (tmp_path / "m.model").write_bytes(model.replace("\u2581".encode(), b"\xff\x96\x81", 1))
    with pytest.raises(TokenizerError, match=r"m\.model is damaged: a piece is not UTF-8"):
        open_tokenizer(tmp_path / "m.model")


def test_a_model_that_uint16_cannot_hold_is_refused() -> None:
    class Large:
        """A processor of 65,537 pieces would take a minute to train; only its size is asked for."""

        def vocab_size(self) -> int:
            return 65537

        def pad_id(self) -> int:
            return 0

        def bos_id(self) -> int:
            return 1

        def eos_id(self) -> int:
            return 2

        def unk_id(self) -> int:
            return 3

    with pytest.raises(TokenizerError, match="65537 pieces"):
        check_tokenizer(Large(), "it")


def test_other_special_pieces_are_refused() -> None:
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, model_type="bpe", vocab_size=60, minloglevel=2
    )
    with pytest.raises(TokenizerError, match="pad/bos/eos/unk"):
        check_tokenizer(SentencePieceProcessor(model_proto=written.getvalue()), "it")


@pytest.fixture(scope="module")
def prose() -> list[str]:
    """Documentation of a few packages that every Python has."""
    return [d.text for d in gather([Path(asyncio.__file__).parent, Path(logging.__file__).parent], processes=1)]


@pytest.fixture(scope="module", params=["small", "1024", "folding", "symbols"])
def any_vocabulary(
    request: pytest.FixtureRequest, prose: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SentencePieceProcessor, Decoder]:
    match request.param:
        case "small":
            model = train_tokenizer(CORPUS, vocab_size=300)
        case "1024":
            model = train_tokenizer(prose, vocab_size=1024)
        case "folding":
            model = train_tokenizer(CORPUS, vocab_size=340, case_folding=True)
        case _:
            model = with_symbols()
    path = tmp_path_factory.mktemp("model") / "m.model"
    path.write_bytes(model)
    return SentencePieceProcessor(model_proto=model), Decoder(path, case_folding=False)


def with_symbols() -> bytes:
    """Also user-defined and control symbols; it writes a dummy prefix and keeps every space."""
    return bpe_model(
        CORPUS,
        360,
        normalization_rule_name=RULE,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        required_chars=SPACE,
        user_defined_symbols=["<html>", "漢", SPACE + SPACE, "é" + SPACE],
        control_symbols=["<end>"],
    )


any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
texts = any_text | st.text(alphabet="the cat▁sat \t\n on é漢0" + MARKS, max_size=60) | st.just("<html><end> <html>")


@settings(max_examples=200, deadline=None)
@given(texts)
def test_counted_bytes_are_the_bytes_of_the_normalised_text(
    any_vocabulary: tuple[SentencePieceProcessor, Decoder], text: str
) -> None:
    tokenizer, decoder = any_vocabulary
    tokens = tokenizer.encode(text, out_type=int, add_bos=True)
    # A leading space, of the text or a dummy prefix, is not part of the normalised text.
    normalised = tokenizer.normalize(text).replace(SPACE, " ").removeprefix(" ").encode("utf-8")
    counted = ByteTable.of(tokenizer).count(tokens[:-1], tokens[1:])
    assert int(counted.sum()) == len(normalised)
    assert decoder.decode(np.array(tokens[1:], dtype=np.uint16)) == normalised
    assert tokenizer.decode(tokens).encode("utf-8") == normalised


token_sequences = st.lists(
    st.sampled_from([0, 1, 2, 3])
    | st.integers(0, 299)
    | st.sampled_from(["the", "▁", "▁the", "▁s", "<0xE6>", "<0xBC>", "<0xA2>"]),
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(token_sequences)
def test_any_sequence_of_tokens_counts_what_it_decodes_to(
    any_vocabulary: tuple[SentencePieceProcessor, Decoder], sequence: list[int | str]
) -> None:
    tokenizer, decoder = any_vocabulary
    tokens = [tokenizer.piece_to_id(token) if isinstance(token, str) else token for token in sequence]
    expected = slowly(tokenizer, tokens)
    counted = ByteTable.of(tokenizer).count([BOS, *tokens[:-1]] if tokens else [], tokens)
    assert counted.tolist() == [len(part) for part in expected]
    assert decoder.decode(np.array(tokens, dtype=np.uint16)) == b"".join(expected)


def slowly(tokenizer: SentencePieceProcessor, tokens: list[int]) -> list[bytes]:
    """The bytes of each token, by SentencePiece's own decoder, one token at a time behind a letter."""
    letter = tokenizer.piece_to_id("t")
    parts, boundary = [], True
    for token in tokens:
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            parts.append(b"")
            boundary = True
            continue
        if tokenizer.is_byte(token):
            part = bytes.fromhex(tokenizer.id_to_piece(token)[3:5])
        else:
            part = tokenizer.decode([letter, token], return_type=bytes).removeprefix(b"t")
        parts.append(part.removeprefix(b" ") if boundary and not tokenizer.is_byte(token) else part)
        boundary = False
    return parts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=8))
def test_bytes_that_are_no_text_count_one_each(tokenizer: SentencePieceProcessor, values: list[int]) -> None:
    tokens = [tokenizer.piece_to_id(f"<0x{value:02X}>") for value in values]
    assert int(ByteTable.of(tokenizer).count([BOS, *tokens[:-1]], tokens).sum()) == len(values)
    try:
        text = bytes(values).decode("utf-8")
    except UnicodeDecodeError:
        assert "\ufffd" in tokenizer.decode(tokens)
    else:
        assert tokenizer.decode(tokens) == text


def test_where_the_rule_and_the_decoder_of_sentencepiece_differ(tokenizer: SentencePieceProcessor) -> None:
    the, letter, space = (tokenizer.piece_to_id(piece) for piece in (SPACE + "the", "t", SPACE))
    count = ByteTable.of(tokenizer).count
    assert tokenizer.decode([letter, 3]) == "t ⁇ "
    assert count([letter], [3]).tolist() == [0]
    assert tokenizer.decode([letter, BOS, the]) == "t the"
    assert count([letter, BOS], [BOS, the]).tolist() == [0, 3]
    assert tokenizer.decode([space, the]) == "the"
    assert count([BOS, space], [space, the]).tolist() == [0, 4]


def test_a_leading_space_after_a_boundary_is_not_counted(tokenizer: SentencePieceProcessor) -> None:
    the = tokenizer.piece_to_id(SPACE + "the")
    letter = tokenizer.piece_to_id("t")
    assert ByteTable.of(tokenizer).count([BOS, letter, letter], [the, the, BOS]).tolist() == [3, 4, 0]


def test_with_case_folding_the_marks_are_pieces_and_words_of_both_cases_are_one() -> None:
    shouting = [text.title() for text in CORPUS]
    folding = SentencePieceProcessor(model_proto=train_tokenizer(shouting, vocab_size=340, case_folding=True))
    assert [folding.id_to_piece(token) for token in range(4, 8)] == list(MARKS)
    assert folding.piece_to_id(SPACE + "the") != folding.unk_id()
    assert folding.piece_to_id(SPACE + "The") == folding.unk_id()
    assert folding.vocab_size() == 340


def test_the_report_of_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(train_tokenizer(CORPUS, vocab_size=340))
    report = tokenizer_report(tmp_path / "m.model", ["the the", "the  漢"])
    # BOS the ▁the, BOS the ▁ and three bytes
    assert (report.documents, report.tokens, report.bytes) == (2, 9, 7 + 7)
    assert report.bytes_per_token == 14 / 9
    assert report.byte_fallback_share == 3 / 9
    assert report.byte_fallback_bytes_share == 3 / 14
    assert (report.unknown_share, report.mark_share) == (0, 0)
    assert report.unused_pieces == 340 - 256 - 4 - 3
    with pytest.raises(InputError, match="without any text"):
        tokenizer_report(tmp_path / "m.model", [""])


def test_the_report_with_case_folding_counts_original_bytes(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(train_tokenizer(CORPUS, vocab_size=340, case_folding=True))
    report = tokenizer_report(tmp_path / "m.model", ["The THE the " * 200_000, "The"], case_folding=True)
    assert report.bytes == 12 * 200_000 - 1 + 3
    assert report.tokens == 2 + 5 * 200_000 + 2
    assert report.mark_share == (2 * 200_000 + 1) / report.tokens
