"""Every method of the contract against every kind of caller.

A caller sees what is its own and nothing else: what it is told about another tenant's job,
delivery or queue is, byte for byte, what it is told about one that does not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
import pytest_asyncio
from google.protobuf import struct_pb2
from google.protobuf.message import Message

from exportd.v1 import dataset_pb2, export_service_pb2_grpc, job_pb2, sink_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd_server.api.interceptors.identity import SCOPES
from exportd_server.api.server import SERVICE
from exportd_server.errors import DeliveryFailed
from exportd_server.identity.base import Scope
from exportd_server.identity.file import FileKeyStore
from exportd_server.settings import CertificateSettings, IdentitySettings, TlsSettings
from exportd_server.sinks.registry import SinkTypes
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.identity import (
    AUDIENCE,
    ISSUER,
    Authority,
    Issuer,
    api_key,
    bearer,
)
from tests.support.samples import catalogue_of
from tests.support.scripted_sink import ScriptedSink
from tests.support.server import Server, serve, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

METHODS = {method.name: method for method in SERVICE.methods}

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Target:
    """What a request names: something of a tenant, or nothing that exists."""

    job_id: str
    delivery_id: str
    queue: str
    request_id: str
    page_token: str

    def hidden_in(self, answer: bytes) -> bytes:
        """The answer without what the request itself named."""
        for text in (self.job_id, self.delivery_id, self.queue):
            answer = answer.replace(text.encode(), b"*" * len(text))
        return answer


@dataclass(frozen=True)
class Probe:
    """A call to a method. `missing` is the reason that it is refused with when what it
    names is not there; None for one that names nothing, and answers a stranger with what
    everybody may know."""

    method: str
    request: Callable[[Target], Message]
    missing: str | None = None
    label: str = ""
    of: str = "finished"
    """Which of the owner's jobs."""
    answers: str | None = None
    """What the owner itself is refused with, though it is let through."""

    def __str__(self) -> str:
        return f"{self.method}-{self.label}" if self.label else self.method


def _create(target: Target, **fields: Any) -> Message:
    return rpc.request("wide", **fields)


