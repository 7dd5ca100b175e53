"""Whether a data set is what its manifest says, byte by byte: what `data verify` does. Tells every fault.

First the files and the validation shards, then the train shards, a worker process each, every document of which is
compared with the digests of the validation documents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from pydantic import ValidationError

from trainer.data.byte_table import ByteTable
from trainer.data.file_checks import Fault, file_faults
from trainer.data.manifest import MANIFEST_NAME, MANIFEST_VERSION, Manifest, ShardEntry, text_sha256
from trainer.data.parallel import ordered_map, usable_cores
from trainer.data.progress import Advance, Progress, Silent
from trainer.data.shard_checks import DIGEST_BYTES, ShardCheck, ShardFacts, ShardTask
from trainer.data.tokenizer import MarkIds, open_tokenizer
from trainer.errors import InputError

# Below this, starting worker processes takes longer than they save.
_WORKER_BYTES = 50_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was looked at, and what is wrong. `unchecked` says what could not be looked at because of the faults."""

    folder: str
    faults: tuple[Fault, ...]
    unchecked: tuple[str, ...] = ()
    files: int = 0
    train_documents: int = 0
    val_documents: int = 0
    tokens: int = 0
    bytes_read: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(folder: Path, *, workers: int | None = None, progress: Progress | None = None) -> VerifyReport:
    """Read every byte of the data set in `folder` and compare it with its manifest.

    `workers` processes at most, by default one per core; `progress` hears of every shard. Memory is bounded: the
    shards are mapped, and of validation documents 16 bytes each are held. What is wrong with the data is in the
    report; OSError is raised only for a disk that cannot be read.
    """
    began = time.monotonic()
    manifest = _read_manifest(folder / MANIFEST_NAME)
    if isinstance(manifest, Fault):
        return VerifyReport(folder=folder.name, faults=(manifest,), unchecked=("everything but the manifest",))
    verification = _Verification(folder=folder, manifest=manifest)
    total = sum(entry.bytes for entry in manifest.files)
    with (progress or Silent()).stage("verify", total=total) as advance:
        verification.run(workers, advance)
    return verification.report(time.monotonic() - began)


