"""Word by word, from the cache or not: always the tokens that SentencePiece gives for the whole text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from odd_tokenizers import bpe_model
from trainer.data.byte_table import SPACE
from trainer.data.normalization import literal_model
from trainer.data.tokenizer import train_tokenizer
from trainer.data.word_cache import WordCache, encodes_by_words

WORDS = ["the", "then", "There", "naïve", "漢字", "1234", "a", "...", "x" * 60, "under_score", "it's", "\u2028", "😀"]


@pytest.fixture(scope="module")
def model() -> bytes:
    rng = np.random.default_rng(0)
    return train_tokenizer((" ".join(rng.choice(WORDS, 40)) for _ in range(200)), vocab_size=350)


def _whole(literal: SentencePieceProcessor, texts: Sequence[str]) -> list[int]:
    return [token for text in texts for token in literal.encode(text, add_bos=True)]


pieces = st.one_of(
    st.sampled_from(WORDS), st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE), max_size=9)
)
documents = st.lists(st.lists(pieces, max_size=12).map(SPACE.join), max_size=5)


@settings(max_examples=150, deadline=None)
@given(calls=st.lists(documents, min_size=1, max_size=4), most_words=st.sampled_from([0, 4, 30, 400]))
def test_equals_the_whole_text(model: bytes, calls: list[list[str]], most_words: int) -> None:
    literal = SentencePieceProcessor(model_proto=literal_model(model))
    cache = WordCache(literal, most_words=most_words)
    for call in [*calls, *calls]:  # the second time from the cache, as far as it reaches
        texts = [text.replace(" ", SPACE) for text in call]
        assert cache.encode(texts).tolist() == _whole(literal, texts)


def test_a_full_cache_forgets_and_a_long_word_is_never_kept(model: bytes) -> None:
    literal = SentencePieceProcessor(model_proto=literal_model(model))
    cache = WordCache(literal, most_words=10)
    texts = [SPACE.join(f"word{number}" for number in range(start, start + 7)) for start in range(0, 70, 7)]
    for text in [*texts, "the" + SPACE + "x" * 60, *texts]:
        assert cache.encode([text]).tolist() == _whole(literal, [text])
        assert len(cache._places) == cache._lengths.size == cache._starts.size <= 10 + 2
        assert cache._tokens.size == int(cache._lengths.sum())
    assert not any("x" * 60 in word for word in cache._places)


def test_a_model_with_spaces_inside_its_pieces_is_not_cut(model: bytes) -> None:
    assert encodes_by_words(SentencePieceProcessor(model_proto=model))
    texts = ["of the people by the people for the people"] * 50
    for flags in ({"split_by_whitespace": False}, {"add_dummy_prefix": True}):
        other = SentencePieceProcessor(model_proto=bpe_model(texts, 300, hard_vocab_limit=False, **flags))
        assert not encodes_by_words(other)
