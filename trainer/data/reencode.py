"""Shards of one vocabulary to shards of another, without the text: it is decoded from the shards, exactly.

Every document is proved: its bytes must be UTF-8, and the new tokens must decode to the very same bytes. The hash of
the validation text must come out as the source has it, so scores of the two stay on one track.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.data.decoding import Decoder, cut, documents_in
from trainer.data.defaults import SEED, SHARD_TOKENS, TOKENIZER_NAME, TOKENIZER_SAMPLE_BYTES
from trainer.data.describing import Provenance, describe
from trainer.data.encoding import Encoded, Encoder, EncoderSettings
from trainer.data.manifest import MANIFEST_NAME, DataSet, DataSetError
from trainer.data.parallel import ordered_map
from trainer.data.progress import Progress, Silent
from trainer.data.shard_stream import FLUSH_BYTES, ShardStream, remove_unfinished
from trainer.data.shards import HEADER_BYTES, ShardError, Tokens, check_tokens, open_shard
from trainer.data.tokenizer import UNK, train_tokenizer
from trainer.data.unfinished import Unfinished, unfinished
from trainer.durable import sha256_of, write_whole

# About a megabyte of text: long beside the hand-over between processes, short beside a worker's memory.
_BATCH_TOKENS = 1 << 18
# Fewer tokens than this are done before worker processes have started.
_FEW_TOKENS = 1 << 20


class ReencodingError(ShardError):
    """A document that cannot be carried over as it is. Names the shard and the token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReencodeReport:
    """What came out. Each of the `documents` was proved to decode to the same bytes; `text_bytes` are those.

    Tokens are those of both splits. `resumed_documents` of the documents were done, and proved, by an earlier call.
    """

    dataset: DataSet
    documents: int
    resumed_documents: int
    text_bytes: int
    tokens_before: int
    tokens_after: int
    seconds: float

    @property
    def ratio(self) -> float:
        """New tokens for each old one."""
        return self.tokens_after / self.tokens_before


