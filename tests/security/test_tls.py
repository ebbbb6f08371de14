"""TLS of the gRPC port, by real handshakes: what is trusted, who is let in, and what
happens when the files change while the server runs."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from structlog.testing import capture_logs

import exportd
from exportd.errors import AccessDenied
from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc
from exportd_server.api.tls import ServerTls, TlsFiles
from exportd_server.errors import ConfigurationError, Unauthenticated
from exportd_server.identity.base import Scope
from exportd_server.identity.certificates import CertificateCallers, CertificateName
from tests.security.fuzz import free_port, judge_log
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.identity import Authority, Pair, api_key, bearer
from tests.support.ledger import FakeClock
from tests.support.samples import catalogue_of
from tests.support.server import Server, serve, server_process, settings
from tests.support.waits import ENOUGH

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def shown(authority: Authority) -> Pair:
    """What the server shows."""
    return authority.pair("server", dns=["localhost"], ips=["127.0.0.1"])


Serving = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture
def run(tmp_path: Path, authority: Authority, shown: Pair) -> Serving:
    """Runs a server with TLS; keywords are its settings of `tls` and `identity`."""

    @asynccontextmanager
    async def run(
        identity: dict[str, Any] | None = None, pair: Pair = shown, **tls: Any
    ) -> AsyncIterator[Server]:
        options = settings(
            tmp_path / "data",
            tls={"cert_file": pair.cert_file, "key_file": pair.key_file, **tls},
            identity=identity or {},
            drain_timeout=1.0,
        )
        async with serve(
            options,
            catalogue_of(wide=GateSource(2, wide=True)),
            credentials=authority.trusted(),
        ) as server:
            yield server

    return run


def port(server: Server) -> int:
    return server.running.certificate_port or server.running.port


async def ask(
    address: str, credentials: grpc.ChannelCredentials | None, **call: Any
) -> str:
    """What a new connection is answered: OK, the reason, or the code of a handshake that
    failed."""
    async with (
        grpc.aio.insecure_channel(address, OWN_CONNECTION)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, OWN_CONNECTION)
    ) as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        try:
            await stub.ListJobs(pb.ListJobsRequest(), timeout=10, **call)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                return "UNAVAILABLE"
            return rpc.Refusal(error).reason
        return "OK"


# --- what clients trust


async def test_a_client_that_trusts_the_authority_gets_in_and_others_do_not(
    run: Serving, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other", "Another authority")
    async with run() as server:
        address = f"localhost:{server.running.port}"
        assert await ask(address, authority.trusted()) == "OK"
        assert await ask(f"127.0.0.1:{server.running.port}", authority.trusted()) == "OK"
        assert await ask(address, other.trusted()) == "UNAVAILABLE"
        assert await ask(address, grpc.ssl_channel_credentials()) == "UNAVAILABLE"
        assert await ask(address, None) == "UNAVAILABLE"


@pytest.mark.parametrize(
    "names",
    [
        {"dns": ["elsewhere.example"]},
        {"dns": ["localhost.example"]},
        {"dns": ["*.localhost"]},
        {"ips": ["127.0.0.2"]},
        {"uris": ["https://localhost"]},
    ],
)
async def test_a_certificate_for_another_name_is_refused_by_clients(
    run: Serving, authority: Authority, names: dict[str, Any]
) -> None:
    async with run(pair=authority.pair("elsewhere", **names)) as server:
        address = f"localhost:{server.running.port}"
        assert await ask(address, authority.trusted()) == "UNAVAILABLE"


async def test_a_certificate_that_has_expired_is_refused_by_clients(
    run: Serving, authority: Authority
) -> None:
    past = datetime.now(UTC) - timedelta(minutes=1)
    async with run(pair=authority.pair("s", dns=["localhost"], not_after=past)) as server:
        address = f"localhost:{server.running.port}"
        assert await ask(address, authority.trusted()) == "UNAVAILABLE"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
async def test_old_versions_of_tls_are_not_spoken(run: Serving) -> None:
    async with run() as server:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            shown = await handshake(server.running.port, version)
            assert shown.serial_number
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await handshake(server.running.port, ssl.TLSVersion.TLSv1_1)


async def handshake(
    port: int, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> x509.Certificate:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(found)
    finally:
        writer.close()


# --- the client's library and command


async def test_both_clients_of_the_library_speak_tls_and_send_their_token(
    run: Serving, authority: Authority, tmp_path: Path
) -> None:
    text, _ = await api_key(tmp_path / "data")
    async with run({"api_keys": True}) as server:
        address = f"localhost:{server.running.port}"

        def blocking(**options: Any) -> list[str]:
            with exportd.Client(address, timeout=10, **options) as client:
                return [dataset.name for dataset in client.datasets()]

        tls = authority.trusted()
        assert await asyncio.to_thread(blocking, tls=tls, token=text) == ["wide"]
        async with exportd.AsyncClient(address, tls=tls, token=text) as client:
            job = await client.export("wide", format="csv")
            await job.wait()
            # It opens connections of its own.
            await job.download(tmp_path / "out.csv")
            assert (tmp_path / "out.csv").stat().st_size
        with pytest.raises(AccessDenied, match="no credentials"):
            await asyncio.to_thread(blocking, tls=authority.trusted())


def command(*arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
    """Run the client's command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "exportd.cli", "--timeout", "5", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **({"EXPORTD_TOKEN": token} if token else {})},
        timeout=60,
    )


