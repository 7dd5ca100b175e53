"""One split's tokens, appended to numbered shards so that a killed run loses at most the last few megabytes.

Tokens grow in parts under `FOLDER/.unfinished/`. From time to time the parts are flushed to the disk, and then a
journal is replaced that says how many documents and tokens they hold; only after that do full parts take their final
names. On reopening, whatever the journal does not vouch for is cut off, so what comes out never depends on where a
run was killed. The journal is removed with `.unfinished` when the data set has its manifest; until then a closed
stream opens as closed, so that a caller that was killed after closing does not encode again.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.defaults import SHARD_TOKENS
from trainer.data.shards import HEADER_BYTES, ShardError, Tokens, open_shard, shard_header
from trainer.durable import write_whole

if TYPE_CHECKING:
    from trainer.data.encoding import Encoded

UNFINISHED = ".unfinished"
FLUSH_BYTES = 16 << 20


class ShardStream:
    """Appends encoded documents to `NAME_000000.bin`, ..., and with `sidecar` their bytes to `NAME_000000.bytes`.

    Every shard but the last has `shard_tokens` tokens. Raises ShardError where files and journal do not belong
    together, and OSError naming the file that cannot be written (a later stream goes on from the journal).
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        shard_tokens: int = SHARD_TOKENS,
        sidecar: bool = False,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens {shard_tokens} is not positive")
        self._folder, self._name, self._shard_tokens = folder, name, shard_tokens
        self._suffixes = (".bin", ".bytes") if sidecar else (".bin",)
        self._flush_bytes = flush_bytes
        self._work = folder / UNFINISHED
        self._work.mkdir(parents=True, exist_ok=True)
        self._documents = self._tokens = self._durable_tokens = 0
        self._closed = False
        if self._journal.exists():
            self._reopen()
        else:
            self._require_fresh()
        self._first_unnamed = self._durable_tokens // shard_tokens

    @property
    def documents(self) -> int:
        """Documents taken so far; right after opening: those that lie durably on the disk, for the caller to skip."""
        return self._documents

    @property
    def tokens(self) -> int:
        return self._tokens

    def append(self, encoded: Encoded) -> None:
        """Take whole documents. After an error the stream must not be used again; open a new one."""
        if self._closed:
            raise ValueError(f"the stream {self._name} of {self._folder} is closed")
        streams = [encoded.tokens] if encoded.original_bytes is None else [encoded.tokens, encoded.original_bytes]
        if len(streams) != len(self._suffixes) or any(s.size != encoded.tokens.size for s in streams):
            raise ValueError(f"the byte sidecar of {self._name} must go with the tokens, one number each, or not be")
        taken = 0
        while taken < encoded.tokens.size:
            index, at = divmod(self._tokens, self._shard_tokens)
            count = min(self._shard_tokens - at, encoded.tokens.size - taken)
            for suffix, stream in zip(self._suffixes, streams, strict=True):
                _write_at(self._part(index, suffix), HEADER_BYTES + 2 * at, stream[taken : taken + count])
            taken += count
            self._tokens += count
        self._documents += encoded.documents
        if 2 * (self._tokens - self._durable_tokens) >= self._flush_bytes:
            self._commit()

    def close(self) -> list[str]:
        """Finish the last shard; returns the names of all shards. A split without tokens has none."""
        if not self._closed:
            self._commit()
            index, rest = divmod(self._tokens, self._shard_tokens)
            if rest:
                self._name_shard(index, rest)
            self._closed = True
            self._write_journal()
        return [f"{self._name}_{index:06d}.bin" for index in range(-(-self._tokens // self._shard_tokens))]

    @property
    def _journal(self) -> Path:
        return self._work / f"{self._name}.journal.json"

    def _part(self, index: int, suffix: str) -> Path:
        return self._work / f"{self._name}_{index:06d}{suffix}.part"

    def _final(self, index: int, suffix: str) -> Path:
        return self._folder / f"{self._name}_{index:06d}{suffix}"

    def _commit(self) -> None:
        """Parts to the disk, then the journal that counts them, then final names for the full ones."""
        full = self._tokens // self._shard_tokens
        for index in range(self._durable_tokens // self._shard_tokens, full + 1):
            for suffix in self._suffixes:
                part = self._part(index, suffix)
                if part.exists():
                    _sync(part)
        _sync(self._work)
        self._durable_tokens = self._tokens
        self._write_journal()
        for index in range(self._first_unnamed, full):
            self._name_shard(index, self._shard_tokens)
        self._first_unnamed = full

    def _write_journal(self) -> None:
        facts = {
            "documents": self._documents,
            "tokens": self._tokens,
            "shard_tokens": self._shard_tokens,
            "sidecar": len(self._suffixes) == 2,
            "closed": self._closed,
        }
        write_whole(self._journal, (json.dumps(facts) + "\n").encode("ascii"))

    def _name_shard(self, index: int, tokens: int) -> None:
        for suffix in self._suffixes:
            part = self._part(index, suffix)
            _write_bytes(part, 0, shard_header(tokens))
            _sync(part)
            part.replace(self._final(index, suffix))
        _sync(self._folder)

    def _require_fresh(self) -> None:
        """Without a journal parts mean nothing, and shards under final names are somebody else's."""
        for suffix in self._suffixes:
            for path in sorted(self._folder.glob(f"{self._name}_[0-9]*{suffix}")):
                raise ShardError(
                    f"{path} is there already, and no unfinished run in {self._work} made it; "
                    "give another --out, or move it away"
                )
        self._drop_parts(0)

    def _drop_parts(self, first: int) -> None:
        for path in self._work.glob(f"{self._name}_*.part"):
            if int(path.name.removeprefix(f"{self._name}_").split(".")[0]) >= first:
                path.unlink()

    def _reopen(self) -> None:
        try:
            facts = json.loads(self._journal.read_bytes())
            documents, tokens, closed = int(facts["documents"]), int(facts["tokens"]), bool(facts["closed"])
            shape = (int(facts["shard_tokens"]), bool(facts["sidecar"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ShardError(f"{self._journal}, offset 0: not a journal ({error!r}); {self._begin_again}") from error
        if documents < 0 or tokens < 0 or shape != (self._shard_tokens, len(self._suffixes) == 2):
            raise ShardError(
                f"{self._journal}: begun with {shape[0]} tokens a shard and {'a' if shape[1] else 'no'} byte sidecar; "
                f"go on with the same, or {self._begin_again}"
            )
        self._documents, self._tokens, self._durable_tokens, self._closed = documents, tokens, tokens, closed
        full, rest = divmod(tokens, self._shard_tokens)
        for suffix in self._suffixes:
            for index in range(full):
                self._reopen_full(index, suffix)
            if closed and rest:
                self._require_shard(self._final(full, suffix), rest)
            elif not closed:
                self._reopen_last(full, suffix, rest)
        self._drop_parts(full if closed else full + 1)

    def _reopen_full(self, index: int, suffix: str) -> None:
        part, final = self._part(index, suffix), self._final(index, suffix)
        if part.exists():  # killed between the journal and the renaming
            _require_length(part, self._shard_tokens, self._begin_again)
            _write_bytes(part, 0, shard_header(self._shard_tokens))
            _sync(part)
            part.replace(final)
        self._require_shard(final, self._shard_tokens)

    def _reopen_last(self, index: int, suffix: str, rest: int) -> None:
        part, final = self._part(index, suffix), self._final(index, suffix)
        if not part.exists() and final.exists():  # killed while closing
            self._require_shard(final, rest)
            final.replace(part)
        if rest:
            _require_length(part, rest, self._begin_again)
            os.truncate(part, HEADER_BYTES + 2 * rest)
        else:
            part.unlink(missing_ok=True)

    def _require_shard(self, path: Path, tokens: int) -> None:
        if not path.exists():
            raise ShardError(f"{path} is missing, although {self._journal} counts it; {self._begin_again}")
        found = open_shard(path).size
        if found != tokens:
            raise ShardError(
                f"{path}: offset 8 announces {found} tokens, but {self._journal} counts {tokens}; {self._begin_again}"
            )

    @property
    def _begin_again(self) -> str:
        return f"remove {self._work} and the shards {self._name}_* beside it to begin again"


def remove_unfinished(folder: Path) -> None:
    """Remove the work files of a data set that has its manifest."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _require_length(part: Path, tokens: int, remedy: str) -> None:
    expected = HEADER_BYTES + 2 * tokens
    found = part.stat().st_size if part.exists() else 0
    if found < expected:
        raise ShardError(f"{part}: ends at offset {found}, but its journal counts {expected} bytes; {remedy}")


def _write_at(path: Path, offset: int, tokens: Tokens) -> None:
    _write_bytes(path, offset, np.ascontiguousarray(tokens, dtype="<u2").tobytes())


def _write_bytes(path: Path, offset: int, data: bytes) -> None:
    """Unbuffered, so that a full disk shows here and not at some later close."""
    try:
        with ExitStack() as stack:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            rest = memoryview(data)
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
