"""Case folding: lossless for every str, the same on every Python, and counted as the text before it."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.casing import (
    CAP,
    CAPS,
    ESC,
    MARKS,
    TITLE,
    CasingError,
    escaped,
    fold,
    fold_all,
    folding_pairs,
    unfold,
)

PAIRS = folding_pairs()
READABLE = str.maketrans(dict(zip(MARKS, "⟨⟪‹\\", strict=True)))

every_str = st.text(max_size=40) | st.text(
    alphabet=st.characters(categories=["Cs", "Lu", "Ll", "Lt"]) | st.sampled_from(MARKS + " aB\n"), max_size=40
)
tangled = st.text(alphabet="aBÉé ßİſΣσςǄǅǆЖ𐐀𐐨ᎠꭰⅣ\n" + MARKS, max_size=30)


@settings(max_examples=500, deadline=None)
@given(every_str | tangled)
@example("\ud83d\ude00 A")
@example("")
def test_unfolding_gives_back_every_text(text: str) -> None:
    folded = fold(text)
    assert unfold(folded) == text
    assert not any(letter in PAIRS for letter in folded)


@settings(max_examples=200, deadline=None)
@given(st.lists(every_str | tangled, max_size=5))
def test_texts_folded_together_are_as_folded_alone(texts: list[str]) -> None:
    assert fold_all(texts) == [slowly_folded(text) for text in texts]


def slowly_folded(text: str) -> str:
    """The grammar of the docstring, one character after the other."""
    small = set(PAIRS.values())
    out: list[str] = []
    at = 0
    while at < len(text):
        if text[at] in MARKS:
            out += [ESC, text[at]]
            at += 1
            continue
        if text[at] not in PAIRS:
            out.append(text[at])
            at += 1
            continue
        end = at
        while end < len(text) and text[end] in PAIRS:
            end += 1
        before = text[at - 1] if at else "\n"
        run = [PAIRS[letter] for letter in text[at:end]]
        alone = len(run) == 1
        if len(run) > 1 and end < len(text) and text[end] in small:
            alone = len(run) == 2
            run.insert(-1, CAP)
        mark = (CAP if before in small else TITLE) if alone else CAPS
        out.insert(len(out) - (before == " "), mark)
        out += run
        at = end
    return "".join(out)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("The cat", "⟨the cat"),
        ("on The mat", "on⟨ the mat"),
        ("of NASA, I", "of⟪ nasa,⟨ i"),
        ("iPhone McDonald", "i‹phone⟨ mc‹donald"),
        ("HTMLParser IDs USAs", "⟪html‹parser⟨ i‹ds⟪ us‹as"),
        ("McDONALD", "⟨mc⟪donald"),
        ('"Hi"\nYou  Two', '"⟨hi"\n⟨you ⟨ two'),
        ("X-Ray A1B", "⟨x-⟨ray⟨ a1⟨b"),
        ("Straße ÉTÉ ßA ǅA", "⟨straße⟪ été ß⟨a ǅ⟨a"),
        ("ΣΑΣ Σας", "⟪σασ⟨ σας"),
        (f"a{TITLE}{ESC} B", "a\\⟨\\\\⟨ b"),
    ],
)
def test_where_the_marks_stand(text: str, folded: str) -> None:
    assert fold(text).translate(READABLE) == folded


@pytest.mark.parametrize(
    ("folded", "offset"),
    [
        (f"ab{TITLE}", 2),
        (f"ab{CAP} c", 2),
        (f"ab{CAPS}1", 2),
        (f"a{TITLE}  c", 1),
        (f"a{TITLE}A", 1),
        (f"{TITLE}{CAP}a", 0),
        (f"abc{ESC}", 4),
        (f"ab{ESC}c", 3),
    ],
)
def test_marks_that_folding_never_writes_are_refused(folded: str, offset: int) -> None:
    with pytest.raises(CasingError, match=f"offset {offset} "):
        unfold(folded)


def test_the_pairs_are_the_same_on_every_python() -> None:
    pairs = PAIRS
    listed = "".join(big + small for big, small in sorted(pairs.items()))
    digest = hashlib.sha256(listed.encode("utf-8")).hexdigest()
    assert (len(pairs), digest[:16]) == (671, "2bf0afae0f6a54d7")
    assert "ABCÀÉΣЖԱ𐐀".translate(str.maketrans(pairs)) == "abcàéσжա𐐨"
    kept = "ßẞİıſςǅᎠꭰ\u212a\u2126"
    assert not set(kept) & (pairs.keys() | set(pairs.values()))
    assert all(len(big.encode("utf-8")) == len(small.encode("utf-8")) for big, small in pairs.items())


def test_no_letter_beyond_those_looked_at_has_a_pair() -> None:
    import unicodedata

    category = unicodedata.ucd_3_2_0.category
    late = [c for c in map(chr, range(0x10450, sys.maxunicode + 1)) if category(c) == "Lu" and c.lower() != c]
    assert late == []


@given(st.lists(st.sampled_from([7, 8, 9]), max_size=12))
def test_which_symbols_an_escape_makes_literal(symbols: list[int]) -> None:
    expected, literal = [], False
    for symbol in symbols:
        expected.append(literal)
        literal = symbol == 9 and not literal
    assert escaped(np.array(symbols, dtype=np.uint16), 9).tolist() == expected
