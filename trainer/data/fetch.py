"""The public FineWeb shards of OpenAI's Parameter Golf, as a data set: what `data fetch` does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from types import MappingProxyType

from trainer.data.adopting import describe_shards
from trainer.data.defaults import TOKENIZER_NAME
from trainer.data.hub_download import Download, FetchError, FetchStopped, HubFile, list_files
from trainer.data.manifest import MANIFEST_NAME, DataSet, DataSetError, Manifest, read_manifest
from trainer.data.progress import Progress, Silent
from trainer.data.shard_stream import UNFINISHED, remove_unfinished


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Where a vocabulary's shards lie: a dataset repository of the hub, and paths inside."""

    repo: str
    folder: str
    tokenizer: str

    def shard(self, split: str, number: int) -> str:
        return f"{self.folder}/fineweb_{split}_{number:06d}.bin"


# The layout is that of openai/parameter-golf, data/cached_challenge_fineweb.py and data/README.md (May 2026), whose
# default repository has sp1024. The others are in the repository that the records' READMEs name, of the first
# records with these vocabularies: track_10min_16mb/2026-04-01_Vocab4096_MLPMult4_WD085 (143 train shards) and
# 2026-04-05_SP8192_GPTQ-Embeddings_SDClip_Loop45x2 (128). All retokenise the same documents, so that the validation
# text is the same.
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        name: Variant(
            repo=repo,
            folder=f"datasets/datasets/fineweb10B_{name}",
            tokenizer=f"datasets/tokenizers/fineweb_{name.removeprefix('sp')}_bpe.model",
        )
        for name, repo in (
            ("sp1024", "willdepueoai/parameter-golf"),
            ("sp4096", "kevclark/parameter-golf"),
            ("sp8192", "kevclark/parameter-golf"),
        )
    }
)


def fetch(
    variant: str,
    out: Path,
    *,
    shards: int,
    repo: str | None = None,
    endpoint: str | None = None,
    workers: int = 4,
    attempts: int = 5,
    progress: Progress | None = None,
) -> DataSet:
    """Bring the first `shards` train shards, the validation shards and the tokenizer to `out`, and save a manifest.

    Every file is checked against the hub's size and hash before it gets its name, and what is there and right is not
    fetched again, so a call that broke off is simply made again. More shards later extend the data set (fewer leave
    it as it is): its validation files stay. `repo` names another repository of the same layout, `endpoint` another hub
    than HF_ENDPOINT; `workers` files come at once, and each is given up after `attempts` requests that brought
    nothing.

    Raises FetchError, DataSetError, ShardError, TokenizerError or OSError.
    """
    chosen = VARIANTS.get(variant)
    if chosen is None:
        raise FetchError(f"there is no variant {variant!r}; there are {', '.join(VARIANTS)}")
    if shards < 1:
        raise FetchError(f"{shards} train shards are no training data; give at least 1")
    source = repo or chosen.repo
    listed = list_files(source, endpoint)
    known = _known(out)
    have = len(known.train) if known is not None else 0
    shards = max(shards, have)
    wanted = _wanted(chosen, variant, source, shards, listed)
    if known is not None:
        _require_same(out, known, wanted, variant)
    missing = _missing(out, wanted, workers)
    if missing or have < shards:
        how = _How(endpoint=endpoint, workers=workers, attempts=attempts, progress=progress or Silent())
        _download(out, missing, how)
        commit = wanted[TOKENIZER_NAME].commit
        names = [name for name in wanted if name != TOKENIZER_NAME]
        dataset = describe_shards(
            out,
            tokenizer=TOKENIZER_NAME,
            train=[name for name in names if name.startswith("train")],
            val=[name for name in names if name.startswith("val")],
            split=f"the first 50,000 documents of the challenge's FineWeb export ({variant}, {source} at {commit})",
        )
        dataset.save()
        remove_unfinished(out)
    return DataSet.load(out)


