"""The examples of the client's page, as they stand there, against a real server."""

from __future__ import annotations

import gzip
import os
import re
import sqlite3
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
    (tmp_path / "reports").mkdir()
    sqlite3.connect(tmp_path / "warehouse.db").close()
    sinks = tmp_path / "sinks.toml"
    sinks.write_text(
        f'[connections.reports]\ntype = "local_file"\nroot = "{tmp_path / "reports"}"\n'
        '[connections.warehouse]\ntype = "database"\n'
        f'url = "sqlite:///{tmp_path / "warehouse.db"}"\n'
    )
    with server_process(
        tmp_path / "data",
        *("--catalogue", str(sample_catalogue)),
        env={
            "EXPORTD_HTTP__LISTEN": "127.0.0.1:0",  # for the URLs among the examples
            "EXPORTD_SINKS": str(sinks),
            # The client's, in whose environment a server may start, too.
            "EXPORTD_WEBHOOK_SECRET": "whsec_x",
        },
    ) as running:
        yield running


def examples(heading: str, server: Process) -> list[str]:
    """The blocks of code under a heading, with the address of this server."""
    section = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert "localhost:50051" in found[0]
    return [block.replace("localhost:50051", server.address) for block in found]


def assert_delivered(tmp_path: Path) -> None:
    """The sinks have what the examples deliver to them."""
    daily = tmp_path / "reports" / "daily"
    assert {file.suffix for file in daily.iterdir()} == {".parquet", ".json"}
    warehouse = sqlite3.connect(tmp_path / "warehouse.db")
    (rows,) = warehouse.execute("SELECT count(*) FROM positions").fetchone()
    warehouse.close()
    assert rows > 0


def test_the_python_examples_export_and_deliver_rows_of_the_sample_data(
    server: Process, tmp_path: Path
) -> None:
    downloading, delivering, stubs = examples("In Python", server)
    for code in (downloading, delivering, stubs):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert pq.read_table(tmp_path / "transfers.parquet").num_rows > 0
    assert_delivered(tmp_path)


@pytest.mark.minutes
def test_the_command_line_examples_export_and_deliver_rows_of_the_sample_data(
    server: Process, tmp_path: Path
) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-e", "-c", "".join(examples("On the command line", server))],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        check=True,
        timeout=60,
    )
    assert len(gzip.decompress((tmp_path / "out.csv.gz").read_bytes()).splitlines()) > 1
    assert [f.suffix for f in (tmp_path / "out").iterdir()] == [".parquet"]
    assert_delivered(tmp_path)
