"""Downloads: resumed by themselves, verified, never half there under the final name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import crc32c
import grpc

from exportd._chunks import METHOD, Chunk, read_chunk
from exportd._connection import Attempts, Channels, Connection, is_passing
from exportd._files import (
    Identity,
    PartialFile,
    Range,
    exists,
    free_ranges,
    refuse_existing,
    safe_name,
)
from exportd._model import ErrorPart, JobInfo, Manifest, Part, counted
from exportd.errors import (
    DataLoss,
    ExportdError,
    GenerationMismatch,
    InvalidRequest,
    JobEnded,
    LocalFileError,
    NotFound,
    PartNotFound,
    PartsNotJoinable,
    Unavailable,
    from_rpc_error,
)
from exportd.v1 import export_service_pb2

MIN_RANGE = 8 * 1024 * 1024
"""A parallel range is not cut smaller than this many bytes."""

_TICK = 0.1  # seconds between looks at stop, stalls and progress
_FIRST_TICK = 0.02  # what takes no longer is hashed when all of it is there
_VERIFY_TICK = 0.02  # seconds between looks for something to hash
_SAVE_EVERY = 0.5  # seconds between records of what is there
_CORRUPT_LIMIT = 3  # bad messages at one place before it counts as lost
_RESTARTS = 3  # generations to follow before giving up

# Codes that proxies and broken connections produce. With a reason of exportd's they
# would be an answer; without one the stream was merely cut.
_CUT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a download is, in bytes; `total` is None while following a job."""

    done: int
    total: int | None
    file_name: str


@dataclass(frozen=True, slots=True)
class Download:
    """A finished download; usable as a path.

    Attributes:
        path: The file, or the directory of the part files.
        files: The files, in the order of the parts.
        size: Bytes in all.
        crc32c: Of the file; None for a directory.
        sha256: Of the file, in hex; None for a directory and for several joined parts.
        verified_by: `sha256` when every byte was proven by SHA-256. `crc32c` when a
            part's header could not be told from the joined file, so that the CRC32C of
            the whole had to do.
        resumed: Bytes that were there from an earlier try.
    """

    path: Path
    files: tuple[Path, ...]
    size: int
    crc32c: int | None
    sha256: str | None
    verified_by: Literal["sha256", "crc32c"]
    resumed: int

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a download was asked to do."""

    path: str | os.PathLike[str]
    part: int | None = None
    parallel: int = 1
    overwrite: bool = False
    follow: bool = False
    errors: bool = False
    """The rows that were left out, instead of the output."""


class _Stream(Protocol):
    """The part of a gRPC stream that is used here."""

    def __next__(self) -> Chunk: ...
    def __iter__(self) -> Iterator[Chunk]: ...
    def cancel(self) -> bool: ...


Report = Callable[[DownloadProgress], object]


class Stop:
    """Lets another thread end a download."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """End it soon."""
        self._event.set()

    @property
    def wanted(self) -> bool:
        """Whether it shall end."""
        return self._event.is_set()


class Stopped(Exception):
    """The download was told to stop."""


@dataclass(frozen=True, slots=True)
class _Source:
    """The bytes of one file. `parts` are those it joins; `total` and the checksums are
    None while they are not known yet."""

    job_id: str
    generation: int
    file_name: str
    part: int | None = None
    total: int | None = None
    crc32c: int | None = None
    sha256: bytes = b""
    parts: tuple[Part, ...] = ()
    errors: bool = False

    @property
    def key(self) -> str:
        """Names the temporary file."""
        name = safe_name(self.job_id, "job")
        if self.part is None:
            return name
        return f"{name}-{'errors-' if self.errors else ''}{self.part}"

    @property
    def identity(self) -> Identity:
        """What the temporary file's record must agree with."""
        return {
            "job_id": self.job_id,
            "part": self.part,
            "errors": self.errors,
            "generation": self.generation,
        }


