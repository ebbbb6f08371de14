"""Secrets stay where they were put: none is found in a log, an answer, an error, the
ledger, the metrics, an output, or what a process shows of itself.

Every place that takes a secret gets one of its own, the server is used and provoked, and
what it let out is searched for each of them, in every spelling.
"""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import psycopg
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import struct_pb2
from grpc_status import rpc_status

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc, job_pb2, sink_pb2
from exportd_server.errors import ConfigurationError
from exportd_server.settings import load_settings
from exportd_server.sinks.connections import load_connections
from exportd_server.sinks.registry import SinkTypes
from exportd_server.sources.catalogue import load_catalogue
from tests.security.fuzz import free_port, judge_log
from tests.support import rpc
from tests.support.canaries import Canaries, Evidence, files_below, forms
from tests.support.identity import Authority, Issuer, bearer
from tests.support.postgres import PostgresServer
from tests.support.processes import Member, processes
from tests.support.receiver import Receiver, reply
from tests.support.server import ROOT, server_process

TOLD = ("answers", "data", "data afterwards", "table exportd.jobs")
"""Where the path of a webhook's URL may stand: its owner is told it, and a job keeps it.
In logs and in errors it has no place."""

PLUGIN = """
from pydantic import BaseModel, ConfigDict, SecretStr
from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import SinkDefaults, SinkPlan, Takes

class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    token: SecretStr
    number: int = 1

class Place(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    password: SecretStr

class Type:
    name = "vault"
    request_model, connection_model, needs_connection = Request, Place, True
    defaults = SinkDefaults()

    def check(self, request, connection, export):
        return SinkPlan(Takes.WHOLE, "vault")

    async def open(self, connection):
        return Sink(connection)

class Sink:
    def __init__(self, connection):
        self.connection = connection

    async def probe(self, request, export):
        return None

    async def deliver(self, request, delivery):
        if request.number == 2:
            raise RuntimeError(f"unforeseen, with {request!r} to {self.connection!r}")
        if request.number == 3:
            raise DeliveryFailed(f"refused: {request}", retryable=False)
        return "kept"

    async def close(self):
        return None
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed sink type that takes secrets."""
    folder = tmp_path_factory.mktemp("plugin")
    about = folder / "vault-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: vault\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[exportd.sinks]\nvault = vault_sink:Type\n")
    (folder / "vault_sink.py").write_text(PLUGIN)
    return folder


@dataclass
class Scene:
    """Canaries in every file and variable, and what was let out so far."""

    canaries: Canaries
    evidence: Evidence
    folder: Path
    catalogue: Path
    environment: dict[str, str]
    receiver: Receiver
    keys: list[str]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return bearer(self.keys[0])


def _url(password: str, place: str) -> str:
    return f"postgresql://postgres:{quote(password, safe='')}@{place}"


