"""Texts to tokens and back: exactly the normalised text, counted token by token, with and without case folding."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from odd_tokenizers import bpe_model
from trainer.data.byte_table import SPACE, ByteTable
from trainer.data.casing import CAPS, ESC, MARKS, TITLE, CasingError
from trainer.data.decoding import Decoder, cut, documents_in, validation_documents
from trainer.data.encoding import Encoder, EncoderSettings
from trainer.data.normalization import (
    RULE,
    adds_dummy_prefix,
    literal_model,
    normalized,
    normalized_for_training,
)
from trainer.data.prose import gather
from trainer.data.shards import BOS, Tokens, write_shard
from trainer.data.tokenizer import TokenizerError, train_tokenizer
from trainer.errors import InputError

CORPUS = [f"The cat sat on the MAT, and then {word} sat there; Naïve café 12{i}" for i, word in enumerate("abcde" * 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers: `plain`, `folding`, and `spacious`, which keeps all spaces, changes no character, and has marks."""
    path = tmp_path_factory.mktemp("models")
    (path / "plain").write_bytes(train_tokenizer(CORPUS, vocab_size=340))
    (path / "folding").write_bytes(train_tokenizer(CORPUS, vocab_size=340, case_folding=True))
    for name, dummy_prefix in (("spacious", False), ("prefixed", True)):
        model = bpe_model(
            CORPUS,
            340,
            normalization_rule_name="identity",
            add_dummy_prefix=dummy_prefix,
            remove_extra_whitespaces=False,
            required_chars=SPACE,
            user_defined_symbols=list(MARKS),
        )
        (path / name).write_bytes(model)
    return path


any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
# No normaliser sees to it that U+2581 means a space, so where a text is taken to the letter it is not one.
texts = (any_text | st.text(alphabet="theTHE AbÉé \t\nßﬁ①漢" + MARKS, max_size=40)).map(lambda t: t.replace(SPACE, ""))

combinations = pytest.mark.parametrize(
    ("name", "case_folding"),
    [
        ("plain", False),
        ("folding", True),
        ("folding", False),
        ("spacious", True),
        ("spacious", False),
        ("prefixed", True),
    ],
)


@combinations
@settings(max_examples=80, deadline=None)
@given(documents=st.lists(texts, max_size=4))
def test_decoding_gives_back_the_normalised_text_and_its_bytes_are_counted(
    folder: Path, name: str, case_folding: bool, documents: list[str]
) -> None:
    model = SentencePieceProcessor(model_proto=(folder / name).read_bytes())
    encoded = Encoder(EncoderSettings(tokenizer=folder / name, case_folding=case_folding)).encode(documents)
    decoder = Decoder(folder / name, case_folding=case_folding)
    expected = [text.encode("utf-8") for text in normalized(model, documents)]
    assert encoded.tokens.dtype == np.uint16
    assert [decoder.decode(tokens) for tokens in documents_in([encoded.tokens])] == expected
    assert encoded.documents == len(documents)
    assert encoded.text_bytes == sum(len(text.encode("utf-8")) for text in documents)
    if not case_folding:
        assert encoded.original_bytes is None
        each = [[BOS, *model.encode(text, out_type=int)] for text in documents]
        assert encoded.tokens.tolist() == [token for tokens in each for token in tokens]
    else:
        assert encoded.original_bytes is not None
        assert encoded.original_bytes.dtype == np.uint16
        by_document = np.split(encoded.original_bytes, np.flatnonzero(encoded.tokens == BOS)[1:])
        assert [int(b.sum()) for b in by_document if b.size] == [len(text) for text in expected]


@combinations
@settings(max_examples=80, deadline=None)
@given(text=texts)
@example(text="  two leading spaces")
@example(text=" The")
@example(text="a\0b ﬁ ")
def test_text_that_is_taken_to_the_letter_comes_back_to_the_letter(
    folder: Path, name: str, case_folding: bool, text: str
) -> None:
    encoder = Encoder(EncoderSettings(tokenizer=folder / name, case_folding=case_folding, normalized=True))
    encoded = encoder.encode([text])
    assert Decoder(folder / name, case_folding=case_folding).decode(encoded.tokens[1:]) == text.encode("utf-8")
    assert encoder.bytes_of(encoded) == len(text.encode("utf-8"))


