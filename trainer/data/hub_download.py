"""Files of a Hugging Face dataset repository: what the hub says of them, and one download that survives a broken line.

huggingface_hub (2.4) drops what it has of a file when the process ends, so the bytes are taken here, over the hub
library's own session (its proxies, its offline switch, its token): into a part file that the next call goes on with,
by a Range request. A file gets its name only after its size and its hash are the hub's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import IO

from trainer.durable import sha256_of
from trainer.errors import InputError

_CHUNK_BYTES = 1 << 20
# Seconds without a byte, or without a connection, before a request counts as broken.
_TIMEOUT_SECONDS = 30.0
_FIRST_WAIT_SECONDS = 0.5
_PASSING = (408, 429, 500, 502, 503, 504)
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class FetchError(InputError):
    """A file that could not be had. The message names it, says why, and what to do."""


class FetchStopped(Exception):  # noqa: N818 - no fault: another file's error, or Ctrl-C, ends this download as well
    """This download was told to end; what it has stays for the next call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFile:
    """A file at one commit. `sha256` is None for a small file outside large-file storage; `git_sha1` serves then."""

    repo: str
    commit: str
    path: str
    bytes: int
    sha256: str | None
    git_sha1: str

    @property
    def digest(self) -> str:
        return self.sha256 or self.git_sha1

    def is_whole(self, local: Path) -> bool:
        """Whether a local file has this size and hash. Raises OSError."""
        if local.stat().st_size != self.bytes:
            return False
        return (sha256_of(local) if self.sha256 else _git_sha1(local)) == self.digest


