"""`python -m trainer data VERB`: text in, vocabularies, shards, and their proof. Never imports torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from trainer.bad_input import bad_input_is_one_line
from trainer.data.defaults import MAX_DOCUMENT_BYTES, SEED, SHARD_TOKENS, TOKENIZER_SAMPLE_BYTES
from trainer.errors import InputError
from trainer.report import ExitCode, Reporter
from trainer.shared_options import sharing

if TYPE_CHECKING:
    from trainer.data.documents import TextRule
    from trainer.data.manifest import DataSet
    from trainer.data.prepare import PrepareReport
    from trainer.data.splitting import SplitRule

data_app = typer.Typer(no_args_is_help=True, help="Text in, vocabularies, shards; fetch, re-encode and verify them.")


Out = Annotated[Path, typer.Option("--out", help="Folder for what is made.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a data set.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of a seeded split, and of the tokenizer's sample.")]
SampleBytes = Annotated[int, typer.Option(min=1, help="Train text for the tokenizer; default: 100 MB.")]
ShardTokens = Annotated[int, typer.Option(min=1, max=SHARD_TOKENS, help="Tokens of a shard.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: all usable cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """Which text is read, how it is cut and split: what `prepare`, `encode` and `tokenizer` have in common."""

    inputs: Annotated[
        list[Path],
        typer.Argument(help="Documents: .txt, .jsonl, .json lines (also .gz, .xz, .zst) or .parquet; no folders."),
    ]
    out: Out
    val_bytes: Annotated[
        int | None, typer.Option(min=1, help="Validation: seeded documents of so many bytes at most.")
    ] = None
    val_documents: Annotated[int | None, typer.Option(min=1, help="Validation: so many documents, seeded.")] = None
    val_first: Annotated[int | None, typer.Option(min=1, help="Validation: the first so many documents.")] = None
    val_file: Annotated[
        list[Path] | None, typer.Option(help="Validation: all documents of this file (repeatable).")
    ] = None
    seed: Seed = SEED
    dedup: Annotated[
        bool, typer.Option("--dedup/--keep-duplicates", help="Leave out texts that were there already.")
    ] = True
    case_folding: Annotated[
        bool, typer.Option("--case-folding", help="Fold case without loss, with a byte sidecar.")
    ] = False
    txt_documents: Annotated[
        str, typer.Option(help="How .txt is cut: file (one document), line, blank-line, or the separator itself.")
    ] = "file"
    max_document_bytes: Annotated[int, typer.Option(min=1, help="A longer document is an error.")] = MAX_DOCUMENT_BYTES
    workers: Workers = None

    def arguments(self) -> TextArguments:
        """As the functions behind the verbs take them. Raises InputError for options that exclude each other."""
        from trainer.data.documents import TextRule

        return {
            "inputs": self.inputs,
            "out": self.out,
            "rule": self._rule(),
            "dedup": self.dedup,
            "case_folding": self.case_folding,
            "text_rule": TextRule.parse(self.txt_documents),
            "max_document_bytes": self.max_document_bytes,
            "workers": self.workers,
        }

    def _rule(self) -> SplitRule:
        """Raises InputError unless exactly one way to choose validation is given."""
        from trainer.data.splitting import FirstDocuments, OwnFile, SeededBytes, SeededDocuments

        rules: list[SplitRule] = []
        if self.val_bytes is not None:
            rules.append(SeededBytes(val_bytes=self.val_bytes, seed=self.seed))
        if self.val_documents is not None:
            rules.append(SeededDocuments(count=self.val_documents, seed=self.seed))
        if self.val_first is not None:
            rules.append(FirstDocuments(count=self.val_first, seed=self.seed))
        if self.val_file:
            rules.append(OwnFile(paths=tuple(self.val_file), seed=self.seed))
        if len(rules) != 1:
            raise InputError("give exactly one of --val-bytes, --val-documents, --val-first and --val-file")
        return rules[0]


class TextArguments(TypedDict):
    inputs: list[Path]
    out: Path
    rule: SplitRule
    dedup: bool
    case_folding: bool
    text_rule: TextRule
    max_document_bytes: int
    workers: int | None


def _say(text: str) -> None:
    Reporter().note(text)


@data_app.command()
def gather(
    out: Annotated[Path, typer.Argument(help="JSON lines to write.")],
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Stop at so many bytes of text.")] = None,
) -> None:
    """Collect the English prose of this interpreter's own documentation."""
    with bad_input_is_one_line():
        from trainer.data.documents import write_documents
        from trainer.data.prose import gather as collect

        documents, size = write_documents(out, collect(max_bytes=max_bytes))
    _say(f"gathered {documents} documents, {size} bytes")