def _prepare(
    folder: Path, postgres: PostgresServer, plugin: Path, receiver: Receiver
) -> Scene:
    canaries, evidence = Canaries(), Evidence()
    folder.mkdir()
    database = postgres.create_database()
    postgres.sql(
        "CREATE TABLE people (id bigint, name text, iban text);"
        "INSERT INTO people SELECT n, 'p' || n, 'iban-' || n FROM generate_series(1,50) n",
        database=database,
    )
    at = f"127.0.0.1:{postgres.port}"
    source, target = canaries.text("catalogue password"), canaries.text("sink password")
    catalogue = folder / "datasets.toml"
    catalogue.write_text(
        f"mask_key = '{canaries.text('mask key')}'\n"
        f'[connections.main]\nurl = "{_url(source, f"{at}/{database}")}"\n'
        '[datasets.people]\nconnection = "main"\ntable = "people"\n'
        'mask = {iban = "hash"}\n'
    )
    (folder / "delivered").mkdir()
    hook = canaries.word("webhook header of the operator")
    sinks = folder / "sinks.toml"
    sinks.write_text(
        '[connections.files]\ntenants = "*"\nshared = true\ntype = "local_file"\n'
        f'root = "{folder}/delivered"\n'
        '[connections.hook]\ntenants = "*"\nshared = true\ntype = "webhook"\n'
        f'url = "{receiver.url}"\n'
        f'signing_keys = ["{canaries.signing_key("signing key of the operator")}"]\n'
        f'headers = {{x-token = "{hook}"}}\n'
        'allow_http = true\nallow_private = ["127.0.0.0/8"]\nmax_attempts = 2\n'
        '[connections.open]\ntenants = "*"\nshared = true\ntype = "webhook"\n'
        "allow_http = true\n"
        'allow_private = ["127.0.0.0/8"]\nmax_attempts = 2\nretry_base_seconds = 0.1\n'
        # One of the receivers speaks no TLS, and does not say so.
        "connect_timeout = 0.5\n"
        '[connections.table]\ntenants = "*"\nshared = true\ntype = "database"\n'
        f'url = "{_url(target, f"{at}/{database}")}"\n'
        '[connections.nowhere]\ntenants = "*"\nshared = true\ntype = "database"\n'
        "max_attempts = 1\n"
        f'url = "{_url(canaries.text("password of one away"), "127.0.0.1:1/x")}"\n'
        '[connections.bucket]\ntenants = "*"\nshared = true\ntype = "object_storage"\n'
        'bucket = "lake"\nmax_attempts = 1\n'
        f'endpoint_url = "http://u:{canaries.word("S3 user of a sink")}@127.0.0.1:1"\n'
        "path_style = true\n"
        'access_key_id = "somebody"\n'
        f"secret_access_key = '{canaries.text('S3 key of a sink')}'\n"
        '[connections.vault]\ntenants = "*"\nshared = true\ntype = "vault"\n'
        "max_attempts = 1\n"
        'password = "${VAULT_PASSWORD}"\n'
    )
    environment = {
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(plugin), os.environ.get("PYTHONPATH")))
        ),
        "VAULT_PASSWORD": canaries.text("password of a plug-in's connection"),
        "EXPORTD_CATALOGUE": str(catalogue),
        "EXPORTD_SINKS": str(sinks),
        "EXPORTD_LOG__LEVEL": "debug",
        "EXPORTD_IDENTITY__API_KEYS": "true",
        "EXPORTD_HTTP__LISTEN": "127.0.0.1:0",
        "EXPORTD_HTTP__SIGNING_KEYS": canaries.word("key of download URLs"),
        "EXPORTD_DELIVERY__SECRET_KEYS": canaries.word("key of callers' secrets"),
        "EXPORTD_IDENTITY__JWT__ISSUER": "https://issuer.example",
        "EXPORTD_IDENTITY__JWT__AUDIENCE": "exports",
        "EXPORTD_IDENTITY__JWT__JWKS_URL": (
            f"https://u:{canaries.word('password of the key set')}@127.0.0.1:1/keys"
            f"?key={canaries.word('query of the key set')}"
        ),
    }
    return Scene(canaries, evidence, folder, catalogue, environment, receiver, [])


