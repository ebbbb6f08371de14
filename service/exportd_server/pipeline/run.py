"""Runs one shard: batches from a source, through an encoder, into parts of the store.

Two threads: one reads, one encodes and writes. The pipeline knows nothing of leases or
jobs' states; whoever runs it says what to do when a part is finished.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from exportd_server.encoders.base import Encoder, OutputFormat
from exportd_server.encoders.registry import open_encoder
from exportd_server.errors import ValueNotEncodable
from exportd_server.pipeline.budget import Handover, HandoverClosed
from exportd_server.pipeline.digest import HashingSink, PartDigest
from exportd_server.pipeline.sift import line, sift
from exportd_server.platform import metrics_exports as metrics
from exportd_server.platform.malloc import release_memory_after
from exportd_server.platform.threads import daemon_thread
from exportd_server.sources.base import BatchStream, Query, Shard, Source
from exportd_server.sources.loose import LooseBatch
from exportd_server.store.base import Buffer, OutputStore, PartWriter
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind

_Rows: TypeAlias = pa.RecordBatch | LooseBatch

MIN_PIECE_ROWS = 1024
"""Fewer rows at a time cost more than they save."""


class Stopped(Exception):
    """The run was cancelled."""


@dataclass(frozen=True, slots=True)
class PartLimits:
    """When to begin a new part; None: never for that reason."""

    max_rows: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class FinishedPart:
    """A part that is durable in the store, and so is the error part with the rows that
    it should have had, if there are any. `last`: none of the shard comes after it; else
    one may."""

    key: OutputKey
    rows: int
    digest: PartDigest
    errors: FinishedPart | None = None
    last: bool = False


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What to run. `done_parts` and the like count what an earlier attempt finished;
    `done_bytes` includes its error parts. `skip_errors` leaves rows out that cannot be
    written and tells them in error parts, instead of ending the run."""

    source: Source
    query: Query
    shard: Shard
    output: OutputFormat
    limits: PartLimits
    prefix: JobPrefix
    token: int
    done_parts: int = 0
    done_rows: int = 0
    done_bytes: int = 0
    done_row_errors: int = 0
    skip_errors: bool = False