GONE = "JOB_NOT_FOUND"
PROBES = [
    Probe("ListDatasets", lambda _: pb.ListDatasetsRequest()),
    Probe("GetDataset", lambda _: pb.GetDatasetRequest(name="wide")),
    Probe("CreateExport", lambda t: _create(t, validate_only=True), label="checked"),
    Probe("CreateExport", lambda t: _create(t, request_id=t.request_id), label="repeated"),
    Probe(
        "CreateExport",
        lambda t: _create(t, request_id=t.request_id, format=dataset_pb2.FORMAT_JSONL),
        label="conflicting",
        answers="REQUEST_ID_CONFLICT",
    ),
    Probe("GetJob", lambda t: pb.GetJobRequest(job_id=t.job_id), GONE),
    Probe(
        "GetJob", lambda t: pb.GetJobRequest(job_id=t.job_id), GONE, "running", "running"
    ),
    Probe("ListJobs", lambda _: pb.ListJobsRequest()),
    Probe("ListJobs", lambda _: pb.ListJobsRequest(dataset="wide"), label="filtered"),
    Probe("ListJobs", lambda t: pb.ListJobsRequest(page_token=t.page_token), label="paged"),
    Probe("WatchJob", lambda t: pb.WatchJobRequest(job_id=t.job_id), GONE),
    Probe(
        "WatchJob",
        lambda t: pb.WatchJobRequest(job_id=t.job_id, until_delivered=True),
        GONE,
        "delivered",
    ),
    Probe("CancelJob", lambda t: pb.CancelJobRequest(job_id=t.job_id), GONE),
    Probe(
        "CancelJob",
        lambda t: pb.CancelJobRequest(job_id=t.job_id),
        GONE,
        "running",
        "cancelled by its owner",
    ),
    Probe(
        "DeleteJob",
        lambda t: pb.DeleteJobRequest(job_id=t.job_id),
        GONE,
        of="deleted by its owner",
    ),
    Probe(
        "DeleteJob",
        lambda t: pb.DeleteJobRequest(job_id=t.job_id),
        GONE,
        "running",
        "running",
        answers="JOB_NOT_FINISHED",
    ),
    Probe("StreamDownload", lambda t: pb.StreamDownloadRequest(job_id=t.job_id), GONE),
    Probe(
        "StreamDownload",
        lambda t: pb.StreamDownloadRequest(job_id=t.job_id, part_index=0),
        GONE,
        "part",
    ),
    Probe(
        "StreamDownload",
        lambda t: pb.StreamDownloadRequest(job_id=t.job_id, follow=True),
        GONE,
        "followed",
    ),
    Probe(
        "StreamDownload",
        lambda t: pb.StreamDownloadRequest(job_id=t.job_id, error_part_index=0),
        GONE,
        "errors",
        answers="PART_NOT_FOUND",
    ),
    Probe(
        "StreamDownload",
        lambda t: pb.StreamDownloadRequest(job_id=t.job_id),
        GONE,
        "running",
        "running",
        answers="JOB_NOT_FINISHED",
    ),
    Probe("GetDownloadUrls", lambda t: pb.GetDownloadUrlsRequest(job_id=t.job_id), GONE),
    Probe(
        "GetDownloadUrls",
        lambda t: pb.GetDownloadUrlsRequest(job_id=t.job_id, part_index=0),
        GONE,
        "part",
    ),
    Probe("ListDeliveries", lambda _: pb.ListDeliveriesRequest()),
    Probe(
        "ListDeliveries",
        lambda t: pb.ListDeliveriesRequest(job_id=t.job_id),
        GONE,
        "job",
    ),
    Probe(
        "ListDeliveries",
        lambda t: pb.ListDeliveriesRequest(job_id=t.job_id, sink="dead"),
        GONE,
        "sink",
    ),
    Probe(
        "ListDeliveries", lambda t: pb.ListDeliveriesRequest(queue=t.queue), label="queue"
    ),
    Probe(
        "RedriveDeliveries",
        lambda t: pb.RedriveDeliveriesRequest(job_id=t.job_id),
        GONE,
        "job",
    ),
    Probe(
        "RedriveDeliveries",
        lambda t: pb.RedriveDeliveriesRequest(delivery_id=t.delivery_id),
        "DELIVERY_NOT_FOUND",
        "delivery",
    ),
    Probe(
        "RedriveDeliveries",
        lambda t: pb.RedriveDeliveriesRequest(queue=t.queue),
        "SINK_QUEUE_NOT_FOUND",
        "queue",
    ),
    Probe("ListSinkQueues", lambda _: pb.ListSinkQueuesRequest()),
    Probe(
        "EnableSinkQueue",
        lambda t: pb.EnableSinkQueueRequest(queue=t.queue),
        "SINK_QUEUE_NOT_FOUND",
    ),
    Probe("ListAuditRecords", lambda _: pb.ListAuditRecordsRequest()),
    Probe(
        "ListAuditRecords",
        lambda t: pb.ListAuditRecordsRequest(job_id=t.job_id),
        label="job",
    ),
]
OF_ALL_TENANTS = frozenset({"ListAuditRecords"})
"""Methods for those who run the service, which tell an admin of any tenant of all."""
NOWHERE = Target(
    str(UUID(int=7, version=4)),
    str(UUID(int=8, version=4)),
    "scripted/nowhere",
    str(UUID(int=9, version=4)),
    "",
)

REFUSED = {
    "no credentials": "",
    "an unknown key": "",
    "a key with a wrong secret": "",
    "an expired key": "has expired",
    "a revoked key": "was revoked",
    "a key without its prefix": "",
    "an expired token": "has expired",
    "a token of another issuer's key": "",
    "a token for another audience": "another audience",
    "a certificate nobody knows": "nobody who is known",
    "an expired certificate": "has expired",
    "a bad key beside a good certificate": "",
}
"""Callers who are nobody, and what those who have proven something may be told."""


