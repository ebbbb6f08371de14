"""The rows of stored parts, as one stream of CSV lines without headers.

One path for all formats: CSV goes as it is, Parquet and Arrow through exportd's own CSV
encoder, which is lossless. The event loop fetches bytes; everything else happens in the
thread that wants them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import queue
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeAlias, cast

import pyarrow as pa
from crc32c import crc32c
from isal import igzip, isal_zlib

from exportd_server.encoders.base import (
    Buffer,
    Compression,
    CsvOptions,
    Format,
    OutputFormat,
)
from exportd_server.encoders.registry import open_encoder
from exportd_server.errors import DeliveryFailed, ValueNotEncodable
from exportd_server.sinks.base import Export, Part

_BUFFER_BYTES = 1 << 20
_BUFFERS = 3
_BATCH_ROWS = 16_384
_LONE_MARKER = "\\N"
_UNREADABLE: tuple[type[Exception], ...] = (
    pa.ArrowException,
    EOFError,
    OSError,
    ValueError,
    cast("type[Exception]", isal_zlib.error),
)
"""What decoders raise for bytes that are not of their format."""


class Stopped(Exception):
    """The delivery was cancelled."""


class _End:
    """Everything of a part has been fetched."""


_News: TypeAlias = memoryview | _End | BaseException


class Feed:
    """Carries the bytes of parts from the event loop to a thread, a few buffers ahead."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._loop = asyncio.get_running_loop()
        self._free: asyncio.Queue[memoryview] = asyncio.Queue()
        for _ in range(_BUFFERS):
            self._free.put_nowait(memoryview(bytearray(_BUFFER_BYTES)))
        self._news: queue.SimpleQueue[_News] = queue.SimpleQueue()

    async def pump(self) -> None:
        """Fetch all parts in order. What goes wrong is told to the thread."""
        try:
            for part in self._parts:
                async with part.content.open() as reader:
                    while True:
                        buffer = await self._free.get()
                        count = await reader.readinto(buffer)
                        if not count:
                            break
                        self._news.put(buffer[:count])
                    self._free.put_nowait(buffer)
                self._news.put(_End())
        except asyncio.CancelledError:
            self.stop()
            raise
        except BaseException as error:  # noqa: BLE001 - raised where the bytes are read
            self._news.put(error)

    def stop(self) -> None:
        """End the thread's reading with `Stopped`."""
        self._news.put(Stopped())

    def next(self) -> memoryview | None:
        """The next bytes of the part, for the thread; None at its end."""
        news = self._news.get()
        if isinstance(news, BaseException):
            self._news.put(news)  # for whoever asks again
            raise news
        return None if isinstance(news, _End) else news

    def give_back(self, piece: memoryview) -> None:
        """The bytes were used."""
        whole = memoryview(cast("bytearray", piece.obj))
        with contextlib.suppress(RuntimeError):  # a loop that is closed wants nothing
            self._loop.call_soon_threadsafe(self._free.put_nowait, whole)