@pytest.mark.minutes
def test_the_command_speaks_tls_shows_a_certificate_and_sends_its_token(
    tmp_path: Path, authority: Authority, shown: Pair
) -> None:
    """A real server that listens on every address, as an operator would run it."""
    data = tmp_path / "data"
    text, _ = asyncio.run(api_key(data, "globex"))
    mine = authority.pair("mine", uris=["spiffe://example.org/exports"])
    config = tmp_path / "server.toml"
    config.write_text(f"""
        sample_rows = 1000
        [identity]
        api_keys = true
        [[identity.mtls]]
        uri = "spiffe://example.org/exports"
        tenant = "acme"
        scopes = ["exports.read", "exports.write"]
        [tls]
        cert_file = "{shown.cert_file}"
        key_file = "{shown.key_file}"
        client_ca_file = "{authority.cert_file}"
        require_client_cert = true
    """)
    with server_process(data, "--config", str(config), "--listen", "0.0.0.0:0") as server:
        to = ("--server", f"localhost:{server.port}", "--ca-cert", str(authority.cert_file))
        with_cert = (
            *("--client-cert", str(mine.cert_file)),
            *("--client-key", str(mine.key_file)),
        )
        created = command(*to, *with_cert, "create", "positions", "-f", "csv", "--json")
        assert created.returncode == 0, created.stderr
        job_id = json.loads(created.stdout)["job_id"]
        assert command(*to, *with_cert, "get", job_id).returncode == 0
        # The token decides, and it is another tenant's.
        assert command(*to, *with_cert, "get", job_id, token=text).returncode == 3
        bad = command(*to, *with_cert, "get", job_id, token=text[:-1])
        assert bad.returncode != 0
        assert "UNAUTHENTICATED" in bad.stderr or "not valid" in bad.stderr
        assert command(*to, "list").returncode == 5, "no handshake without a certificate"
        alone = command(*to, *with_cert[:2], "list")
        assert alone.returncode == 2
        assert "client_key" in alone.stderr
        assert server.terminate() == 0
        assert "client certificates" in server.log.read_text()


# --- whom the server lets in


CALLERS: dict[str, Any] = {
    "mtls": [
        {"cn": "reader", "tenant": "acme", "scopes": ["exports.read"]},
        {"dns": "batch.example", "tenant": "acme", "scopes": ["admin"]},
        {"uri": "spiffe://example/x", "tenant": "globex", "scopes": ["admin"]},
    ]
}