class ShardRun:
    """One run of a shard. Call it in a thread; it blocks until the shard is written.

    `commit` is called for each finished part, in order, and returns once the part is
    recorded, the last one perhaps before; when it raises, the run ends with that error.
    `check` is called with the shard's rows, bytes and refused rows so far, finished parts
    included, after each piece of work, and ends the run by raising, too. `rows`, `bytes`,
    which has those of error parts as well, and `row_errors` may be read from any thread.

    Raises what the source, the encoder, the store, `commit` or `check` raised, or
    `Stopped` after `cancel`; an unfinished part is then gone.
    """

    def __init__(
        self,
        task: ShardTask,
        store: OutputStore,
        *,
        commit: Callable[[FinishedPart], None],
        check: Callable[[int, int, int], None],
        max_bytes_in_flight: int,
    ) -> None:
        self._task = task
        self._store = store
        self._commit = commit
        self._check = check
        self._handover: Handover[_Rows] = Handover(max_bytes_in_flight)
        self._lock = threading.Lock()
        self._stream: BatchStream | None = None
        self._cancelled = False
        self._silent_since: float | None = None
        self._source_seconds = 0.0
        self._encode_seconds = 0.0
        self._writing = _Stopwatch()
        self._sequence = task.done_parts
        self._finished_rows = task.done_rows
        self._finished_bytes = task.done_bytes
        self._finished_row_errors = task.done_row_errors
        self.rows = task.done_rows
        self.bytes = task.done_bytes
        self.row_errors = task.done_row_errors

    def __call__(self) -> None:
        """Write the shard's parts."""
        try:
            self._run()
        finally:
            metrics.source_stage.observe(self._source_seconds)
            metrics.encode_stage.observe(self._encode_seconds)
            metrics.write_stage.observe(self._writing.seconds)
            written = self.bytes - self._task.done_bytes
            release_memory_after(self._handover.handed_over + written)

    def _run(self) -> None:
        try:
            self._run_pipeline()
        except HandoverClosed:
            raise Stopped from None
        except BaseException:
            # A cancel makes the source fail in whatever way its driver does.
            if self._cancelled:
                raise Stopped from None
            raise

    def cancel(self) -> None:
        """Stop soon; from any thread, at any time."""
        with self._lock:
            self._cancelled = True
            stream = self._stream
        self._handover.close()
        if stream is not None:
            stream.cancel()

    @property
    def source_silence(self) -> float:
        """For how many seconds the source has been asked for more and given nothing; from
        any thread."""
        since = self._silent_since
        return 0.0 if since is None else time.monotonic() - since

    def _run_pipeline(self) -> None:
        task = self._task
        done = task.done_rows + task.done_row_errors
        opening = self._silent_since = time.monotonic()
        with task.source.open(task.query, task.shard, skip_rows=done) as stream:
            self._source_seconds += time.monotonic() - opening
            with self._lock:
                self._stream = stream
                if self._cancelled:
                    raise Stopped
            reader = daemon_thread(lambda: self._read(stream), "read")
            try:
                self._write_parts(stream.schema)
            finally:
                # After an error here the reader may wait for room, or in the source.
                self._handover.close()
                if not reader.done():
                    stream.cancel()
                reader.result()
                with self._lock:
                    self._stream = None

    def _read(self, stream: BatchStream) -> None:
        asked = time.monotonic()
        try:
            for batch in _loose(stream) if self._task.skip_errors else stream:
                self._silent_since = None
                self._source_seconds += time.monotonic() - asked
                self._handover.put(batch)
                asked = self._silent_since = time.monotonic()
        except HandoverClosed:
            pass
        except BaseException as error:  # noqa: BLE001 - crosses to the other thread
            self._handover.finish(error)
        else:
            self._handover.finish()
        finally:
            self._silent_since = None

    def _write_parts(self, schema: pa.Schema) -> None:
        part: _OpenPart | None = None
        limits = self._task.limits
        if self._sequence == 0 and self._task.shard.index == 0:
            # An export without rows is still a file: a header, a schema. So this one is
            # made in any case, and while the source looks for the first rows.
            part = self._open_part(schema)
        try:
            for batch in self._handover:
                rest = batch
                while rest.num_rows:
                    if part is None:
                        part = self._open_part(schema)
                    piece = rest.slice(0, part.room(rest, limits))
                    rest = rest.slice(piece.num_rows)
                    with self._encoding():
                        if isinstance(piece, LooseBatch):
                            part.write_sifted(piece, self._found(part))
                        else:
                            part.write(piece)
                    self._note(part)
                    if part.full(limits):
                        self._finish_part(part)
                        part = None
            if part is not None:
                self._finish_part(part, last=True)
                part = None
        finally:
            if part is not None:
                part.abort()

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Count the time as that of encoding, but for what the store takes of it."""
        begun = time.perf_counter() - self._writing.seconds
        try:
            yield
        finally:
            spent = time.perf_counter() - self._writing.seconds - begun
            self._encode_seconds += spent

    def _create(self, key: OutputKey) -> PartWriter:
        with self._writing:
            return _TimedWriter(self._store.create(key), self._writing)

    def _open_part(self, schema: pa.Schema) -> _OpenPart:
        key = self._key(OutputKind.OUTPUT)
        writer = self._create(key)
        first_row = self._finished_rows + self._finished_row_errors
        return _OpenPart(
            key, writer, self._task.output, schema, self._open_errors, first_row
        )

    def _open_errors(self) -> _ErrorPart:
        key = self._key(OutputKind.ERROR)
        return _ErrorPart(key, self._create(key))

    def _key(self, kind: OutputKind) -> OutputKey:
        return OutputKey(
            self._task.prefix,
            kind,
            self._task.shard.index,
            self._sequence,
            self._task.token,
        )

    def _found(self, part: _OpenPart) -> Callable[[int], None]:
        before = part.row_errors

        def found(more: int) -> None:
            row_errors = self._finished_row_errors + before + more
            self._check(self.rows, self.bytes, row_errors)
            if self._cancelled:
                raise Stopped

        return found

    def _note(self, part: _OpenPart) -> None:
        self.rows = self._finished_rows + part.rows
        self.bytes = self._finished_bytes + part.stored_bytes
        self.row_errors = self._finished_row_errors + part.row_errors
        self._check(self.rows, self.bytes, self.row_errors)
        if self._cancelled:
            raise Stopped

    def _finish_part(self, part: _OpenPart, *, last: bool = False) -> None:
        with self._encoding():
            finished = part.finish(last=last)
        self._finished_rows += finished.rows
        self._finished_bytes += finished.digest.bytes
        if finished.errors is not None:
            self._finished_row_errors += finished.errors.rows
            self._finished_bytes += finished.errors.digest.bytes
        self._sequence += 1
        self.rows = self._finished_rows
        self.bytes = self._finished_bytes
        self.row_errors = self._finished_row_errors
        self._check(self.rows, self.bytes, self.row_errors)
        if self._cancelled:
            raise Stopped
        self._commit(finished)


def _loose(stream: BatchStream) -> Iterator[LooseBatch]:
    """The stream's rows, good or not."""
    try:
        yield from stream.loose()
    except ValueNotEncodable as error:
        raise ValueNotEncodable(
            f"{error.message}; the source cannot tell in which row, so that it cannot be "
            "left out",
            column=error.metadata.get("column"),
        ) from error.__cause__


