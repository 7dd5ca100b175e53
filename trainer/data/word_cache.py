"""BPE word by word, each word once: the same tokens as SentencePiece on the whole text, in a fraction of the time.

SentencePiece trains with `split_by_whitespace`, so no piece reaches over a space: merges in one word never depend on
another, and the tokens of a text are those of its words, one after the other. Most words of a text have been there
before (of 220 MB of English, 95 in 100 within the first 24 MB), so their tokens are looked up. That the pieces allow
it is read off the model; a model with spaces inside its pieces is encoded whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby, repeat

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from trainer.data.byte_table import SPACE, ByteTable
from trainer.data.shards import Tokens

# Some 100 bytes each. Rarer words are encoded each time they come.
_MOST_WORDS = 400_000
_LONGEST_CHARACTERS = 48

Places = npt.NDArray[np.int64]


def encodes_by_words(tokenizer: SentencePieceProcessor) -> bool:
    """Whether no piece holds a space but as its first character, and normalising writes U+2581 for it and adds none."""
    pieces = (str(tokenizer.id_to_piece(token)) for token in range(tokenizer.vocab_size()))
    return not any(SPACE in piece[1:] for piece in pieces) and str(tokenizer.normalize("a b")) == f"a{SPACE}b"


class WordCache:
    """Tokens of words, for one process. `literal` is a tokenizer that takes its input as it is."""

    def __init__(self, literal: SentencePieceProcessor, *, most_words: int = _MOST_WORDS) -> None:
        self._literal, self._most_words = literal, most_words
        self._leading_space = ByteTable.of(literal).leading_space
        # A word is known by itself; the first of a text, which has no space before it, by a space and itself.
        self._places: dict[str, int] = {}
        self._lengths = self._starts = np.zeros(0, dtype=np.int64)
        self._tokens: Tokens = np.zeros(0, dtype=np.uint16)
        self._bos = "\n" + SPACE  # no word: the texts were cut at every U+2581
        self._append([self._bos, " "], np.array([literal.bos_id()], dtype=np.uint16), np.array([1, 0]))

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Normalised texts, each space written as U+2581, to their tokens `(n,)`, each text after a BOS."""
        words = list(chain.from_iterable(self._words(text) for text in texts))
        places = np.fromiter(map(self._places.get, words, repeat(-1)), dtype=np.int64, count=len(words))
        unknown = np.flatnonzero(places < 0)
        if not unknown.size:
            return self._gathered(places)
        known = len(self._places)
        # The long ones last, so that those that are forgotten again are the end; few runs of first words.
        new = sorted(dict.fromkeys([words[index] for index in unknown]), key=lambda w: (_is_long(w), _is_first(w)))
        self._append(new, *self._encoded(new))
        places[unknown] = [self._places[words[index]] for index in unknown]
        tokens = self._gathered(places)
        self._forget(known, new)
        return tokens

    def _words(self, text: str) -> Iterable[str]:
        first, *others = text.split(SPACE)
        return (self._bos, " " + first, *others)

    def _encoded(self, words: Sequence[str]) -> tuple[Tokens, Places]:
        """Their tokens, one word after the other, and how many each has."""
        tokens: list[Tokens] = []
        lengths: list[Places] = []
        for first, group in groupby(words, key=_is_first):
            alike = list(group)
            found = self._one_by_one(alike) if first else self._together(alike)
            tokens.append(found[0])
            lengths.append(found[1])
        return np.concatenate(tokens), np.concatenate(lengths)

    def _one_by_one(self, words: Sequence[str]) -> tuple[Tokens, Places]:
        each = self._literal.encode([word[1:] for word in words], return_type="numpy", num_threads=1)
        return np.concatenate(each).astype(np.uint16), np.array([tokens.size for tokens in each], dtype=np.int64)

    def _together(self, words: Sequence[str]) -> tuple[Tokens, Places]:
        """Words after a space, as one text: each begins with the one of its tokens that has the space."""
        text = SPACE + SPACE.join(words)
        tokens: Tokens = self._literal.encode(text, return_type="numpy", num_threads=1).astype(np.uint16)
        return tokens, np.diff(np.flatnonzero(self._leading_space[tokens]), append=tokens.size)

    def _append(self, words: Sequence[str], tokens: Tokens, lengths: Places) -> None:
        self._places.update(zip(words, range(len(self._places), len(self._places) + len(words)), strict=True))
        starts = self._tokens.size + np.cumsum(lengths) - lengths
        self._lengths, self._starts = np.append(self._lengths, lengths), np.append(self._starts, starts)
        self._tokens = np.append(self._tokens, tokens)

    def _forget(self, known: int, new: Sequence[str]) -> None:
        """Of the new words, those that are long, and those that came when the cache was full."""
        kept = min(len(new) - sum(map(_is_long, new)), max(0, self._most_words - known))
        for word in new[kept:]:
            del self._places[word]
        self._lengths, self._starts = self._lengths[: known + kept], self._starts[: known + kept]
        self._tokens = self._tokens[: int(self._starts[-1] + self._lengths[-1])]

    def _gathered(self, places: Places) -> Tokens:
        lengths = self._lengths[places]
        ends = np.cumsum(lengths)
        # Of each token: where its word's tokens lie, plus how many tokens of that word came before it.
        shift = np.repeat(self._starts[places] - (ends - lengths), lengths)
        gathered: Tokens = self._tokens[shift + np.arange(shift.size)]
        return gathered


def _is_first(word: str) -> bool:
    return word.startswith(" ")


def _is_long(word: str) -> bool:
    return len(word) > _LONGEST_CHARACTERS
