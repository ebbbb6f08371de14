"""Those who use the service, as real clients would: they repeat what was not answered,
at whichever API process answers, and hold every answer against what they were told."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
from crc32c import crc32c
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from exportd import AsyncClient, Retry
from exportd.errors import ExportdError
from exportd.v1 import dataset_pb2, export_service_pb2_grpc, job_pb2, sink_pb2
from exportd.v1 import export_service_pb2 as pb
from tests.torture.data import BANK, LAKE, Bank, lake_fault, rows_of
from tests.torture.history import History

PATIENCE = 120.0
"""Seconds that a call is repeated, and that a job may take beyond the faults."""
_CALL_SECONDS = 30.0
_LONG_TTL = 3600
_AGAIN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        # What a call may get that comes in just when the server stops; counted apart.
        grpc.StatusCode.CANCELLED,
    }
)
_FINAL = (
    job_pb2.JOB_STATE_SUCCEEDED,
    job_pb2.JOB_STATE_FAILED,
    job_pb2.JOB_STATE_CANCELLED,
)
_OPTIONS = (
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
)


class Refused(Exception):
    """An answer that is final."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.reason = _reason(error)
        super().__init__(f"{self.code.name} {self.reason} {error.details()}")


def _reason(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)
    for packed in status.details if status is not None else ():
        if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            packed.Unpack(info)
            return str(info.reason)
    return ""


@dataclass
class Tracked:
    """A job, and all that was said of it."""

    request: job_pb2.CreateExportRequest
    client: int
    job_id: str = ""
    revision: int = 0
    cancelling: bool = False
    deleting: bool = False
    gone: bool = False
    """Forgotten before anybody saw how it ended: its ttl was short."""
    final: job_pb2.Job | None = None
    verified: bool = False

    @property
    def state(self) -> str:
        """Its final state, in short."""
        if self.final is None:
            return "EXPIRED UNSEEN" if self.gone else "UNFINISHED"
        return job_pb2.JobState.Name(self.final.state).removeprefix("JOB_STATE_")

    @property
    def failure(self) -> str:
        """Why it failed."""
        for packed in self.final.error.details if self.final is not None else ():
            if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                packed.Unpack(info)
                return str(info.reason)
        return ""

    @property
    def expires(self) -> float:
        """When, in seconds since 1970; never, as far as is known."""
        if self.final is None or not self.final.HasField("expire_time"):
            return float("inf")
        return self.final.expire_time.ToNanoseconds() / 1e9

    def may_be_gone(self) -> bool:
        """Whether it may rightly be unknown to the service."""
        return self.deleting or time.time() >= self.expires


@dataclass
class Api:
    """All API processes, seen from one place."""

    addresses: Sequence[str]
    history: History
    random: random.Random
    channels: list[grpc.aio.Channel] = field(default_factory=list)
    stubs: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for address in self.addresses:
            channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
            self.channels.append(channel)
            self.stubs.append(export_service_pb2_grpc.ExportServiceStub(channel))

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(channel.close() for channel in self.channels))

    async def call(self, method: str, request: Any, at: int | None = None) -> Any:
        """Call until there is an answer; raises `Refused` for one that is final."""
        deadline = time.monotonic() + PATIENCE
        tries = 0
        while True:
            where = self.random.randrange(len(self.stubs)) if at is None else at
            tries += 1
            try:
                answer = await getattr(self.stubs[where], method)(
                    request, timeout=_CALL_SECONDS
                )
            except grpc.aio.AioRpcError as error:
                again = error.code() in _AGAIN and time.monotonic() < deadline
                self.history.note(
                    "retry" if again else "refused",
                    method=method,
                    api=where,
                    job=getattr(request, "job_id", ""),
                    code=error.code().name,
                    reason=_reason(error),
                    details=error.details(),
                )
                if not again:
                    raise Refused(error) from None
                await asyncio.sleep(self.random.uniform(0.02, 0.3))
            else:
                self.history.note(
                    "call", method=method, api=where, tries=tries, **_short(answer)
                )
                return answer


def _short(answer: Any) -> dict[str, Any]:
    job = getattr(answer, "job", None)
    if job is None:
        return {}
    state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
    return {
        "job": job.job_id,
        "state": state,
        "revision": job.revision,
        "generation": job.generation,
        "attempt": job.attempt,
    }