def _wanted(variant: Variant, name: str, source: str, shards: int, listed: Mapping[str, HubFile]) -> dict[str, HubFile]:
    """What to bring, by local name; train shards first, in their order. Raises FetchError for what is not there."""
    there = {split: _numbered(variant, split, listed) for split in ("train", "val")}
    for path, found in ((variant.tokenizer, variant.tokenizer in listed), (variant.shard("val", 0), there["val"])):
        if not found:
            raise FetchError(f"{source} has no {path}, so no {name}; give a --repo that has it, or another variant")
    if shards > len(there["train"]):
        count = len(there["train"])
        raise FetchError(f"{source} has {count} train shards of {name}, fewer than {shards}; ask for {count}")
    return {
        **{f"train_{number:06d}.bin": file for number, file in enumerate(there["train"][:shards])},
        **{f"val_{number:06d}.bin": file for number, file in enumerate(there["val"])},
        TOKENIZER_NAME: listed[variant.tokenizer],
    }


def _numbered(variant: Variant, split: str, listed: Mapping[str, HubFile]) -> list[HubFile]:
    """The shards 0, 1, ... of a split, up to the first that is not there: a stream has no holes."""
    files: list[HubFile] = []
    while (file := listed.get(variant.shard(split, len(files)))) is not None:
        files.append(file)
    return files


def _known(out: Path) -> Manifest | None:
    """The manifest in `out`, whose files may be missing: fetching is how they come back."""
    if (out / UNFINISHED / "plan.json").exists():
        raise FetchError(f"{out} holds an unfinished data set of another kind; finish it, or give another folder")
    if not (out / MANIFEST_NAME).exists():
        return None
    try:
        return read_manifest(out / MANIFEST_NAME)
    except DataSetError as error:
        raise FetchError(f"{error}; or remove it and fetch again, which keeps the shards that are right") from error


def _require_same(out: Path, known: Manifest, wanted: Mapping[str, HubFile], variant: str) -> None:
    """Raise FetchError unless the data set in `out` is the one that is wanted, or a part of it."""
    have = {known.tokenizer.file: known.tokenizer.sha256} | {s.file: s.sha256 for s in (*known.val, *known.train)}
    other = [name for name, sha256 in have.items() if name not in wanted or wanted[name].sha256 not in {None, sha256}]
    if other or len(known.val) != sum(name.startswith("val") for name in wanted):
        raise FetchError(
            f"{out} holds another data set than {variant} ({json.dumps(other or 'other validation shards')}), and "
            "nobody's validation set may change under a run; give another folder"
        )


def _missing(out: Path, wanted: Mapping[str, HubFile], workers: int) -> dict[str, HubFile]:
    """What is not there yet. Raises FetchError for a file of that name that is not the hub's."""
    there = [name for name in wanted if (out / name).exists()]
    with ThreadPoolExecutor(workers) as pool:  # hashing lets go of the interpreter
        whole = list(pool.map(lambda name: wanted[name].is_whole(out / name), there))
    for name, right in zip(there, whole, strict=True):
        if not right:
            raise FetchError(
                f"{out / name} is not {wanted[name].path} of {wanted[name].repo}: its size or hash differs; "
                "remove it and fetch again, or give another folder"
            )
    return {name: file for name, file in wanted.items() if name not in there}


@dataclass(frozen=True, kw_only=True, slots=True)
class _How:
    endpoint: str | None
    workers: int
    attempts: int
    progress: Progress


def _download(out: Path, missing: Mapping[str, HubFile], how: _How) -> None:
    """Bring all files, a few at once; the first error ends the others, which keep what they have."""
    parts = out / UNFINISHED
    parts.mkdir(parents=True, exist_ok=True)
    total = sum(file.bytes for file in missing.values())
    begun = sum(part.stat().st_size for part in parts.glob("*.part"))
    free = shutil.disk_usage(out).free
    if total - begun > free:
        raise FetchError(f"{out} has room for {free} bytes and {total - begun} are to come; make room and fetch again")
    stop, lock = Event(), Lock()
    with how.progress.stage("fetch", total=total) as advance, ThreadPoolExecutor(how.workers) as pool:

        def told(count: int) -> None:
            with lock:
                advance(count)

        download = Download(endpoint=how.endpoint, told=told, stop=stop, attempts=how.attempts)
        futures = [pool.submit(download, file, out / name, parts) for name, file in missing.items()]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # an error, or Ctrl-C while waiting
            stop.set()
            pool.shutdown(cancel_futures=True)
    _raise_first([future.exception() for future in futures if not future.cancelled()])


def _raise_first(errors: Sequence[BaseException | None]) -> None:
    causes = [error for error in errors if error is not None and not isinstance(error, FetchStopped)]
    if causes:
        raise causes[0]
