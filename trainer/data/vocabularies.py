"""Tokenizers of several vocabularies on the same train documents, each judged on the validation text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.data.corpus import VAL_SOURCES_NAME, draw, open_corpus
from trainer.data.defaults import MAX_DOCUMENT_BYTES, TOKENIZER_SAMPLE_BYTES
from trainer.data.documents import TextRule
from trainer.data.indexing import Reading
from trainer.data.manifest import DataSetError
from trainer.data.progress import Progress, Silent
from trainer.data.shard_stream import remove_unfinished
from trainer.data.splitting import OwnFile, SplitRule
from trainer.data.tokenizer import train_tokenizer
from trainer.data.tokenizer_report import TokenizerReport, tokenizer_report
from trainer.data.unfinished import unfinished
from trainer.durable import write_whole


def model_name(vocab_size: int, *, case_folding: bool) -> str:
    return f"sp{vocab_size}{'_folded' if case_folding else ''}.model"


def train_vocabularies(
    inputs: Sequence[Path],
    out: Path,
    *,
    vocab_sizes: Sequence[int],
    rule: SplitRule,
    dedup: bool = True,
    case_folding: bool = False,
    text_rule: TextRule | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    sample_bytes: int = TOKENIZER_SAMPLE_BYTES,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TokenizerReport]:
    """Train `out/spN.model` for each size on a seeded sample of the train documents that `prepare` would have.

    Returns each file's report over the validation documents. A model that is there already is refused; a killed call
    goes on. Raises DocumentError, DataSetError, TokenizerError, WorkerLostError or OSError.
    """
    shown = progress or Silent()
    names = {model_name(size, case_folding=case_folding): size for size in vocab_sizes}
    own = rule.paths if isinstance(rule, OwnFile) else ()
    reading = Reading(paths=(*own, *inputs), text_rule=text_rule or TextRule(), max_document_bytes=max_document_bytes)
    arguments = {
        "tokenizers": sorted(names.values()),
        "rule": rule.words,
        "seed": rule.seed,
        "dedup": dedup,
        "case_folding": case_folding,
        "text_rule": asdict(reading.text_rule),
        "max_document_bytes": max_document_bytes,
        "sample_bytes": sample_bytes,
    }
    if not names:
        raise DataSetError("no vocabulary is asked for; give at least one size")
    reports = {}
    with unfinished(out, arguments=arguments, inputs=reading.paths, made=[*names, VAL_SOURCES_NAME]) as work:
        corpus = open_corpus(work, reading, rule, dedup=dedup, workers=workers, progress=shown)
        draw(corpus, sample_bytes=sample_bytes, progress=shown)
        for name, size in names.items():
            with shown.stage(f"train {name}"):
                if not (out / name).exists():
                    write_whole(
                        out / name, train_tokenizer(corpus.sample(), vocab_size=size, case_folding=case_folding)
                    )
            texts = (document.text for batch in corpus.val(0) for document in batch.documents())
            with shown.stage(f"judge {name}"):
                reports[name] = tokenizer_report(out / name, texts, case_folding=case_folding)
        (out / VAL_SOURCES_NAME).unlink(missing_ok=True)  # drawn for data sets; a tokenizer has no use for it
        remove_unfinished(out)
    return reports
