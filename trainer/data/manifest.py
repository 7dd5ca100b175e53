"""The manifest of a prepared data set: what its files are, and the facts that make scores comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainer.data.shards import HEADER_BYTES
from trainer.durable import sha256_of, write_whole
from trainer.errors import InputError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION: Final = 2
_ADOPT = "take its shards over with `data adopt`, or prepare it again"


class DataSetError(InputError):
    """A data folder that cannot be used: the message names the file and what to do."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _plain_name(name: str) -> str:
    if name != Path(name).name or name in {"", ".", ".."}:
        raise ValueError(f"{name!r} is not a plain file name; files of a data set lie beside their manifest")
    return name


class FileEntry(_Value):
    """A file beside the manifest."""

    file: str
    bytes: int = Field(ge=0)
    sha256: str

    _name = field_validator("file")(_plain_name)


class ShardEntry(_Value):
    file: str
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0, description="Documents that begin in this shard: its BOS tokens.")
    sha256: str
    original_bytes: FileEntry | None = Field(
        default=None, description="Sidecar: each token's original bytes, where a text transform changes lengths."
    )

    _name = field_validator("file")(_plain_name)


class InputEntry(_Value):
    """A file that documents were read from; its name only, never a path of the machine that read it."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str
    documents: int = Field(ge=0)


class Manifest(_Value):
    """`manifest.json`. Bytes are those of the normalised text (before case folding), as scores count them."""

    version: Literal[2] = MANIFEST_VERSION
    vocab_size: int = Field(ge=8, le=65536)
    tokenizer: FileEntry
    case_folding: bool = False
    train: tuple[ShardEntry, ...]
    val: tuple[ShardEntry, ...]
    train_tokens: int = Field(ge=0)
    train_bytes: int = Field(ge=0)
    train_documents: int = Field(ge=0)
    val_tokens: int = Field(gt=0, description="Scored tokens: all of the validation stream but its first.")
    val_bytes: int = Field(gt=0, description="Bytes of the scored tokens.")
    val_documents: int = Field(ge=0)
    val_sha256: str = Field(
        description="Hash of the validation *text*, document by document; names the track, whatever the vocabulary."
    )
    val_sources: FileEntry | None = Field(
        default=None, description="JSON list: where each validation document is from."
    )
    inputs: tuple[InputEntry, ...] = ()
    split: str = Field(description="How the validation documents were chosen, in words.")
    duplicates: int = Field(default=0, ge=0, description="Documents left out because their text was there already.")

    @property
    def documents(self) -> int:
        return self.train_documents + self.val_documents

    @property
    def bytes_per_token(self) -> float:
        """Of the validation stream: `val_bpb = val_loss / ln 2 / bytes_per_token`."""
        return self.val_bytes / self.val_tokens

    @property
    def train_sha256(self) -> str:
        """Names the training data: one digest over the hashes of the tokenizer and of the train shards, in order."""
        hashes = (self.tokenizer.sha256, *(shard.sha256 for shard in self.train))
        return hashlib.sha256("\n".join(hashes).encode("ascii", "replace")).hexdigest()

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the data set but the manifest itself."""
        shards = (*self.train, *self.val)
        return (
            self.tokenizer,
            *([] if self.val_sources is None else [self.val_sources]),
            *(FileEntry(file=s.file, bytes=HEADER_BYTES + 2 * s.tokens, sha256=s.sha256) for s in shards),
            *(s.original_bytes for s in shards if s.original_bytes is not None),
        )

    @model_validator(mode="after")
    def _sums(self) -> Self:
        if sum(shard.tokens for shard in self.train) != self.train_tokens:
            raise ValueError("train_tokens is not the sum over the train shards")
        if sum(shard.tokens for shard in self.val) != self.val_tokens + 1:
            raise ValueError("val_tokens is not the sum over the validation shards, less one")
        if sum(shard.documents for shard in self.train) != self.train_documents:
            raise ValueError("train_documents is not the sum over the train shards")
        if sum(shard.documents for shard in self.val) != self.val_documents:
            raise ValueError("val_documents is not the sum over the validation shards")
        if any((shard.original_bytes is not None) != self.case_folding for shard in (*self.train, *self.val)):
            raise ValueError("case folding needs a byte sidecar beside every shard, and nothing else has one")
        return self


def text_sha256(documents: Iterable[bytes]) -> str:
    """Digest of texts in order, each preceded by its length (8 bytes, little-endian), so that borders count."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A folder with a manifest, a tokenizer and shards."""

    path: Path
    manifest: Manifest

    @property
    def train_shards(self) -> tuple[Path, ...]:
        return tuple(self.path / shard.file for shard in self.manifest.train)

    @property
    def val_shards(self) -> tuple[Path, ...]:
        return tuple(self.path / shard.file for shard in self.manifest.val)

    @property
    def val_original_bytes(self) -> tuple[Path, ...]:
        """The byte sidecars of the validation shards; empty without case folding."""
        return tuple(self.path / s.original_bytes.file for s in self.manifest.val if s.original_bytes is not None)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / self.manifest.tokenizer.file

    @classmethod
    def load(cls, path: Path) -> DataSet:
        """Read and check a data folder: every file there and of its size; tokenizer and validation files unchanged.

        The train shards' hashes, which take seconds per gigabyte, are left to `data verify`. Raises DataSetError.
        """
        manifest = read_manifest(path / MANIFEST_NAME)
        dataset = cls(path=path, manifest=manifest)
        for entry in manifest.files:
            file = path / entry.file
            found = file.stat().st_size if file.is_file() else None
            if found != entry.bytes:
                state = "is missing" if found is None else f"has {found} bytes instead of {entry.bytes}"
                raise DataSetError(f"{file} {state}; prepare the data set again")
        sidecars = [shard.original_bytes for shard in manifest.val if shard.original_bytes is not None]
        scored = {entry.file: entry.sha256 for entry in (manifest.tokenizer, *sidecars)}
        scored |= {shard.file: shard.sha256 for shard in manifest.val}
        for name, sha256 in scored.items():
            if sha256_of(path / name) != sha256:
                raise DataSetError(
                    f"{path / name} has changed since the data set was made, and scores depend on it; "
                    "prepare the data set again"
                )
        return dataset

    def is_validation_set(self, sha256: str) -> bool:
        """Whether this hash names the validation set: that of its text or, in older files, of its shards' bytes.

        The latter is told by reading the shards. It says as much only for whoever knows the tokenizer to be the same.
        """
        return sha256 == self.manifest.val_sha256 or sha256 == _sha256_in_order(self.val_shards)

    def save(self) -> None:
        """Write the manifest, whole; it is written last, so a folder with a manifest is complete."""
        write_whole(self.path / MANIFEST_NAME, (self.manifest.model_dump_json(indent=2) + "\n").encode("utf-8"))


def _sha256_in_order(paths: Iterable[Path]) -> str:
    """What named the validation set while manifests had version 1. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_manifest(where: Path) -> Manifest:
    """What a manifest says, its files unseen. Raises DataSetError."""
    try:
        text = where.read_bytes()
        data = json.loads(text)
    except OSError as error:
        raise DataSetError(f"{where} cannot be read ({error.strerror}); make it with `data prepare`") from error
    except (ValueError, RecursionError) as error:
        raise DataSetError(f"{where} is not JSON: {error}; {_ADOPT}") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != MANIFEST_VERSION:
        raise DataSetError(f"{where} has version {version}, this reader knows version {MANIFEST_VERSION}; {_ADOPT}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise DataSetError(f"{where} is not a data manifest: {error}") from error
