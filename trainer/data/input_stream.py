"""The decompressed bytes of an input file, hashed and counted as they are read."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import zlib
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from trainer.data.documents import DocumentError

if TYPE_CHECKING:
    import zstandard
    from _typeshed import WriteableBuffer

_RAW_CHUNK_BYTES = 1 << 20
# A zstd block of 4 bytes can stand for 128 KiB: so few at a time bound what one call can return to 32 MiB.
_ZSTD_CHUNK_BYTES = 1024
_TOO_WIDE = "requires too much memory"


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class InputStream:
    """The text bytes of a file, plain or compressed by its suffix (`.gz`, `.xz`, `.zst`), from start to end.

    `raw_bytes` counts the bytes of the file itself that were read so far. Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path, *, hashed: bool = False) -> None:
        self._path = path
        self._raw = _HashedFile(path, hashed=hashed)
        buffered = io.BufferedReader(self._raw, _RAW_CHUNK_BYTES)
        self._stream: _Readable
        self._broken: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
        match path.suffix:
            case ".gz":
                self._stream = gzip.GzipFile(fileobj=buffered)
            case ".xz":
                self._stream = lzma.LZMAFile(buffered)  # noqa: SIM115 - closed with the raw file under it
            case ".zst":
                from zstandard import ZstdError  # noqa: PLC0415 - only for those who have such files

                self._broken = (*self._broken, ZstdError)
                self._stream = _Zstd(buffered)
            case _:
                self._stream = buffered
        self._offset = 0

    @property
    def raw_bytes(self) -> int:
        return self._raw.position

    def read(self, size: int) -> bytes:
        """The next `size` bytes of text, fewer at the end only. Raises DocumentError where compressed data breaks."""
        try:
            data = self._stream.read(size)
        except self._broken as error:
            if _TOO_WIDE in str(error):
                raise DocumentError(
                    f"{self._path}: a zstd frame looks back over more than 128 MiB; compress it again without --long"
                ) from error
            raise DocumentError(
                f"{self._path}: the compressed data breaks at byte {self.raw_bytes} of the file or before, after "
                f"{self._offset} bytes of text were read ({error}); get the file again"
            ) from error
        self._offset += len(data)
        return data

    def sha256(self) -> str:
        """Hex digest of the whole file, with whatever of it is not read yet."""
        while self._raw.read(_RAW_CHUNK_BYTES):
            pass
        return self._raw.digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._raw.close()


class _HashedFile(io.RawIOBase):
    def __init__(self, path: Path, *, hashed: bool) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._hashed = hashed
        self.digest = hashlib.sha256()
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        count = self._file.readinto(view) or 0
        if self._hashed:
            self.digest.update(view[:count])
        self.position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Zstd:
    """Frames one after the other. The library's own reader ends without a word where a file is cut short."""

    def __init__(self, raw: _Readable) -> None:
        from zstandard import ZstdDecompressor  # noqa: PLC0415

        self._raw = raw
        self._decompressor = ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready: deque[memoryview] = deque()
        self._ready_bytes = 0
        self._ended = False

    def read(self, size: int, /) -> bytes:
        while self._ready_bytes < size and not self._ended:
            self._fill()
        taken: list[memoryview] = []
        left = size
        while left and self._ready:
            piece = self._ready.popleft()
            if len(piece) > left:
                self._ready.appendleft(piece[left:])
                piece = piece[:left]
            taken.append(piece)
            left -= len(piece)
        self._ready_bytes -= size - left
        return b"".join(taken)

    def _fill(self) -> None:
        chunk = self._raw.read(_ZSTD_CHUNK_BYTES)
        if not chunk:
            if self._frame is not None:
                raise EOFError("the file ends within a frame")
            self._ended = True
        while chunk:
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            data = self._frame.decompress(chunk)
            chunk = b""
            if data:
                self._ready.append(memoryview(data))
                self._ready_bytes += len(data)
            if self._frame.eof:
                chunk = self._frame.unused_data
                self._frame = None
