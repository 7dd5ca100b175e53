"""The manifest of a prepared data set: what its files are, and the facts that make scores comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainer.data.shards import HEADER_BYTES, check_tokens, open_shard
from trainer.durable import sha256_of, write_whole
from trainer.errors import InputError

MANIFEST_NAME = "manifest.json"


class DataSetError(InputError):
    """A data folder that cannot be used: the message names the file and what to do."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _plain_name(name: str) -> str:
    if name != Path(name).name or name in {"", ".", ".."}:
        raise ValueError(f"{name!r} is not a plain file name; files of a data set lie beside their manifest")
    return name


class ShardEntry(_Value):
    file: str
    tokens: int = Field(ge=0)
    sha256: str

    _name = field_validator("file")(_plain_name)


class TokenizerEntry(_Value):
    file: str
    sha256: str
    bytes: int

    _name = field_validator("file")(_plain_name)


class Manifest(_Value):
    """`manifest.json`. Bytes are those of the normalised text, counted by the tokenizer's byte table."""

    version: Literal[1] = 1
    vocab_size: int = Field(ge=8, le=65536)
    tokenizer: TokenizerEntry
    train: tuple[ShardEntry, ...]
    val: tuple[ShardEntry, ...]
    train_tokens: int
    val_tokens: int = Field(gt=0, description="Scored tokens: all of the validation stream but its first.")
    val_bytes: int = Field(gt=0, description="Bytes of the scored tokens.")
    val_sha256: str = Field(description="Hash over the validation shards' bytes, in order; names the track.")
    documents: int
    val_documents: int

    @property
    def bytes_per_token(self) -> float:
        """Of the validation stream: `val_bpb = val_loss / ln 2 / bytes_per_token`."""
        return self.val_bytes / self.val_tokens

    @property
    def train_sha256(self) -> str:
        """Names the training data: one digest over the hashes of the tokenizer and of the train shards, in order."""
        hashes = (self.tokenizer.sha256, *(shard.sha256 for shard in self.train))
        return hashlib.sha256("\n".join(hashes).encode("ascii", "replace")).hexdigest()

    @model_validator(mode="after")
    def _sums(self) -> Self:
        if sum(shard.tokens for shard in self.train) != self.train_tokens:
            raise ValueError("train_tokens is not the sum over the train shards")
        if sum(shard.tokens for shard in self.val) != self.val_tokens + 1:
            raise ValueError("val_tokens is not the sum over the validation shards, less one")
        return self


def hash_in_order(paths: Iterable[Path]) -> str:
    """One digest over several files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
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
    def tokenizer_path(self) -> Path:
        return self.path / self.manifest.tokenizer.file

    @classmethod
    def load(cls, path: Path) -> DataSet:
        """Read and check a data folder: every file there and of its size, tokenizer and validation hashes equal.

        The train shards' hashes, which take seconds per gigabyte, are left to `verify`. Raises DataSetError.
        """
        where = path / MANIFEST_NAME
        try:
            manifest = Manifest.model_validate_json(where.read_bytes())
        except OSError as error:
            raise DataSetError(f"{where} cannot be read ({error.strerror}); make it with `data prepare`") from error
        except ValidationError as error:
            raise DataSetError(f"{where} is not a data manifest: {error}") from error
        dataset = cls(path=path, manifest=manifest)
        dataset._check_sizes()
        if sha256_of(dataset.tokenizer_path) != manifest.tokenizer.sha256:
            raise DataSetError(f"{dataset.tokenizer_path} is not the tokenizer of this data set; prepare it again")
        if hash_in_order(dataset.val_shards) != manifest.val_sha256:
            raise DataSetError(f"the validation shards in {path} have changed since they were made; prepare them again")
        return dataset

    def verify(self) -> None:
        """Hash every shard and check every token's range. Raises DataSetError or ShardError."""
        for entry in (*self.manifest.train, *self.manifest.val):
            shard = self.path / entry.file
            if sha256_of(shard) != entry.sha256:
                raise DataSetError(f"{shard} has changed since it was made; prepare the data set again")
            check_tokens(shard, open_shard(shard), self.manifest.vocab_size)

    def save(self) -> None:
        """Write the manifest, whole; it is written last, so a folder with a manifest is complete."""
        write_whole(self.path / MANIFEST_NAME, (self.manifest.model_dump_json(indent=2) + "\n").encode("utf-8"))

    def _check_sizes(self) -> None:
        expected = {entry.file: HEADER_BYTES + 2 * entry.tokens for entry in (*self.manifest.train, *self.manifest.val)}
        expected[self.manifest.tokenizer.file] = self.manifest.tokenizer.bytes
        for name, size in expected.items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise DataSetError(f"{file} {state}; prepare the data set again")
