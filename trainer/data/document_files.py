"""Files of documents: JSON lines and plain text, each plain or compressed, and parquet; streamed, cut, not parsed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.data.defaults import MAX_DOCUMENT_BYTES
from trainer.data.documents import Document, DocumentError, RawDocuments, TextRule, shown_name
from trainer.data.input_stream import InputStream
from trainer.durable import sha256_of

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

# Text read, and so handed on, in one go; also the size of a worker's task.
BLOCK_BYTES = 1 << 20
_COMPRESSED = (".gz", ".xz", ".zst")
_MOST_ROWS, _MOST_ROW_BYTES = 256, 4 << 20
_SOURCE_COLUMNS = ("src", "source", "url")
_BOM = b"\xef\xbb\xbf"

Form = Literal["json", "text", "parquet"]


def form_of(path: Path) -> Form:
    """By the suffix. Raises DocumentError, naming the accepted ones, for any other file."""
    name = path.with_suffix("") if path.suffix in _COMPRESSED else path
    match name.suffix:
        case ".jsonl" | ".json":
            return "json"
        case ".txt":
            return "text"
        case ".parquet" if name == path:
            return "parquet"
    raise DocumentError(
        f"{path}: documents are read from .jsonl, .json (one object a line) and .txt files, each plain or with .gz, "
        ".xz or .zst after it, and from .parquet files; convert it or leave it out"
    )


class DocumentFile:
    """One input file. `raw_bytes` grows while `batches` runs; `sha256` is known after a hashed run to the end.

    `max_document_bytes` bounds a JSON line, or the text of a document; nothing longer is ever held in memory.
    Raises DocumentError for a suffix that is not read.
    """

    def __init__(
        self, path: Path, *, text_rule: TextRule | None = None, max_document_bytes: int = MAX_DOCUMENT_BYTES
    ) -> None:
        self._path, self._form = path, form_of(path)
        self._rule = text_rule or TextRule()
        self._limit = max_document_bytes
        self.raw_bytes = 0
        self.sha256 = ""

    def batches(self, *, hashed: bool = False) -> Iterator[RawDocuments]:
        """All documents in order, some `BLOCK_BYTES` at a time. Raises OSError or DocumentError."""
        if self._form == "parquet":
            yield from self._parquet()
            if hashed:
                self.sha256 = sha256_of(self._path)
            return
        with InputStream(self._path, hashed=hashed) as stream:
            for batch in self._cut(stream):
                self.raw_bytes = stream.raw_bytes
                yield batch
            if hashed:
                self.sha256 = stream.sha256()
            self.raw_bytes = stream.raw_bytes

    def _cut(self, stream: InputStream) -> Iterator[RawDocuments]:
        if self._form == "json" or self._rule.cut == "line":
            return self._lines(stream)
        if self._rule.cut == "blank-line":
            return self._paragraphs(stream)
        return self._separated(stream) if self._rule.cut == "separator" else self._whole(stream)

    def _raw(self, payloads: Sequence[bytes], lines: Sequence[int], offsets: Sequence[int]) -> RawDocuments:
        json = self._form == "json"
        return RawDocuments(
            file=str(self._path),
            form="json" if json else "text",
            payloads=payloads,
            lines=lines,
            offsets=offsets,
            src="" if json else shown_name(self._path),
        )

    def _lines(self, stream: InputStream) -> Iterator[RawDocuments]:
        number = 1
        for offset, pieces in self._pieces(stream, b"\n"):
            payloads, lines, offsets, at = [], [], [], offset
            for line, piece in enumerate(pieces, start=number):
                if piece and not piece.isspace():
                    payloads.append(piece if self._form == "json" else piece.rstrip(b"\r"))
                    lines.append(line)
                    offsets.append(at)
                at += len(piece) + 1
            number += len(pieces)
            yield self._raw(payloads, lines, offsets)

    def _separated(self, stream: InputStream) -> Iterator[RawDocuments]:
        separator = self._rule.separator.encode("utf-8")
        number = 1
        for offset, pieces in self._pieces(stream, separator):
            payloads, lines, offsets, at = [], [], [], offset
            for piece in pieces:
                text = piece.lstrip(b"\r\n")
                lead = len(piece) - len(text)
                if text and not text.isspace():
                    payloads.append(text.rstrip(b"\r\n"))
                    lines.append(number + piece.count(b"\n", 0, lead))
                    offsets.append(at + lead)
                number += piece.count(b"\n") + separator.count(b"\n")
                at += len(piece) + len(separator)
            yield self._raw(payloads, lines, offsets)

    def _paragraphs(self, stream: InputStream) -> Iterator[RawDocuments]:
        number, begun, start, size = 1, 1, 0, 0
        paragraph: list[bytes] = []
        for offset, pieces in self._pieces(stream, b"\n"):
            payloads, lines, offsets, at = [], [], [], offset
            for line, piece in enumerate(pieces, start=number):
                if piece and not piece.isspace():
                    if not paragraph:
                        begun, start, size = line, at, 0
                    paragraph.append(piece)
                    size += len(piece) + 1
                    if size > self._limit:
                        raise self._too_long(begun, start)
                elif paragraph:
                    payloads.append(b"\n".join(paragraph).rstrip(b"\r"))
                    lines.append(begun)
                    offsets.append(start)
                    paragraph = []
                at += len(piece) + 1
            number += len(pieces)
            yield self._raw(payloads, lines, offsets)
        if paragraph:
            yield self._raw([b"\n".join(paragraph).rstrip(b"\r")], [begun], [start])

    def _whole(self, stream: InputStream) -> Iterator[RawDocuments]:
        text = stream.read(self._limit + 1)
        if len(text) > self._limit:
            raise self._too_long(1, 0)
        start = len(_BOM) if text.startswith(_BOM) else 0
        if text:
            yield self._raw([text[start:]], [1], [start])

    def _pieces(self, stream: InputStream, separator: bytes) -> Iterator[tuple[int, list[bytes]]]:
        """The text cut at the separator: (offset of the first piece, pieces) for each block; the separators go."""
        rest, offset, newlines = b"", 0, 1
        # Reading as much again as is pending keeps a long piece from being searched over and over.
        while block := stream.read(max(BLOCK_BYTES, len(rest))):
            if not rest and not offset and block.startswith(_BOM):
                block, offset = block[len(_BOM) :], len(_BOM)
            pieces = (rest + block).split(separator)
            rest = pieces.pop()
            if pieces:
                longest = max(map(len, pieces))
                if longest > self._limit:
                    self._refuse(pieces, offset, newlines, separator)
                yield offset, pieces
                offset += sum(map(len, pieces)) + len(separator) * len(pieces)
                newlines += sum(piece.count(b"\n") for piece in pieces) + separator.count(b"\n") * len(pieces)
            if len(rest) > self._limit:
                raise self._too_long(newlines, offset)
        if rest:
            yield offset, [rest]

    def _refuse(self, pieces: list[bytes], offset: int, line: int, separator: bytes) -> None:
        for piece in pieces:
            if len(piece) > self._limit:
                raise self._too_long(line, offset)
            offset += len(piece) + len(separator)
            line += piece.count(b"\n") + separator.count(b"\n")

    def _too_long(self, line: int, offset: int) -> DocumentError:
        what, remedy = "the document", "cut the file into documents (--txt-documents)"
        if self._form == "json":
            what, remedy = "the line", "split it into documents"
        return DocumentError(
            f"{self._path}, line {line}, offset {offset}: {what} that begins here is longer than {self._limit} bytes; "
            f"{remedy} or raise --max-document-bytes"
        )

    def _parquet(self) -> Iterator[RawDocuments]:
        """By batches of rows, read through a small buffer: a row group can be larger than the memory."""
        import pyarrow as pa  # noqa: PLC0415 - a heavy import, for parquet only
        from pyarrow import parquet  # noqa: PLC0415

        size = self._path.stat().st_size
        row = 0
        try:
            with parquet.ParquetFile(self._path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
                source = self._source_column(file.schema_arrow)
                columns = ["text"] if source is None else ["text", source]
                total = max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=_rows_at_once(file), columns=columns, use_threads=False):
                    yield self._rows(batch, source, row)
                    row += batch.num_rows
                    self.raw_bytes = size * row // total
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            raise DocumentError(f"{self._path}: broken parquet after row {row} ({reason}); get it again") from error
        except OSError as error:
            if error.errno is not None:
                raise
            reason = " ".join(str(error).split())  # how the reader reports broken pages
            raise DocumentError(f"{self._path}: broken parquet after row {row} ({reason}); get it again") from error

    def _source_column(self, schema: pa.Schema) -> str | None:
        import pyarrow as pa  # noqa: PLC0415

        def is_text(name: str) -> bool:
            kind = schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            return kind in {pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()}

        if schema.names.count("text") != 1 or not is_text("text"):
            columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
            raise DocumentError(
                f"{self._path}: needs one column `text` of strings, but has {columns}; rename the column that holds "
                "the text"
            )
        return next((name for name in _SOURCE_COLUMNS if schema.names.count(name) == 1 and is_text(name)), None)

    def _rows(self, batch: pa.RecordBatch, source: str | None, before: int) -> RawDocuments:
        payloads = [text or b"" for text in _byte_strings(batch.column("text"))]
        for number, payload in enumerate(payloads, start=before + 1):
            if len(payload) > self._limit:
                raise DocumentError(
                    f"{self._path}, row {number}: the text is longer than {self._limit} bytes; "
                    "split it or raise --max-document-bytes"
                )
        sources = None
        if source is not None:
            sources = [(src or b"").decode("utf-8", "replace") for src in _byte_strings(batch.column(source))]
        return RawDocuments(
            file=str(self._path),
            form="text",
            payloads=payloads,
            lines=range(before + 1, before + 1 + len(payloads)),
            sources=sources,
        )


def read_documents(
    path: Path, *, text_rule: TextRule | None = None, max_document_bytes: int = MAX_DOCUMENT_BYTES
) -> Iterator[Document]:
    """Stream the documents of one file, those without text too. Raises DocumentError, or OSError."""
    for batch in DocumentFile(path, text_rule=text_rule, max_document_bytes=max_document_bytes).batches():
        yield from batch.documents()


def _rows_at_once(file: parquet.ParquetFile) -> int:
    """Rows of some megabytes on average in the row group that has the longest."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_MOST_ROWS, _MOST_ROW_BYTES // max(1, longest)))


def _byte_strings(column: pa.Array) -> list[Any]:
    """Bytes or None of each row: text that is not UTF-8 must not fail before its row can be named."""
    import pyarrow as pa  # noqa: PLC0415

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.type == pa.string_view():
        column = column.cast(pa.large_string())
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
    values: list[Any] = (column if binary is None else column.cast(binary)).to_pylist()
    return values