@dataclass
class World:
    """A server with jobs of the tenant `acme`, and callers of all kinds."""

    server: Server
    targets: dict[str, Target]
    nowhere: Target
    callers: dict[str, Metadata]
    with_certificate: dict[str, Any]
    """Stubs over connections with a client certificate."""

    async def call(
        self, caller: str, probe: Probe, target: Target
    ) -> list[Any] | grpc.aio.AioRpcError:
        """The messages of the answer, or the refusal."""
        stub = self.with_certificate.get(caller, self.server.stub)
        metadata = self.callers.get(caller, ())
        call = getattr(stub, probe.method)(
            probe.request(target), metadata=metadata, timeout=30
        )
        try:
            if METHODS[probe.method].server_streaming:
                return [message async for message in call]
            return [await call]
        except grpc.aio.AioRpcError as error:
            return error

    async def told(self, caller: str, probe: Probe, target: Target) -> Any:
        """All that a caller is told, but for what it said itself."""
        answer = await self.call(caller, probe, target)
        if isinstance(answer, grpc.aio.AioRpcError):
            trailers = sorted(
                (key, value if isinstance(value, bytes) else value.encode())
                for key, value in answer.trailing_metadata() or ()
            )
            return (
                answer.code(),
                target.hidden_in((answer.details() or "").encode()),
                [(key, target.hidden_in(value)) for key, value in trailers],
            )
        return [
            target.hidden_in(_steady(message).SerializeToString(deterministic=True))
            for message in answer
        ]


def _steady(message: Any) -> Message:
    """A job that was made just now, without what differs each time."""
    if not isinstance(message, pb.CreateExportResponse):
        assert isinstance(message, Message)
        return message
    steady = pb.CreateExportResponse()
    steady.CopyFrom(message)
    for field in steady.job.DESCRIPTOR.fields:
        if field.name not in {"request", "generation"}:
            steady.job.ClearField(field.name)  # type: ignore[arg-type]
    steady.job.request.ClearField("request_id")
    return steady


def _to(label: str, endpoint: str = "") -> sink_pb2.Sink:
    config = struct_pb2.Struct()
    config.update({"label": label, "endpoint": endpoint})
    plugin = sink_pb2.PluginSink(type="scripted", config=config)
    return sink_pb2.Sink(name=label, plugin=plugin)


async def _finished(
    stub: Any, metadata: Metadata, *sinks: sink_pb2.Sink, request_id: str = ""
) -> str:
    """An export that has ended, and its deliveries with it."""
    created = await stub.CreateExport(
        rpc.request("wide", request_id=request_id, sinks=sinks), metadata=metadata
    )
    job_id = str(created.job.job_id)
    watch = pb.WatchJobRequest(job_id=job_id, until_delivered=True)
    async for answer in stub.WatchJob(watch, metadata=metadata):
        job = answer.job
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED
    return job_id


