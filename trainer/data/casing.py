"""Lossless case folding: upper case becomes lower case after a mark, so that "The" and "the" share their tokens.

Folded text is lower-case text with four marks, private-use characters that stand for nothing else:

    TITLE [space] letter     the letter is upper case               " The"  -> TITLE " the"
    CAPS  [space] letters    so is the whole run of letters         " NASA" -> CAPS " nasa"
    CAP   letter             the letter, inside a word              "iPod"  -> "i" CAP "pod"
    ESC   mark               that very mark, as the text has it

A *letter* here is one of a folding pair: an upper-case letter and a lower-case one that are each other's only case
mapping, one character each, of the same UTF-8 length. Everything else (ß, ſ, İ, ǅ, final sigma, letters without
case) stays as it is and ends a run. The rules of writing, which make the folding a function:

- A run of upper-case letters has one mark before it: CAPS if it is two letters or more, else TITLE, or CAP where the
  character before is a lower-case letter. Only single spaces are jumped: where a space stands before the run, the
  mark stands before that space (so that the token "▁the" serves both cases), otherwise right before the letter (at
  the start, after a newline, a quote, a hyphen).
- Where a lower-case letter follows the run, its last letter takes a CAP of its own and CAPS covers the rest, ending at
  that mark ("HTMLParser" -> CAPS "html" CAP "parser"); with two letters the first counts as a run of one.
- A mark of the text takes an ESC before it.

The pairs are those of Unicode 3.2, which Python keeps (`unicodedata.ucd_3_2_0`), and pairs never change once they
are there (the stability policy of Unicode), so every Python folds and unfolds alike. Letters that got their case
later, such as those of Cherokee, stay as they are.
"""

from __future__ import annotations

import functools
import itertools
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import InputError

TITLE, CAPS, CAP, ESC = MARKS = "\uecf0\uecf1\uecf2\uecf3"

_Codes = npt.NDArray[np.uint32]
_Positions = npt.NDArray[np.intp]
_UTF32 = "utf-32-le"
_OTHER, _UPPER, _LOWER, _SPACE, _MARK = range(5)
# Deseret, the last script of Unicode 3.2 that has case, ends at U+1044F.
_LAST_CASED = 0x1044F


class CasingError(InputError):
    """Text with marks that folding never writes. Names the character's offset."""


def fold(text: str) -> str:
    """The folded text; `unfold` gives back exactly `text`, whatever it is."""
    return fold_all([text])[0]


def fold_all(texts: Sequence[str]) -> list[str]:
    """Each text folded. Much faster than one by one where they are short: they are folded as one array."""
    # Newlines around each text keep the runs apart, and give every letter a neighbour.
    codes = _codes("\n" + "\n".join(texts) + "\n")
    kind = _alphabet().kind[codes]
    at, marks = _insertions(kind)
    if at.size == 0:
        return list(texts)
    inserted_at = at + np.arange(at.size)
    out = np.empty(codes.size + at.size, dtype=np.uint32)
    kept = np.ones(out.size, dtype=np.bool_)
    kept[inserted_at] = False
    out[inserted_at] = marks
    out[kept] = _alphabet().lower[codes]
    folded = _text(out)
    starts = np.cumsum([1, *(len(text) + 1 for text in texts)])
    moved = (starts + np.searchsorted(at, starts, side="left")).tolist()
    return [folded[start : after - 1] for start, after in itertools.pairwise(moved)]


def unfold(folded: str) -> str:
    """The text that was folded. Raises CasingError for marks that folding never writes."""
    codes = _codes(folded + "\n")
    kind = _alphabet().kind[codes]
    marks = np.flatnonzero(kind == _MARK)
    if marks.size == 0:
        return folded
    literal = escaped(codes, ord(ESC))
    _require(kind[literal] == _MARK, np.flatnonzero(literal), folded, "ESC before a character that is no mark")
    active = marks[~literal[marks]]
    raising = active[codes[active] != ord(ESC)]
    jumps = (codes[raising] != ord(CAP)) & (kind[raising + 1] == _SPACE)
    first = raising + 1 + jumps
    _require(kind[first] == _LOWER, raising, folded, "a mark of case without a lower-case letter to raise")
    runs = codes[raising] == ord(CAPS)
    upper = np.concatenate([first[~runs], _inside_runs(first[runs], kind != _LOWER)])
    codes[upper] = _alphabet().upper[codes[upper]]
    kept = np.ones(codes.size, dtype=np.bool_)
    kept[active] = False
    return _text(codes[kept])[:-1]


