"""Restarts the processes of a fleet one after the other while it is used.

`python -m tests.rolling --seconds 300` does so for some minutes.

Callers have the service config that the clients ship, and all processes in one channel.
Nothing may be lost, and no call may fail that the config repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import polars as pl
from grpc_health.v1 import health_pb2, health_pb2_grpc

from exportd import SERVICE_CONFIG, AsyncClient
from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc, job_pb2
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.processes import Member, Processes, processes
from tests.torture.audit import Audit
from tests.torture.runner import audited_ledger

DATASET = "numbers"
ROWS = 100_000
PART_ROWS = 2_000
MEMBERS = 3
DRAIN = 1.0
"""Seconds. Short, so that exports are given back and downloads are cut."""
CALL_SECONDS = 60.0
"""In which a call has its answer, however often it is repeated."""
_ANY_STATE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""What a stream that has begun may end with: only its reader knows where to go on."""

SETTINGS = {
    "drain_timeout": DRAIN,
    "worker__shard_rows": ROWS // 2,
    "worker__concurrency": 1,
    "download__chunk_bytes": 32_768,
}


@dataclass
class Outcome:
    """What came of it."""

    failures: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    """Streams that had begun and were taken up again, by method and code."""
    created: dict[str, str] = field(default_factory=dict)
    """Jobs by request_id; empty while the call is under way."""
    verified: set[str] = field(default_factory=set)
    restarts: int = 0
    moved: int = 0
    """Plans and shards that more than one process has worked at."""

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"restarts {self.restarts}, jobs {len(self.created)}",
            f"verified {len(self.verified)}, handed over {self.moved}",
            *(f"  {method}: {count}" for method, count in sorted(self.calls.items())),
            *(f"  cut and resumed: {key} {n}" for key, n in sorted(self.cut.items())),
            *(f"FAILED {told}" for told in self.failures),
        ]


