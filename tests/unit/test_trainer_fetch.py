"""Fetching the public shards from a stand-in of the hub that breaks off, lies and refuses; and adopting shards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from huggingface_hub import close_session

from trainer.data.adopting import adopt
from trainer.data.encoding import Encoder, EncoderSettings
from trainer.data.fetch import VARIANTS, fetch
from trainer.data.hub_download import FetchError, list_files
from trainer.data.manifest import MANIFEST_NAME, DataSet, DataSetError
from trainer.data.shards import BOS, HEADER_BYTES, ShardError, open_shard, write_shard
from trainer.data.tokenizer import TokenizerError, train_tokenizer
from trainer.data.verification import verify
from trainer.errors import InputError

SECRET = "hf_secretsecretsecret"  # noqa: S105 - no secret
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "for",
    "on",
    "that",
    "with",
    "as",
    "it",
    "was",
    "at",
    "by",
    "from",
    "are",
]


@dataclass(eq=False)
class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of the hub, and a CDN under another name; it fails where it is told to."""

    files: dict[str, bytes]
    repo: str = "some/where"
    small: set[str] = field(default_factory=set)
    """Files outside large-file storage: their hash is git's."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """By file: after how many bytes each next answer breaks off."""
    lies: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """By a part of the path: status and headers of the answer."""
    ranges: bool = True
    html: bool = False
    seen: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """Of each request: path, Range, Authorization."""

    def __post_init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, name: str) -> list[str | None]:
        """The Range of each request for the content of a file."""
        return [span for path, span, _ in self.seen if path.startswith("/cdn/") and path.endswith(name)]

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            entry = {"rfilename": name, "size": len(data), "blobId": blob}
            if name not in self.small:
                sha256 = hashlib.sha256(data).hexdigest()
                entry |= {"lfs": {"sha256": sha256, "size": len(data), "pointerSize": 134}}
            siblings.append(entry)
        return {"id": self.repo, "sha": "c0ffee" + "0" * 34, "siblings": siblings}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server
        hub.seen.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        for part, (status, headers) in hub.refusals.items():
            if part in self.path:
                return self._answer(status, b"refused", headers)
        if self.path.startswith("/api/"):
            if hub.html:
                return self._answer(200, b"<html>Log in to the hotel's network</html>", {})
            if self.path != f"/api/datasets/{hub.repo}?blobs=true":
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return self._answer(200, json.dumps(hub.listing()).encode(), {})
        name = self.path.removeprefix(f"/datasets/{hub.repo}/resolve/c0ffee{'0' * 34}/")
        if not self.path.startswith("/cdn/"):
            return self._answer(302, b"", {"Location": f"http://localhost:{hub.server_port}/cdn/{name}"})
        return self._content(self.path.removeprefix("/cdn/"))

    def _content(self, name: str) -> None:
        data = self.server.lies.get(name, self.server.files[name])
        start, status, headers = 0, 200, {}
        if self.server.ranges and (span := self.headers.get("Range")):
            start, status = int(span.removeprefix("bytes=").removesuffix("-")), 206
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        cuts = self.server.cuts.get(name, [])
        self._answer(status, data[start:], headers, send=cuts.pop(0) if cuts else None)

    def _answer(self, status: int, data: bytes, headers: dict[str, str], send: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data if send is None else data[:send])


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a repository in the layout of the competition: three train shards, cut within documents."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 60)) for _ in range(40)]
    folder = tmp_path_factory.mktemp("published")
    (folder / "m").write_bytes(train_tokenizer(iter(texts), vocab_size=300))
    encoder = Encoder(EncoderSettings(tokenizer=folder / "m"))
    at = VARIANTS["sp1024"]
    files = {at.tokenizer: (folder / "m").read_bytes(), "README.md": b"# Shards", "datasets/manifest.json": b"{}"}
    train, val = encoder.encode(texts[:30]).tokens, encoder.encode(texts[30:]).tokens
    for path, tokens in [
        *((at.shard("train", number), piece) for number, piece in enumerate(np.array_split(train, 3))),
        (at.shard("val", 0), val),
    ]:
        write_shard(folder / "s", tokens)
        files[path] = (folder / "s").read_bytes()
    return files


@pytest.fixture
def hub(published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    close_session()
    with Hub(files=dict(published), small={VARIANTS["sp1024"].tokenizer}) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        close_session()
        server.shutdown()
        thread.join()


def _fetch(hub: Hub, out: Path, *, shards: int = 2, attempts: int = 5) -> DataSet:
    return fetch("sp1024", out, shards=shards, repo=hub.repo, endpoint=hub.endpoint, attempts=attempts, workers=2)


def _train(number: int) -> str:
    return VARIANTS["sp1024"].shard("train", number)


def test_brings_plain_verified_files_and_their_manifest(hub: Hub, tmp_path: Path) -> None:
    dataset = _fetch(hub, tmp_path)
    names = ["manifest.json", "tokenizer.model", "train_000000.bin", "train_000001.bin", "val_000000.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not any(path.is_symlink() for path in tmp_path.iterdir())
    assert (tmp_path / "train_000001.bin").read_bytes() == hub.files[_train(1)]
    assert dataset.manifest.val_documents == 10
    assert "some/where at c0ffee" in dataset.manifest.split
    assert verify(tmp_path).faults == ()


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_us(hub: Hub, tmp_path: Path) -> None:
    _fetch(hub, tmp_path)
    for path, _, authorization in hub.seen:
        assert authorization == (None if path.startswith("/cdn/") else f"Bearer {SECRET}")


def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    first = _fetch(hub, tmp_path)
    hub.seen.clear()
    assert _fetch(hub, tmp_path) == first
    assert _fetch(hub, tmp_path, shards=1) == first
    assert not any(path.startswith("/cdn/") for path, _, _ in hub.seen)


def test_more_shards_extend_the_data_set(hub: Hub, tmp_path: Path) -> None:
    small = _fetch(hub, tmp_path, shards=1)
    hub.seen.clear()
    large = _fetch(hub, tmp_path, shards=3)
    brought = sorted(path for path, _, _ in hub.seen if path.startswith("/cdn/"))
    assert brought == [f"/cdn/{_train(1)}", f"/cdn/{_train(2)}"]
    assert len(large.train_shards) == 3
    assert large.manifest.val == small.manifest.val
    assert large.manifest.val_sha256 == small.manifest.val_sha256
    assert verify(tmp_path).faults == ()


def test_a_broken_line_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[_train(0)] = [700, 300]
    _fetch(hub, tmp_path)
    assert hub.asked("train_000000.bin") == [None, "bytes=700-", "bytes=1000-"]
    assert (tmp_path / "train_000000.bin").read_bytes() == hub.files[_train(0)]


def test_a_later_call_goes_on_where_a_dead_one_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[_train(0)] = [700, 0]
    with pytest.raises(FetchError, match=r"train_000000.*no answer|no answer.*train_000000"):
        _fetch(hub, tmp_path, attempts=1)
    assert not (tmp_path / "train_000000.bin").exists()
    assert not (tmp_path / MANIFEST_NAME).exists()
    hub.seen.clear()
    _fetch(hub, tmp_path)
    assert hub.asked("train_000000.bin") == ["bytes=700-"]
    assert verify(tmp_path).faults == ()


def test_a_server_without_ranges_sends_the_file_anew(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[_train(0)], hub.ranges = [700], False
    _fetch(hub, tmp_path)
    assert hub.asked("train_000000.bin") == [None, "bytes=700-"]
    assert (tmp_path / "train_000000.bin").read_bytes() == hub.files[_train(0)]


@pytest.mark.parametrize("path", [_train(1), VARIANTS["sp1024"].tokenizer], ids=["large", "small"])
def test_a_flipped_byte_is_caught_by_its_hash_and_the_file_deleted(hub: Hub, tmp_path: Path, path: str) -> None:
    good = hub.files[path]
    hub.lies[path] = good[:-1] + bytes([good[-1] ^ 1])
    name = "tokenizer.model" if path.endswith("model") else "train_000001.bin"
    with pytest.raises(FetchError, match=rf"{name} came with another hash.*deleted.*fetch again"):
        _fetch(hub, tmp_path)
    assert not list(tmp_path.rglob(f"{name}*"))
    hub.lies.clear()
    _fetch(hub, tmp_path)
    assert (tmp_path / name).read_bytes() == good


def test_a_file_longer_than_announced_is_not_taken(hub: Hub, tmp_path: Path) -> None:
    hub.lies[_train(0)] = hub.files[_train(0)] + b"more"
    with pytest.raises(FetchError, match=r"train_000000.bin is longer than the \d+ bytes"):
        _fetch(hub, tmp_path)
    assert not (tmp_path / "train_000000.bin").exists()


@pytest.mark.parametrize(
    ("part", "answer", "message"),
    [
        ("/api/", (401, {}), "the hub answers 401 for some/where; check the repository's name, or set HF_TOKEN"),
        ("/api/", (404, {"X-Error-Code": "RepoNotFound"}), "no dataset repository of the hub"),
        ("/api/", (403, {"X-Error-Code": "GatedRepo"}), "is gated: accept its terms.*HF_TOKEN"),
        ("/api/", (500, {}), "the hub answers 500 for some/where; it is busy or down: fetch again later"),
        ("/cdn/", (401, {}), "the hub answers 401 for .*; check .* or set HF_TOKEN"),
        ("/cdn/", (404, {"X-Error-Code": "EntryNotFound"}), "the hub answers 404 for .*; check the repository's name"),
        ("/cdn/", (503, {}), "the hub answers 503 for .*; it is busy or down: fetch again later"),
        ("/cdn/", (410, {}), "the hub answers 410 for .*; fetch again later"),
    ],
)
def test_refusals_are_one_line_with_a_remedy_and_without_the_token(
    hub: Hub, tmp_path: Path, part: str, answer: tuple[int, dict[str, str]], message: str
) -> None:
    hub.refusals[part] = answer
    with pytest.raises(FetchError, match=message) as caught:
        _fetch(hub, tmp_path, attempts=1)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.refusals["train_000000"] = (503, {})
    asked = hub.seen

    class Recovering(list[tuple[str, str | None, str | None]]):
        def append(self, item: tuple[str, str | None, str | None]) -> None:
            super().append(item)
            if "train_000000" in item[0] and len([1 for path, _, _ in self if "train_000000" in path]) == 2:
                hub.refusals.clear()

    hub.seen = Recovering(asked)
    _fetch(hub, tmp_path)
    assert (tmp_path / "train_000000.bin").read_bytes() == hub.files[_train(0)]


def test_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FetchError, match=r"no answer for some/where \(ConnectError.*check the network"):
        fetch("sp1024", tmp_path, shards=1, repo=hub.repo, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        _fetch(hub, tmp_path)


def test_what_answers_is_no_hub(hub: Hub, tmp_path: Path) -> None:
    hub.html = True
    with pytest.raises(FetchError, match="the answer is not a hub's"):
        _fetch(hub, tmp_path)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (("sp77", 1, "some/where"), "no variant 'sp77'; there are sp1024, sp4096, sp8192"),
        (("sp1024", 0, "some/where"), "0 train shards"),
        (("sp1024", 4, "some/where"), "has 3 train shards of sp1024, fewer than 4; ask for 3"),
        (("sp4096", 1, "some/where"), "has no datasets/tokenizers/fineweb_4096_bpe.model.*--repo"),
        (("sp1024", 1, "no such name"), "is not the name of a repository"),
        (("sp1024", 1, "some/other"), "some/other is no dataset repository"),
    ],
)
def test_wishes_that_cannot_be_had(hub: Hub, tmp_path: Path, wish: tuple[str, int, str], message: str) -> None:
    variant, shards, repo = wish
    with pytest.raises(FetchError, match=message):
        fetch(variant, tmp_path, shards=shards, repo=repo, endpoint=hub.endpoint)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_it_has(hub: Hub, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = len(hub.files[_train(0)]) - 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(FetchError, match=rf"File too large after {limit} of \d+ bytes; make room"):
            _fetch(hub, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.bin"))
    hub.seen.clear()
    _fetch(hub, tmp_path)
    assert f"bytes={limit}-" in [span for path, span, _ in hub.seen if path.startswith("/cdn/")]


def test_two_fetches_do_not_write_one_part(hub: Hub, tmp_path: Path) -> None:
    parts = tmp_path / ".unfinished"
    parts.mkdir()
    digest = hashlib.sha256(hub.files[_train(0)]).hexdigest()
    with (parts / f"train_000000.bin.{digest[:16]}.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match=r"train_000000.*is being written by another fetch"):
            _fetch(hub, tmp_path)
    _fetch(hub, tmp_path)


def test_nothing_foreign_is_overwritten(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "train_000000.bin").write_bytes(b"mine")
    with pytest.raises(FetchError, match=r"train_000000.bin is not datasets/.*remove it and fetch again"):
        _fetch(hub, tmp_path)
    assert (tmp_path / "train_000000.bin").read_bytes() == b"mine"


def test_another_data_set_is_not_extended(hub: Hub, tmp_path: Path) -> None:
    _fetch(hub, tmp_path)
    write_shard(tmp_path / "s", open_shard(tmp_path / "val_000000.bin")[:-5])
    hub.files[VARIANTS["sp1024"].shard("val", 0)] = (tmp_path / "s").read_bytes()
    before = (tmp_path / MANIFEST_NAME).read_bytes()
    with pytest.raises(FetchError, match=r"another data set than sp1024.*val_000000.bin"):
        _fetch(hub, tmp_path, shards=3)
    assert (tmp_path / MANIFEST_NAME).read_bytes() == before
    (tmp_path / MANIFEST_NAME).write_text('{"version": 1}')
    with pytest.raises(FetchError, match=r"has version 1, .*remove it and fetch again"):
        _fetch(hub, tmp_path)


def test_an_unfinished_preparation_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "plan.json").write_text("{}")
    with pytest.raises(FetchError, match="unfinished data set"):
        _fetch(hub, tmp_path)


def test_a_lost_or_damaged_shard_is_brought_back(hub: Hub, tmp_path: Path) -> None:
    _fetch(hub, tmp_path)
    path = tmp_path / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FetchError, match="size or hash differs; remove it and fetch again"):
        _fetch(hub, tmp_path)
    path.unlink()
    _fetch(hub, tmp_path)
    assert verify(tmp_path).faults == ()


def test_the_listing_names_size_and_hash(hub: Hub, tmp_path: Path) -> None:
    files = list_files(hub.repo, hub.endpoint)
    tokenizer = files[VARIANTS["sp1024"].tokenizer]
    assert tokenizer.sha256 is None
    assert len(tokenizer.digest) == 40
    assert files[_train(0)].digest == hashlib.sha256(hub.files[_train(0)]).hexdigest()
    (tmp_path / "x").write_bytes(b"x" * tokenizer.bytes)
    assert not tokenizer.is_whole(tmp_path / "x")


def test_a_hash_that_is_none_never_becomes_a_file_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = hub.listing()
    for sibling in listing["siblings"]:
        if sibling["rfilename"] == _train(1):
            sibling["lfs"]["sha256"] = "/../../../outside"
    monkeypatch.setattr(hub, "listing", lambda: listing)
    with pytest.raises(
        FetchError, match=r"train_000001\.bin is listed with '/\.\./\.\./\.\./outside' instead of a hash"
    ):
        _fetch(hub, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def shards(published: dict[str, bytes], tmp_path: Path) -> Path:
    """A folder of public shards under their public names, and a tokenizer outside."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path, data in published.items():
        if path.endswith(".bin"):
            (folder / Path(path).name).write_bytes(data)
    (tmp_path / "fineweb_1024_bpe.model").write_bytes(published[VARIANTS["sp1024"].tokenizer])
    return folder