@settings(max_examples=80, deadline=None)
@given(text=any_text)
@example(text=" ")
@example(text=" a")
@pytest.mark.parametrize("case_folding", [False, True])
def test_normalised_text_taken_to_the_letter_gives_the_tokens_of_the_text(
    folder: Path, case_folding: bool, text: str
) -> None:
    for name in ("plain", "folding", "spacious", "prefixed"):
        if case_folding and name == "plain":
            continue
        model = SentencePieceProcessor(model_proto=(folder / name).read_bytes())
        encoder = Encoder(EncoderSettings(tokenizer=folder / name, case_folding=case_folding))
        literal = Encoder(EncoderSettings(tokenizer=folder / name, case_folding=case_folding, normalized=True))
        encoded, again = encoder.encode([text]), literal.encode(normalized(model, [text]))
        if name != "spacious" or not text.startswith((" ", SPACE)):
            assert again.tokens.tolist() == encoded.tokens.tolist()
        # A model that keeps a leading space gives it a token without bytes; decoded text does not have it any more.
        assert literal.bytes_of(again) == encoder.bytes_of(encoded)


def test_real_prose_normalised_first_gives_the_same_tokens(folder: Path) -> None:
    prose = [document.text for document in gather([Path(logging.__file__).parent], processes=1)]
    model = SentencePieceProcessor(model_proto=(folder / "plain").read_bytes())
    encoded = Encoder(EncoderSettings(tokenizer=folder / "plain")).encode(prose)
    literal = Encoder(EncoderSettings(tokenizer=folder / "plain", normalized=True)).encode(normalized(model, prose))
    assert encoded.text_bytes > 20_000
    assert encoded.tokens.tolist() == literal.tokens.tolist()


@settings(max_examples=60, deadline=None)
@given(text=any_text)
def test_marks_pass_through_normalising_whether_or_not_a_tokenizer_knows_them(folder: Path, text: str) -> None:
    plain, folding = (SentencePieceProcessor(model_proto=(folder / name).read_bytes()) for name in ("plain", "folding"))
    assert plain.normalize(f"a{MARKS}b") == f"a{MARKS}b"
    marked = f"{text}{MARKS} {text}"
    assert normalized(plain, [marked]) == normalized(folding, [marked])
    assert list(normalized_for_training(iter([text]))) == normalized(plain, [text])


def test_both_cases_of_a_word_are_one_token_after_a_mark(folder: Path) -> None:
    model = SentencePieceProcessor(model_proto=(folder / "folding").read_bytes())
    encoded = Encoder(EncoderSettings(tokenizer=folder / "folding", case_folding=True)).encode(["The the The THE"])
    assert [model.id_to_piece(int(token)) for token in encoded.tokens[1:]] == [
        TITLE, "the", "▁the", TITLE, "▁the", CAPS, "▁the",
    ]  # fmt: skip
    assert encoded.original_bytes is not None
    assert encoded.original_bytes.tolist() == [0, 0, 3, 4, 0, 4, 0, 4]


def test_a_mark_of_the_text_is_counted_and_its_escape_is_not(folder: Path) -> None:
    encoded = Encoder(EncoderSettings(tokenizer=folder / "folding", case_folding=True)).encode([f"{ESC}{TITLE}A"])
    assert encoded.original_bytes is not None
    assert encoded.original_bytes.tolist() == [0, 0, 3, 0, 3, 0, 1]


def test_folding_needs_a_tokenizer_with_marks(folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"plain does not have the case mark U\+ECF0"):
        Encoder(EncoderSettings(tokenizer=folder / "plain", case_folding=True))
    with pytest.raises(TokenizerError, match="case mark"):
        Decoder(folder / "plain", case_folding=True)


def test_marks_that_folding_never_writes_do_not_decode(folder: Path) -> None:
    model = SentencePieceProcessor(model_proto=(folder / "folding").read_bytes())
    tokens = np.array([model.piece_to_id(TITLE), model.piece_to_id("▁")], dtype=np.uint16)
    with pytest.raises(CasingError, match="offset 0"):
        Decoder(folder / "folding", case_folding=True).decode(tokens)
    assert Decoder(folder / "folding", case_folding=False).decode(tokens) == f"{TITLE} ".encode()


def test_bytes_that_are_no_utf8_decode_as_they_are(folder: Path) -> None:
    model = SentencePieceProcessor(model_proto=(folder / "folding").read_bytes())
    pieces = ["<0xE6>", "<0xBC>", TITLE, "t", "<0xFF>"]
    tokens = np.array([model.piece_to_id(piece) for piece in pieces], dtype=np.uint16)
    assert Decoder(folder / "folding", case_folding=True).decode(tokens) == b"\xe6\xbcT\xff"


