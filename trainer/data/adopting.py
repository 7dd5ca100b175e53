"""A manifest for shards that somebody else made in the public format: what `data adopt` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.data.defaults import TOKENIZER_NAME
from trainer.data.describing import Provenance, describe, sidecar_name
from trainer.data.manifest import MANIFEST_NAME, DataSet, DataSetError
from trainer.data.shard_stream import UNFINISHED
from trainer.data.shards import BOS, HEADER_BYTES, open_shard
from trainer.durable import write_whole


def adopt(
    folder: Path,
    *,
    tokenizer: Path | str,
    train: Sequence[str] | None = None,
    val: Sequence[str] | None = None,
    split: str = "taken over as it was",
) -> DataSet:
    """Describe the shards that lie in `folder` and save their manifest there, which makes it a data set.

    `train` and `val` name shards in the order of their stream; without them every `*train*.bin` and `*val*.bin`, by
    name. A tokenizer that lies elsewhere is copied in as `tokenizer.model`. Byte sidecars (`X.bytes` beside every
    shard) mean case folding. The shards themselves stay as they are. Raises DataSetError, ShardError,
    TokenizerError or OSError; then there is no manifest.
    """
    if (folder / MANIFEST_NAME).exists():
        raise DataSetError(
            f"{folder / MANIFEST_NAME} is there already; if it no longer describes these shards, or is of another "
            "version, remove it and adopt again"
        )
    if (folder / UNFINISHED).exists():
        raise DataSetError(
            f"{folder} holds an unfinished data set ({UNFINISHED}); finish it with the call that began it, or remove "
            f"{folder / UNFINISHED} and adopt what is there"
        )
    train = _found(folder, "train") if train is None else train
    val = _found(folder, "val") if val is None else val
    if both := sorted(set(train) & set(val)):
        raise DataSetError(f"{folder / both[0]} is named both for training and for validation; name it once")
    dataset = describe_shards(folder, tokenizer=_beside(folder, Path(tokenizer)), train=train, val=val, split=split)
    dataset.save()
    return dataset


def describe_shards(folder: Path, *, tokenizer: str, train: Sequence[str], val: Sequence[str], split: str) -> DataSet:
    """The data set of shards that were not made here, their documents' beginnings checked; the caller saves it."""
    for names in (train, val):
        _require_bos(folder, names)
    sidecars = [(folder / sidecar_name(name)).is_file() for name in (*train, *val)]
    if any(sidecars) and not all(sidecars):
        lone = (*train, *val)[sidecars.index(False)]
        raise DataSetError(
            f"{folder / lone} has no byte sidecar {sidecar_name(lone)} although other shards have one; "
            "put it there, or remove all of them if the text was not case-folded"
        )
    provenance = Provenance(split=split, case_folding=all(sidecars))
    return describe(folder, tokenizer=tokenizer, train=train, val=val, provenance=provenance)


def _found(folder: Path, word: str) -> list[str]:
    names = sorted(path.name for path in folder.glob(f"*{word}*.bin"))
    if not names:
        raise DataSetError(f"{folder} holds no shard *{word}*.bin; name the files, or check the folder")
    return names


def _require_bos(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        tokens = open_shard(folder / name)
        if not tokens.size:
            continue
        if tokens[0] != BOS:
            raise DataSetError(
                f"{folder / name}: offset {HEADER_BYTES} holds token {int(tokens[0])} instead of BOS ({BOS}); the "
                "first shard must begin with a document: put the shard before it there, or encode the text again"
            )
        return


def _beside(folder: Path, tokenizer: Path) -> str:
    """The tokenizer's name within the folder, where it is copied to if it lies elsewhere."""
    if not tokenizer.is_file() and (folder / tokenizer.name).is_file() and tokenizer.name == str(tokenizer):
        return tokenizer.name
    data = tokenizer.read_bytes()
    if tokenizer.resolve().parent == folder.resolve():
        return tokenizer.name
    copy = folder / TOKENIZER_NAME
    if copy.exists() and copy.read_bytes() != data:
        raise DataSetError(f"{copy} is another tokenizer than {tokenizer}; remove the one that is not these shards'")
    if not copy.exists():
        write_whole(copy, data)
    return TOKENIZER_NAME