@pytest.mark.parametrize("second", [False, True], ids=["the only port", "a second port"])
async def test_only_certificates_of_the_authority_get_through_the_handshake(
    run: Serving, authority: Authority, tmp_path: Path, second: bool
) -> None:
    where: dict[str, Any] = {"require_client_cert": True}
    if second:
        where = {"client_cert_listen": "127.0.0.1:0"}
    other = Authority(tmp_path / "other", "Another authority")
    past = datetime.now(UTC) - timedelta(minutes=1)
    good = authority.pair("reader")
    forged, expired = other.pair("reader"), authority.pair("reader", not_after=past)
    async with run(CALLERS, client_ca_file=authority.cert_file, **where) as server:
        address = f"localhost:{port(server)}"
        assert await ask(address, authority.trusted(good)) == "OK"
        for wrong in (None, forged, expired):
            assert await ask(address, authority.trusted(wrong)) == "UNAVAILABLE"
        if second:
            # Where nobody is asked for a certificate, one is no use.
            main = f"localhost:{server.running.port}"
            for pair in (None, good):
                answer = await ask(main, authority.trusted(pair))
                assert answer == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"name": "reader"}, "OK"),
        ({"name": "x", "dns": ["batch.example"]}, "OK"),
        ({"name": "x", "uris": ["spiffe://example/x"]}, "OK"),
        ({"name": "x", "dns": ["first.example", "batch.example"]}, "OK"),
        ({"name": "Reader"}, "UNAUTHENTICATED"),
        ({"name": "reader "}, "UNAUTHENTICATED"),
        ({"name": "batch.example"}, "UNAUTHENTICATED"),
        ({"name": "x", "dns": ["reader"]}, "UNAUTHENTICATED"),
        ({"name": "x", "dns": ["*.example"]}, "UNAUTHENTICATED"),
        ({"name": "x", "dns": ["a.batch.example"]}, "UNAUTHENTICATED"),
        ({"name": "x", "dns": ["batch.example.evil"]}, "UNAUTHENTICATED"),
        ({"name": "x", "uris": ["spiffe://example/x/y"]}, "UNAUTHENTICATED"),
        ({"name": "x", "uris": ["batch.example"]}, "UNAUTHENTICATED"),
        ({"name": "reader", "dns": ["batch.example"]}, "UNAUTHENTICATED"),
    ],
    ids=str,
)
async def test_a_name_in_a_certificate_counts_only_letter_by_letter_and_where_it_stands(
    run: Serving, authority: Authority, names: dict[str, Any], expected: str
) -> None:
    async with run(
        CALLERS, client_ca_file=authority.cert_file, require_client_cert=True
    ) as server:
        credentials = authority.trusted(authority.pair(**names))
        assert await ask(f"localhost:{server.running.port}", credentials) == expected


async def test_a_certificate_has_its_tenant_and_scopes(
    run: Serving, authority: Authority
) -> None:
    async with run(
        CALLERS, client_ca_file=authority.cert_file, require_client_cert=True
    ) as server:
        address = f"localhost:{server.running.port}"
        pairs = {
            "reader": authority.pair("reader"),
            "batch": authority.pair("x", dns=["batch.example"]),
            "other": authority.pair("y", uris=["spiffe://example/x"]),
        }
        channels = {
            name: grpc.aio.secure_channel(address, authority.trusted(pair), OWN_CONNECTION)
            for name, pair in pairs.items()
        }
        stubs = {
            name: export_service_pb2_grpc.ExportServiceStub(channel)
            for name, channel in channels.items()
        }
        job = await rpc.create(stubs["batch"], "wide")
        assert (await rpc.get(stubs["reader"], job.job_id)).job_id == job.job_id
        refusal = await rpc.refusal(stubs["reader"].CreateExport(rpc.request("wide")))
        assert refusal.reason == "PERMISSION_DENIED"
        call = stubs["other"].GetJob(pb.GetJobRequest(job_id=job.job_id))
        assert (await rpc.refusal(call)).reason == "JOB_NOT_FOUND"
        for channel in channels.values():
            await channel.close()


async def test_a_token_that_is_sent_decides_alone(
    run: Serving, authority: Authority, tmp_path: Path
) -> None:
    text, _ = await api_key(tmp_path / "data", "globex")
    known, nobody = authority.pair("reader"), authority.pair("nobody")
    async with run(
        {"api_keys": True, **CALLERS},
        client_ca_file=authority.cert_file,
        require_client_cert=True,
    ) as server:
        address = f"localhost:{server.running.port}"
        for pair in (known, nobody):
            credentials = authority.trusted(pair)
            assert await ask(address, credentials, metadata=bearer(text)) == "OK"
            answer = await ask(address, credentials, metadata=bearer(text[:-1]))
            assert answer == "UNAUTHENTICATED"
        assert await ask(address, authority.trusted(known)) == "OK"
        assert await ask(address, authority.trusted(nobody)) == "UNAUTHENTICATED"


def test_a_certificate_ends_at_its_moment_though_the_connection_lives(
    authority: Authority,
) -> None:
    clock = FakeClock()
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    clock.time = end - timedelta(seconds=1)
    pair = authority.pair("reader", not_after=end)
    callers = CertificateCallers(
        {CertificateName("cn", "reader"): ("acme", [Scope.READ])}, clock
    )
    assert callers.authenticate(pair.cert).tenant == "acme"
    clock.advance(1)
    with pytest.raises(Unauthenticated, match="has expired"):
        callers.authenticate(pair.cert)
    with pytest.raises(Unauthenticated):
        callers.authenticate(b"no certificate")


