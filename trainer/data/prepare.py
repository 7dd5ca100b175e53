"""Documents to a data set: index, split, draw, tokenizer, shards, manifest. A killed run goes on where it was.

Every stage leaves what it made on the disk before the next begins. The bytes of the result depend on the documents
and the arguments only, never on the number of workers or on where a run was killed. The input is read three times:
for the index, for the texts that are needed apart (validation, and the tokenizer's sample), and for encoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.data.corpus import VAL_SOURCES_NAME, Corpus, draw, open_corpus
from trainer.data.defaults import MAX_DOCUMENT_BYTES, SHARD_TOKENS, TOKENIZER_NAME, TOKENIZER_SAMPLE_BYTES
from trainer.data.describing import Provenance, describe
from trainer.data.documents import DocumentError, RawDocuments, TextRule
from trainer.data.encoding import Encoded, Encoder, EncoderSettings
from trainer.data.encoding_rate import BareRate, Spread, bare_rate
from trainer.data.indexing import FEW_TO_ENCODE, Reading, grouped, workers_for
from trainer.data.manifest import DataSet
from trainer.data.parallel import ordered_map
from trainer.data.progress import Progress, Silent, Timed
from trainer.data.shard_stream import FLUSH_BYTES, ShardStream, remove_unfinished
from trainer.data.splitting import OwnFile, SplitRule
from trainer.data.tokenizer import train_tokenizer
from trainer.data.unfinished import unfinished
from trainer.durable import sha256_of, write_whole
from trainer.errors import InputError

# Records count the bytes of a document in 32 bits.
_MOST_DOCUMENT_BYTES = (1 << 32) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareReport:
    """What this call did: one that goes on with another counts only what was left to do.

    `stage_seconds` are wall seconds, in the order of the stages that ran. `bare` is SentencePiece alone, right after
    encoding and on text from all over the train documents of this call, if that was asked for.
    """

    dataset: DataSet
    stage_seconds: dict[str, float]
    documents: int
    tokens: int
    text_bytes: int
    encode_seconds: float
    bare: BareRate | None = None

    @property
    def encode_bytes_per_second(self) -> float:
        """UTF-8 bytes of text per second of wall time, with reading and writing; 0 if nothing was left to encode."""
        return self.text_bytes / max(self.encode_seconds, 1e-9)


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    rule: SplitRule,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    dedup: bool = True,
    case_folding: bool = False,
    text_rule: TextRule | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    sample_bytes: int = TOKENIZER_SAMPLE_BYTES,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    progress: Progress | None = None,
    flush_bytes: int = FLUSH_BYTES,
    measure_bare_rate: bool = False,
) -> PrepareReport:
    """Make the data set `out` of the documents of `inputs`, or go on with the same call that was killed.

    Either `vocab_size`, for a tokenizer that is trained on a seeded sample of the train documents, or `tokenizer`, a
    model that is copied in. `workers` defaults to all usable cores; tokens are flushed to the disk each
    `flush_bytes`. An `out` that already holds a data set is refused, so that nobody's validation set changes under a
    run. Raises DataSetError, DocumentError, TokenizerError, ShardError, WorkerLostError, OSError, or ValueError for
    arguments that exclude each other.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError("give exactly one of vocab_size and tokenizer")
    own = rule.paths if isinstance(rule, OwnFile) else ()
    reading = Reading(
        paths=(*own, *inputs),
        text_rule=text_rule or TextRule(),
        max_document_bytes=max_document_bytes,
        tokenizer=tokenizer,
    )
    _require_usable(reading, tokenizer, case_folding=case_folding)
    arguments = {
        "rule": rule.words,
        "seed": rule.seed,
        "vocab_size": vocab_size,
        "tokenizer": None if tokenizer is None else sha256_of(tokenizer),
        "dedup": dedup,
        "case_folding": case_folding,
        "text_rule": asdict(reading.text_rule),
        "max_document_bytes": max_document_bytes,
        "sample_bytes": sample_bytes,
        "shard_tokens": shard_tokens,
    }
    made = [VAL_SOURCES_NAME, "train_000000.bin", "val_000000.bin"]
    if tokenizer is None or tokenizer.resolve() != (out / TOKENIZER_NAME).resolve():
        made.append(TOKENIZER_NAME)
    timed = Timed(progress or Silent())
    with unfinished(out, arguments=arguments, inputs=reading.paths, made=made) as work:
        corpus = open_corpus(work, reading, rule, dedup=dedup, workers=workers, progress=timed)
        sources = draw(corpus, sample_bytes=0 if vocab_size is None else sample_bytes, progress=timed)
        if not (out / TOKENIZER_NAME).exists():
            with timed.stage("tokenizer"):
                model = _model(corpus, vocab_size, tokenizer, case_folding=case_folding)
                write_whole(out / TOKENIZER_NAME, model)
        encoding = _Encoding(
            corpus=corpus,
            settings=EncoderSettings(tokenizer=out / TOKENIZER_NAME, case_folding=case_folding),
            shard_tokens=shard_tokens,
            flush_bytes=flush_bytes,
            workers=workers,
            progress=timed,
        )
        spread = Spread(corpus.split.train_bytes) if measure_bare_rate else None
        encoded = encoding.run(spread)
        texts = [] if spread is None else spread.texts()
        bare = bare_rate(out / TOKENIZER_NAME, texts) if texts else None
        work.require_same_inputs()
        with timed.stage("describe"):
            dataset = describe(
                out,
                tokenizer=TOKENIZER_NAME,
                train=encoded.train,
                val=encoded.val,
                provenance=Provenance(
                    split=rule.words,
                    inputs=corpus.entries,
                    duplicates=corpus.split.duplicates,
                    case_folding=case_folding,
                    val_sources=VAL_SOURCES_NAME if sources else None,
                ),
            )
        dataset.save()
        remove_unfinished(out)
    return PrepareReport(
        dataset=dataset,
        stage_seconds=timed.seconds,
        documents=encoded.documents,
        tokens=encoded.tokens,
        text_bytes=encoded.text_bytes,
        encode_seconds=encoded.seconds,
        bare=bare,
    )