def reencode(
    source: DataSet,
    out: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    case_folding: bool | None = None,
    seed: int = SEED,
    sample_bytes: int = TOKENIZER_SAMPLE_BYTES,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    progress: Progress | None = None,
    flush_bytes: int = FLUSH_BYTES,
) -> ReencodeReport:
    """Make the data set `out` of the documents of `source`, in the same split and order, or go on with it.

    Either `tokenizer`, a model that is copied in, or `vocab_size`, for one that is trained on a seeded sample of the
    source's train documents. `case_folding` defaults to the source's. Tokens that stand for no text, such as EOS, are
    not carried over. Raises ReencodingError for a document with unknown tokens or bytes that are no UTF-8, ShardError,
    DataSetError, TokenizerError, WorkerLostError, OSError, or ValueError for arguments that exclude each other.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError("give exactly one of vocab_size and tokenizer")
    begun = time.monotonic()
    folding = source.manifest.case_folding if case_folding is None else case_folding
    if tokenizer is not None:
        Encoder(EncoderSettings(tokenizer=tokenizer, case_folding=folding))  # a wrong one is told before work begins
    arguments = {
        "re-encoding of validation text": source.manifest.val_sha256,
        "train shards": source.manifest.train_sha256,
        "tokenizer": None if tokenizer is None else sha256_of(tokenizer),
        "vocab_size": vocab_size,
        "case_folding": folding,
        "sample": None if vocab_size is None else [seed, sample_bytes],
        "shard_tokens": shard_tokens,
    }
    inputs = [source.path / MANIFEST_NAME, source.tokenizer_path, *source.train_shards, *source.val_shards]
    sources = source.manifest.val_sources
    made = [TOKENIZER_NAME, "train_000000.bin", "val_000000.bin", *([] if sources is None else [sources.file])]
    with unfinished(out, arguments=arguments, inputs=inputs, made=made) as work:
        model = out / TOKENIZER_NAME
        if not model.exists():
            if vocab_size is not None:
                sample = _sample(source, seed, sample_bytes)
                write_whole(model, train_tokenizer(sample, vocab_size=vocab_size, case_folding=folding))
            elif tokenizer is not None:
                write_whole(model, tokenizer.read_bytes())
        if sources is not None:
            write_whole(out / sources.file, (source.path / sources.file).read_bytes())
        conversion = _Conversion(
            source_tokenizer=source.tokenizer_path,
            source_folding=source.manifest.case_folding,
            target_tokenizer=model,
            target_folding=folding,
        )
        streaming = _Streaming(
            source=source,
            work=work,
            conversion=conversion,
            shard_tokens=shard_tokens,
            flush_bytes=flush_bytes,
            workers=workers,
            progress=progress or Silent(),
        )
        val = streaming.run("val")
        train = streaming.run("train")
        work.require_same_inputs()
        made_of = Provenance(
            split=source.manifest.split,
            inputs=source.manifest.inputs,
            duplicates=source.manifest.duplicates,
            case_folding=folding,
            val_sources=None if sources is None else sources.file,
        )
        dataset = describe(out, tokenizer=TOKENIZER_NAME, train=train.shards, val=val.shards, provenance=made_of)
        if dataset.manifest.val_sha256 != source.manifest.val_sha256:
            raise DataSetError(
                f"{source.path / MANIFEST_NAME} names a validation text that its shards do not hold (they decode to "
                f"{dataset.manifest.val_sha256}); look at it with `data verify`"
            )
        dataset.save()
        remove_unfinished(out)
    return ReencodeReport(
        dataset=dataset,
        documents=val.documents + train.documents,
        resumed_documents=val.resumed + train.resumed,
        text_bytes=dataset.manifest.train_bytes + dataset.manifest.val_bytes,
        tokens_before=source.manifest.train_tokens + source.manifest.val_tokens + 1,
        tokens_after=dataset.manifest.train_tokens + dataset.manifest.val_tokens + 1,
        seconds=time.monotonic() - begun,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Documents, and where each begins: its shard and the index of its first token after BOS."""

    documents: list[Tokens]
    places: list[tuple[Path, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Conversion:
    """The work of one process: decode, encode, and prove."""

    source_tokenizer: Path
    source_folding: bool
    target_tokenizer: Path
    target_folding: bool

    def __call__(self, batch: _Batch) -> Encoded:
        source, encoder, target = _tools(self)
        texts = [_text(source, tokens, place) for tokens, place in zip(batch.documents, batch.places, strict=True)]
        encoded = encoder.encode(texts)
        again = map(target.decode, documents_in([encoded.tokens]))
        for text, made, place in zip(texts, again, batch.places, strict=True):
            if made != text.encode("utf-8"):
                raise ReencodingError(
                    f"{_where(place)} does not survive the new tokenizer {self.target_tokenizer} (such as U+2581 "
                    "spelled in bytes, which an encoder takes for a space); prepare the data set from its text"
                )
        return encoded


@functools.lru_cache(maxsize=1)
def _tools(conversion: _Conversion) -> tuple[Decoder, Encoder, Decoder]:
    """Opened where a process first needs them; tokenizers do not travel between processes."""
    model, folding = conversion.target_tokenizer, conversion.target_folding
    return (
        Decoder(conversion.source_tokenizer, case_folding=conversion.source_folding),
        Encoder(EncoderSettings(tokenizer=model, case_folding=folding, normalized=True)),
        Decoder(model, case_folding=folding),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Split:
    shards: list[str]
    documents: int
    resumed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Streaming:
    """One split after the other, through worker processes, into resumable shards."""

    source: DataSet
    work: Unfinished
    conversion: _Conversion
    shard_tokens: int
    flush_bytes: int
    workers: int | None
    progress: Progress

    def run(self, name: Literal["train", "val"]) -> _Split:
        manifest = self.source.manifest
        shards, text_bytes = (
            (self.source.train_shards, manifest.train_bytes)
            if name == "train"
            else (self.source.val_shards, manifest.val_bytes)
        )
        stream = ShardStream(
            self.work.out,
            name,
            shard_tokens=self.shard_tokens,
            sidecar=self.conversion.target_folding,
            flush_bytes=self.flush_bytes,
        )
        done = stream.documents
        opened = [(path, open_shard(path)) for path in shards]
        few = self.workers is None and sum(tokens.size for _, tokens in opened) < _FEW_TOKENS
        batches = _batches(opened, manifest.vocab_size, skip=done)
        with self.progress.stage(name, total=text_bytes) as advance:
            for encoded in ordered_map(self.conversion, batches, workers=1 if few else self.workers):
                stream.append(encoded)
                advance(encoded.text_bytes)
        return _Split(shards=stream.close(), documents=stream.documents, resumed=done)


def _batches(shards: Sequence[tuple[Path, Tokens]], vocab_size: int, *, skip: int) -> Iterator[_Batch]:
    documents: list[Tokens] = []
    places: list[tuple[Path, int]] = []
    size = 0
    for shard, at, tokens in itertools.islice(cut(tokens for _, tokens in shards), skip, None):
        path = shards[shard][0]
        check_tokens(path, tokens, vocab_size, at)
        documents.append(np.asarray(tokens))
        places.append((path, at))
        size += tokens.size + 1
        if size >= _BATCH_TOKENS:
            yield _Batch(documents=documents, places=places)
            documents, places, size = [], [], 0
    if documents:
        yield _Batch(documents=documents, places=places)


def _text(decoder: Decoder, tokens: Tokens, place: tuple[Path, int]) -> str:
    unknown = np.flatnonzero(tokens == UNK)
    if unknown.size:
        raise ReencodingError(
            f"{_where(place)} holds an unknown token, its token {int(unknown[0])}, whose text is lost; "
            "prepare the data set from its text"
        )
    data = decoder.decode(tokens)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReencodingError(
            f"{_where(place)} is no UTF-8 at byte {error.start} of its text: cut within a character, or not text; "
            "prepare the data set from its text"
        ) from error


def _where(place: tuple[Path, int]) -> str:
    path, at = place
    return f"{path}: the document at token {at} (offset {HEADER_BYTES + 2 * at})"


def _sample(source: DataSet, seed: int, sample_bytes: int) -> Iterator[str]:
    """About so many bytes of train documents, each chosen by a hash of the seed and its number, and the first one."""
    share = sample_bytes / max(1, source.manifest.train_bytes)
    decoder = Decoder(source.tokenizer_path, case_folding=source.manifest.case_folding)
    key = seed.to_bytes(8, "little")
    for number, (shard, at, tokens) in enumerate(cut(map(open_shard, source.train_shards))):
        digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, key=key).digest()
        if number == 0 or int.from_bytes(digest, "little") < share * 2**64:
            yield _text(decoder, tokens, (source.train_shards[shard], at))
