"""The seam between batches of Arrow and the bytes of one part.

An encoder knows rows and bytes. It knows nothing of jobs, files or networks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

Buffer = bytes | bytearray | memoryview


class Format(enum.StrEnum):
    """File formats, as the contract names them."""

    CSV = "CSV"
    JSONL = "JSONL"
    PARQUET = "PARQUET"
    ARROW = "ARROW"


class Compression(enum.StrEnum):
    """Compression around a whole text file."""

    NONE = "NONE"
    GZIP = "GZIP"
    ZSTD = "ZSTD"


class CsvDialect(enum.StrEnum):
    """Whether text that a spreadsheet would run is made harmless."""

    RAW = "RAW"
    SPREADSHEET_SAFE = "SPREADSHEET_SAFE"


class ParquetCompression(enum.StrEnum):
    """Page compression of Parquet."""

    UNCOMPRESSED = "UNCOMPRESSED"
    SNAPPY = "SNAPPY"
    ZSTD = "ZSTD"
    LZ4 = "LZ4"


class ArrowCompression(enum.StrEnum):
    """Buffer compression of Arrow IPC."""

    UNCOMPRESSED = "UNCOMPRESSED"
    LZ4 = "LZ4"
    ZSTD = "ZSTD"


@dataclass(frozen=True, slots=True)
class CsvOptions:
    """How CSV is written; see the contract's `CsvOptions`."""

    delimiter: str = ","
    header: bool = True
    null_marker: str = ""
    dialect: CsvDialect = CsvDialect.RAW


@dataclass(frozen=True, slots=True)
class ParquetOptions:
    """How Parquet is written."""

    row_group_rows: int = 122_880
    compression: ParquetCompression = ParquetCompression.ZSTD


@dataclass(frozen=True, slots=True)
class ArrowOptions:
    """How Arrow is written."""

    compression: ArrowCompression = ArrowCompression.UNCOMPRESSED


_CONTENT_TYPES = {
    Format.CSV: "text/csv",
    Format.JSONL: "application/jsonl",
    Format.PARQUET: "application/vnd.apache.parquet",
    Format.ARROW: "application/vnd.apache.arrow.stream",
}
_EXTENSIONS = {
    Format.CSV: "csv",
    Format.JSONL: "jsonl",
    Format.PARQUET: "parquet",
    Format.ARROW: "arrows",
}
_ENCODINGS = {
    Compression.NONE: ("", ""),
    Compression.GZIP: ("gzip", ".gz"),
    Compression.ZSTD: ("zstd", ".zst"),
}
_COMPRESSED = {
    Compression.GZIP: "application/gzip",
    Compression.ZSTD: "application/zstd",
}


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A format with all its options; those of other formats are not looked at."""

    format: Format
    compression: Compression = Compression.NONE
    csv: CsvOptions = field(default_factory=CsvOptions)
    parquet: ParquetOptions = field(default_factory=ParquetOptions)
    arrow: ArrowOptions = field(default_factory=ArrowOptions)

    @property
    def content_type(self) -> str:
        """Media type, without the compression."""
        return _CONTENT_TYPES[self.format]

    @property
    def file_content_type(self) -> str:
        """Media type of a file as it is stored. Around a compressed one it is that of the
        compression: named as `Content-Encoding` instead, clients would undo it and keep a
        file whose name, size and checksum are another's."""
        return _COMPRESSED.get(self.compression, self.content_type)

    @property
    def content_encoding(self) -> str:
        """`gzip`, `zstd` or empty."""
        return _ENCODINGS[self.compression][0]

    @property
    def extension(self) -> str:
        """File extension, without the leading dot, compression included."""
        return _EXTENSIONS[self.format] + _ENCODINGS[self.compression][1]

    @property
    def joinable(self) -> bool:
        """Whether several parts join into one valid file."""
        return self.format is not Format.PARQUET


class ByteSink(Protocol):
    """Takes the bytes of one part, in order. The buffer is the caller's again when
    `write` returns."""

    def write(self, data: Buffer, /) -> object:
        """Take all of `data`."""
        ...


class Encoder(Protocol):
    """Writes one part.

    Everything the encoder puts out goes to the sink it was opened with: first a prefix
    of `prefix_bytes` bytes, then the rows, then a suffix of `suffix_bytes` bytes. Parts
    of a joinable format concatenate into one valid file when every part but the first
    lacks its prefix and every part but the last its suffix. A part without rows is
    valid too.

    Calls block, release the GIL for the heavy work, and raise `ValueNotEncodable` when
    a value cannot be written losslessly. Memory stays within a few batches.
    """

    prefix_bytes: int
    suffix_bytes: int

    @property
    def buffered_bytes(self) -> int:
        """About how many bytes the rows will make that are held back now and that
        `flush` does not push out: those of an unfinished Parquet row group."""
        ...

    def write(self, batch: pa.RecordBatch) -> None:
        """Encode one batch of the schema the encoder was opened with."""
        ...

    def stage(self, batch: pa.RecordBatch) -> Callable[[], None]:
        """Do as much of `write` as a value can make fail, and leave the part as it is;
        calling the result writes the batch. So a batch that is refused leaves no trace.
        What is staged is held in memory, and is written before the next is staged, or
        never."""
        ...

    def flush(self) -> None:
        """Push out what is buffered, where that costs little, so that the sink's count
        of bytes is close to the part's size so far."""
        ...

    def close(self) -> None:
        """Write what is left, and the suffix. `suffix_bytes` holds from here on."""
        ...