def _require_usable(reading: Reading, tokenizer: Path | None, *, case_folding: bool) -> None:
    """What is wrong with the arguments is told before anything is read or written."""
    if not 0 < reading.max_document_bytes <= _MOST_DOCUMENT_BYTES:
        raise InputError(
            f"--max-document-bytes {reading.max_document_bytes} is not between 1 and {_MOST_DOCUMENT_BYTES}"
        )
    for path in reading.paths:
        reading.open(path)
    if tokenizer is not None:
        Encoder(EncoderSettings(tokenizer=tokenizer, case_folding=case_folding))


def _model(corpus: Corpus, vocab_size: int | None, tokenizer: Path | None, *, case_folding: bool) -> bytes:
    if tokenizer is not None:
        return tokenizer.read_bytes()
    if vocab_size is None:
        raise ValueError("give exactly one of vocab_size and tokenizer")
    return train_tokenizer(corpus.sample(), vocab_size=vocab_size, case_folding=case_folding)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    """Both splits as this call encoded them, and the names of all of their shards."""

    val: list[str]
    train: list[str]
    documents: int
    tokens: int
    text_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoding:
    corpus: Corpus
    settings: EncoderSettings
    shard_tokens: int
    flush_bytes: int
    workers: int | None
    progress: Timed

    def run(self, spread: Spread | None) -> _Encoded:
        """Validation, then training, by one set of workers: starting them takes as long as some 10 MB of text."""
        val, train, split = self._stream("val"), self._stream("train"), self.corpus.split
        streams = (val, train)
        documents, tokens = _sums(streams)
        left = 1 - documents / (split.val_documents + split.train_documents)
        size = split.val_bytes + split.train_bytes
        text_bytes = 0
        taking: deque[ShardStream] = deque()

        def tasks() -> Iterator[list[RawDocuments]]:
            source = self.corpus.train(train.documents)
            sources = (self.corpus.val(val.documents), source if spread is None else spread.through(source))
            for stream, batches in zip(streams, sources, strict=True):
                for task in grouped(batches):
                    taking.append(stream)
                    yield task

        with self.progress.stage("encode", total=int(size * left)) as advance:
            workers = workers_for(int(size * left), FEW_TO_ENCODE, self.workers)
            val_shards: list[str] | None = None
            for encoded in ordered_map(EncodeDocuments(self.settings), tasks(), workers=workers):
                stream = taking.popleft()
                if stream is train and val_shards is None:
                    val_shards = self._closed(val, split.val_documents)
                stream.append(encoded)
                text_bytes += encoded.text_bytes
                advance(encoded.text_bytes)
            val_shards = val_shards or self._closed(val, split.val_documents)
            train_shards = self._closed(train, split.train_documents)
        documents_now, tokens_now = _sums(streams)
        return _Encoded(
            val=val_shards,
            train=train_shards,
            documents=documents_now - documents,
            tokens=tokens_now - tokens,
            text_bytes=text_bytes,
            seconds=self.progress.seconds["encode"],
        )

    def _stream(self, name: str) -> ShardStream:
        return ShardStream(
            self.corpus.work.out,
            name,
            shard_tokens=self.shard_tokens,
            sidecar=self.settings.case_folding,
            flush_bytes=self.flush_bytes,
        )

    def _closed(self, stream: ShardStream, documents: int) -> list[str]:
        if stream.documents != documents:
            raise DocumentError(
                f"{stream.documents} documents were encoded instead of {documents}: an input changed while it was "
                f"read; remove {self.corpus.work.folder} and the files beside it to begin again"
            )
        return stream.close()


def _sums(streams: Iterable[ShardStream]) -> tuple[int, int]:
    """Documents and tokens of all."""
    counts = [(stream.documents, stream.tokens) for stream in streams]
    return sum(documents for documents, _ in counts), sum(tokens for _, tokens in counts)


class EncodeDocuments:
    """The work of a worker: parse documents and encode them, with an encoder that is opened once per process."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings
        self._encoder: Encoder | None = None

    def __call__(self, task: Sequence[RawDocuments]) -> Encoded:
        if self._encoder is None:
            self._encoder = Encoder(self._settings)
        return self._encoder.encode([document.text for batch in task for document in batch.documents()])
