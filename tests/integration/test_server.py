"""What every tool expects of a gRPC server: health, reflection, a clean start and stop."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc
from tests.support.gate import GateSource
from tests.support.samples import catalogue_of
from tests.support.server import ROOT, serve, server_process, settings
from tests.support.waits import ENOUGH

SERVICE = "exportd.v1.ExportService"


def reflect(address: str, version: str, symbol: str | None = None) -> bytes:
    """Ask one version of reflection for the services, or the file of a symbol."""
    request = (
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
        if symbol
        else reflection_pb2.ServerReflectionRequest(list_services="")
    )
    with grpc.insecure_channel(address) as channel:
        call: grpc.StreamStreamMultiCallable[object, bytes] = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        )
        (response,) = call(iter([request]))
    return bytes(response)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_names_and_describes_the_service_in_both_versions(
    tmp_path: Path, version: str
) -> None:
    async with serve(settings(tmp_path), catalogue_of(gated=GateSource())) as server:
        listed = await asyncio.to_thread(reflect, server.address, version)
        for name in (
            SERVICE,
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        ):
            assert name.encode() in listed
        for symbol in (SERVICE, "grpc.reflection.v1.ServerReflection"):
            described = await asyncio.to_thread(reflect, server.address, version, symbol)
            assert symbol.rpartition(".")[2].encode() in described


async def test_health_is_serving_until_the_server_drains(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    with server_process(tmp_path, "--catalogue", str(sample_catalogue)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watched = aiter(health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)))
            first = await anext(watched)
            assert first.status == health_pb2.HealthCheckResponse.SERVING
            server.process.terminate()
            second = await asyncio.wait_for(anext(watched), ENOUGH)
            assert second.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_sigterm_ends_the_server_cleanly(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    with server_process(tmp_path, "--catalogue", str(sample_catalogue)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            await stub.ListDatasets(pb.ListDatasetsRequest())
        assert server.terminate() == 0
        events = [json.loads(line)["event"] for line in server.log.read_text().splitlines()]
        assert events == ["serving", "draining", "stopped"]


async def test_a_second_server_on_the_same_data_is_refused_in_one_line(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    with server_process(tmp_path, "--catalogue", str(sample_catalogue)):
        second = start(tmp_path, "--catalogue", str(sample_catalogue))
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert "ledger.db" in line


def start(
    data_dir: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Start a server that is expected to refuse."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "exportd_server", "serve"),
            *("--listen", "127.0.0.1:0", "--data-dir", str(data_dir), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
        cwd=ROOT,
    )


@pytest.mark.minutes
@pytest.mark.parametrize(
    ("arguments", "env", "config", "expected"),
    [
        (["--listen", "0.0.0.0:0"], {}, None, ["listen", "allow_unauthenticated"]),
        (["--listen", "nowhere"], {}, None, ["listen", "host:port"]),
        (["--catalogue", "missing.toml"], {}, None, ["missing.toml"]),
        ([], {"EXPORTD_LEDGR__URL": "x"}, None, ["EXPORTD_LEDGR__URL", "LEDGER__URL"]),
        ([], {"EXPORTD_WORKER__CONCURRENCY": "0"}, None, ["worker.concurrency"]),
        ([], {}, "[workr]\n", ["server.toml", "workr"]),
        ([], {}, "[worker]\nconcurency = 1\n", ["server.toml", "worker.concurency"]),
        ([], {}, "listen = \n", ["server.toml", "TOML"]),
        ([], {}, '[ledger]\nurl = "mysql://x/y"\n', ["ledger.url", "sqlite:///"]),
        ([], {}, '[store]\nurl = "ftp://x/y"\n', ["store.url", "file:///"]),
        ([], {}, "[retention]\nreap_interval = 0.5\n", ["retention.reap_interval"]),
        ([], {}, "[retention]\nttl = 1000\nmax_ttl = 10\n", ["retention", "max_ttl"]),
        ([], {"EXPORTD_RETENTION__MAX_TTL": "9" * 18}, None, ["retention.max_ttl"]),
        (["--data-dir", "README.md"], {}, None, ["data_dir", "README.md"]),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line_with_the_key(
    tmp_path: Path,
    sample_catalogue: Path,
    arguments: list[str],
    env: dict[str, str],
    config: str | None,
    expected: list[str],
) -> None:
    if "--catalogue" not in arguments:
        arguments = [*arguments, "--catalogue", str(sample_catalogue)]
    if config is not None:
        file = tmp_path / "server.toml"
        file.write_text(config)
        arguments = [*arguments, "--config", str(file)]
    done = start(tmp_path / "data", *arguments, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    for text in expected:
        assert text in line


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, sample_catalogue: Path) -> None:
    with server_process(tmp_path / "a", "--catalogue", str(sample_catalogue)) as server:
        done = start(
            tmp_path / "b",
            *("--catalogue", str(sample_catalogue), "--listen", server.address),
        )
        assert done.returncode == 2
        assert "listen" in done.stderr.splitlines()[-1]
