"""Shards that grow, are killed at any moment, and go on to the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import shard_stream
from trainer.data.encoding import Encoded
from trainer.data.shard_stream import UNFINISHED, ShardStream, remove_unfinished
from trainer.data.shards import ShardError, open_shard, write_shard


class Killed(BaseException):
    """Stands for the end of the process."""


def _encoded(run: Sequence[int], *, sidecar: bool = False, documents: int = 1) -> Encoded:
    tokens = np.array(run, dtype=np.uint16)
    return Encoded(
        tokens=tokens, original_bytes=tokens // 3 if sidecar else None, documents=documents, text_bytes=len(run)
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _write(folder: Path, runs: Sequence[Sequence[int]], shard_tokens: int, *, sidecar: bool, flush: int) -> list[str]:
    stream = ShardStream(folder, "train", shard_tokens=shard_tokens, sidecar=sidecar, flush_bytes=flush)
    for run in runs[stream.documents :]:
        stream.append(_encoded(run, sidecar=sidecar))
    return stream.close()


runs_of_tokens = st.lists(st.lists(st.integers(0, 65535), max_size=40), max_size=8)


@settings(max_examples=25, deadline=None)
@given(runs=runs_of_tokens, shard_tokens=st.integers(1, 50), sidecar=st.booleans())
def test_shards_hold_the_stream(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[int]], shard_tokens: int, sidecar: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    names = _write(folder, runs, shard_tokens, sidecar=sidecar, flush=64)
    remove_unfinished(folder)
    flat = [token for run in runs for token in run]
    shards = [open_shard(folder / name) for name in names]
    assert [token for shard in shards for token in shard.tolist()] == flat
    assert all(shard.size == shard_tokens for shard in shards[:-1])
    assert bool(names) == bool(flat)
    sidecars = [Path(name).with_suffix(".bytes").name for name in names] if sidecar else []
    assert [byte for name in sidecars for byte in open_shard(folder / name).tolist()] == [
        token // 3 for token in (flat if sidecar else [])
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, *sidecars])


def _killed_at(patch: pytest.MonkeyPatch, when: int) -> None:
    """Make the process "end" at the `when`th step that touches the disk."""
    step = 0

    def counted(name: str) -> Callable[..., object]:
        real: Callable[..., object] = getattr(shard_stream, name) if "." not in name else getattr(Path, name[5:])

        def wrapped(*arguments: object, **named: object) -> object:
            nonlocal step
            step += 1
            if step == when:
                raise Killed
            return real(*arguments, **named)

        return wrapped

    for name in ("_write_bytes", "_sync", "write_whole"):
        patch.setattr(shard_stream, name, counted(name))
    patch.setattr(Path, "replace", counted("Path.replace"))


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=30), min_size=1, max_size=6),
    shard_tokens=st.integers(1, 40),
    sidecar=st.booleans(),
    flush=st.sampled_from([1, 40, 1 << 20]),
    kills=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    runs: list[list[int]],
    shard_tokens: int,
    sidecar: bool,
    flush: int,
    kills: list[int],
) -> None:
    folder, whole = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    expected = _write(whole, runs, shard_tokens, sidecar=sidecar, flush=1 << 20)
    for when in kills:
        with pytest.MonkeyPatch.context() as patch:
            _killed_at(patch, when)
            try:
                _write(folder, runs, shard_tokens, sidecar=sidecar, flush=flush)
            except Killed:
                for path in folder.glob("train_*"):
                    assert open_shard(path).size  # whole, whenever it has its final name
    assert _write(folder, runs, shard_tokens, sidecar=sidecar, flush=flush) == expected
    assert _files(folder) == _files(whole)
    again = ShardStream(folder, "train", shard_tokens=shard_tokens, sidecar=sidecar)
    assert (again.documents, again.close()) == (len(runs), expected)


def test_documents_count_those_on_the_disk(tmp_path: Path) -> None:
    stream = ShardStream(tmp_path, "val", flush_bytes=10)
    stream.append(_encoded([1, 2, 3], documents=2))
    assert (ShardStream(tmp_path, "val", flush_bytes=10).documents, stream.documents) == (0, 2)
    stream = ShardStream(tmp_path, "val", flush_bytes=10)
    stream.append(_encoded([1, 2, 3, 4, 5], documents=3))
    assert ShardStream(tmp_path, "val").documents == stream.documents == 3
    assert ShardStream(tmp_path, "train").documents == 0


def test_a_stream_refuses_what_does_not_belong(tmp_path: Path) -> None:
    stream = ShardStream(tmp_path, "val")
    with pytest.raises(ValueError, match="sidecar"):
        stream.append(_encoded([1], sidecar=True))
    stream.append(_encoded([1]))
    assert stream.close() == ["val_000000.bin"]
    with pytest.raises(ValueError, match="closed"):
        stream.append(_encoded([1]))
    write_shard(tmp_path / "train_000000.bin", np.zeros(3, np.uint16))
    with pytest.raises(ShardError, match=r"train_000000\.bin is there already"):
        ShardStream(tmp_path, "train")
    with pytest.raises(ValueError, match="not positive"):
        ShardStream(tmp_path, "other", shard_tokens=0)


def _begin(folder: Path) -> Path:
    stream = ShardStream(folder, "train", shard_tokens=4, flush_bytes=1)
    stream.append(_encoded(range(10), documents=3))
    return folder / UNFINISHED


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / UNFINISHED / "train.journal.json").write_text("{"), "offset 0: not a journal"),
        (lambda out: os.truncate(out / UNFINISHED / "train_000002.bin.part", 1026), "ends at offset 1026.*1028"),
        (lambda out: (out / UNFINISHED / "train_000002.bin.part").unlink(), "ends at offset 0"),
        (lambda out: (out / "train_000001.bin").unlink(), r"train_000001\.bin is missing"),
        (lambda out: write_shard(out / "train_000001.bin", np.zeros(3, np.uint16)), "offset 8 announces 3 tokens"),
    ],
)
def test_damaged_work_files_are_named_with_the_remedy(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    _begin(tmp_path)
    damage(tmp_path)
    with pytest.raises(ShardError, match=message) as caught:
        ShardStream(tmp_path, "train", shard_tokens=4)
    assert "remove " in str(caught.value)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    work = _begin(tmp_path)
    for shard_tokens, sidecar in ((5, False), (4, True)):
        with pytest.raises(ShardError, match="begun with 4 tokens a shard and no byte sidecar"):
            ShardStream(tmp_path, "train", shard_tokens=shard_tokens, sidecar=sidecar)
    assert json.loads((work / "train.journal.json").read_text())["documents"] == 3


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    stream = ShardStream(tmp_path, "train")
    (tmp_path / UNFINISHED / "train_000000.bin.part").mkdir()
    with pytest.raises(OSError, match=r"train_000000\.bin\.part"):
        stream.append(_encoded([1]))