class Clients:
    """The loops, and the jobs of all of them."""

    def __init__(
        self,
        addresses: Sequence[str],
        history: History,
        seed: int,
        lake: pa.Table,
        bank: Bank,
        directory: Path,
        sinks_of: Callable[[job_pb2.CreateExportRequest], Sequence[sink_pb2.Sink]] = (
            lambda _request: ()
        ),
    ) -> None:
        self._sinks_of = sinks_of
        self._addresses = addresses
        self._history = history
        self._seed = seed
        self._lake = lake
        self._bank = bank
        self._directory = directory
        self.jobs: list[Tracked] = []
        self.verified = 0
        self.rows = 0
        self.bytes = 0

    def api(self, name: object) -> Api:
        """A view of the API processes whose chances follow from the seed."""
        return Api(self._addresses, self._history, random.Random(f"{self._seed} {name}"))

    async def run(self, number: int, until: Callable[[], bool]) -> None:
        """See one job through after the other."""
        api = self.api(f"client {number}")
        try:
            while not until():
                try:
                    await self._one_job(api, number)
                except Refused as refused:
                    self._history.violation("an answer nobody expects", answer=refused)
                except TimeoutError:
                    self._history.violation("a client waited in vain", client=number)
        finally:
            await api.close()

    # --- one job

    async def _one_job(self, api: Api, number: int) -> None:
        chosen = api.random
        tracked = Tracked(self._request(chosen, number), number)
        if chosen.random() < 0.15:
            await self._by_the_client(tracked)
            return
        await self._create(api, tracked)
        if chosen.random() < 0.18:
            await asyncio.sleep(chosen.uniform(0, 1.2))
            await self.cancel(api, tracked)
        else:
            await self._finish(api, tracked)
        await self.check(api, tracked)
        if tracked.request.ttl.seconds < _LONG_TTL:
            await self._see_it_expire(api, tracked)
        elif chosen.random() < 0.4 and not tracked.request.sinks:
            await self.delete(api, tracked)

    def _request(self, chosen: random.Random, number: int) -> job_pb2.CreateExportRequest:
        form = chosen.choice(
            [
                *(dataset_pb2.FORMAT_CSV, dataset_pb2.FORMAT_JSONL),
                *(dataset_pb2.FORMAT_PARQUET, dataset_pb2.FORMAT_ARROW),
            ]
        )
        text = form in (dataset_pb2.FORMAT_CSV, dataset_pb2.FORMAT_JSONL)
        ttl = chosen.choice([_LONG_TTL] * 5 + [1, 3])
        request = job_pb2.CreateExportRequest(
            request_id=str(uuid.UUID(int=chosen.getrandbits(128), version=4)),
            dataset=chosen.choice([LAKE, BANK]),
            format=form,
            compression=chosen.choice(
                [
                    *(job_pb2.COMPRESSION_NONE, job_pb2.COMPRESSION_GZIP),
                    job_pb2.COMPRESSION_ZSTD,
                ]
            )
            if text
            else job_pb2.COMPRESSION_UNSPECIFIED,
            max_part_rows=chosen.choice([400, 1000, 3000]),
            ttl=duration_pb2.Duration(seconds=ttl),
            priority=chosen.randint(-5, 5),
            labels={"seed": str(self._seed), "client": str(number)},
        )
        # What is soon forgotten is not waited for by its sinks.
        if ttl == _LONG_TTL and chosen.random() < 0.6:
            request.sinks.extend(self._sinks_of(request))
        return request

    async def _create(self, api: Api, tracked: Tracked) -> None:
        """Create it, now and then at two processes at once, or with another payload."""
        calls = [api.call("CreateExport", tracked.request)]
        if api.random.random() < 0.3:
            calls.append(api.call("CreateExport", tracked.request))
        answers = await asyncio.gather(*calls)
        brief = tracked.request.ttl.seconds < _LONG_TTL
        if len({answer.job.job_id for answer in answers}) != 1 and not brief:
            self._history.violation(
                "one request_id made two jobs", jobs=[a.job.job_id for a in answers]
            )
        # The last one: of a job that is soon forgotten the request_id is free again.
        tracked.job_id = max(answer.job.job_id for answer in answers)
        self.jobs.append(tracked)
        for answer in answers:
            if answer.job.job_id == tracked.job_id:
                self._take(tracked, answer.job, floor=0)
        if api.random.random() < 0.1 and tracked.request.ttl.seconds == _LONG_TTL:
            other = job_pb2.CreateExportRequest()
            other.CopyFrom(tracked.request)
            other.limit = 7
            await self._must_refuse(api.call("CreateExport", other), "REQUEST_ID_CONFLICT")

    async def _finish(self, api: Api, tracked: Tracked) -> None:
        """Follow it to its end, by watching or by asking."""
        deadline = time.monotonic() + PATIENCE
        watching = api.random.random() < 0.6
        while tracked.final is None:
            if time.monotonic() > deadline:
                # Not over yet: the end of the run waits for it and says so.
                self._history.note("slow job", job=tracked.job_id)
                return
            if watching:
                await self._watch(api, tracked)
            else:
                await asyncio.sleep(api.random.uniform(0.05, 0.4))
            if await self.look(api, tracked) is None:
                return

    async def _watch(self, api: Api, tracked: Tracked) -> None:
        where = api.random.randrange(len(api.stubs))
        request = pb.WatchJobRequest(job_id=tracked.job_id)
        last = 0
        try:
            async for answer in api.stubs[where].WatchJob(request, timeout=_CALL_SECONDS):
                if answer.job.revision < last:
                    self._history.violation("a watch went back", job=tracked.job_id)
                last = answer.job.revision
                self._take(tracked, answer.job, floor=0)
        except grpc.aio.AioRpcError as error:
            gone = error.code() is grpc.StatusCode.NOT_FOUND and (
                tracked.may_be_gone() or self._may_have_expired_unseen(tracked)
            )
            if error.code() not in _AGAIN and not gone:
                raise Refused(error) from None
            self._history.note(
                "watch cut", job=tracked.job_id, code=error.code().name, api=where
            )
            await asyncio.sleep(api.random.uniform(0.02, 0.3))

    async def look(
        self, api: Api, tracked: Tracked, at: int | None = None
    ) -> job_pb2.Job | None:
        """Ask where it stands; None when it is rightly gone."""
        floor = tracked.revision
        try:
            answer = await api.call("GetJob", pb.GetJobRequest(job_id=tracked.job_id), at)
        except Refused as refused:
            if refused.reason == "JOB_NOT_FOUND":
                if tracked.may_be_gone():
                    return None
                if self._may_have_expired_unseen(tracked):
                    tracked.gone = True
                    return None
            self._history.violation(
                "a job that was accepted is lost", job=tracked.job_id, answer=refused
            )
            return None
        self._take(tracked, answer.job, floor=floor)
        return answer.job  # type: ignore[no-any-return]

    def _may_have_expired_unseen(self, tracked: Tracked) -> bool:
        return tracked.final is None and tracked.request.ttl.seconds < _LONG_TTL

    def _take(self, tracked: Tracked, job: job_pb2.Job, *, floor: int) -> None:
        """Hold an answer against those before it. `floor` is a revision that was known
        before the call began."""
        if job.revision < floor:
            self._history.violation(
                "an answer is older than one before it",
                job=job.job_id,
                revision=job.revision,
                known=floor,
            )
        tracked.revision = max(tracked.revision, job.revision)
        if tracked.final is not None and job.revision >= tracked.final.revision:
            if _unchanging(job) != _unchanging(tracked.final):
                self._history.violation(
                    "a job changed after its end",
                    job=job.job_id,
                    was=_short_job(tracked.final),
                    now=_short_job(job),
                )
        elif job.state in _FINAL and tracked.final is None:
            tracked.final = job
            self._history.note("final", client=tracked.client, **_short_job(job))
            if job.state == job_pb2.JOB_STATE_CANCELLED and not tracked.cancelling:
                self._history.violation("cancelled by nobody", job=job.job_id)

    async def cancel(self, api: Api, tracked: Tracked) -> None:
        """Cancel it, and hear the same from whoever is asked after."""
        tracked.cancelling = True
        try:
            answer = await api.call("CancelJob", pb.CancelJobRequest(job_id=tracked.job_id))
        except Refused as refused:
            expired = self._may_have_expired_unseen(tracked) or tracked.may_be_gone()
            if refused.reason != "JOB_NOT_FOUND" or not expired:
                raise
            return
        self._take(tracked, answer.job, floor=0)
        if answer.job.state not in _FINAL:
            self._history.violation("cancelled and not ended", job=tracked.job_id)

    # --- output

    async def check(self, api: Api, tracked: Tracked) -> None:
        """See that all API processes say the same, and that the output is right, or out
        of reach."""
        if tracked.final is None:
            return
        for where in range(len(api.stubs)):
            await self.look(api, tracked, where)
        if tracked.final.state == job_pb2.JOB_STATE_SUCCEEDED:
            await self.verify(api, tracked)
            return
        reason = {
            job_pb2.JOB_STATE_FAILED: "JOB_FAILED",
            job_pb2.JOB_STATE_CANCELLED: "JOB_CANCELLED",
        }[tracked.final.state]
        await self._must_not_be_readable(api, tracked, reason)

    async def verify(self, api: Api, tracked: Tracked) -> None:
        """Download it and compare it with its source."""
        assert tracked.final is not None
        manifest = tracked.final.manifest
        try:
            if manifest.joinable and api.random.random() < 0.5:
                files = [await self._download(api, tracked, None)]
                _prove(files[0], manifest.bytes, manifest.crc32c, manifest.sha256)
            else:
                files = []
                for part in manifest.parts:
                    data = await self._download(api, tracked, part.index)
                    _prove(data, part.bytes, part.crc32c, part.sha256)
                    files.append(data)
        except Refused as refused:
            expired = refused.reason in ("OUTPUT_EXPIRED", "JOB_NOT_FOUND")
            if expired and tracked.may_be_gone():
                return
            self._history.violation(
                "an output that was promised cannot be read",
                job=tracked.job_id,
                answer=refused,
            )
            return
        except AssertionError as error:
            self._history.violation("bytes are wrong", job=tracked.job_id, fault=error)
            return
        await self._compare(tracked, files, manifest.rows)

    async def _compare(
        self, tracked: Tracked, files: list[bytes], rows: int | None = None
    ) -> None:
        def compare() -> tuple[int, str | None]:
            found = rows_of(tracked.request, files)
            if tracked.request.dataset == LAKE:
                return len(found), lake_fault(self._lake, found)
            return len(found), self._bank.fault(found)

        try:
            count, fault = await asyncio.to_thread(compare)
        except (pa.ArrowException, ValueError, KeyError) as error:
            count, fault = 0, f"the output cannot be parsed: {error}"
        if rows is not None and count != rows:
            fault = f"{count} rows, and the manifest says {rows}; {fault or ''}"
        if fault is not None:
            self._history.violation(
                "rows are wrong",
                job=tracked.job_id,
                dataset=tracked.request.dataset,
                format=dataset_pb2.Format.Name(tracked.request.format),
                fault=fault,
            )
            return
        if not tracked.verified:
            tracked.verified = True
            self.verified += 1
            self.rows += count
            self.bytes += sum(map(len, files))

    async def _download(self, api: Api, tracked: Tracked, part: int | None) -> bytes:
        """All bytes, gone on with elsewhere whenever the stream breaks off."""
        data = bytearray()
        generation = tracked.final.generation if tracked.final is not None else 0
        deadline = time.monotonic() + PATIENCE
        while True:
            where = api.random.randrange(len(api.stubs))
            request = pb.StreamDownloadRequest(
                job_id=tracked.job_id,
                part_index=part,
                read_offset=len(data),
                if_generation_match=generation,
            )
            # Now and then a client goes away in the middle, and comes back.
            leaving = api.random.random() < 0.05
            call = api.stubs[where].StreamDownload(request, timeout=_CALL_SECONDS)
            total = None
            try:
                async for message in call:
                    if message.HasField("metadata"):
                        total = message.metadata.total_bytes
                        continue
                    assert message.offset == len(data), "an offset is wrong"
                    assert message.crc32c == crc32c(message.data), "a chunk is corrupt"
                    data += message.data
                    if leaving:
                        break
                if total == len(data):
                    return bytes(data)
                assert leaving, "a download ended before its end"
            except grpc.aio.AioRpcError as error:
                self._history.note(
                    "download cut",
                    job=tracked.job_id,
                    api=where,
                    code=error.code().name,
                    details=error.details(),
                )
                if error.code() not in _AGAIN or time.monotonic() > deadline:
                    raise Refused(error) from None
                await asyncio.sleep(api.random.uniform(0.02, 0.3))
            finally:
                call.cancel()

    async def _must_not_be_readable(
        self, api: Api, tracked: Tracked, *reasons: str
    ) -> None:
        if time.time() >= tracked.expires:
            reasons = (*reasons, "OUTPUT_EXPIRED", "JOB_NOT_FOUND")
        try:
            await self._download(api, tracked, None)
        except Refused as refused:
            late = time.time() >= tracked.expires and refused.reason in (
                "OUTPUT_EXPIRED",
                "JOB_NOT_FOUND",
            )
            if refused.reason not in reasons and not late:
                self._history.violation(
                    "refused for another reason", job=tracked.job_id, answer=refused
                )
        else:
            self._history.violation("readable, and must not be", job=tracked.job_id)

    async def _must_refuse(self, call: Any, reason: str) -> None:
        try:
            await call
        except Refused as refused:
            if refused.reason != reason:
                raise
        else:
            self._history.violation("answered, and must be refused", reason=reason)

    # --- the end of jobs

    async def delete(self, api: Api, tracked: Tracked) -> None:
        """Delete it; nothing of it can be seen after."""
        tracked.deleting = True
        try:
            await api.call("DeleteJob", pb.DeleteJobRequest(job_id=tracked.job_id))
        except Refused as refused:
            # The answer to an earlier try may have been lost.
            if refused.reason != "JOB_NOT_FOUND":
                raise
        await self._must_refuse(
            api.call("GetJob", pb.GetJobRequest(job_id=tracked.job_id)), "JOB_NOT_FOUND"
        )
        await self._must_not_be_readable(api, tracked, "JOB_NOT_FOUND")

    async def _see_it_expire(self, api: Api, tracked: Tracked) -> None:
        if tracked.final is None:
            return
        await asyncio.sleep(max(0.0, tracked.expires - time.time()) + 0.05)
        tracked.deleting = True
        await self._must_not_be_readable(api, tracked, "OUTPUT_EXPIRED", "JOB_NOT_FOUND")

    # --- the product's own client

    async def _by_the_client(self, tracked: Tracked) -> None:
        """The same by the Python client, which knows both addresses and is patient."""
        request = tracked.request
        patient = Retry(attempts=60, initial=0.05, maximum=1.0)
        names = dataset_pb2.Format.Name(request.format).removeprefix("FORMAT_")
        target = "ipv4:" + ",".join(self._addresses)
        folder = self._directory / request.request_id
        async with AsyncClient(
            target, timeout=PATIENCE, retry=patient, stream_retry=patient
        ) as client:
            try:
                job = await client.export(
                    request.dataset,
                    format=names.lower(),  # type: ignore[arg-type] # one of its names
                    request_id=request.request_id,
                    max_part_rows=request.max_part_rows,
                    labels=dict(request.labels),
                )
                tracked.request.ttl.seconds = _LONG_TTL
                tracked.request.compression = job_pb2.COMPRESSION_NONE
                tracked.job_id = job.id
                self.jobs.append(tracked)
                await job.wait(timeout=PATIENCE)
                folder.mkdir(parents=True)
                done = await job.download(folder)
            except ExportdError as error:
                self._history.violation(
                    "the client gave up", job=tracked.job_id, error=repr(error)
                )
                return
        files = [path.read_bytes() for path in done.files]
        for path in done.files:
            path.unlink()
        self._history.note("client done", job=tracked.job_id, files=len(files))
        await self._compare(tracked, files)


def _unchanging(job: job_pb2.Job) -> bytes:
    """What must never change of a job that has ended."""
    kept = job_pb2.Job()
    kept.CopyFrom(job)
    kept.ClearField("revision")
    # Deliveries go on after the job's end.
    for name in ("delivery_status", "delivered_to", "deliveries"):
        kept.ClearField(name)
    return kept.SerializeToString(deterministic=True)


def _short_job(job: job_pb2.Job) -> dict[str, Any]:
    return {
        **_short(pb.GetJobResponse(job=job)),
        "parts": len(job.manifest.parts),
        "rows": job.manifest.rows,
        "error": job.error.message,
    }


def _prove(data: bytes, size: int, checksum: int, sha256: bytes) -> None:
    assert len(data) == size, f"{len(data)} bytes and not {size}"
    assert crc32c(data) == checksum, "CRC32C differs"
    assert not sha256 or hashlib.sha256(data).digest() == sha256, "SHA-256 differs"