def _make_key(scene: Scene, place: str, env: dict[str, str], *arguments: str) -> str:
    """Have the command make an API key; what it logs is evidence, what it prints is for
    the owner."""
    made = subprocess.run(
        [
            *(sys.executable, "-m", "exportd_server", "keys", "create"),
            *("--tenant", "acme", "--scope", "admin", *arguments),
        ],
        capture_output=True,
        check=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    scene.evidence.add("keys create", made.stderr)
    key = made.stdout.strip()
    scene.canaries.add(place, key.rpartition("_")[2])
    return key


def _requests(scene: Scene) -> Iterator[job_pb2.CreateExportRequest]:
    """Right and wrong ones, with secrets wherever a caller may put one."""
    canaries, hook = scene.canaries, scene.receiver.url

    def ask(**sink: Any) -> job_pb2.CreateExportRequest:
        return rpc.request("people", sinks=[sink_pb2.Sink(**sink)])

    def webhook(number: int, **said: Any) -> job_pb2.CreateExportRequest:
        header = canaries.word(f"header {number} of a caller")
        said.setdefault("secret", canaries.signing_key(f"signing key {number} of a caller"))
        return ask(
            webhook=sink_pb2.WebhookSink(
                connection="open", headers={"authorization": header}, **said
            )
        )

    def vault(place: str, **said: Any) -> job_pb2.CreateExportRequest:
        config = struct_pb2.Struct()
        config.update({"token": canaries.text(place), **said})
        return ask(
            plugin=sink_pb2.PluginSink(type="vault", connection="vault", config=config)
        )

    secret_path = canaries.word("path of a webhook")
    secret_query = canaries.word("query of a webhook")
    yield rpc.request("people", columns=["name", "iban"])
    yield ask(local_file=sink_pb2.LocalFileSink(connection="files"))
    yield ask(webhook=sink_pb2.WebhookSink(connection="hook"))
    yield ask(
        database=sink_pb2.DatabaseSink(connection="table", table="t", create_table=True)
    )
    yield ask(database=sink_pb2.DatabaseSink(connection="nowhere", table="t"))
    yield ask(object_storage=sink_pb2.ObjectStorageSink(connection="bucket"))
    yield webhook(1, url=f"{hook}/{secret_path}?key={secret_query}")
    yield webhook(2, url=f"http://127.0.0.1:1/{secret_path}")
    yield webhook(3, url=hook.replace("http:", "https:") + f"/{secret_path}")
    yield webhook(4, url=hook, mode=sink_pb2.WEBHOOK_MODE_PUSH_PARTS)
    yield vault("secret of a plug-in")
    yield vault("secret of a plug-in that fails", number=2)
    yield vault("secret of a plug-in that refuses", number=3)
    # What is refused at once.
    user = canaries.word("password in a URL")
    yield webhook(5, url=f"http://u:{user}@127.0.0.1/")
    yield webhook(6, url=f"ftp://{canaries.word('place of a bad URL')}/")
    yield webhook(7, url=hook, secret=canaries.text("bad signing key"))
    yield webhook(8, url=hook, secret="whsec_" + canaries.word("short signing key"))
    yield ask(
        webhook=sink_pb2.WebhookSink(
            connection="hook", url=hook + "/../" + canaries.word("other path")
        )
    )
    bad = f"{canaries.word('bad header value')}\r\nx: y"
    yield ask(
        webhook=sink_pb2.WebhookSink(connection="open", url=hook, headers={"x-a": bad})
    )
    yield vault("secret beside a bad field", number="many")
    yield vault("secret beside an unknown field", nothing=1)
    config = struct_pb2.Struct()
    config.update({"token": {"inner": canaries.text("secret of the wrong kind")}})
    yield ask(plugin=sink_pb2.PluginSink(type="vault", connection="vault", config=config))


async def _provoke(scene: Scene, stub: Any) -> list[str]:
    """Make every request, checked first and then in earnest; keep all that is said.
    Returns the jobs."""
    evidence, jobs = scene.evidence, []
    for request in _requests(scene):
        for only in (True, False):
            request.validate_only = only
            try:
                answer = await stub.CreateExport(request, metadata=scene.metadata)
            except grpc.aio.AioRpcError as error:
                _keep_error(evidence, error)
                continue
            evidence.add("answers", answer.SerializeToString() + str(answer).encode())
            if not only:
                jobs.append(answer.job.job_id)
    await asyncio.gather(*(_watch(scene, stub, job_id) for job_id in jobs))
    for method, message in (
        ("ListJobs", pb.ListJobsRequest()),
        ("ListDeliveries", pb.ListDeliveriesRequest(page_size=1000)),
        ("ListSinkQueues", pb.ListSinkQueuesRequest()),
        ("ListDatasets", pb.ListDatasetsRequest()),
        ("GetDataset", pb.GetDatasetRequest(name="people")),
        *(("GetJob", pb.GetJobRequest(job_id=job)) for job in jobs),
    ):
        answer = await getattr(stub, method)(message, metadata=scene.metadata)
        evidence.add("answers", answer.SerializeToString() + str(answer).encode())
    evidence.add("downloads", await _downloaded(scene, stub, jobs[0]))
    return jobs


async def _watch(scene: Scene, stub: Any, job_id: str) -> None:
    watch = pb.WatchJobRequest(job_id=job_id, until_delivered=True)
    # Deliveries to what is away go on for longer than anybody waits here.
    call = stub.WatchJob(watch, metadata=scene.metadata, timeout=4)
    try:
        async for response in call:
            scene.evidence.add("answers", response.SerializeToString())
    except grpc.aio.AioRpcError as error:
        scene.evidence.add("errors", f"{error.details()}{error.debug_error_string()}")


async def _downloaded(scene: Scene, stub: Any, job_id: str) -> bytes:
    data = b""
    async for message in stub.StreamDownload(
        pb.StreamDownloadRequest(job_id=job_id), metadata=scene.metadata
    ):
        data += message.SerializeToString()
    urls = await stub.GetDownloadUrls(
        pb.GetDownloadUrlsRequest(job_id=job_id), metadata=scene.metadata
    )
    scene.evidence.add("answers", urls.SerializeToString())
    if urls.urls[0].url.startswith("http://"):
        for url in (urls.urls[0].url, urls.urls[0].url[:-9] + "changed"):
            data += await asyncio.to_thread(_fetched, url)
    return data


def _fetched(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - of the server
            return str(answer.headers).encode() + answer.read()  # type: ignore[no-any-return]
    except urllib.error.HTTPError as refused:
        with refused:
            return str(refused.headers).encode() + refused.read()


async def _strangers(scene: Scene, stub: Any) -> None:
    """Calls with keys and tokens that are none, or of elsewhere."""
    issuer = Issuer()
    issuer.add("k")
    token = issuer.token()
    canaries = scene.canaries
    canaries.add("a token's signature", token.rpartition(".")[2])
    halves = scene.keys[0].rpartition("_")
    for text in (
        token,
        f"{halves[0]}_{canaries.word('secret of a wrong key')}",
        f"{halves[0]}_{halves[2][:-1]}",
        canaries.word("no key at all"),
    ):
        for scheme in ("Bearer ", "bearer  ", "Basic ", ""):
            said = (("authorization", scheme + text),)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ListJobs(pb.ListJobsRequest(), metadata=said)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            _keep_error(scene.evidence, refused.value)


def _keep_error(evidence: Evidence, error: grpc.aio.AioRpcError) -> None:
    status = rpc_status.from_call(error)
    assert status is not None, error
    evidence.add("errors", f"{error.details()}{error.debug_error_string()}{status}")
    for key, value in error.trailing_metadata() or ():
        evidence.add("errors", key)
        evidence.add("errors", value)


def _keep_log(evidence: Evidence, where: str, log: Path) -> None:
    text = log.read_text()
    assert '"level": "debug"' in text, "the log is to hold everything"
    evidence.add(where, text)
    wrong, _ = judge_log(text)
    # The plug-in that raises what nobody foresaw is told about, and nothing else.
    assert not [line for line in wrong if "no JSON" in line]


def _check(scene: Scene) -> None:
    """Nothing was found, and the search finds what is there."""
    found = [
        each
        for each in scene.canaries.found_in(scene.evidence)
        if not any(
            each.startswith(f"path of a webhook stands in {place} ") for place in TOLD
        )
    ]
    assert not found, "\n".join(found)
    # A control: in each of these places it would have been found.
    place, secret = next(iter(scene.canaries.secrets.items()))
    for where, data in scene.evidence.pieces.items():
        planted = Evidence({where: data})
        planted.add(where, base64.b64encode(b"x" + secret))
        assert Canaries({place: secret}).found_in(planted), where


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Takes what is sent to it, once it has refused the first."""
    async with Receiver(reply(503), reply(204)).listen() as listening:
        yield listening


def _private_key(canaries: Canaries, folder: Path) -> tuple[dict[str, str], bytes]:
    """Settings of a server with TLS, whose key is a secret, and who has signed it."""
    authority = Authority(folder)
    pair = authority.pair("localhost", dns=["localhost"])
    key = serialization.load_pem_private_key(pair.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    number = key.private_numbers().private_value.to_bytes(32, "big")
    canaries.secrets["private key (number)"] = number
    for line in pair.key.decode().splitlines()[1:-1]:
        canaries.add(f"private key ({line[:4]}...)", line)
    settings = {
        "EXPORTD_TLS__CERT_FILE": str(pair.cert_file),
        "EXPORTD_TLS__KEY_FILE": str(pair.key_file),
    }
    return settings, authority.cert


@pytest.mark.parametrize(
    "encrypted",
    [False, pytest.param(True, id="TLS", marks=pytest.mark.minutes)],
    ids=["plain", None],
)
async def test_an_embedded_server_lets_no_secret_out(
    tmp_path: Path,
    postgres: PostgresServer,
    plugin: Path,
    receiver: Receiver,
    encrypted: bool,
) -> None:
    scene = _prepare(tmp_path / "scene", postgres, plugin, receiver)
    data = tmp_path / "data"
    metrics = f"127.0.0.1:{free_port()}"
    env = {**scene.environment, "EXPORTD_METRICS__LISTEN": metrics}
    root = b""
    if encrypted:
        tls, root = _private_key(scene.canaries, tmp_path / "tls")
        env |= tls
    scene.keys.append(_make_key(scene, "API key", env, "--data-dir", str(data)))
    with server_process(data, env=env) as server:
        address = f"localhost:{server.port}"
        async with (
            grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root))
            if encrypted
            else grpc.aio.insecure_channel(address)
        ) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            jobs = await _provoke(scene, stub)
            await _strangers(scene, stub)
        scene.evidence.add(
            "metrics", await asyncio.to_thread(_fetched, f"http://{metrics}/metrics")
        )
        scene.evidence.add_process("process", server.process.pid)
        # With what is written ahead, and before anything is tidied.
        scene.evidence.add_files(
            "data", [path for path in files_below(data) if path.suffix != ".log"]
        )
        scene.evidence.add_files("delivered", files_below(scene.folder / "delivered"))
        assert server.terminate() == 0
        _keep_log(scene.evidence, "log", server.log)
    scene.evidence.add_files(
        "data afterwards", [path for path in files_below(data) if path.suffix != ".log"]
    )
    assert len(jobs) >= 10
    assert len(receiver.requests) >= 3, "normal use is part of it"
    assert b"exportd_build_info" in scene.evidence.pieces["metrics"]
    assert {"log", "metrics", "data", "answers", "errors", "downloads", "process"} <= set(
        scene.evidence.pieces
    )
    _check(scene)


@pytest.mark.minutes
async def test_a_fleet_lets_no_secret_out(
    tmp_path: Path, postgres: PostgresServer, plugin: Path, receiver: Receiver
) -> None:
    scene = _prepare(tmp_path / "scene", postgres, plugin, receiver)
    password = scene.canaries.text("password of the ledger")
    ledger = _url(password, f"127.0.0.1:{postgres.port}/{postgres.create_database()}")
    metrics = f"127.0.0.1:{free_port()}"
    with processes(ledger, tmp_path, scene.catalogue) as fleet:
        fleet.environment.update(scene.environment)
        scene.keys.append(_make_key(scene, "API key", fleet.environment))
        api = fleet.api(metrics__listen=metrics)
        worker = fleet.worker()
        async with grpc.aio.insecure_channel(api.address) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            await _provoke(scene, stub)
            await _strangers(scene, stub)
        scene.evidence.add(
            "metrics", await asyncio.to_thread(_fetched, f"http://{metrics}/metrics")
        )
        for name, member in (("API", api), ("worker", worker)):
            scene.evidence.add_process(f"process of the {name}", member.process.pid)
        # The cluster shows what each connection calls itself and runs.
        with psycopg.connect(ledger) as peer:
            for table in ("pg_stat_activity", *_tables(peer)):
                rows = peer.execute(f"SELECT t::text FROM {table} t".encode()).fetchall()
                scene.evidence.add(f"table {table}", "\n".join(row for (row,) in rows))
        scene.evidence.add_files("outputs", files_below(tmp_path / "out"))
        scene.evidence.add_files("delivered", files_below(scene.folder / "delivered"))
        _end(scene, {"API": api, "worker": worker})
    assert b"people" in scene.evidence.pieces["table exportd.jobs"]
    assert len(receiver.requests) >= 3, "normal use is part of it"
    _check(scene)


def _tables(peer: psycopg.Connection[Any]) -> list[str]:
    rows = peer.execute(
        "SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname = 'exportd'"
    ).fetchall()
    assert len(rows) >= 5
    return [name for (name,) in rows]


def _end(scene: Scene, members: dict[str, Member]) -> None:
    for name, member in members.items():
        assert member.terminate() == 0
        _keep_log(scene.evidence, f"log of the {name}", member.log)


# --- what cannot start


Load = Callable[[Path], object]
S = "@S@"
"""Stands for the secret; `@U@` for it, encoded for a URL, and `@W@` for one of letters and
digits alone, which parsers take for a host, a port or a path."""

BAD_CATALOGUES = {
    "refused": "[connections.c]\nurl = 'postgresql://u:@U@@127.0.0.1:1/d'\n",
    "unknown host": "[connections.c]\nurl = 'postgresql://u:@U@@no.invalid/d'\n",
    "bad port": "[connections.c]\nurl = 'postgresql://u:@U@@127.0.0.1:port/d'\n",
    "huge port": "[connections.c]\nurl = 'postgresql://u:@U@@127.0.0.1:99999/d'\n",
    "bad scheme": "[connections.c]\nurl = 'mysql://u:@U@@127.0.0.1/d'\n",
    "no scheme": "[connections.c]\nurl = 'u:@S@@127.0.0.1/d'\n",
    "bare password": "[connections.c]\nurl = 'postgresql://u:@S@@127.0.0.1:1/d'\n",
    "@ in a password": "[connections.c]\nurl = 'postgresql://u:ab@@W@@127.0.0.1/d'\n",
    "@ and : in a password": "[connections.c]\nurl = 'postgresql://u:ab@cd:@W@@h/d'\n",
    "/ in a password": "[connections.c]\nurl = 'postgresql://u:12/@W@@127.0.0.1/d'\n",
    "? in a password": "[connections.c]\nurl = 'postgresql://u:12?@W@@127.0.0.1/d'\n",
    "# in a password": "[connections.c]\nurl = 'postgresql://u:12#@W@@127.0.0.1/d'\n",
    "password for a port": "[connections.c]\nurl = 'postgresql://u:@W@/d'\n",
    "bracket": "[connections.c]\nurl = 'postgresql://u:@U@@[::1/d'\n",
    "option": "[connections.c]\nurl = 'postgresql://127.0.0.1:1/d?password=@U@'\n",
    "bad option": "[connections.c]\nurl = 'postgresql://127.0.0.1:1/d?passwort=@U@'\n",
    "list": "[connections.c]\nurl = ['postgresql://u:@U@@127.0.0.1/d']\n",
    "table": "[connections.c]\nurl = {password = '@S@'}\n",
    "unknown key": "[connections.c]\nurl = 'sqlite:///x'\npassword = '@S@'\n",
    "mask key": "mask_key = ['@S@']\n",
    "no TOML": "mask_key = '@S@\n",
    "no TOML either": "mask_key = @S@\n",
}
BAD_SINKS = {
    "bad scheme": "type = 'database'\nurl = 'mysql://u:@U@@h/d'\n",
    "list": "type = 'database'\nurl = ['postgresql://u:@U@@h/d']\n",
    "with more": "type = 'database'\nurl = 'sqlite:///@U@'\nschemas = ['a']\n",
    "bad port": "type = 'database'\nurl = 'postgresql://u:@U@@127.0.0.1:port/d'\n",
    "bare password": "type = 'database'\nurl = 'postgresql://u:@S@@127.0.0.1/d'\n",
    "@ in a password": "type = 'database'\nurl = 'postgresql://u:ab@@W@@h/d'\n",
    "@ and : in a password": "type = 'database'\nurl = 'postgresql://u:ab@cd:@W@@h/d'\n",
    "unknown key": "type = 'database'\nurl = 'postgresql://u:@U@@h/d'\npasswd = '@S@'\n",
    "half a pair": "type = 'object_storage'\nbucket = 'b'\nsecret_access_key = '@S@'\n",
    "S3 list": "type = 'object_storage'\nbucket = 'b'\nsecret_access_key = ['@S@']\n",
    "S3 endpoint": "type = 'object_storage'\nbucket = 'b'\nendpoint_url = 'x://a:@U@@h'\n",
    "signing key": "type = 'webhook'\nsigning_keys = ['@S@']\n",
    "short signing key": "type = 'webhook'\nsigning_keys = ['whsec_@S@']\n",
    "one signing key": "type = 'webhook'\nsigning_keys = '@S@'\n",
    "headers alone": "type = 'webhook'\nheaders = {x = '@S@'}\n",
    "bad header": "type = 'webhook'\nurl = 'https://h/'\nheaders = {x = \"@S@\\r\"}\n",
    "header list": "type = 'webhook'\nurl = 'https://h/'\nheaders = {x = ['@S@']}\n",
    "URL with user": "type = 'webhook'\nurl = 'https://u:@U@@h/'\n",
    "URL of path": "type = 'webhook'\nurl = 'https://h/@U@/../x'\n",
}
JWT = "[identity.jwt]\nissuer = 'i'\naudience = 'a'\n"
BAD_SETTINGS = {
    "ledger list": "ledger = {url = ['postgresql://u:@U@@h/d']}\n",
    "ledger key": "[ledger]\nurl = 'postgresql://u:@U@@h/d'\npassword = '@S@'\n",
    "S3 list": "[store.s3]\nsecret_access_key = ['@S@']\n",
    "S3 key": "[store.s3]\nsecret_key = '@S@'\n",
    "short key": "[http]\nsigning_keys = ['@S@', 'x']\n",
    "key list": "[http]\nsigning_keys = [['@S@']]\n",
    "no JSON": "[http]\nsigning_keys = '[@S@'\n",
    "short secret": "[delivery]\nsecret_keys = '@S@ x'\n",
    "public URL": "[http]\npublic_url = 'https://u:@U@@h/'\n",
    "key set": f"{JWT}jwks_url = 'ftp://u:@U@@h/'\n",
    "@ in that of a key set": f"{JWT}jwks_url = 'https://u:ab@cd:@W@@h/'\n",
    "/ in that of a key set": f"{JWT}jwks_url = 'https://u:12/@W@@h/'\n",
    "odd letter in it": f"{JWT}jwks_url = 'https://u:℀@W@@h/'\n",
}
BAD_VARIABLES = {
    "EXPORTD_LEDGER": '{"url": "@S@"}',
    "EXPORTD_LEDGER__PASSWORD": S,
    "EXPORTD_IDENTITY__MTLS": "[@S@",
    "EXPORTD_HTTP__SIGNING_KEYS": "[@S@",
    "EXPORTD_DELIVERY__SECRET_KEYS": '["x @S@"]'.replace(" @S@", "") + "@S@",
}
REFUSED = [
    *(("datasets.toml", name, text) for name, text in BAD_CATALOGUES.items()),
    *(("sinks.toml", name, text) for name, text in BAD_SINKS.items()),
    *(("exportd.toml", name, text) for name, text in BAD_SETTINGS.items()),
]
LOADERS: dict[str, Load] = {
    "datasets.toml": load_catalogue,
    "sinks.toml": lambda path: load_connections(path, SinkTypes.installed()),
    "exportd.toml": lambda path: load_settings(path, {}, {}),
}


@pytest.mark.parametrize(
    ("file", "text"),
    [(file, text) for file, _, text in REFUSED],
    ids=[f"{file}-{name}" for file, name, _ in REFUSED],
)
def test_a_file_that_is_refused_does_not_tell_its_secret(
    tmp_path: Path, file: str, text: str
) -> None:
    canaries, evidence = Canaries(), Evidence()
    secret = canaries.text("secret").replace('"', "").replace("é", "e")
    canaries.secrets["secret"] = secret.encode()
    if file == "datasets.toml":
        text += '[datasets.d]\nconnection = "c"\ntable = "t"\n'
    if file == "sinks.toml":
        text = "[connections.c]\n" + text
    path = tmp_path / file
    text = text.replace("@W@", canaries.word("word"))
    path.write_text(text.replace("@U@", quote(secret, safe="")).replace(S, secret))
    with pytest.raises(ConfigurationError) as refused:
        LOADERS[file](path)
    told = str(refused.value)
    assert "\n" not in told
    evidence.add("message", told)
    assert not canaries.found_in(evidence)


@pytest.mark.parametrize("name", BAD_VARIABLES)
def test_a_variable_that_is_refused_does_not_tell_its_secret(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    canaries, evidence = Canaries(), Evidence()
    monkeypatch.setenv(name, BAD_VARIABLES[name].replace(S, canaries.word("secret")))
    with pytest.raises(ConfigurationError) as refused:
        load_settings(None, {})
    evidence.add("message", str(refused.value))
    assert not canaries.found_in(evidence)


UNENCODED = {"at": "ab@@W@", "at and colon": "ab@cd:@W@", "slash": "12/@W@"}
"""Passwords that make another URL of the text that they stand in."""


def _unencoded(folder: Path, canaries: Canaries) -> Iterator[tuple[str, dict[str, str]]]:
    """Environments with such passwords in each place that takes one."""
    for name, password in UNENCODED.items():

        def url(
            place: str, scheme: str = "postgresql", name: str = name, text: str = password
        ) -> str:
            secret = text.replace("@W@", canaries.word(f"{place}, {name}"))
            return f"{scheme}://u:{secret}@127.0.0.1:1/d"

        catalogue, sinks = folder / f"{name} 1.toml", folder / f"{name} 2.toml"
        catalogue.write_text(
            f"[connections.c]\nurl = '{url('catalogue')}'\n"
            "[datasets.d]\nconnection = 'c'\ntable = 't'\n"
        )
        sinks.write_text(f"[connections.c]\ntype = 'database'\nurl = '{url('sink')}'\n")
        yield f"ledger with {name}", {"EXPORTD_LEDGER__URL": url("ledger")}
        yield f"catalogue with {name}", {"EXPORTD_CATALOGUE": str(catalogue)}
        yield f"sinks with {name}", {"EXPORTD_SINKS": str(sinks)}
        yield (
            f"key set with {name}",
            {
                "EXPORTD_IDENTITY__JWT__ISSUER": "i",
                "EXPORTD_IDENTITY__JWT__AUDIENCE": "a",
                "EXPORTD_IDENTITY__JWT__JWKS_URL": url("key set", "https"),
            },
        )


def _starts(tmp_path: Path, canaries: Canaries) -> dict[str, dict[str, str]]:
    """Environments that no server can start with."""
    authority = Authority(tmp_path / "tls")
    pair = authority.pair("localhost")
    bad_key = tmp_path / "bad.key"
    secret = canaries.word("private key")
    bad_key.write_text(
        f"-----BEGIN PRIVATE KEY-----\n{secret}\n-----END PRIVATE KEY-----\n"
    )
    s3 = {
        "EXPORTD_STORE__URL": "s3://bucket/prefix",
        "EXPORTD_STORE__S3__ENDPOINT_URL": (
            f"http://u:{canaries.word('S3 user')}@127.0.0.1:1"
        ),
        "EXPORTD_STORE__S3__ACCESS_KEY_ID": "somebody",
        "EXPORTD_STORE__S3__SECRET_ACCESS_KEY": canaries.text("S3 key"),
        "EXPORTD_STORE__S3__SESSION_TOKEN": canaries.text("S3 session"),
        "EXPORTD_STORE__S3__ATTEMPTS": "1",
    }

    def ledger(place: str, url: str) -> dict[str, str]:
        secret = quote(canaries.text(f"ledger, {place}"), safe="")
        return {
            "EXPORTD_LEDGER__URL": url.replace("@U@", secret),
            "EXPORTD_STORE__URL": "file:///tmp/x",
        }

    return {
        "ledger refused": ledger("refused", "postgresql://u:@U@@127.0.0.1:1/d"),
        "ledger port": ledger("port", "postgresql://u:@U@@127.0.0.1:port/d"),
        "ledger option": ledger("option", "postgresql://127.0.0.1:1/d?password=@U@&x=y"),
        "S3": s3,
        "store": {"EXPORTD_STORE__URL": f"s3://u:{canaries.word('store URL')}@bucket/x"},
        "TLS": {
            "EXPORTD_TLS__CERT_FILE": str(pair.cert_file),
            "EXPORTD_TLS__KEY_FILE": str(bad_key),
        },
    }


@pytest.mark.minutes
def test_a_server_that_cannot_start_does_not_tell_why_by_its_secrets(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    canaries, evidence = Canaries(), Evidence()
    unencoded = dict(_unencoded(tmp_path, canaries))
    starts = {**_starts(tmp_path, canaries), **unencoded}

    def start(name: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / name.replace(" ", "-")
        return subprocess.run(
            [
                *(sys.executable, "-m", "exportd_server", "serve"),
                *("--listen", "127.0.0.1:0", "--log-level", "debug"),
                *("--data-dir", str(folder)),
            ],
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "EXPORTD_CATALOGUE": str(sample_catalogue),
                **starts[name],
            },
            timeout=60,
        )

    with ThreadPoolExecutor(3) as pool:
        ended = dict(zip(starts, pool.map(start, starts), strict=True))
    for name, done in ended.items():
        evidence.add(name, done.stdout + done.stderr)
        assert "Traceback" not in done.stderr, name
        assert name not in unencoded or "percent-encode" in done.stderr, done.stderr
    assert {name: done.returncode for name, done in ended.items()} == dict.fromkeys(
        starts, 2
    )
    assert not canaries.found_in(evidence)


@pytest.mark.parametrize("skip", range(3))
def test_the_search_finds_a_secret_in_every_spelling(skip: int) -> None:
    canaries = Canaries()
    secret = canaries.text("secret")
    other = Canaries()
    other.text("another secret")
    padded = b"x" * skip + secret.encode() + b"yz"
    spellings = [
        padded,
        padded.hex().encode(),
        padded.hex().upper().encode(),
        base64.b64encode(padded),
        base64.urlsafe_b64encode(padded),
        quote(padded.decode(), safe="").encode(),
        *forms(secret.encode()),
    ]
    for spelling in spellings:
        evidence = Evidence({"somewhere": b"before " + spelling + b" after"})
        assert canaries.found_in(evidence), spelling
        assert not other.found_in(evidence)
