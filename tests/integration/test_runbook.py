"""From an alert to the job, its error and the way on, by the runbook's own commands."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import struct_pb2

from exportd.v1 import sink_pb2
from exportd_server.errors import DeliveryFailed, ValueNotEncodable
from exportd_server.sinks.registry import SinkTypes
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.samples import catalogue_of
from tests.support.scrape import scrape
from tests.support.scripted_sink import ScriptedSink
from tests.support.server import ROOT, Server, serve, settings
from tests.support.waits import ENOUGH


def steps(alert: str) -> list[str]:
    """The commands of an alert's section, in their order."""
    text = (ROOT / "docs/runbook.md").read_text()
    (section,) = re.findall(
        rf"^## {alert}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    blocks = re.findall(r"^```console\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return re.findall(r"^\$ (.+)$", "".join(blocks), re.MULTILINE)


def rule(alert: str) -> dict[str, Any]:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]
    (found,) = (r for g in groups for r in g["rules"] if r["alert"] == alert)
    assert isinstance(found, dict)
    return found


@dataclass
class Shift:
    """An operator at a server."""

    server: Server
    sink: ScriptedSink
    source: GateSource
    metrics: str

    async def raised(self, alert: str, **labels: str) -> None:
        """Wait until what the alert counts has moved."""
        counted = re.findall(r"exportd_\w+", rule(alert)["expr"])[0]
        async with asyncio.timeout(ENOUGH):
            while not (await scrape(self.metrics)).total(counted, **labels):
                await asyncio.sleep(0.05)

    async def exportd(self, step: str) -> str:
        """Run a command as it stands in the runbook; it must end well."""
        name, *words = shlex.split(step)
        assert name == "exportd"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "exportd.cli", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "EXPORTD_SERVER": self.server.address},
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    async def console(self, alert: str) -> str:
        """The page that the alert names."""
        (path,) = re.findall(r"/console/\S+", rule(alert)["annotations"]["see"])
        url = f"http://127.0.0.1:{self.server.running.http_port}{path}"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())

        return await asyncio.to_thread(read)


@pytest.fixture
async def shift(tmp_path: Path, unused_tcp_port: int) -> AsyncIterator[Shift]:
    sink, source = ScriptedSink(), GateSource(2, wide=True)
    metrics = f"127.0.0.1:{unused_tcp_port}"
    options = settings(
        tmp_path,
        metrics={"listen": metrics},
        http={
            "listen": "127.0.0.1:0",
            "console": True,
            "signing_keys": ["a-key-for-tests-and-nothing-else-"],
        },
        drain_timeout=2.0,
    )
    types = SinkTypes.installed().with_type(sink)
    async with serve(options, catalogue_of(orders=source), types) as server:
        yield Shift(server, sink, source, metrics)


async def test_from_dead_letters_to_the_job_its_error_and_the_redrive(
    shift: Shift,
) -> None:
    refused = DeliveryFailed("the table has no column amount", retryable=False)
    shift.sink.behaviour["a"] = lambda _delivery: refused
    config = struct_pb2.Struct()
    config.update({"label": "a"})
    to_sink = sink_pb2.Sink(plugin=sink_pb2.PluginSink(type="scripted", config=config))
    job = await rpc.export(shift.server.stub, "orders", sinks=[to_sink])
    await shift.raised("ExportdDeadLetters", outcome="dead_lettered", sink="scripted")

    listed, told, redriven, watched = steps("ExportdDeadLetters")
    assert rule("ExportdDeadLetters")["annotations"]["see"].startswith(listed)
    assert job.job_id in await shift.exportd(listed)
    error = await shift.exportd(told.replace("JOB", job.job_id))
    assert "the table has no column amount" in error
    page = await shift.console("ExportdDeadLetters")
    assert job.job_id in page
    assert "the table has no column amount" in page

    shift.sink.behaviour.clear()
    await shift.exportd(redriven.replace("JOB", job.job_id))
    assert "DELIVERED" in await shift.exportd(watched.replace("JOB", job.job_id))
    assert job.job_id not in await shift.exportd(listed)
    assert shift.sink.got["a"]


async def test_from_failing_jobs_to_the_job_and_its_error(shift: Shift) -> None:
    shift.source.fail(ValueNotEncodable("row 7 is no number", column="text"))
    failed = await rpc.create(shift.server.stub, "orders")
    await rpc.finish(shift.server.stub, failed.job_id)
    await shift.raised("ExportdJobsFailing", dataset="orders")

    listed, told = steps("ExportdJobsFailing")
    see = rule("ExportdJobsFailing")["annotations"]["see"]
    assert see.replace("{{ $labels.dataset }}", "DATASET").startswith(listed)
    assert failed.job_id in await shift.exportd(listed.replace("DATASET", "orders"))
    assert "row 7 is no number" in await shift.exportd(told.replace("JOB", failed.job_id))
    assert failed.job_id in await shift.console("ExportdJobsFailing")