@data_app.command()
@sharing(TextOptions)
def prepare(
    options: TextOptions,
    *,
    vocab_size: Annotated[int, typer.Option(min=8, max=65536, help="Pieces of the tokenizer that is trained.")],
    sample_bytes: SampleBytes = TOKENIZER_SAMPLE_BYTES,
    shard_tokens: ShardTokens = SHARD_TOKENS,
) -> None:
    """Split by document, train the tokenizer on train only, write shards and a manifest. Goes on if it was killed."""
    with bad_input_is_one_line():
        from trainer.data.prepare import prepare as run
        from trainer.data.progress import shown_to

        report = run(
            **options.arguments(),
            vocab_size=vocab_size,
            sample_bytes=sample_bytes,
            shard_tokens=shard_tokens,
            progress=shown_to(_say),
        )
    _prepared(report)


@data_app.command()
@sharing(TextOptions)
def encode(
    options: TextOptions,
    *,
    tokenizer: Annotated[Path, typer.Option(help="A SentencePiece .model; it is copied in.")],
    shard_tokens: ShardTokens = SHARD_TOKENS,
    rate: Annotated[bool, typer.Option("--rate", help="Measure SentencePiece alone too; print the ratio.")] = False,
) -> None:
    """Text to shards with a tokenizer that is there already. Goes on if it was killed."""
    with bad_input_is_one_line():
        from trainer.data.prepare import prepare as run
        from trainer.data.progress import shown_to

        report = run(
            **options.arguments(),
            tokenizer=tokenizer,
            shard_tokens=shard_tokens,
            progress=shown_to(_say),
            measure_bare_rate=rate,
        )
    _prepared(report)


@data_app.command()
@sharing(TextOptions)
def tokenizer(
    options: TextOptions,
    *,
    vocab_size: Annotated[list[int], typer.Option(min=8, max=65536, help="Pieces (repeatable).")],
    sample_bytes: SampleBytes = TOKENIZER_SAMPLE_BYTES,
    as_json: AsJson = False,
) -> None:
    """Train OUT/spN.model for each size on train documents only, and judge each on the validation documents."""
    with bad_input_is_one_line():
        from trainer.data.progress import Silent, shown_to
        from trainer.data.vocabularies import train_vocabularies

        reports = train_vocabularies(
            **options.arguments(),
            vocab_sizes=vocab_size,
            sample_bytes=sample_bytes,
            progress=Silent() if as_json else shown_to(_say),
        )
    if as_json:
        _say(json.dumps({name: asdict(report) for name, report in reports.items()}, indent=2))
        return
    for name, report in reports.items():
        _say(
            f"{options.out / name}: {report.bytes_per_token:.4f} bytes per token on {report.documents} validation "
            f"documents, {report.byte_fallback_share:.3%} of the tokens spell bytes, {report.unused_pieces} pieces "
            "unused there"
        )