def _read_manifest(path: Path) -> Manifest | Fault:
    adopt = "take the shards over with `data adopt`, fetch again, or prepare the data set again"
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        return Fault(file=path.name, what=f"cannot be read ({error.strerror})", remedy=adopt)
    except UnicodeDecodeError as error:
        return Fault(file=path.name, offset=error.start, what="is not UTF-8", remedy=adopt)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8"))
        return Fault(file=path.name, offset=offset, what=f"is not JSON: {error.msg}", remedy=adopt)
    except RecursionError:
        return Fault(file=path.name, what="is no manifest: its JSON is nested too deeply", remedy=adopt)
    version = data.get("version") if isinstance(data, dict) else None
    if version != MANIFEST_VERSION:
        what = f"has version {version}; this reader knows version {MANIFEST_VERSION}"
        return Fault(file=path.name, what=what, remedy=adopt)
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'manifest'}: {one['msg']}" for one in error.errors())
        return Fault(file=path.name, what=found, remedy=adopt)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TextTask:
    """The hash of the validation text, decoded from these shards."""

    shards: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What a worker does: a train shard, or the validation text. Opens its tools in the worker."""

    check: ShardCheck
    tokenizer: Path
    case_folding: bool

    def __call__(self, task: ShardTask | _TextTask) -> ShardFacts | str | InputError:
        if isinstance(task, ShardTask):
            return self.check(task)
        from trainer.data.decoding import Decoder, validation_documents  # noqa: PLC0415 - one worker of many needs it

        try:
            decoder = Decoder(self.tokenizer, case_folding=self.case_folding)
            return text_sha256(validation_documents([self.check.folder / name for name in task.shards], decoder))
        except InputError as error:
            return error


class _Verification:
    """One verification: its faults so far, and the counts of its report."""

    def __init__(self, *, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._faults: list[Fault] = []
        self._unchecked: list[str] = []
        self._documents = {"train": 0, "val": 0}
        self._tokens = self._bytes_read = 0

    def run(self, workers: int | None, advance: Advance) -> None:
        manifest = self._manifest
        table, marks = self._tokenizer()
        self._sources()
        check = ShardCheck(folder=self._folder, vocab_size=manifest.vocab_size, table=table, marks=marks)
        val = [self._taken("val", check(task)) for task in _tasks(manifest.val)]
        if not manifest.val:
            self._fault("val_tokens counts tokens, but there is no validation shard")
        whole_stream = all(facts.decodable for facts in val)
        # An empty document is a fault of its own wherever it is; that two are equal is none.
        nothing = blake2b(b"", digest_size=DIGEST_BYTES).digest()
        digests = frozenset(digest for facts in val for digest in facts.digests) - {nothing}
        against = replace(check, validation=digests)
        if not whole_stream:
            self._unchecked.append("whether training has documents of the validation shards that cannot be read")
        train_tasks: list[ShardTask | _TextTask] = list(_tasks(manifest.train))
        if table is not None and whole_stream:
            train_tasks.insert(0, _TextTask(shards=tuple(shard.file for shard in manifest.val)))
        else:
            self._unchecked.append("val_sha256")
        tokenizer = self._folder / manifest.tokenizer.file
        work = _Work(check=against, tokenizer=tokenizer, case_folding=manifest.case_folding)
        train: list[ShardFacts] = []
        advance(self._bytes_read)
        for result in ordered_map(work, train_tasks, workers=self._workers(workers, len(train_tasks))):
            if isinstance(result, ShardFacts):
                train.append(self._taken("train", result))
                advance(result.bytes_read)
            else:
                self._text(result)
        self._sums(train, val)

    def report(self, seconds: float) -> VerifyReport:
        return VerifyReport(
            folder=self._folder.name,
            faults=tuple(self._faults),
            unchecked=tuple(self._unchecked),
            files=len(self._manifest.files) + 1,
            train_documents=self._documents["train"],
            val_documents=self._documents["val"],
            tokens=self._tokens,
            bytes_read=self._bytes_read,
            seconds=seconds,
        )

    def _workers(self, asked: int | None, tasks: int) -> int:
        if asked is not None:
            return asked
        if sum(shard.tokens for shard in self._manifest.train) * 2 < _WORKER_BYTES:
            return 1
        return max(1, min(usable_cores(), tasks))

    def _fault(self, what: str, file: str = MANIFEST_NAME) -> None:
        self._faults.append(Fault(file=file, what=what))

    def _taken(self, split: str, facts: ShardFacts) -> ShardFacts:
        self._faults += facts.faults
        self._documents[split] += facts.documents
        self._tokens += facts.tokens
        self._bytes_read += facts.bytes_read
        return facts

    def _tokenizer(self) -> tuple[ByteTable | None, MarkIds | None]:
        """The bytes of its tokens and its marks of case, if it is a tokenizer and the one that the manifest means."""
        entry = self._manifest.tokenizer
        faults, read = file_faults(self._folder, entry)
        self._faults += faults
        self._bytes_read += read
        path = self._folder / entry.file
        found: tuple[ByteTable | None, MarkIds | None] = (None, None)
        if path.is_file():
            try:
                model = open_tokenizer(path)
                table = ByteTable.of(model)
                found = (table, MarkIds.of(model, entry.file) if self._manifest.case_folding else None)
                if table.vocab_size != self._manifest.vocab_size:
                    found = (None, None)
                    stated = self._manifest.vocab_size
                    self._fault(f"{table.vocab_size} pieces; the manifest has vocab_size {stated}", entry.file)
            except InputError as error:
                self._fault(f"unusable: {str(error).removeprefix(str(path)).strip()}", entry.file)
        if found[0] is None:
            self._unchecked.append("the bytes of the tokens")
        return found

    def _sources(self) -> None:
        entry = self._manifest.val_sources
        if entry is None:
            return
        faults, read = file_faults(self._folder, entry)
        self._faults += faults
        self._bytes_read += read
        path = self._folder / entry.file
        if not path.is_file():
            return
        data = path.read_bytes()
        try:
            sources = json.loads(data)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else None
            self._faults.append(Fault(file=entry.file, offset=at, what=f"is not JSON: {error}"))
            return
        if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
            self._fault("is not a JSON list of strings", entry.file)
        elif len(sources) != self._manifest.val_documents:
            self._fault(f"{len(sources)} sources for {self._manifest.val_documents} validation documents", entry.file)

    def _text(self, found: str | InputError) -> None:
        if isinstance(found, InputError):
            self._fault(f"the validation text cannot be decoded: {found}")
        elif found != self._manifest.val_sha256:
            self._fault(f"val_sha256 is {self._manifest.val_sha256}, but the validation text hashes to {found}")

    def _sums(self, train: Sequence[ShardFacts], val: Sequence[ShardFacts]) -> None:
        """The manifest's bytes against those of the shards; its other sums it keeps itself, with each shard's."""
        for name, facts, stated in (
            ("train_bytes", train, self._manifest.train_bytes),
            ("val_bytes", val, self._manifest.val_bytes),
        ):
            counted = [shard.text_bytes for shard in facts]
            known = [count for count in counted if count is not None]
            if len(known) < len(counted):
                self._unchecked.append(name)
            elif sum(known) != stated:
                self._fault(f"{name} is {stated}, but the tokens stand for {sum(known)} bytes")


def _tasks(shards: Sequence[ShardEntry]) -> list[ShardTask]:
    names = tuple(shard.file for shard in shards)
    return [
        ShardTask(entry=shard, before=names[:index], after=names[index + 1 :]) for index, shard in enumerate(shards)
    ]