streams = st.lists(st.sampled_from([BOS, 5, 6]), max_size=14)


@given(stream=streams, borders=st.lists(st.integers(0, 14), max_size=3))
def test_a_stream_in_any_pieces_has_the_same_documents(stream: list[int], borders: list[int]) -> None:
    whole = np.array(stream, dtype=np.uint16)
    edges = [0, *sorted(min(border, whole.size) for border in borders), whole.size]
    pieces: list[Tokens] = [whole[a:b] for a, b in itertools.pairwise(edges)]
    expected: list[list[int]] = []
    for token in stream:
        if token == BOS:
            expected.append([])
        elif expected:
            expected[-1].append(token)
        else:
            expected = [[token]]
    found = list(cut(pieces))
    assert [tokens.tolist() for _, _, tokens in found] == expected
    begins = [edges[piece] + at for piece, at, _ in found]
    unannounced = [0] if stream and stream[0] != BOS else []
    assert begins == unannounced + [at + 1 for at, token in enumerate(stream) if token == BOS]


def test_validation_documents_span_shards(tmp_path: Path, folder: Path) -> None:
    encoded = Encoder(EncoderSettings(tokenizer=folder / "plain")).encode(["the cat", "", "sat 漢"])
    shards = []
    for number, part in enumerate(np.array_split(encoded.tokens, 3)):
        shards.append(tmp_path / f"val_{number:06d}.bin")
        write_shard(shards[-1], part)
    decoder = Decoder(folder / "plain", case_folding=False)
    assert list(validation_documents(shards, decoder)) == [b"the cat", b"", "sat 漢".encode()]


def test_no_texts_and_texts_without_tokens(folder: Path) -> None:
    encoder = Encoder(EncoderSettings(tokenizer=folder / "folding", case_folding=True))
    assert encoder.encode([]).tokens.tolist() == []
    nothing = encoder.encode(["", " \n"])
    assert nothing.tokens.tolist() == [BOS, BOS]
    assert nothing.original_bytes is not None
    assert nothing.original_bytes.tolist() == [0, 0]


def test_the_literal_model_keeps_all_but_the_normaliser(folder: Path) -> None:
    model = (folder / "plain").read_bytes()
    before, after = (SentencePieceProcessor(model_proto=m) for m in (model, literal_model(model)))
    assert before.id_to_piece(list(range(340))) == after.id_to_piece(list(range(340)))
    assert after.normalize(" ﬁ\t a ") == "▁ﬁ\t▁a▁"
    assert literal_model(literal_model(model)) == literal_model(model)
    assert ByteTable.of(before).base_bytes.tolist() == ByteTable.of(after).base_bytes.tolist()
    assert adds_dummy_prefix(SentencePieceProcessor(model_proto=literal_model((folder / "prefixed").read_bytes())))
    assert RULE.encode() in model


def test_fields_of_every_wire_type_are_kept_and_repeated_normalisers_are_one() -> None:
    others = bytes([9 << 3]) + b"\x96\x01" + bytes([10 << 3 | 1]) + b"eight_by" + bytes([11 << 3 | 5]) + b"four"
    unknown_subfield = bytes([7 << 3 | 2, 3]) + b"abc"
    first = bytes([3 << 3 | 2, 4, 2 << 3 | 2, 2]) + b"xy"
    second = bytes([3 << 3 | 2, 5]) + unknown_subfield
    spec = unknown_subfield + bytes([4 << 3, 0])
    assert literal_model(first + others + second) == others + bytes([3 << 3 | 2, len(spec)]) + spec
    long_name = bytes([1 << 3 | 2]) + b"\xc8\x01" + b"n" * 200
    long_spec = bytes([3 << 3 | 2]) + b"\xcb\x01" + long_name
    assert literal_model(long_spec) == bytes([3 << 3 | 2]) + b"\xcd\x01" + long_name + bytes([4 << 3, 0])


@pytest.mark.parametrize("broken", [b"\x0a\x05abc", b"\x0b", b"\x0a", b"\x08\x80", b"\x0d\x01"])
def test_what_is_no_serialised_model_is_an_error(broken: bytes) -> None:
    with pytest.raises(InputError, match="no SentencePiece model"):
        literal_model(broken)