class Downloader:
    """Downloads outputs of one server; blocks, holds no state between calls."""

    def __init__(
        self,
        connection: Connection,
        channels: Channels,
        get_job: Callable[[str], JobInfo],
        stop: Stop,
    ) -> None:
        self._connection = connection
        self._channels = channels
        self._get_job = get_job
        self._stop = stop

    def download(self, job: JobInfo, plan: Plan, report: Report | None = None) -> Download:
        """Download the output of a job. The job is asked for anew unless it had succeeded,
        for its manifest stays as it is, and whether the output is still there the server
        tells when bytes are to be fetched.

        Raises:
            NotFinished, JobFailed, JobCancelled, OutputExpired: There is nothing to get.
            OutputExists: A file stands in the way and `overwrite` is not set.
            DataLoss: The bytes do not match their checksums, whatever was tried.
            LocalFileError: This machine's disk is full or refuses.
            Unavailable: The server stayed away for longer than the retries.
        """
        if plan.parallel < 1:
            raise InvalidRequest.of("parallel", "at least 1")
        if plan.follow and plan.part is not None:
            raise InvalidRequest.of("follow", "follows the whole output, not one part")
        restarts = 0
        if job.manifest is None or not job.manifest.size:
            job = self._get_job(job.id)
        while True:
            try:
                if plan.follow and not job.state.final:
                    return self._follow(job, plan, report)
                return self._fetch(job, job.raise_unless_succeeded(), plan, report)
            except GenerationMismatch:
                restarts += 1
                if restarts > _RESTARTS:
                    raise
            job = self._get_job(job.id)

    def _fetch(
        self, job: JobInfo, manifest: Manifest, plan: Plan, report: Report | None
    ) -> Download:
        if plan.errors:
            return self._errors(job, manifest, plan, report)
        if plan.part is not None:
            part = next((p for p in manifest.parts if p.index == plan.part), None)
            if part is None:
                parts = counted(len(manifest.parts), "part")
                raise PartNotFound(
                    f"job {job.id} has {parts}, none with index {plan.part}",
                    reason="PART_NOT_FOUND",
                )
            return self._file(_part_source(job, part), plan, report)
        if manifest.joinable:
            return self._file(_joined_source(job, manifest), plan, report)
        if len(manifest.parts) == 1:
            return self._file(_part_source(job, manifest.parts[0]), plan, report)
        return self._directory(job, manifest.parts, plan, report)

    def _errors(
        self, job: JobInfo, manifest: Manifest, plan: Plan, report: Report | None
    ) -> Download:
        if not manifest.error_parts:
            raise PartNotFound(
                f"job {job.id} left no row out, so that there is nothing to tell",
                reason="PART_NOT_FOUND",
            )
        if len(manifest.error_parts) == 1:
            return self._file(_part_source(job, manifest.error_parts[0]), plan, report)
        return self._directory(job, manifest.error_parts, plan, report)

    def _follow(self, job: JobInfo, plan: Plan, report: Report | None) -> Download:
        """Take a job's parts as they are finished; verified once the job is done."""
        source = _Source(job.id, job.generation, f"{job.dataset}-{job.id}")
        final = _target(plan.path, source.file_name)
        into_directory = final != Path(plan.path)
        if not (into_directory or plan.overwrite):
            refuse_existing(final)
        with PartialFile(final, source.key) as file:
            transfer = self._transfer(source, file, 1)
            resumed = transfer.done
            try:
                self._run(transfer, file, _from_zero(report, source))
            except PartsNotJoinable as error:
                raise PartsNotJoinable(
                    f"the parts of {job.format} do not join, so job {job.id} cannot be "
                    "followed; download it without follow once it has ended",
                    reason=error.reason,
                    code=error.code,
                    metadata=error.metadata,
                ) from error
            job = self._get_job(job.id)
            manifest = job.raise_unless_succeeded()
            whole = _joined_source(job, manifest)
            if len(manifest.parts) == 1:
                whole = replace(whole, sha256=manifest.parts[0].sha256)
            if job.generation != source.generation:
                file.discard()
                raise GenerationMismatch("the output was made anew while it was followed")
            if into_directory:
                final = _target(plan.path, whole.file_name)
            return self._finish(_Verifier(whole, file), final, plan, resumed)

    def _file(self, source: _Source, plan: Plan, report: Report | None) -> Download:
        final = _target(plan.path, source.file_name)
        if not plan.overwrite:
            refuse_existing(final)
        return self._to_file(source, final, plan, _from_zero(report, source))

    def _to_file(
        self,
        source: _Source,
        final: Path,
        plan: Plan,
        report: Callable[[int], object] | None,
    ) -> Download:
        with PartialFile(final, source.key) as file:
            verifier = _Verifier(source, file)
            transfer = self._transfer(source, file, plan.parallel, verifier)
            resumed = transfer.done
            self._run(transfer, file, report)
            return self._finish(verifier, final, plan, resumed)

    def _directory(
        self,
        job: JobInfo,
        parts: Sequence[Part | ErrorPart],
        plan: Plan,
        report: Report | None,
    ) -> Download:
        """Parts that do not join become files of their own in a directory. A part that
        is there and matches is kept, so that the same call again goes on."""
        directory = Path(plan.path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise exists(directory) from None
        except OSError as error:
            raise LocalFileError.of(error, f"cannot make {directory}") from error
        sources = [_part_source(job, p) for p in parts]
        finals = _part_paths(directory, parts)
        total = sum(p.size for p in parts)
        before = resumed = 0
        for source, final, part in zip(sources, finals, parts, strict=True):
            if _matches(final, part):
                resumed += part.size
            else:
                if not plan.overwrite:
                    refuse_existing(final)
                done = self._to_file(
                    source, final, plan, _shifted(report, before, total, final.name)
                )
                resumed += done.resumed
            before += part.size
        return Download(directory, finals, total, None, None, "sha256", resumed)

    def _transfer(
        self,
        source: _Source,
        file: PartialFile,
        parallel: int,
        verifier: _Verifier | None = None,
    ) -> _Transfer:
        ranges = file.load(source.identity)
        if source.total is None:
            whole = Range(0, None)
            if ranges and ranges[0].start == 0:
                whole.done, whole.crc = ranges[0].done, ranges[0].crc
            ranges = [whole]
        else:
            ranges = free_ranges(ranges, source.total, parallel, MIN_RANGE)
            file.reserve(source.total - sum(r.done for r in ranges))
        return _Transfer(
            self._connection,
            self._channels,
            source,
            file,
            ranges,
            workers=parallel,
            stop=self._stop,
            verifier=verifier,
        )

    def _run(
        self,
        transfer: _Transfer,
        file: PartialFile,
        report: Callable[[int], object] | None,
    ) -> None:
        try:
            transfer.run(report)
        except (NotFound, JobEnded, GenerationMismatch, PartsNotJoinable):
            file.discard()  # nothing will ever complete these bytes
            raise

    def _finish(
        self, verifier: _Verifier, final: Path, plan: Plan, resumed: int
    ) -> Download:
        source, file = verifier.source, verifier.file
        try:
            crc, sha256 = verifier.finish(self._stop)
        except DataLoss:
            file.discard()  # so that the next try begins anew
            raise
        file.publish(final, overwrite=plan.overwrite)
        return Download(
            final,
            (final,),
            source.total or 0,
            crc,
            source.sha256.hex() or None,
            "sha256" if sha256 else "crc32c",
            resumed,
        )


class _Transfer:
    """Fetches the missing ranges of one file, each on a thread, and on a channel that is
    its own meanwhile.

    The calling thread waits, reports, records what is there and looks for stalls; so a
    KeyboardInterrupt reaches it at once, and callbacks run on the caller's thread.
    """

    def __init__(
        self,
        connection: Connection,
        channels: Channels,
        source: _Source,
        file: PartialFile,
        ranges: Sequence[Range],
        *,
        workers: int,
        stop: Stop,
        verifier: _Verifier | None,
    ) -> None:
        self._verifier = verifier
        self._connection = connection
        self._channels = channels
        # Streams have threads of their own, which know of no span.
        self._metadata = connection.metadata
        self._source = source
        self._file = file
        self._ranges = ranges
        self._todo = [r for r in ranges if not r.complete]
        self._workers = min(workers, len(self._todo))
        self._stop = stop
        self._changed = threading.Condition()
        self._running = 0
        self._threads: list[threading.Thread] = []
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._calls: dict[_Stream, float | None] = {}

    @property
    def done(self) -> int:
        """Bytes that are there and verified."""
        return sum(r.done for r in self._ranges)

    def run(self, report: Callable[[int], object] | None) -> None:
        """Fetch everything. What is there when it fails is recorded for the next try."""
        for n in range(self._workers):
            self._thread(self._work, f"exportd-download-{n}")
        self._running = self._workers
        try:
            for thread in self._threads:
                thread.start()
            self._wait(report)
        finally:
            self._end()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
            self._save()
        if report is not None:
            report(self.done)

    def _thread(self, work: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        return thread

    def _verify_along(self, verifier: _Verifier) -> None:
        """Hash what is there from the start on, until the transfer ends. What is left,
        and any trouble with reading, is for `finish`."""
        with contextlib.suppress(LocalFileError):
            while not self._ending.wait(_VERIFY_TICK):
                with self._changed:
                    there = _contiguous(self._ranges)
                verifier.advance(there, self._ending.is_set)

    def _wait(self, report: Callable[[int], object] | None) -> None:
        saved = time.monotonic()
        reported = -1
        tick = _FIRST_TICK
        while True:
            with self._changed:
                if self._running and self._error is None:
                    self._changed.wait(tick)
                if self._error is not None:
                    raise self._error
                if not self._running:
                    return
            if self._stop.wanted:
                raise Stopped
            if tick == _FIRST_TICK:
                # Until now it was not worth a thread of its own.
                tick = _TICK
                if self._verifier is not None:
                    along = partial(self._verify_along, self._verifier)
                    self._thread(along, "exportd-verify").start()
            now = time.monotonic()
            if now - saved >= _SAVE_EVERY:
                self._save()
                saved = now
            self._cancel_stalled(now)
            if report is not None and self.done != reported:
                reported = self.done
                report(reported)

    def _save(self) -> None:
        with self._changed:
            ranges = [Range(r.start, r.end, r.done, r.crc) for r in self._ranges]
        self._file.save(self._source.identity, ranges)

    def _cancel_stalled(self, now: float) -> None:
        with self._changed:
            stalled = [
                call
                for call, since in self._calls.items()
                if since is not None and now - since > self._connection.stall_timeout
            ]
        for call in stalled:
            call.cancel()

    def _end(self) -> None:
        self._ending.set()
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            with self._channels.lend() as channel:
                stream: Any = channel.unary_stream(
                    METHOD,
                    export_service_pb2.StreamDownloadRequest.SerializeToString,
                    read_chunk,
                )
                while (wanted := self._next()) is not None:
                    self._fetch(stream, wanted)
        except Stopped:
            pass
        except BaseException as raised:  # noqa: BLE001 - raised again where run() waits
            error = raised
        with self._changed:
            self._running -= 1
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def _next(self) -> Range | None:
        with self._changed:
            return self._todo.pop(0) if self._todo else None

    def _fetch(self, stream: Callable[..., _Stream], wanted: Range) -> None:
        attempts = Attempts(self._connection.stream_retry, None)
        corrupt_at, corrupt = -1, 0
        while not wanted.complete:
            before = wanted.position
            try:
                if self._stream(stream, wanted, attempts):
                    return
                problem: ExportdError = Unavailable("the download was cut short")
                retryable = True
            except _Corrupt as error:
                corrupt = corrupt + 1 if wanted.position == corrupt_at else 1
                corrupt_at = wanted.position
                problem = DataLoss(f"{error} at byte {corrupt_at}, {corrupt} times")
                retryable = corrupt < _CORRUPT_LIMIT
            except grpc.RpcError as error:
                problem = from_rpc_error(error, self._connection.address)
                retryable = is_passing(problem) or (
                    not problem.reason and problem.code in _CUT
                )
            if self._ending.is_set():
                raise Stopped
            if wanted.position > before:
                attempts.progress()
            if self._ending.wait(attempts.next_delay(problem, retryable=retryable)):
                raise Stopped

    def _stream(
        self, stream: Callable[..., _Stream], wanted: Range, attempts: Attempts
    ) -> bool:
        """Read one stream into the range. True when the range is complete."""
        request = export_service_pb2.StreamDownloadRequest(
            job_id=self._source.job_id,
            part_index=None if self._source.errors else self._source.part,
            error_part_index=self._source.part if self._source.errors else None,
            read_offset=wanted.position,
            read_limit=0 if wanted.end is None else wanted.end - wanted.position,
            if_generation_match=self._source.generation,
            follow=wanted.end is None,
        )
        ended = False
        call = stream(request, metadata=self._metadata)
        try:
            for chunk in self._chunks(call):
                if (metadata := chunk.metadata) is not None:
                    self._check(metadata)
                    if wanted.end is None:
                        attempts.progress()  # the server lives; parts take their time
                        ended = metadata.HasField(
                            "total_bytes"
                        ) and metadata.total_bytes == wanted.position + len(chunk.data)
                if chunk.data:
                    self._take(wanted, chunk)
        finally:
            call.cancel()
            with self._changed:
                self._calls.pop(call, None)
        if ended:
            wanted.end = wanted.position
        return wanted.complete

    def _chunks(self, call: _Stream) -> Iterator[Chunk]:
        """The stream's messages; keeps note of since when the next is waited for."""
        while True:
            with self._changed:
                self._calls[call] = time.monotonic()
            if self._ending.is_set():
                raise Stopped
            chunk = next(call, None)
            self._calls[call] = None
            if chunk is None:
                return
            yield chunk

    def _check(self, metadata: export_service_pb2.DownloadMetadata) -> None:
        known = self._source.total
        changed = metadata.generation != self._source.generation
        if known is not None and metadata.total_bytes != known:
            changed = True
        if changed:
            raise GenerationMismatch(
                f"the output of job {self._source.job_id} is not the one that the "
                "download began with",
                reason="GENERATION_MISMATCH",
            )

    def _take(self, wanted: Range, chunk: Chunk) -> None:
        data = chunk.data
        position = wanted.position
        if chunk.offset != position:
            raise _Corrupt(f"bytes of offset {chunk.offset} came")
        if crc32c.crc32c(data) != chunk.crc32c:
            raise _Corrupt("bytes came that do not match their checksum")
        if wanted.end is not None and position + len(data) > wanted.end:
            raise _Corrupt("more bytes came than were asked for")
        self._file.write(data, position)
        crc = crc32c.crc32c(data, wanted.crc)
        with self._changed:
            wanted.crc = crc
            wanted.done += len(data)


def _contiguous(ranges: Sequence[Range]) -> int:
    """How many bytes from the start on are there."""
    there = 0
    for r in ranges:
        if r.start != there:
            break
        there = r.position
    return there


class _Corrupt(Exception):
    """A message is not what it should be; DataLoss when that does not go away."""


class _Verifier:
    """Reads a file back and holds it against its checksums.

    It may go along while the file is being fetched, behind what is there: hashing then
    costs no time of its own, and reads what the page cache still holds. A part of a
    joined file is rebuilt from the header and the trailer that the joined file carries
    once. That can fail without any damage, when two headers of equal length differ; the
    CRC32C of the whole decides then.
    """

    def __init__(self, source: _Source, file: PartialFile) -> None:
        self.source = source
        self.file = file
        self._total = source.total or 0
        self._pieces = _pieces(source)
        self._digests: list[Any] = []
        self._piece_end = 0
        self._crc = 0
        self._seen = 0

    def advance(self, limit: int, ending: Callable[[], bool]) -> None:
        """Hash on up to byte `limit`, unless it is `ending` before."""
        while self._seen < limit:
            if not self._digests or self._seen >= self._piece_end:
                self._begin_piece()
                continue
            for block in self.file.blocks(self._seen, min(limit, self._piece_end)):
                self._crc = crc32c.crc32c(block, self._crc)
                self._digests[-1].update(block)
                self._seen += len(block)
                if ending():
                    return
            if self._seen < min(limit, self._piece_end):
                return  # the file is shorter than it should be: finish() tells

    def finish(self, stop: Stop) -> tuple[int, bool]:
        """Hash what is left and compare.

        Answers with the CRC32C, and whether SHA-256 vouches for every byte.

        Raises:
            DataLoss: A checksum does not hold.
            Stopped: It was told to stop.
        """
        if self.file.size() > self._total:
            self.file.truncate(self._total)  # leftovers of an earlier try past the end
        self.advance(self._total, lambda: stop.wanted)
        if stop.wanted:
            raise Stopped
        if self._seen != self._total:
            raise DataLoss(
                f"{self._seen} bytes are here, {self._total} should be; download again"
            )
        while len(self._digests) < len(self._pieces):
            self._begin_piece()
        proven = all(map(self._holds, self._pieces, self._digests))
        if self.source.crc32c is not None and self._crc != self.source.crc32c:
            raise DataLoss("the file does not match its CRC32C; download again")
        return self._crc, proven

    def _begin_piece(self) -> None:
        piece = self._pieces[len(self._digests)]
        head = self._read(0, piece.head)
        self._digests.append(hashlib.sha256(head, usedforsecurity=False))
        self._piece_end += piece.size

    def _holds(self, piece: _Piece, digest: Any) -> bool:
        digest.update(self._read(self._total - piece.tail, self._total))
        if not piece.sha256 or digest.digest() == piece.sha256:
            return bool(piece.sha256)
        if piece.certain:
            raise DataLoss(f"{piece.name} does not match its SHA-256; download again")
        return False

    def _read(self, start: int, end: int) -> bytes:
        return b"".join(map(bytes, self.file.blocks(start, end)))


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a SHA-256 is known for: `size` bytes of the file, after as many as `head` of
    the file's first bytes, and before as many as `tail` of its last. Not `certain` when
    those are only presumed to be the part's own."""

    name: str
    size: int
    sha256: bytes
    head: int = 0
    tail: int = 0

    @property
    def certain(self) -> bool:
        """Whether a mismatch can only be damage."""
        return not (self.head or self.tail)


def _pieces(source: _Source) -> list[_Piece]:
    total = source.total or 0
    if source.sha256 or len(source.parts) < 2:
        return [_Piece("the file", total, source.sha256)]
    first, last = source.parts[0], source.parts[-1]
    pieces = []
    for part in source.parts:
        head = 0 if part is first else part.prefix_bytes
        tail = 0 if part is last else part.suffix_bytes
        size = part.size - head - tail
        if head in {0, first.prefix_bytes} and tail in {0, last.suffix_bytes}:
            pieces.append(_Piece(f"part {part.index}", size, part.sha256, head, tail))
        else:  # other lengths mean other bytes: there is nothing to rebuild it from
            pieces.append(_Piece(f"part {part.index}", size, b""))
    if sum(p.size for p in pieces) != total or min(p.size for p in pieces) < 0:
        return [_Piece("the file", total, b"")]
    return pieces


def _joined_source(job: JobInfo, manifest: Manifest) -> _Source:
    return _Source(
        job.id,
        job.generation,
        manifest.file_name,
        None,
        manifest.size,
        manifest.crc32c,
        manifest.sha256,
        manifest.parts,
    )


def _part_source(job: JobInfo, part: Part | ErrorPart) -> _Source:
    return _Source(
        job.id,
        job.generation,
        part.file_name,
        part.index,
        part.size,
        part.crc32c,
        part.sha256,
        errors=isinstance(part, ErrorPart),
    )


def _target(path: str | os.PathLike[str], file_name: str) -> Path:
    """The final name: `path`, or a name of the server's in it when it is a directory."""
    target = Path(path)
    if target.is_dir() or os.fspath(path).endswith("/"):
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalFileError.of(error, f"cannot make {target}") from error
        return target / safe_name(file_name, "export")
    return target


def _part_paths(directory: Path, parts: Sequence[Part | ErrorPart]) -> tuple[Path, ...]:
    names = [safe_name(p.file_name, f"part-{p.index:05d}") for p in parts]
    if len(set(names)) < len(names):  # made equal by what was taken out
        names = [f"{p.index:05d}-{n}" for p, n in zip(parts, names, strict=True)]
    return tuple(directory / n for n in names)


def _matches(path: Path, part: Part | ErrorPart) -> bool:
    """Whether a part file is there and whole."""
    if not part.sha256 or not path.is_file() or path.stat().st_size != part.size:
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return digest.digest() == part.sha256


def _from_zero(report: Report | None, source: _Source) -> Callable[[int], object] | None:
    return _shifted(report, 0, source.total, safe_name(source.file_name, "export"))


def _shifted(
    report: Report | None, before: int, total: int | None, name: str
) -> Callable[[int], object] | None:
    if report is None:
        return None
    return lambda done: report(DownloadProgress(before + done, total, name))
