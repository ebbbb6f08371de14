"""The README's sessions with grpcurl, as they stand there, against a real server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import exportd
from exportd.v1 import export_service_pb2, job_pb2
from exportd_server.identity.base import Scope
from tests.support.identity import Authority, api_key
from tests.support.samples import SAMPLE_ROWS
from tests.support.server import ROOT, Process, server_process
from tools.api_reference import ERROR_EXAMPLE, EXAMPLES

MISSING = [tool for tool in ("grpcurl", "jq", "base64") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"
)

SERVICE = "exportd.v1.ExportService"
MARK = "\x1e"


@dataclass(frozen=True)
class Command:
    """A command of a session, and what the README shows of its output."""

    text: str
    shown: str


def sessions() -> list[list[Command]]:
    """The blocks of the section, each with its commands."""
    section = (ROOT / "README.md").read_text(encoding="utf-8")
    section = section.split("\n## With grpcurl\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [list(map(command, block.split("\n$ "))) for block in blocks]


def command(text: str) -> Command:
    """A command goes on behind each backslash at the end of a line; its output follows."""
    match = re.fullmatch(r"((?:.*\\\n)*.*)\n?((?:.*\n?)*)", text.removeprefix("$ "))
    assert match is not None
    return Command(match[1], match[2])


def run(
    commands: list[Command], server: Process, directory: Path, **variables: str
) -> list[str]:
    """Run commands in one shell that stops at the first failure; returns the output of
    each."""
    lines = [f"{command.text}\nprintf '{MARK}'\n" for command in commands]
    script = "".join(lines).replace("localhost:50051", f"localhost:{server.port}")
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=directory,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *outputs, rest = done.stdout.split(MARK)
    assert rest == ""
    assert len(outputs) == len(commands)
    for command, output in zip(commands, outputs, strict=True):
        if command.shown:
            assert output.splitlines() == command.shown.splitlines(), command.text
    return outputs


def grpcurl(server: Process, *options: str, method: str) -> dict[str, Any]:
    """What a call of one's own prints, be it an answer or an error."""
    done = subprocess.run(
        ["grpcurl", "-plaintext", "-format-error", *options, server.address, method],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, sample_catalogue: Path
) -> Iterator[Process]:
    options = ("--catalogue", str(sample_catalogue))
    with server_process(tmp_path_factory.mktemp("grpcurl"), *options) as running:
        yield running


def test_the_session_that_looks_around_lists_and_describes(
    server: Process, tmp_path: Path
) -> None:
    listed, service, request = run(sessions()[0], server, tmp_path)
    assert SERVICE in listed.split()
    (methods,) = export_service_pb2.DESCRIPTOR.services_by_name.values()
    assert set(re.findall(r"rpc (\w+)", service)) == set(methods.methods_by_name)
    fields = job_pb2.CreateExportRequest.DESCRIPTOR.fields_by_name
    assert set(re.findall(r"(\w+) = \d+;", request)) == set(fields)


def test_the_session_that_exports_saves_what_the_client_does(
    server: Process, tmp_path: Path
) -> None:
    created, watched, streamed, saved = run(sessions()[1], server, tmp_path)
    assert created == streamed == saved == ""
    *_, (state, progress) = map(json.loads, watched.splitlines())
    assert state == "JOB_STATE_SUCCEEDED"
    assert (progress["rows"], progress["fraction"]) == (str(SAMPLE_ROWS), 1)

    # Several blocks of base64, of which more than the last one end in padding.
    told = (tmp_path / "download.json").read_text(encoding="utf-8")
    blocks = re.findall(r'"data": "(.+)"', told)
    assert any(block.endswith("=") for block in blocks[:-1])
    with exportd.Client(server.address) as client:
        (job,) = client.jobs()
        job.download(tmp_path / "by-the-client.csv")
    saved_bytes = (tmp_path / "transfers.csv").read_bytes()
    assert saved_bytes == (tmp_path / "by-the-client.csv").read_bytes()


def test_the_session_that_fails_shows_reason_field_and_mend(
    server: Process, tmp_path: Path
) -> None:
    (explained,) = run(sessions()[2], server, tmp_path)
    message, info, bad = map(json.loads, explained.splitlines())
    assert message.startswith("[INVALID_REQUEST] columns[0]: ")
    assert info["reason"] == "INVALID_REQUEST"
    assert [each["field"] for each in bad["fieldViolations"]] == ["columns[0]"]


def test_the_session_with_tls_and_a_key_is_let_in_by_them_alone(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    authority = Authority(tmp_path)  # writes ca.pem
    pair = authority.pair("server", dns=["localhost"])
    data = tmp_path / "data"
    data.mkdir()
    key, _ = asyncio.run(api_key(data, scopes=[Scope.READ]))
    with server_process(
        data,
        *("--catalogue", str(sample_catalogue)),
        env={
            "EXPORTD_TLS__CERT_FILE": str(pair.cert_file),
            "EXPORTD_TLS__KEY_FILE": str(pair.key_file),
            "EXPORTD_IDENTITY__API_KEYS": "true",
        },
    ) as server:
        (listing,) = sessions()[3:]
        (listed,) = run(listing, server, tmp_path, EXPORTD_TOKEN=key)
        assert len(json.loads(listed)["datasets"]) == 6
        with pytest.raises(AssertionError, match="UNAUTHENTICATED"):
            run(listing, server, tmp_path, EXPORTD_TOKEN=f"{key[:-1]}!")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_both_versions_of_reflection_answer(server: Process, version: str) -> None:
    answer = grpcurl(
        server,
        *("-d", '{"list_services": ""}'),
        method=f"grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
    )
    names = [each["name"] for each in answer["listServicesResponse"]["service"]]
    assert SERVICE in names


def test_the_examples_of_the_api_reference_are_what_grpcurl_prints(server: Process) -> None:
    example = json.loads(ERROR_EXAMPLE.read_text(encoding="utf-8"))
    request = ("-d", json.dumps(example["request"]))
    refused = grpcurl(server, *request, method=f"{SERVICE}/{example['method']}")
    assert refused == example["status"]

    example = json.loads((EXAMPLES / "GetDataset.json").read_text(encoding="utf-8"))
    request = ("-d", json.dumps(example["request"]))
    answer = grpcurl(server, *request, method=f"{SERVICE}/GetDataset")
    assert list(answer["dataset"]) == list(example["response"]["dataset"])


@pytest.mark.parametrize(
    ("symbol", "told"),
    [
        ("exportd.v1.ExportService.CancelJob", "Its output is refused at once"),
        ("exportd.v1.Job", "From this moment on its output is refused"),
        ("exportd.v1.CreateExportRequest.dataset", "dataset"),
    ],
)
def test_a_method_and_a_message_are_described_with_their_comments(
    server: Process, symbol: str, told: str
) -> None:
    done = subprocess.run(
        ["grpcurl", "-plaintext", server.address, "describe", symbol],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert told in done.stdout