_X400 = x509.UnrecognizedExtension(
    # A name of a kind that the library does not know: [3] of an empty ORAddress.
    x509.SubjectAlternativeName.oid,
    bytes.fromhex("3004a3023000"),
)
_URI = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://example/x")])
ODD: dict[str, list[x509.ExtensionType]] = {
    "UnsupportedGeneralNameType": [_X400],
    "DuplicateExtension": [_URI, _URI],
    "ValueError": [x509.UnrecognizedExtension(_URI.oid, b"no DER")],
}


@pytest.mark.parametrize("cause", ODD)
async def test_a_certificate_that_cannot_be_read_is_nobodys_though_it_was_signed(
    run: Serving, authority: Authority, cause: str
) -> None:
    odd = authority.pair("reader", extensions=ODD[cause])
    with capture_logs() as lines:
        async with run(
            CALLERS, client_ca_file=authority.cert_file, require_client_cert=True
        ) as server:
            address = f"localhost:{server.running.port}"
            # One of the kinds does not get through the handshake.
            told = await ask(address, authority.trusted(odd))
    callers = CertificateCallers(
        {CertificateName("cn", "reader"): ("acme", [Scope.READ])}, FakeClock()
    )
    with pytest.raises(Unauthenticated) as refused:
        callers.authenticate(odd.cert)
    assert refused.value.cause == f"unreadable client certificate: {cause}"
    causes = [line["cause"] for line in lines if line["event"] == "caller refused"]
    assert (told, causes) in (
        ("UNAUTHENTICATED", [refused.value.cause]),
        ("UNAVAILABLE", []),
    )


# --- files that change


async def test_a_renewed_certificate_serves_new_connections_and_old_ones_live_on(
    run: Serving, authority: Authority, shown: Pair
) -> None:
    async with run() as server:
        before = await handshake(server.running.port)
        await server.stub.ListJobs(pb.ListJobsRequest())
        replace(shown, authority.pair("renewed", dns=["localhost"]))
        after = await handshake(server.running.port)
        assert after.serial_number != before.serial_number
        # Both a connection that was there and a new one.
        await server.stub.ListJobs(pb.ListJobsRequest())
        address = f"localhost:{server.running.port}"
        assert await ask(address, authority.trusted()) == "OK"


def replace(pair: Pair, new: Pair) -> None:
    """As renewing tools do: the new file beside the old one, then over it."""
    for file, content in ((pair.cert_file, new.cert), (pair.key_file, new.key)):
        fresh = file.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.replace(file)


@pytest.mark.minutes
def test_many_connections_at_once_and_a_renewal_among_them_leave_the_server_alive(
    tmp_path: Path, authority: Authority, shown: Pair
) -> None:
    """In a process of its own: the library would end it."""
    new = authority.pair("renewed", dns=["localhost"])
    files = {
        "EXPORTD_TLS__CERT_FILE": str(shown.cert_file),
        "EXPORTD_TLS__KEY_FILE": str(shown.key_file),
    }
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])

    def connect(times: int) -> set[bytes | None]:
        found = set()
        for _ in range(times):
            with (
                socket.create_connection(("127.0.0.1", server.port), ENOUGH) as plain,
                context.wrap_socket(plain) as connection,
            ):
                found.add(connection.getpeercert(binary_form=True))
        return found

    with (
        server_process(tmp_path / "data", env=files) as server,
        ThreadPoolExecutor(32) as threads,
    ):
        before = connect(1)
        crowd = [threads.submit(connect, 30) for _ in range(31)]
        connect(15)
        replace(shown, new)
        after = connect(1)
        shown_to_crowd = [each.result() for each in crowd]
        assert server.terminate() == 0
    assert after != before
    assert set().union(*shown_to_crowd) == before | after


@pytest.mark.parametrize("fault", ["half", "garbage", "empty", "gone"])
async def test_files_that_are_broken_change_nothing_and_are_told_once(
    run: Serving, authority: Authority, shown: Pair, fault: str
) -> None:
    new = authority.pair("renewed", dns=["localhost"])
    async with run() as server:
        before = await handshake(server.running.port)
        if fault == "half":
            shown.cert_file.write_bytes(new.cert)
        elif fault == "garbage":
            shown.cert_file.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA")
        elif fault == "empty":
            shown.key_file.write_bytes(b"")
        else:
            shown.cert_file.unlink()
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                assert await handshake(server.running.port) == before
        told = [each for each in logs if "TLS files" in each["event"]]
        assert len(told) == 1
        assert "tls." in told[0]["error"]
        assert "PRIVATE" not in str(told)
        replace(shown, new)
        after = await handshake(server.running.port)
        assert after == x509.load_pem_x509_certificate(new.cert)