def escaped(symbols: npt.NDArray[Any], escape: int) -> npt.NDArray[np.bool_]:
    """Which of the symbols `(n,)`, code points or tokens, an escape before them makes literal; escapes too."""
    literal = np.zeros(symbols.size, dtype=np.bool_)
    at = np.flatnonzero(symbols == escape)
    if at.size:
        new_run = np.diff(at, prepend=-2) != 1
        run_start = np.maximum.accumulate(np.where(new_run, at, 0))
        escaping = at[(at - run_start) % 2 == 0]  # in a row of them every second is itself escaped
        literal[escaping[escaping + 1 < symbols.size] + 1] = True
    return literal


@dataclass(frozen=True, kw_only=True, slots=True)
class _Alphabet:
    """By code point: kind, and the other case where it has one, `(0x110000,)` each."""

    kind: npt.NDArray[np.uint8]
    lower: _Codes
    upper: _Codes


@functools.cache
def _alphabet() -> _Alphabet:
    kind = np.full(sys.maxunicode + 1, _OTHER, dtype=np.uint8)
    lower = np.arange(kind.size, dtype=np.uint32)
    upper = lower.copy()
    for big, small in folding_pairs().items():
        kind[ord(big)], kind[ord(small)] = _UPPER, _LOWER
        lower[ord(big)], upper[ord(small)] = ord(small), ord(big)
    kind[ord(" ")] = _SPACE
    kind[[ord(mark) for mark in MARKS]] = _MARK
    return _Alphabet(kind=kind, lower=lower, upper=upper)


def folding_pairs() -> dict[str, str]:
    """Upper-case letters and the lower-case ones that they fold to."""
    pairs = {}
    category = unicodedata.ucd_3_2_0.category
    for big in map(chr, range(_LAST_CASED + 1)):
        if category(big) == "Lu":
            small = big.lower()
            paired = len(small) == 1 and small.upper() == big and category(small) == "Ll"
            if paired and len(big.encode("utf-8")) == len(small.encode("utf-8")):
                pairs[big] = small
    return pairs


def _insertions(kind: npt.NDArray[np.uint8]) -> tuple[_Positions, _Codes]:
    """Before which characters `(n,)`, rising, which marks `(n,)` go."""
    upper = np.flatnonzero(kind == _UPPER)
    begins = np.diff(upper, prepend=-2) != 1
    starts = upper[begins]
    ends = upper[np.roll(begins, -1)] + 1 if upper.size else upper
    size = ends - starts
    before = kind[starts - 1]
    lower_follows = kind[ends] == _LOWER
    single = size - lower_follows < 2
    marks = np.where(single, np.where(before == _LOWER, ord(CAP), ord(TITLE)), ord(CAPS))
    last = ends[(size > 1) & lower_follows] - 1
    literal = np.flatnonzero(kind == _MARK)
    at = np.concatenate([starts - (before == _SPACE), last, literal])
    marks = np.concatenate([marks, np.full(last.size, ord(CAP)), np.full(literal.size, ord(ESC))])
    order = np.argsort(at)
    return at[order], marks[order].astype(np.uint32)


def _inside_runs(starts: _Positions, outside: npt.NDArray[np.bool_]) -> _Positions:
    """All positions from each start to the next that is outside."""
    if starts.size == 0:
        return starts
    borders = np.flatnonzero(outside)
    sizes = borders[np.searchsorted(borders, starts)] - starts
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))


def _require(good: npt.NDArray[np.bool_], at: _Positions, folded: str, wrong: str) -> None:
    if not good.all():
        offset = int(at[np.argmin(good)])
        raise CasingError(
            f"offset {offset} of the folded text has {wrong} ({folded[max(0, offset - 10) : offset + 10]!r}); "
            "this text was not made by case folding"
        )


def _codes(text: str) -> _Codes:
    # Lone surrogates pass: folding is lossless for every str, and who encodes to UTF-8 hears of them there.
    return np.frombuffer(bytearray(text.encode(_UTF32, "surrogatepass")), dtype="<u4")


def _text(codes: _Codes) -> str:
    return codes.astype("<u4", copy=False).tobytes().decode(_UTF32, "surrogatepass")