def list_files(repo: str, endpoint: str | None = None) -> dict[str, HubFile]:
    """Every file of a dataset repository by its path, all at the newest commit. Raises FetchError."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - a third of a second, which other verbs need not wait
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    with _explained(repo, repo):
        try:
            found = HfApi(endpoint=endpoint).dataset_info(repo, files_metadata=True, timeout=_TIMEOUT_SECONDS)
            commit, siblings = found.sha, found.siblings
        except HFValidationError as error:
            raise FetchError(f"{repo!r} is not the name of a repository ({error}); give one like owner/name") from error
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, OSError):
                raise  # an HTTP status, which the hub library calls a ValueError as well
            raise FetchError(
                f"{repo}: the answer is not a hub's ({error!r}); check HF_ENDPOINT, or a proxy that answers instead"
            ) from error
    files = {}
    for file in siblings or ():
        if commit is not None and file.size is not None and file.blob_id is not None:
            listed = HubFile(
                repo=repo,
                commit=commit,
                path=file.rfilename,
                bytes=file.size,
                sha256=file.lfs.sha256 if file.lfs else None,
                git_sha1=file.blob_id,
            )
            if not _HASH.fullmatch(listed.digest):  # it becomes a part of a file name
                raise FetchError(
                    f"{repo}: {listed.path} is listed with {listed.digest!r} instead of a hash; check HF_ENDPOINT, or "
                    "a proxy that answers instead"
                )
            files[file.rfilename] = listed
    return files


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """How files are taken. `told` hears the bytes of each piece received, `stop` ends all downloads that share it.

    A file is given up after `attempts` requests in a row that brought nothing.
    """

    endpoint: str | None
    told: Callable[[int], None]
    stop: Event
    attempts: int = 5

    def __call__(self, file: HubFile, target: Path, parts: Path) -> None:
        """Bring `file` under the name `target`, whole and verified; its part lies in `parts` meanwhile.

        Raises FetchError, FetchStopped, or OSError for the local disk.
        """
        part = parts / f"{target.name}.{file.digest[:16]}.part"
        with _explained(file.repo, file.path), _room(file, part), part.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FetchError(f"{part} is being written by another fetch; wait for it to end") from error
            if stream.tell() > file.bytes:
                _restart(stream)
            self.told(stream.tell())
            self._fill(file, stream)
            stream.flush()
            os.fsync(stream.fileno())
            if not file.is_whole(part):
                part.unlink()
                raise FetchError(
                    f"{target} came with another hash than the hub's {file.digest}, so it was deleted; "
                    "fetch again, and if it comes wrong again, suspect the disk or a proxy"
                )
            part.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)

    def _fill(self, file: HubFile, stream: IO[bytes]) -> None:
        """Ask for what is missing until nothing is; a broken line or a busy hub is asked again, after a while."""
        from httpx2 import TransportError  # noqa: PLC0415 - comes with huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

        fruitless = 0
        while (had := stream.tell()) < file.bytes:
            broken: Exception | None = None
            try:
                self._receive(file, stream)
            except TransportError as error:
                broken = error
            except HfHubHTTPError as error:
                if error.response.status_code not in _PASSING:
                    raise
                broken = error
            fruitless = 0 if stream.tell() > had else fruitless + 1
            if fruitless >= self.attempts:
                raise broken or FetchError(
                    f"{file.repo}: {file.path} ends after {had} of {file.bytes} bytes; fetch again later"
                )
            if broken and self.stop.wait(_FIRST_WAIT_SECONDS * 2**fruitless):
                raise FetchStopped

    def _receive(self, file: HubFile, stream: IO[bytes]) -> None:
        from huggingface_hub import get_session, hf_hub_url  # noqa: PLC0415
        from huggingface_hub.utils import (  # type: ignore[attr-defined] # noqa: PLC0415 - documented, not in __all__
            build_hf_headers,
            hf_raise_for_status,
        )

        url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit, endpoint=self.endpoint)
        # Ranges must count the bytes of the file, not those of a compressed copy of it.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        had = stream.tell()
        if had:
            headers["Range"] = f"bytes={had}-"
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            if had and response.status_code != 206:
                self.told(-had)
                _restart(stream)  # the whole file comes after all
            for piece in response.iter_bytes():
                if self.stop.is_set():
                    raise FetchStopped
                if stream.tell() + len(piece) > file.bytes:
                    self.told(-stream.tell())
                    _restart(stream)
                    raise FetchError(
                        f"{file.repo}: {file.path} is longer than the {file.bytes} bytes that the hub announced; "
                        "fetch again, and if it happens again, suspect a proxy"
                    )
                stream.write(piece)
                self.told(len(piece))


def _restart(stream: IO[bytes]) -> None:
    stream.seek(0)
    stream.truncate()


def _git_sha1(path: Path) -> str:
    """The name that git gives to a blob of this content; a hash to compare with, not to trust against malice."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _room(file: HubFile, part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        have = part.stat().st_size if part.exists() else 0
        raise FetchError(
            f"{part}: {error.strerror} after {have} of {file.bytes} bytes; make room and fetch again, "
            "which goes on from there"
        ) from error


@contextmanager
def _explained(repo: str, what: str) -> Iterator[None]:
    """The hub's and the network's errors as one line with a remedy. No header, so no token, is ever in it."""
    from httpx2 import HTTPError  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise FetchError(
            f"{repo} is gated: accept its terms on its page, set HF_TOKEN to a token of that account, and fetch again"
        ) from error
    except RepositoryNotFoundError as error:
        raise FetchError(
            f"{repo} is no dataset repository of the hub, or a private one: check its name, or set HF_TOKEN to a "
            "token that may read it"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise FetchError(f"{repo}: the hub answers {status} for {what}; {_remedy(status)}") from error
    except OfflineModeIsEnabled as error:
        raise FetchError(f"{repo} cannot be reached with HF_HUB_OFFLINE set; unset it and fetch again") from error
    except HTTPError as error:
        raise FetchError(
            f"{repo}: no answer for {what} ({type(error).__name__}: {error}); check the network (HTTPS_PROXY, "
            "HF_ENDPOINT) and fetch again, which goes on where this call stopped"
        ) from error


def _remedy(status: int) -> str:
    if status in {401, 403}:
        return "check the repository's name, or set HF_TOKEN to a token that may read it"
    if status == 404:
        return "check the repository's name; if files were moved there meanwhile, fetch again"
    if status in _PASSING:
        return "it is busy or down: fetch again later, which goes on where this call stopped"
    return "fetch again later"
