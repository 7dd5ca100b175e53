"""The work folder of a data set that is being made: what was asked for, which stages are done, and one maker at a time.

A run that was killed is gone on with by the same call; other arguments or changed inputs would mix two data sets, so
they are refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.manifest import MANIFEST_NAME, DataSetError
from trainer.data.shard_stream import UNFINISHED, remove_unfinished
from trainer.durable import write_whole

_PLAN = "plan.json"
_LOCK = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputState:
    """What tells that a file is still the same without reading it."""

    path: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> InputState:
        """Raises OSError if there is no such file, DataSetError for what cannot be read twice, such as a pipe."""
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            what = "a directory" if stat.S_ISDIR(state.st_mode) else "a pipe or a device"
            raise DataSetError(f"{path} is {what}; the input is read more than once, so give regular files")
        return cls(path=str(path.resolve()), bytes=state.st_size, mtime_ns=state.st_mtime_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfinished:
    """The folder `OUT/.unfinished`, held by this process alone."""

    out: Path
    inputs: tuple[InputState, ...]

    @property
    def folder(self) -> Path:
        return self.out / UNFINISHED

    def done(self, stage: str) -> dict[str, Any] | None:
        """The facts of a stage that was finished, or None."""
        path = self.folder / f"{stage}.json"
        return _read(path) if path.exists() else None

    def finish(self, stage: str, facts: Mapping[str, object]) -> None:
        """A stage's facts, written when all that it made lies on the disk."""
        write_whole(self.folder / f"{stage}.json", (json.dumps(facts) + "\n").encode("utf-8"))

    def require_same_inputs(self) -> None:
        """Raise DataSetError if an input was written to since this began."""
        for was in self.inputs:
            if InputState.of(Path(was.path)) != was:
                raise DataSetError(
                    f"{was.path} has changed since {self.folder} was begun; remove {self.folder} and the files beside "
                    "it to begin again"
                )


@contextmanager
def unfinished(
    out: Path, *, arguments: Mapping[str, object], inputs: Sequence[Path], made: Sequence[str]
) -> Iterator[Unfinished]:
    """Begin a data set in `out`, or go on with the one that the same call began there.

    `arguments` are JSON values; `made` are the files that will be written beside the manifest, none of which may be
    there at the beginning. Raises DataSetError if `out` holds a data set, if other arguments or other inputs began it,
    or if another process works on it; OSError.
    """
    states = tuple(map(InputState.of, inputs))
    if (out / MANIFEST_NAME).exists():
        if (out / UNFINISHED / _PLAN).exists():
            remove_unfinished(out)  # killed after the manifest was written
        raise DataSetError(f"{out} already holds a data set; give another --out, or remove it first")
    work = Unfinished(out=out, inputs=states)
    work.folder.mkdir(parents=True, exist_ok=True)
    with (work.folder / _LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataSetError(f"another process is making a data set in {out}; wait for it, or stop it") from error
        plan = work.folder / _PLAN
        if plan.exists() and not _is_nothing_done(out, made, work.folder):
            _require_same(plan, arguments, work)
        else:
            _require_free(out, made, work.folder)
            wanted = {"arguments": dict(arguments), "inputs": [_listed(state) for state in states]}
            write_whole(plan, (json.dumps(wanted) + "\n").encode("utf-8"))
        yield work


def _is_nothing_done(out: Path, made: Sequence[str], folder: Path) -> bool:
    """A call that was refused for its input, before it finished a stage, leaves nothing that could be mixed up."""
    return not any((out / name).exists() for name in made) and [*folder.glob("*.json")] == [folder / _PLAN]


def _require_free(out: Path, made: Sequence[str], folder: Path) -> None:
    taken = next((name for name in made if (out / name).exists()), None)
    if taken is not None:
        (folder / _LOCK).unlink()
        if not os.listdir(folder):  # noqa: PTH208 - of a handful of names
            folder.rmdir()
        raise DataSetError(f"{out / taken} is there already, without a manifest; give another --out, or move it away")


def _require_same(plan: Path, arguments: Mapping[str, object], work: Unfinished) -> None:
    begun = _read(plan)
    were = begun.get("arguments")
    if not isinstance(were, dict) or not isinstance(begun.get("inputs"), list):
        raise DataSetError(f"{plan} is not a plan; remove {work.folder} and the files beside it to begin again")
    for name in [*arguments, *were]:
        if were.get(name) != arguments.get(name):
            raise DataSetError(
                f"{work.folder} was begun with {name} {were.get(name)} instead of {arguments.get(name)}; go on with "
                f"the same arguments, or remove {work.folder} and the files beside it to begin again"
            )
    work.require_same_inputs()
    if begun["inputs"] != [_listed(state) for state in work.inputs]:
        raise DataSetError(
            f"{work.folder} was begun with other inputs, or one of them has changed since; go on with the same, or "
            f"remove {work.folder} and the files beside it to begin again"
        )


def _listed(state: InputState) -> list[str | int]:
    return [state.path, state.bytes, state.mtime_ns]


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataSetError(f"{path} is not JSON: {error}; remove {path.parent} to begin again") from error
    if not isinstance(value, dict):
        raise DataSetError(f"{path} holds no object; remove {path.parent} to begin again")
    return value