class _Stopwatch:
    """Adds up the time spent in its contexts. For one thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begun


class _TimedWriter:
    """See `PartWriter`."""

    def __init__(self, writer: PartWriter, watch: _Stopwatch) -> None:
        self._writer = writer
        self._watch = watch

    def write(self, data: Buffer, /) -> int:
        """See `PartWriter`."""
        with self._watch:
            return self._writer.write(data)

    def finalize(self) -> None:
        """See `PartWriter`."""
        with self._watch:
            self._writer.finalize()

    def abort(self) -> None:
        """See `PartWriter`."""
        self._writer.abort()


class _ErrorPart:
    """An error part that is being written: the rows that its output part lacks."""

    def __init__(self, key: OutputKey, writer: PartWriter) -> None:
        self.key = key
        self.writer = writer
        self.sink = HashingSink(writer)
        self.rows = 0

    def write(self, line: bytes) -> None:
        """Add a row."""
        self.sink.write(line)
        self.rows += 1

    def finish(self) -> FinishedPart:
        """Make it durable and readable."""
        digest = self.sink.finish(0, 0)
        self.writer.finalize()
        return FinishedPart(self.key, self.rows, digest)


class _OpenPart:
    """A part that is being written, with its error part as soon as there is one.
    `first_row` is its first row's place in the shard."""

    def __init__(
        self,
        key: OutputKey,
        writer: PartWriter,
        output: OutputFormat,
        schema: pa.Schema,
        open_errors: Callable[[], _ErrorPart],
        first_row: int,
    ) -> None:
        self.key = key
        self.writer = writer
        self.rows = 0
        self._open_errors = open_errors
        self._errors: _ErrorPart | None = None
        self._first_row = first_row
        self.sink = HashingSink(writer)
        try:
            self.encoder: Encoder = open_encoder(output, schema, self.sink)
        except BaseException:
            writer.abort()
            raise
        # A schema may be longer than what the sink remembers of the start.
        self.sink.mark()

    @property
    def bytes(self) -> int:
        """Stored bytes so far, with what the encoder still holds."""
        return self.sink.bytes + self.encoder.buffered_bytes

    @property
    def row_errors(self) -> int:
        """Rows that were refused so far."""
        return 0 if self._errors is None else self._errors.rows

    @property
    def stored_bytes(self) -> int:
        """As `bytes`, with the error part's."""
        return self.bytes + (0 if self._errors is None else self._errors.sink.bytes)

    def room(self, batch: _Rows, limits: PartLimits) -> int:
        """How many of the batch's rows to write next, at least one."""
        rows: int = batch.num_rows
        if limits.max_bytes is not None:
            # Stored bytes a row so far; before the first row its size in memory, which
            # for text is about the same.
            per_row = (
                self.bytes / self.rows
                if self.rows and self.bytes
                else batch.nbytes / batch.num_rows
            )
            left = max(0, limits.max_bytes - self.bytes)
            rows = min(rows, max(MIN_PIECE_ROWS, int(left / max(per_row, 0.01)) + 1))
        if limits.max_rows is not None:
            rows = min(rows, limits.max_rows - self.rows)
        return rows

    def write(self, piece: pa.RecordBatch) -> None:
        """Encode a piece of a batch."""
        with self._store_errors_first():
            self.encoder.write(piece)
            self.encoder.flush()
        self.rows += piece.num_rows

    def write_sifted(self, piece: LooseBatch, found: Callable[[int], None]) -> None:
        """Encode the rows of a piece that can be, and tell the others."""
        with self._store_errors_first():
            sifted = sift(piece, self.encoder.stage, found)
            sifted.write()
            self.encoder.flush()
        first = self._first_row + self.rows + self.row_errors
        for refused in sifted.refused:
            if self._errors is None:
                self._errors = self._open_errors()
            self._errors.write(line(piece, refused, self.key.shard, first + refused.row))
        self.rows += sifted.rows

    def full(self, limits: PartLimits) -> bool:
        """Whether the next row belongs into another part."""
        return (limits.max_rows is not None and self.rows >= limits.max_rows) or (
            limits.max_bytes is not None and self.bytes >= limits.max_bytes
        )

    def finish(self, *, last: bool) -> FinishedPart:
        """Make the part durable and readable."""
        with self._store_errors_first():
            self.encoder.close()
        digest = self.sink.finish(self.encoder.prefix_bytes, self.encoder.suffix_bytes)
        errors = None if self._errors is None else self._errors.finish()
        self.writer.finalize()
        return FinishedPart(self.key, self.rows, digest, errors, last)

    @contextmanager
    def _store_errors_first(self) -> Iterator[None]:
        """A library between encoder and sink may have wrapped the store's error."""
        try:
            yield
        finally:
            if self.sink.error is not None:
                raise self.sink.error

    def abort(self) -> None:
        """Leave nothing behind. An error part that was finalized before its output part
        failed is named by nobody, and is cleaned up with what else is not."""
        self.writer.abort()
        if self._errors is not None:
            self._errors.writer.abort()