async def _running(stub: Any, metadata: Metadata) -> str:
    created = await stub.CreateExport(rpc.request("held"), metadata=metadata)
    job_id = str(created.job.job_id)
    async for answer in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), metadata=metadata):
        if answer.job.state == job_pb2.JOB_STATE_RUNNING:
            break
    return job_id


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = tmp_path_factory.mktemp("tenancy")
    data = directory / "data"
    authority = Authority(directory / "ca")
    shown = authority.pair("localhost", dns=["localhost"])
    issuer, forger = Issuer(), Issuer()
    issuer.add("k")
    forger.add("k")
    jwks = directory / "jwks.json"
    jwks.write_bytes(issuer.jwks())
    callers, keys = await _callers(data, issuer, forger)
    scripted = ScriptedSink()
    scripted.behaviour["dead"] = lambda _: DeliveryFailed("no", retryable=False)
    held = GateSource(2)
    connections = directory / "sinks.toml"
    connections.write_text(
        f'[connections.private]\ntype = "local_file"\nroot = "{directory}"\n'
        'tenants = ["acme"]\n'
    )
    options = settings(
        data,
        identity=IdentitySettings.model_validate(
            {
                "api_keys": True,
                "jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": jwks},
                "mtls": [
                    CertificateSettings(cn=name, tenant="acme", scopes=("admin",))
                    for name in ("expiring", "known")
                ],
            }
        ),
        tls=TlsSettings(
            cert_file=shown.cert_file,
            key_file=shown.key_file,
            client_ca_file=authority.cert_file,
            client_cert_listen="127.0.0.1:0",
        ),
        http={"listen": "127.0.0.1:0"},
        sinks=connections,
        worker={"concurrency": 4},
        drain_timeout=1.0,
    )
    sources = catalogue_of(wide=GateSource(2, wide=True), held=held)
    types = SinkTypes.installed().with_type(scripted)
    async with serve(options, sources, types, credentials=authority.trusted()) as server:
        own = callers["own"]
        request_id = str(UUID(int=1, version=4))
        job_id = await _finished(server.stub, own, _to("dead", "acme"))
        found = await server.stub.ListDeliveries(
            pb.ListDeliveriesRequest(job_id=job_id), metadata=own
        )
        delivery = next(each for each in found.deliveries if each.file_name)
        page = await server.stub.ListJobs(pb.ListJobsRequest(page_size=1), metadata=own)
        target = Target(
            job_id, delivery.delivery_id, delivery.queue, request_id, page.next_page_token
        )
        other = await _finished(server.stub, own, request_id=request_id)
        page = await server.stub.ListJobs(pb.ListJobsRequest(page_size=1), metadata=own)
        target = replace(target, page_token=page.next_page_token)
        assert all((target.queue, target.delivery_id, target.page_token))
        targets = {
            "finished": target,
            "deleted by its owner": replace(target, job_id=other),
            "running": replace(target, job_id=await _running(server.stub, own)),
            "cancelled by its owner": replace(
                target, job_id=await _running(server.stub, own)
            ),
        }
        store = FileKeyStore(data)
        await store.revoke(keys["a revoked key"], datetime.now(UTC))
        async with _over_certificates(server, authority) as stubs:
            # As long as the other, for a message that names it tells its length, too.
            nowhere = replace(NOWHERE, queue=target.queue[:-4] + "none")
            world = World(server, targets, nowhere, callers, stubs)
            await _until_refused(world, "a revoked key")
            await _until_refused(world, "an expired certificate")
            yield world
        held.open_wide()


async def _callers(
    data: Path, issuer: Issuer, forger: Issuer
) -> tuple[dict[str, Metadata], dict[str, str]]:
    """Metadata of each caller, and the ids of their keys."""
    made = {
        "own": ("acme", (Scope.ADMIN,)),
        "own, exports.read": ("acme", (Scope.READ,)),
        "own, exports.write": ("acme", (Scope.WRITE,)),
        "own, admin": ("acme", (Scope.ADMIN,)),
        "own, no scope": ("acme", ()),
        "stranger": ("globex", (Scope.ADMIN,)),
        "stranger, checked": ("initech", (Scope.ADMIN,)),
        "stranger, repeated": ("hooli", (Scope.ADMIN,)),
        "stranger, conflicting": ("umbrella", (Scope.ADMIN,)),
        "a revoked key": ("acme", (Scope.ADMIN,)),
    }
    texts: dict[str, str] = {}
    keys: dict[str, str] = {}
    for name, (tenant, scopes) in made.items():
        texts[name], key = await api_key(data, tenant, scopes)
        keys[name] = key.key_id
    texts["an expired key"], _ = await api_key(data, lifetime=timedelta(seconds=-1))
    own = texts["own"]
    texts |= {
        "an unknown key": f"exportd_{'a' * 16}_{'b' * 52}",
        "a key with a wrong secret": own[:-1] + ("a" if own[-1] != "a" else "b"),
        "a key without its prefix": own.removeprefix("exportd_"),
        "a bad key beside a good certificate": own[:-1],
        "own, by token": issuer.token(scope="admin"),
        "an expired token": issuer.token(scope="admin", lifetime=-60),
        "a token of another issuer's key": forger.token(scope="admin"),
        "a token for another audience": issuer.token(scope="admin", aud="another"),
    }
    return {name: bearer(text) for name, text in texts.items()}, keys


