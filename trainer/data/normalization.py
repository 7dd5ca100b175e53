"""The normalised text, which is what bits per byte counts, and how to encode it without normalising it again.

Normalising is not idempotent in general, so a text that was normalised once must not be again: case folding works on
the normalised text, and shards of another vocabulary are made of text that is normalised already. SentencePiece keeps
its normaliser inside the model file, with no switch to turn it off; `literal_model` edits that one field of the
serialised model. The file is a protocol buffer (sentencepiece_model.proto): `ModelProto.normalizer_spec` is field 3,
and within it `precompiled_charsmap` is field 2 and `remove_extra_whitespaces` field 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor

from trainer.data.byte_table import SPACE
from trainer.errors import InputError

RULE = "nmt_nfkc"

_NORMALIZER_SPEC, _SELF_TEST_DATA = 3, 4  # fields of ModelProto
_CHARSMAP, _REMOVE_EXTRA_WHITESPACES = 2, 4  # fields of NormalizerSpec
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # wire types


def normalized(tokenizer: SentencePieceProcessor, texts: Sequence[str]) -> list[str]:
    """The texts as decoding their tokens gives them back; a leading space is not part of them."""
    return [_decoded(text) for text in tokenizer.normalize(list(texts))]


def normalized_for_training(texts: Iterator[str]) -> Iterator[str]:
    """The texts as a tokenizer of this project's flags normalises them, before there is a tokenizer."""
    normalizer = SentencePieceNormalizer(
        rule_name=RULE, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=True
    )
    for text in texts:
        yield _decoded(normalizer.normalize(text))


def _decoded(text: str) -> str:
    """A U+2581 is a space after decoding, also where the text itself had it: texts may not differ in that alone."""
    return text.replace(SPACE, " ").removeprefix(" ")


def adds_dummy_prefix(tokenizer: SentencePieceProcessor) -> bool:
    """Whether the model puts a space before each text, which decoding takes away again."""
    return str(tokenizer.normalize("a")).startswith(SPACE)


def literal_model(model: bytes) -> bytes:
    """The same model with a normaliser that only writes U+2581 for a space (and its dummy prefix, if it had one).

    Raises InputError if `model` is no serialised model.
    """
    kept, spec = bytearray(), bytearray()
    for field, start, value, end in _fields(model):
        if field == _NORMALIZER_SPEC:
            spec += model[value:end]  # by the rules of protocol buffers, a repeated message is one, concatenated
        elif field != _SELF_TEST_DATA:  # whose expectations are those of the old normaliser
            kept += model[start:end]
    literal = bytearray()
    for field, start, _, end in _fields(bytes(spec)):
        if field not in {_CHARSMAP, _REMOVE_EXTRA_WHITESPACES}:
            literal += spec[start:end]
    literal += bytes([_REMOVE_EXTRA_WHITESPACES << 3 | _VARINT, 0])
    return bytes(kept) + bytes([_NORMALIZER_SPEC << 3 | _LENGTH]) + _varint_of(len(literal)) + bytes(literal)


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """For each field of a message: its number, where it starts, where its value starts, and where it ends."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        value = at
        if wire == _VARINT:
            _, at = _varint(message, at)
        elif wire == _LENGTH:
            length, value = _varint(message, at)
            at = value + length
        elif wire in {_EIGHT_BYTES, _FOUR_BYTES}:
            at += 8 if wire == _EIGHT_BYTES else 4
        else:
            raise InputError(f"no SentencePiece model: wire type {wire} at offset {start}; train the tokenizer again")
        if at > len(message):
            raise InputError(f"no SentencePiece model: cut at offset {len(message)}; train the tokenizer again")
        yield field, start, value, at


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise InputError(f"no SentencePiece model: cut at offset {len(message)}; train the tokenizer again")


def _varint_of(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