async def test_clients_of_a_new_authority_get_in_once_its_file_is_there(
    run: Serving, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other", "Another authority")
    mine, theirs = authority.pair("reader"), other.pair("reader")
    file = tmp_path / "client-ca.pem"
    file.write_bytes(authority.cert)
    async with run(CALLERS, client_ca_file=file, require_client_cert=True) as server:
        address = f"localhost:{server.running.port}"
        foreign = grpc.ssl_channel_credentials(authority.cert, theirs.key, theirs.cert)
        assert await ask(address, foreign) == "UNAVAILABLE"
        file.write_bytes(authority.cert + other.cert)
        assert await ask(address, foreign) == "OK"
        assert await ask(address, authority.trusted(mine)) == "OK"
        file.write_bytes(other.cert)
        assert await ask(address, authority.trusted(mine)) == "UNAVAILABLE"
        assert await ask(address, foreign) == "OK"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no certificate", "tls.cert_file: .* cannot be read"),
        ("no key", "tls.key_file: .* cannot be read"),
        ("text", "tls.cert_file: .* holds no certificate"),
        ("another key", "is not the key of the first certificate"),
        ("password", "without a password"),
        ("no authority", "tls.client_ca_file"),
    ],
)
def test_a_server_does_not_start_on_files_that_will_not_do(
    authority: Authority, shown: Pair, fault: str, told: str
) -> None:
    files = TlsFiles(shown.cert_file, shown.key_file, authority.cert_file)
    if fault == "no certificate":
        shown.cert_file.unlink()
    elif fault == "no key":
        shown.key_file.unlink()
    elif fault == "text":
        shown.cert_file.write_text("certificate")
    elif fault == "another key":
        shown.key_file.write_bytes(authority.pair("other").key)
    elif fault == "password":
        key: Any = serialization.load_pem_private_key(shown.key, None)
        shown.key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"word"),
            )
        )
    else:
        authority.cert_file.write_text("")
    with pytest.raises(ConfigurationError, match=told) as refused:
        ServerTls(files)
    assert "\n" not in str(refused.value)


# --- the log


async def thrown_at(port: int, junk: bytes) -> None:
    """Send what is no request here, and wait until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(junk)
    async with asyncio.timeout(ENOUGH):
        with suppress(ConnectionError):
            await writer.drain()
            writer.write_eof()
            await reader.read()
    writer.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
async def test_every_line_of_the_log_is_json_whatever_knocks_on_the_ports(
    tmp_path: Path, authority: Authority, shown: Pair
) -> None:
    http, certificates = free_port(), free_port()
    config = tmp_path / "server.toml"
    config.write_text(f"""
        sample_rows = 1000
        [http]
        listen = "127.0.0.1:{http}"
        [log]
        level = "debug"
        [tls]
        cert_file = "{shown.cert_file}"
        key_file = "{shown.key_file}"
        client_ca_file = "{authority.cert_file}"
        client_cert_listen = "127.0.0.1:{certificates}"
        [[identity.mtls]]
        cn = "reader"
        tenant = "acme"
        scopes = ["exports.read"]
    """)
    noise = random.Random(7)

    with server_process(tmp_path / "data", "--config", str(config)) as server:
        for port in (server.port, certificates, http):
            await thrown_at(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await thrown_at(port, b"")
            # What begins as a record of TLS does, and what does not.
            await thrown_at(port, b"\x16\x03\x01\x00\xff" + noise.randbytes(300))
            for _ in range(5):
                await thrown_at(port, noise.randbytes(300))
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                await handshake(port, ssl.TLSVersion.TLSv1_1)
        address = f"localhost:{certificates}"
        assert await ask(address, authority.trusted()) == "UNAVAILABLE"
        assert await ask(address, authority.trusted(authority.pair("reader"))) == "OK"
        code = await asyncio.to_thread(server.terminate)
        text = server.log.read_text()
    assert code == 0
    wrong, events = judge_log(text)
    assert wrong == []
    assert events["info: stopped"] == 1