@asynccontextmanager
async def _over_certificates(
    server: Server, authority: Authority
) -> AsyncIterator[dict[str, Any]]:
    names = {
        "own, by certificate": "known",
        "a bad key beside a good certificate": "known",
        "a certificate nobody knows": "unknown",
        "an expired certificate": "expiring",
    }
    async with AsyncExitStack() as stack:
        stubs = {}
        for caller, name in names.items():
            channel = await stack.enter_async_context(_connected(server, authority, name))
            stubs[caller] = export_service_pb2_grpc.ExportServiceStub(channel)
        yield stubs


@asynccontextmanager
async def _connected(
    server: Server, authority: Authority, name: str
) -> AsyncIterator[grpc.aio.Channel]:
    """Connect with a certificate of that name. The one that expires must do so after the
    handshake, which a busy machine may take its time for."""
    address = f"localhost:{server.running.certificate_port}"
    # Else all of them would share the first one's connection.
    options = (("grpc.use_local_subchannel_pool", 1),)
    for seconds in (2, 4, 8, 16):
        until = None
        if name == "expiring":
            until = datetime.now(UTC) + timedelta(seconds=seconds)
        credentials = authority.trusted(authority.pair(name, not_after=until))
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            try:
                await asyncio.wait_for(channel.channel_ready(), seconds)
            except TimeoutError:
                continue
            yield channel
            return
    raise AssertionError("no handshake in time")


async def _until_refused(world: World, caller: str) -> None:
    """Revoking a key takes some seconds, and so does the end of a certificate."""
    async with asyncio.timeout(25):
        while not isinstance(
            await world.call(caller, PROBES[0], world.nowhere), grpc.aio.AioRpcError
        ):
            await asyncio.sleep(0.1)


async def test_every_method_of_the_contract_is_probed_and_needs_a_scope() -> None:
    assert {probe.method for probe in PROBES} == set(METHODS)
    assert set(SCOPES) == set(METHODS)


every_probe = pytest.mark.parametrize("probe", PROBES, ids=str)


@every_probe
@pytest.mark.parametrize("caller", REFUSED)
async def test_nobody_gets_in_with(world: World, caller: str, probe: Probe) -> None:
    answer = await world.call(caller, probe, world.targets[probe.of])
    assert isinstance(answer, grpc.aio.AioRpcError)
    refusal = rpc.Refusal(answer)
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "UNAUTHENTICATED",
    )
    assert REFUSED[caller] in refusal.message
    assert await world.told(caller, probe, world.nowhere) == await world.told(
        caller, probe, world.targets[probe.of]
    )


@every_probe
async def test_a_caller_without_the_scope_is_told_which_one_it_lacks(
    world: World, probe: Probe
) -> None:
    needed = SCOPES[probe.method]
    wrong = {Scope.READ, Scope.WRITE} - {needed}
    for caller in ("own, no scope", *(f"own, {scope}" for scope in sorted(wrong))):
        answer = await world.call(caller, probe, world.targets[probe.of])
        assert isinstance(answer, grpc.aio.AioRpcError)
        refusal = rpc.Refusal(answer)
        assert refusal.code == grpc.StatusCode.PERMISSION_DENIED
        assert refusal.reason == "PERMISSION_DENIED"
        assert refusal.metadata == {"scope": needed}
        assert needed in refusal.message
        assert await world.told(caller, probe, world.nowhere) == await world.told(
            caller, probe, world.targets[probe.of]
        )