def write_numbers(directory: Path) -> Path:
    """A catalogue with one dataset, large enough to be cut."""
    pl.DataFrame({"n": range(ROWS)}).with_columns(
        square=pl.col("n").cast(pl.Int64) ** 2,
        text=pl.col("n").cast(pl.String).repeat_by(8).list.join("-"),
    ).write_parquet(directory / "numbers.parquet", row_group_size=ROWS // 10)
    catalogue = directory / "datasets.toml"
    catalogue.write_text(f'[datasets.{DATASET}]\nparquet = "numbers.parquet"\n')
    return catalogue


def service_config() -> str:
    """The one that is shipped, for a channel to several processes."""
    config = json.loads(SERVICE_CONFIG)
    config["loadBalancingConfig"] = [{"round_robin": {}}]
    return json.dumps(config)


class Callers:
    """Those who use the fleet. Each runs until it is told that it is over."""

    def __init__(self, addresses: Sequence[str], directory: Path, outcome: Outcome) -> None:
        self.target = f"ipv4:{','.join(addresses)}"
        self.over = asyncio.Event()
        self._directory = directory
        self._outcome = outcome
        self._sha256 = b""
        self._first = ""
        self._running: set[str] = set()

    @property
    def options(self) -> tuple[tuple[str, str | int], ...]:
        """Of a channel to all processes."""
        return (
            ("grpc.service_config", service_config()),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        )

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        """The stubs alone, with the service config."""
        async with grpc.aio.insecure_channel(self.target, options=self.options) as channel:
            yield export_service_pb2_grpc.ExportServiceStub(channel)

    async def begin(self) -> None:
        """The first export, which every other one must equal byte by byte."""
        async with AsyncClient(self.target, options=self.options) as client:
            job = await self._export(client)
            path = (await job.download(self._directory / "first.csv")).path
        data = path.read_bytes()
        rows = pl.read_csv(io.BytesIO(data))
        assert rows["n"].to_list() == list(range(ROWS))
        assert (rows["square"] == rows["n"] ** 2).all()
        self._sha256 = hashlib.sha256(data).digest()
        self._first = job.id
        self._outcome.verified.add(job.id)

    async def _export(self, client: AsyncClient) -> Any:
        request_id = str(uuid.uuid4())
        self._outcome.created[request_id] = ""
        job = await client.export(
            DATASET, format="csv", max_part_rows=PART_ROWS, request_id=request_id
        )
        self._outcome.created[request_id] = job.id
        self._running.add(job.id)
        await job.wait()
        self._running.discard(job.id)
        return job

    async def by_the_client(self, number: int) -> None:
        """Export, wait, download and verify, by the Python client."""
        async with AsyncClient(self.target, options=self.options) as client:
            while not self.over.is_set():
                with self._judged("the client"):
                    job = await self._export(client)
                    path = self._directory / f"{number}.csv"
                    await job.download(path, overwrite=True)
                    assert hashlib.sha256(path.read_bytes()).digest() == self._sha256
                    self._outcome.verified.add(job.id)
                    self._outcome.calls["export, wait, download"] += 1

    async def by_single_calls(self, callers: int) -> None:
        """Every short call that is repeated, by the stubs; so many at a time, because a
        server that ends is asked for more than it has begun."""
        async with self.stub() as stub, asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(self._single_calls(stub))

    async def _single_calls(self, stub: Any) -> None:
        while not self.over.is_set():
            job_id = next(iter(self._running), self._first)
            for method, request in (
                ("GetJob", pb.GetJobRequest(job_id=job_id)),
                ("ListJobs", pb.ListJobsRequest(page_size=5)),
                ("ListDatasets", pb.ListDatasetsRequest()),
                ("GetDataset", pb.GetDatasetRequest(name=DATASET)),
                ("ListDeliveries", pb.ListDeliveriesRequest(job_id=job_id)),
            ):
                with self._judged(method):
                    await getattr(stub, method)(request, timeout=CALL_SECONDS)
                    self._outcome.calls[method] += 1
                await asyncio.sleep(0.05)

    async def by_watching(self) -> None:
        """Watch a job to its end, by the stubs."""
        async with self.stub() as stub:
            while not self.over.is_set():
                job_id = next(iter(self._running), self._first)
                request = partial(pb.WatchJobRequest, job_id=job_id)
                state = job_pb2.JOB_STATE_UNSPECIFIED
                async for answer in self._messages(stub, "WatchJob", request):
                    state = answer.job.state
                if state != job_pb2.JOB_STATE_SUCCEEDED:
                    self._outcome.failures.append(f"WatchJob ended at state {state}")

    async def by_downloading(self, pause: float) -> None:
        """Download by the stubs, with `pause` seconds between messages."""
        async with self.stub() as stub:
            while not self.over.is_set():
                offset, digest = 0, hashlib.sha256()

                def request() -> pb.StreamDownloadRequest:
                    return pb.StreamDownloadRequest(
                        job_id=self._first,
                        read_offset=offset,  # noqa: B023 - read while it is this one
                    )

                async for message in self._messages(stub, "StreamDownload", request):
                    if message.data:
                        assert message.offset == offset
                        digest.update(message.data)
                        offset += len(message.data)
                    await asyncio.sleep(pause)
                if digest.digest() != self._sha256:
                    self._outcome.failures.append("StreamDownload gave other bytes")

    async def _messages(
        self, stub: Any, method: str, request: Callable[[], Any]
    ) -> AsyncIterator[Any]:
        """The messages of a stream, which is opened again when it is cut after it began.
        One that does not begin is the service config's."""
        while True:
            begun = False
            try:
                async for message in getattr(stub, method)(request(), timeout=CALL_SECONDS):
                    begun = True
                    yield message
            except grpc.aio.AioRpcError as error:
                if not begun or error.code() not in _ANY_STATE:
                    self._outcome.failures.append(_told(method, error))
                    return
                self._outcome.cut[f"{method} {error.code().name}"] += 1
            else:
                self._outcome.calls[method] += 1
                return

    @contextlib.contextmanager
    def _judged(self, method: str) -> Any:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, no caller expects it
            self._outcome.failures.append(_told(method, error))


def _told(method: str, error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{method}: {error.code().name} {error.details()}"
    return f"{method}: {type(error).__name__} {error}"


async def _serving(address: str) -> None:
    """Wait until the health of a process says SERVING."""
    async with asyncio.timeout(CALL_SECONDS), grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        while True:
            answer = await health.Check(request, wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


async def _restart(fleet: Processes, member: Member) -> Member:
    """End a process as an operator would, and start it again where it listened."""
    code = await asyncio.to_thread(member.terminate)
    assert code == 0, f"it ended with {code}: {member.log.read_text()[-2000:]}"
    again = await asyncio.to_thread(
        fleet.start, "serve", "--listen", member.address, **SETTINGS
    )
    await _serving(again.address)
    return again


async def run(
    postgres: PostgresServer, directory: Path, until: Callable[[int], bool]
) -> Outcome:
    """Restart each process in turn, in rounds, until `until(rounds)` says so."""
    outcome = Outcome()
    url = await asyncio.to_thread(audited_ledger, postgres)
    with processes(url, directory, write_numbers(directory)) as fleet:
        members = await asyncio.gather(
            *(
                asyncio.to_thread(
                    fleet.start, "serve", "--listen", "127.0.0.1:0", **SETTINGS
                )
                for _ in range(MEMBERS)
            )
        )
        callers = Callers([one.address for one in members], directory, outcome)
        await callers.begin()
        async with asyncio.TaskGroup() as load:
            for number in range(2):
                load.create_task(callers.by_the_client(number))
            load.create_task(callers.by_single_calls(16))
            load.create_task(callers.by_watching())
            load.create_task(callers.by_downloading(0.005))
            load.create_task(callers.by_downloading(0.05))
            rounds = 0
            while not until(rounds):
                for place, member in enumerate(members):
                    members[place] = await _restart(fleet, member)
                    outcome.restarts += 1
                rounds += 1
            callers.over.set()
        await _check(fleet, callers, outcome)
        audit = await asyncio.to_thread(Audit.read, url)
    outcome.failures += audit.faults()
    ends = Counter(
        job_id
        for job_id, moves in audit.moves.items()
        for move in moves
        if move.state == "SUCCEEDED" and move.former != move.state
    )
    outcome.failures += [
        f"job {one} published {n} times" for one, n in ends.items() if n != 1
    ]
    owners: dict[int, set[str]] = {}
    for claim in audit.claims:
        if claim.kind in ("plan", "shard"):
            owners.setdefault(claim.task_id, set()).add(claim.owner)
    outcome.moved = sum(len(each) > 1 for each in owners.values())
    return outcome


async def _check(fleet: Processes, callers: Callers, outcome: Outcome) -> None:
    """Every job that was asked for is there once, and has succeeded."""
    found: dict[str, job_pb2.Job] = {}
    async with callers.stub() as stub:
        token = ""
        while True:
            page = await stub.ListJobs(pb.ListJobsRequest(page_size=1000, page_token=token))
            found |= {job.job_id: job for job in page.jobs}
            token = page.next_page_token
            if not token:
                break
    wanted = set(outcome.created.values())
    if wanted != found.keys() or len(wanted) != len(outcome.created):
        outcome.failures.append(
            f"jobs {wanted ^ found.keys()} are lost, or made more than once"
        )
    if wanted != outcome.verified:
        outcome.failures.append(f"not downloaded: {wanted - outcome.verified}")
    for job_id, job in found.items():
        if job.state != job_pb2.JOB_STATE_SUCCEEDED:
            outcome.failures.append(f"job {job_id} is {job_pb2.JobState.Name(job.state)}")
            continue
        manifests = [
            file for file in fleet.files_of(job_id) if file.parent.name == "manifest"
        ]
        if len(manifests) != 1:
            outcome.failures.append(f"job {job_id} has {len(manifests)} manifests")


def main() -> int:
    """Run; 0 when nothing was lost and nothing failed, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.rolling", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of restarts")
    end = time.monotonic() + parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as directory, running_postgres() as postgres:
        outcome = asyncio.run(
            run(postgres, Path(directory), lambda _rounds: time.monotonic() >= end)
        )
    sys.stdout.write("\n".join(outcome.lines()) + "\n")
    return int(bool(outcome.failures))


if __name__ == "__main__":
    sys.exit(main())
