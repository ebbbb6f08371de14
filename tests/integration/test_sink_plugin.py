"""The example of a sink in a package of its own: built, installed and used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import struct_pb2

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import export_service_pb2_grpc, job_pb2, sink_pb2
from tests.support import rpc
from tests.support.server import ROOT, server_process

PACKAGE = ROOT / "docs" / "examples" / "sink-plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package was installed: nothing of it is on the path otherwise."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--disable-pip-version-check", "--no-build-isolation", "--no-index"),
            *("--target", str(target), str(PACKAGE)),
        ],
        check=True,
        capture_output=True,
    )
    return target


@pytest.mark.minutes
async def test_a_sink_of_another_package_is_found_configured_and_delivered_to(
    installed: Path, tmp_path: Path, sample_catalogue: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    sinks = tmp_path / "sinks.toml"
    sinks.write_text(f'[connections.audit]\ntype = "journal"\nfile = "{journal}"\n')

    def to(**config: str) -> sink_pb2.Sink:
        said = struct_pb2.Struct()
        said.update(config)
        return sink_pb2.Sink(
            plugin=sink_pb2.PluginSink(type="journal", connection="audit", config=said)
        )

    env = {
        "PYTHONPATH": str(installed),
        "EXPORTD_SINKS": str(sinks),
        "EXPORTD_CATALOGUE": str(sample_catalogue),
    }
    with server_process(tmp_path / "data", env=env) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            refusal = await rpc.refusal(
                stub.CreateExport(rpc.request("positions", sinks=[to(notes="x")]))
            )
            assert refusal.fields == ["sinks[0].plugin.notes"]
            refusal = await rpc.refusal(
                stub.CreateExport(rpc.request("positions", sinks=[to(note="a\nb")]))
            )
            assert refusal.fields == ["sinks[0].plugin.note"]
            job = await rpc.create(stub, "positions", sinks=[to(note="Q3")])
            assert job.request.sinks[0].plugin.config["note"] == "Q3"
            done = job_pb2.Job()
            watch = pb.WatchJobRequest(job_id=job.job_id, until_delivered=True)
            async for response in stub.WatchJob(watch, timeout=30):
                done = response.job
    assert list(done.delivered_to) == ["journal"]
    assert done.deliveries[0].receipt == "line 1"
    (line,) = map(json.loads, journal.read_text().splitlines())
    assert line["job"] == job.job_id
    assert line["rows"] == done.manifest.rows
    assert line["note"] == "Q3"


def test_a_package_that_cannot_be_loaded_stops_no_server(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    broken = tmp_path / "broken"
    (broken / "broken-1.0.dist-info").mkdir(parents=True)
    (broken / "broken-1.0.dist-info" / "METADATA").write_text(
        "Name: broken\nVersion: 1.0\n"
    )
    (broken / "broken-1.0.dist-info" / "entry_points.txt").write_text(
        "[exportd.sinks]\nbroken = broken_sink:Type\n"
    )
    (broken / "broken_sink.py").write_text("raise RuntimeError('no such library')\n")
    env = {"PYTHONPATH": str(broken), "EXPORTD_CATALOGUE": str(sample_catalogue)}
    with server_process(tmp_path / "data", env=env) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = export_service_pb2_grpc.ExportServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.CreateExport(
                    rpc.request(
                        "positions",
                        sinks=[sink_pb2.Sink(plugin=sink_pb2.PluginSink(type="broken"))],
                    )
                )
        assert "sinks[0].plugin.type" in str(refused.value)
        assert server.terminate() == 0
        assert "sink type cannot be loaded" in server.log.read_text()