@pytest.mark.parametrize(
    "probe", [probe for probe in PROBES if probe.method not in OF_ALL_TENANTS], ids=str
)
async def test_a_stranger_is_told_of_what_is_anothers_as_of_what_is_not_there(
    world: World, probe: Probe
) -> None:
    target = world.targets[probe.of]
    before = await _state(world, target)
    # What one makes is its own, and shows in what it lists.
    creates = probe.method == "CreateExport"
    stranger = f"stranger, {probe.label}" if creates else "stranger"
    about_it = await world.told(stranger, probe, target)
    assert about_it == await world.told(stranger, probe, world.nowhere)
    answer = await world.call(stranger, probe, target)
    if probe.missing is None:
        assert not isinstance(answer, grpc.aio.AioRpcError)
        assert target.job_id not in str(answer)
        assert target.delivery_id not in str(answer)
        assert "acme" not in str(answer)
    else:
        assert isinstance(answer, grpc.aio.AioRpcError)
        assert rpc.Refusal(answer).code == grpc.StatusCode.NOT_FOUND
        assert rpc.Refusal(answer).reason == probe.missing
    assert await _state(world, target) == before


async def _state(world: World, target: Target) -> list[Any]:
    """What only a call could change of a job, a delivery and a queue."""
    own = world.callers["own"]
    stub = world.server.stub
    job = (await stub.GetJob(pb.GetJobRequest(job_id=target.job_id), metadata=own)).job
    query = pb.ListDeliveriesRequest(job_id=target.job_id)
    found = (await stub.ListDeliveries(query, metadata=own)).deliveries
    queues = (await stub.ListSinkQueues(pb.ListSinkQueuesRequest(), metadata=own)).queues
    return [job.state, job.generation, job.manifest, list(found), list(queues)]


@pytest.mark.parametrize("caller", ["own", "stranger"])
async def test_a_connection_of_other_tenants_is_as_one_that_is_not_there(
    world: World, caller: str
) -> None:
    told = []
    for connection in ("private", "nowhere"):
        sink = sink_pb2.Sink(local_file=sink_pb2.LocalFileSink(connection=connection))
        request = rpc.request("wide", sinks=[sink], validate_only=True)
        call = world.server.stub.CreateExport(request, metadata=world.callers[caller])
        try:
            await call
        except grpc.aio.AioRpcError as error:
            told.append(str(rpc.Refusal(error).details).replace(connection, "it"))
        else:
            told.append("OK")
    assert (told[0] == told[1]) == (caller == "stranger")
    assert ("OK" in told) == (caller == "own")
    # What there is to choose from is told as well.
    assert ("private" in told[1]) == (caller == "own")


# The last: some of them change what is there.
@every_probe
async def test_the_owner_gets_through_with_the_very_scope(
    world: World, probe: Probe
) -> None:
    caller = f"own, {SCOPES[probe.method]}"
    answer = await world.call(caller, probe, world.targets[probe.of])
    if probe.answers is not None:
        assert isinstance(answer, grpc.aio.AioRpcError)
        assert rpc.Refusal(answer).reason == probe.answers
    else:
        assert isinstance(answer, list), answer
        assert answer
    if probe.method == "RedriveDeliveries":
        assert isinstance(answer, list)
        assert answer[0].redriven >= 1, "the dead letters are there"
        # They fail again, for the next one to find.
        watch = pb.WatchJobRequest(
            job_id=world.targets[probe.of].job_id, until_delivered=True
        )
        async for _ in world.server.stub.WatchJob(watch, metadata=world.callers["own"]):
            pass


@every_probe
@pytest.mark.parametrize("caller", ["own, by token", "own, by certificate"])
async def test_an_admin_may_do_everything_however_it_identifies_itself(
    world: World, caller: str, probe: Probe
) -> None:
    target = world.nowhere if probe.missing else world.targets[probe.of]
    answer = await world.call(caller, probe, target)
    if isinstance(answer, grpc.aio.AioRpcError):
        assert rpc.Refusal(answer).reason in {probe.missing, probe.answers}
    else:
        assert probe.missing is None