def test_adopts_public_names_with_a_tokenizer_from_elsewhere(shards: Path) -> None:
    dataset = adopt(shards, tokenizer=shards.parent / "fineweb_1024_bpe.model", split="the first ten")
    assert [path.name for path in dataset.train_shards] == [f"fineweb_train_00000{n}.bin" for n in range(3)]
    assert dataset.tokenizer_path == shards / "tokenizer.model"
    assert dataset.manifest.train_documents == 30
    assert dataset.manifest.split == "the first ten"
    assert DataSet.load(shards) == dataset
    assert verify(shards).faults == ()


def test_adopts_named_shards_with_a_tokenizer_beside_them(shards: Path) -> None:
    (shards.parent / "fineweb_1024_bpe.model").rename(shards / "own.model")
    dataset = adopt(shards, tokenizer="own.model", train=["fineweb_train_000000.bin"], val=["fineweb_val_000000.bin"])
    assert dataset.manifest.tokenizer.file == "own.model"
    assert len(dataset.train_shards) == 1


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / MANIFEST_NAME).write_text("{}"), DataSetError, "manifest.json is there already.*remove it"),
        (lambda d: (d / ".unfinished").mkdir(), DataSetError, "unfinished data set.*finish it"),
        (lambda d: (d / "fineweb_val_000000.bin").unlink(), DataSetError, r"holds no shard \*val\*.bin"),
        (lambda d: (d / "fineweb_val_000000.bin").rename(d / "train_val.bin"), DataSetError, "both for training"),
        (lambda d: (d / "fineweb_train_000000.bin").unlink(), DataSetError, f"000001.bin: offset {HEADER_BYTES} .*BOS"),
        (lambda d: (d / "fineweb_train_000001.bin").write_bytes(b"x"), ShardError, "000001.bin: 1 bytes at offset 0"),
        (
            lambda d: write_shard(d / "fineweb_train_000002.bin", np.array([BOS, 7, 300], dtype=np.uint16)),
            ShardError,
            f"000002.bin: offset {HEADER_BYTES + 4} holds token 300, outside the vocabulary of 300",
        ),
        (lambda d: (d / "fineweb_train_000001.bytes").write_bytes(b""), DataSetError, "no byte sidecar"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"other"), DataSetError, "tokenizer.model is another tokenizer"),
        (
            lambda d: (d.parent / "fineweb_1024_bpe.model").write_bytes(b"junk"),
            TokenizerError,
            "is not a SentencePiece model",
        ),
        (
            lambda d: write_shard(d / "fineweb_val_000000.bin", np.array([BOS], dtype=np.uint16)),
            DataSetError,
            "no text to score",
        ),
    ],
)
def test_what_cannot_be_adopted_is_refused(shards: Path, damage: Any, error: type[InputError], message: str) -> None:
    damage(shards)
    before = (shards / MANIFEST_NAME).exists()
    with pytest.raises(error, match=message):
        adopt(shards, tokenizer=shards.parent / "fineweb_1024_bpe.model")
    assert (shards / MANIFEST_NAME).exists() == before
