"""The examples of the client's page, as they stand there, against a real server."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.server import ROOT, Process, server_process

README = ROOT / "clients/python/README.md"


@pytest.fixture
def server(tmp_path: Path, sample_catalogue: Path) -> Iterator[Process]:
    with server_process(
        tmp_path / "data",
        *("--catalogue", str(sample_catalogue)),
        # For the URLs among the examples.
        env={"EXPORTD_HTTP__LISTEN": "127.0.0.1:0"},
    ) as running:
        yield running


def example(heading: str, server: Process) -> str:
    """The first block of code under a heading, with the address of this server."""
    section = README.read_text().split(f"\n## {heading}\n")[1]
    found = re.search(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert "localhost:50051" in found[1]
    return found[1].replace("localhost:50051", server.address)


def test_the_python_example_exports_rows_of_the_sample_data(
    server: Process, tmp_path: Path
) -> None:
    code = example("In Python", server)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert pq.read_table(tmp_path / "transfers.parquet").num_rows > 0


def test_the_command_line_example_exports_rows_of_the_sample_data(
    server: Process, tmp_path: Path
) -> None:
    script = example("On the command line", server)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        check=True,
        timeout=60,
    )
    assert len(gzip.decompress((tmp_path / "out.csv.gz").read_bytes()).splitlines()) > 1
    assert [f.suffix for f in (tmp_path / "out").iterdir()] == [".parquet"]