@data_app.command()
def reencode(
    folder: Folder,
    *,
    out: Out,
    tokenizer: Annotated[Path | None, typer.Option(help="A SentencePiece .model; it is copied in.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=8, max=65536, help="Train one on the train documents.")] = None,
    case_folding: Annotated[
        bool | None, typer.Option("--case-folding/--no-case-folding", help="Default: as it is.")
    ] = None,
    seed: Seed = SEED,
    sample_bytes: SampleBytes = TOKENIZER_SAMPLE_BYTES,
    shard_tokens: ShardTokens = SHARD_TOKENS,
    workers: Workers = None,
) -> None:
    """Shards of one vocabulary to another, without the text; every document is proved to keep its bytes."""
    with bad_input_is_one_line():
        from trainer.data.manifest import DataSet
        from trainer.data.progress import shown_to
        from trainer.data.reencode import reencode as run

        if (tokenizer is None) == (vocab_size is None):
            raise InputError("give exactly one of --tokenizer and --vocab-size")
        source = DataSet.load(folder)
        report = run(
            source,
            out,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            case_folding=case_folding,
            seed=seed,
            sample_bytes=sample_bytes,
            shard_tokens=shard_tokens,
            workers=workers,
            progress=shown_to(_say),
        )
    _facts(report.dataset)
    _say(
        f"re-encoded {report.documents} documents, every one with equal bytes ({report.text_bytes} in all; "
        f"{report.resumed_documents} of them by an earlier call): {report.tokens_before} -> {report.tokens_after} "
        f"tokens, {report.ratio:.4f} new for each old one, {1 / report.ratio:.3f}x fewer"
    )


@data_app.command()
def fetch(
    variant: Annotated[str, typer.Argument(help="sp1024, sp4096 or sp8192.")],
    out: Out,
    shards: Annotated[int, typer.Option(min=1, help="Train shards of 10^8 tokens; more later extend the set.")] = 10,
    repo: Annotated[str | None, typer.Option(help="Another dataset repository of the same layout.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=32, help="Files at once.")] = 4,
) -> None:
    """Download the public FineWeb shards and tokenizer, verify them, and write a manifest. Goes on if it broke off."""
    with bad_input_is_one_line():
        from trainer.data.fetch import fetch as run
        from trainer.data.progress import shown_to

        dataset = run(variant, out, shards=shards, repo=repo, workers=workers, progress=shown_to(_say))
    _facts(dataset)


@data_app.command()
def adopt(
    folder: Annotated[Path, typer.Argument(help="Folder with *train*.bin and *val*.bin shards in the public format.")],
    tokenizer: Annotated[Path, typer.Option(help="Their SentencePiece .model.")],
    split: Annotated[str, typer.Option(help="How validation was chosen, in words.")] = "taken over as it was",
) -> None:
    """Write a manifest for shards that were made elsewhere; the shards stay as they are."""
    with bad_input_is_one_line():
        from trainer.data.adopting import adopt as run

        dataset = run(folder, tokenizer=tokenizer, split=split)
    _facts(dataset)


@data_app.command()
def verify(folder: Folder, workers: Workers = None, as_json: AsJson = False) -> None:
    """Read every byte of a data set and name every fault with its file and offset; exit code 2 if there is one."""
    with bad_input_is_one_line():
        from trainer.data.progress import Silent, shown_to
        from trainer.data.verification import verify as run

        report = run(folder, workers=workers, progress=Silent() if as_json else shown_to(_say))
    if as_json:
        _say(json.dumps(asdict(report), indent=2))
    else:
        for fault in report.faults:
            where = fault.file if fault.offset is None else f"{fault.file}, offset {fault.offset}"
            _say(f"fault: {where}: {fault.what}; {fault.remedy}")
        for unchecked in report.unchecked:
            _say(f"not checked: {unchecked}")
        _say(
            f"{len(report.faults)} faults in {report.files} files, {report.train_documents} train and "
            f"{report.val_documents} validation documents, {report.tokens} tokens; {report.bytes_read / 1e6:.1f} MB "
            f"read in {report.seconds:.1f} s"
        )
    raise typer.Exit(int(ExitCode.OK if report.ok else ExitCode.BAD_INPUT))


@data_app.command()
def info(folder: Folder) -> None:
    """Print a data set's manifest, its files and validation hashes checked (`verify` reads every byte)."""
    with bad_input_is_one_line():
        from trainer.data.manifest import DataSet

        dataset = DataSet.load(folder)
    _say(dataset.manifest.model_dump_json(indent=2))
    _say(f"{dataset.manifest.bytes_per_token:.4f} bytes per token")


def _prepared(report: PrepareReport) -> None:
    _facts(report.dataset)
    rate = report.encode_bytes_per_second
    bare = report.bare
    _say(f"encoded {report.documents} documents at {rate / 1e6:.2f} MB/s of text")
    if bare is not None:
        _say(
            f"SentencePiece alone, all cores, text in memory: {bare.lists / 1e6:.2f} MB/s into lists "
            f"(ratio {rate / bare.lists:.3f}), {bare.arrays / 1e6:.2f} MB/s into arrays (ratio "
            f"{rate / bare.arrays:.3f})"
        )
    _say(f"prepared {report.dataset.path}")


def _facts(dataset: DataSet) -> None:
    manifest = dataset.manifest
    _say(
        f"{dataset.path}: vocabulary {manifest.vocab_size}{', case folded' if manifest.case_folding else ''}; train "
        f"{manifest.train_documents} documents, {manifest.train_tokens} tokens, {manifest.train_bytes} bytes; "
        f"validation {manifest.val_documents} documents, {manifest.val_tokens} tokens, {manifest.val_bytes} bytes, "
        f"{manifest.bytes_per_token:.4f} bytes per token; {manifest.duplicates} duplicates left out"
    )
    _say(f"validation text {manifest.val_sha256}")