class _PartFile(io.RawIOBase):
    """The bytes of one part as a file, from `skip` on. All of them are held against the
    manifest, those that are skipped too."""

    def __init__(self, feed: Feed, part: Part, skip: int) -> None:
        self._feed = feed
        self._part = part
        self._skip = skip
        self._piece: memoryview | None = None
        self._left = memoryview(b"")
        self._crc = 0
        self._size = 0
        self._ended = False
        self.failure: BaseException | None = None
        """What the feed raised: libraries that read this file may raise another error."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:  # type: ignore[override] # typeshed's buffer is wider than what BufferedReader gives
        target = memoryview(buffer).cast("B")
        while not self._left and not self._ended:
            self._fetch()
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def finish(self) -> None:
        """Fetch what nobody asked for, and hold it all against the manifest. Raises
        `DeliveryFailed`."""
        while not self._ended:
            self._fetch()
        if self._crc != self._part.crc32c or self._size != self._part.bytes:
            raise damaged(self._part)

    def _fetch(self) -> None:
        if self._piece is not None:
            self._feed.give_back(self._piece)
            self._piece = None
        self._left = memoryview(b"")
        try:
            piece = self._feed.next()
        except BaseException as error:
            self.failure = error
            raise
        if piece is None:
            self._ended = True
            return
        self._piece = piece
        self._crc = crc32c(piece, self._crc)
        self._left = piece[max(0, self._skip - self._size) :]
        self._size += len(piece)


def damaged(part: Part) -> DeliveryFailed:
    """The stored bytes are not those that were written."""
    return DeliveryFailed(
        f"the stored bytes of {part.file_name} do not match their checksum",
        retryable=True,
    )


def csv_options(export: Export) -> CsvOptions:
    """How the lines of `csv_lines` are written; the null marker is never left to a rule."""
    csv = export.output.csv
    if export.output.format is not Format.CSV:
        csv = CsvOptions()
    marker = csv.null_marker
    if not marker and len(export.columns) == 1:
        marker = _LONE_MARKER
    return replace(csv, header=False, null_marker=marker)


def csv_lines(
    feed: Feed, export: Export, parts: Sequence[Part], spool: Path | None = None
) -> Generator[Buffer, None, None]:
    """All rows of the parts in order, in pieces of any length that end anywhere; a piece
    is good until the next is asked for. Raises `DeliveryFailed`, `Stopped`, and what the
    content raised."""
    for part in parts:
        text = export.output.format is Format.CSV
        file = _PartFile(feed, part, part.prefix_bytes if text else 0)
        try:
            yield from _lines(file, export, spool)
        except _UNREADABLE as error:
            if file.failure is not None:
                raise file.failure from error
            file.finish()  # damage has a name of its own
            raise DeliveryFailed(
                f"{part.file_name} cannot be read", retryable=False
            ) from error
        file.finish()


@contextlib.contextmanager
def spooled(
    lines: Iterator[Buffer], spool: Path | None, most: int
) -> Iterator[tuple[Iterator[Buffer], bool]]:
    """The lines, kept on the disk until all are here; False where they are not, because
    they are more than `most` bytes, or than half of what the disk has left. Then those that
    came so far are kept, and the others come as they do. Raises what `csv_lines` does."""
    try:
        kept = _open_spool(spool)
    except OSError:
        yield lines, False
        return
    with kept:
        room = min(most, _free(kept) // 2)
        size = 0
        for piece in lines:
            if size + len(piece) > room or not _wrote(kept, piece):
                kept.truncate(size)
                kept.seek(0)
                yield itertools.chain(_pieces(kept), [piece], lines), False
                return
            size += len(piece)
        kept.seek(0)
        yield _pieces(kept), True


def _open_spool(spool: Path | None) -> io.FileIO:
    # Without a buffer there is nothing that could fail when it is closed.
    return tempfile.TemporaryFile(dir=spool, buffering=0)


def _free(kept: io.FileIO) -> int:
    disk = os.fstatvfs(kept.fileno())
    return disk.f_bavail * disk.f_frsize


def _wrote(kept: io.FileIO, piece: Buffer) -> bool:
    """Write all of a piece; whether that went well."""
    left = memoryview(piece)
    try:
        while left:
            left = left[kept.write(left) :]
    except OSError:
        return False
    return True


def _pieces(kept: io.FileIO) -> Iterator[bytes]:
    while True:
        try:
            piece = kept.read(_BUFFER_BYTES)
        except OSError as error:
            raise _no_disk() from error
        if not piece:
            return
        yield piece


def _no_disk() -> DeliveryFailed:
    return DeliveryFailed(
        "rows cannot be kept on the server's disk while they are read", retryable=True
    )


def _lines(file: _PartFile, export: Export, spool: Path | None) -> Iterator[Buffer]:
    output = export.output
    if output.format is Format.CSV:
        yield from _unpacked(file, output.compression)
        return
    for batches in _batches(file, output.format, spool):
        yield from _as_csv(batches, export)


def _unpacked(file: _PartFile, compression: Compression) -> Iterator[Buffer]:
    if compression is Compression.NONE:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while count := file.readinto(buffer):
            yield buffer[:count]
        return
    source = io.BufferedReader(file, _BUFFER_BYTES)
    stream = (
        igzip.IGzipFile(fileobj=source, mode="rb")  # type: ignore[no-untyped-call] # isal's
        if compression is Compression.GZIP
        else pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")
    )
    while piece := stream.read(_BUFFER_BYTES):
        yield piece


def _batches(
    file: _PartFile, form: Format, spool: Path | None
) -> Iterator[pa.RecordBatchReader]:
    source = io.BufferedReader(file, _BUFFER_BYTES)
    if form is Format.ARROW:
        with pa.ipc.open_stream(pa.PythonFile(source, mode="r")) as reader:
            yield reader
        return
    from pyarrow import parquet  # noqa: PLC0415 - slow to load, and rarely wanted

    # Its directory is at its end: the part has to lie somewhere whole.
    with (
        _spooled(source, spool) as kept,
        parquet.ParquetFile(kept, buffer_size=_BUFFER_BYTES, pre_buffer=False) as whole,
    ):
        # Group by group: a batch that spans two would hold both.
        batches = (
            batch
            for group in range(whole.num_row_groups)
            for batch in whole.iter_batches(
                _BATCH_ROWS, row_groups=[group], use_threads=False
            )
        )
        yield pa.RecordBatchReader.from_batches(whole.schema_arrow, batches)


@contextlib.contextmanager
def _spooled(source: IO[bytes], spool: Path | None) -> Iterator[IO[bytes]]:
    try:
        kept = _open_spool(spool)
    except OSError as error:
        raise _no_disk() from error
    with kept:
        while piece := source.read(_BUFFER_BYTES):
            if not _wrote(kept, piece):
                raise _no_disk()
        kept.seek(0)
        yield kept


class _Collector:
    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Buffer, /) -> None:
        self.pieces.append(bytes(data))


def _as_csv(reader: pa.RecordBatchReader, export: Export) -> Iterator[Buffer]:
    if reader.schema.names != [column.name for column in export.columns]:
        raise ValueError("the part has other columns than the export")
    sink = _Collector()
    output = OutputFormat(Format.CSV, csv=csv_options(export))
    encoder = open_encoder(output, reader.schema, sink)
    for batch in reader:
        for piece in _slices(batch):
            try:
                encoder.write(piece)
            except ValueNotEncodable as error:
                raise DeliveryFailed(error.message, retryable=False) from error
            pieces, sink.pieces = sink.pieces, []
            yield from pieces


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in slices of about a MiB, whose text is held all at once."""
    row_bytes = batch.nbytes / max(1, batch.num_rows)
    rows = max(1, int(_BUFFER_BYTES / max(1.0, row_bytes)))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)
