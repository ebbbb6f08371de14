"""Clients that were released go on working with today's server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import server_process
from tools.release import CONTRACT, ROOT, releases

JOURNEY = Path(__file__).with_name("journey.py")


def test_something_was_released() -> None:
    assert releases()[0].name == "v0.1.0"


@pytest.mark.minutes
@pytest.mark.parametrize("release", releases(), ids=lambda release: release.name)
def test_a_released_client_does_all_it_could(
    release: Path, sample_catalogue: Path, tmp_path: Path
) -> None:
    (wheel,) = release.glob("exportd-*.whl")
    assert (release / CONTRACT).is_file()
    with server_process(tmp_path / "data", "--catalogue", str(sample_catalogue)) as server:
        done = subprocess.run(
            [sys.executable, str(JOURNEY), server.address, str(tmp_path)],
            check=False,
            capture_output=True,
            text=True,
            # Pure Python: a wheel can be imported from as it is.
            env={**os.environ, "PYTHONPATH": str(wheel)},
            cwd=tmp_path,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["client"].startswith(str(wheel)), "another client ran"


def test_a_contract_that_breaks_released_clients_is_found(tmp_path: Path) -> None:
    changed = tmp_path / "proto"
    subprocess.run(["cp", "-r", str(ROOT / "proto"), str(changed)], check=True)
    job = changed / "exportd/v1/job.proto"
    text = job.read_text()
    assert "string job_id = 1;" in text
    job.write_text(text.replace("string job_id = 1;", "string job_id = 77;", 1))
    buf = Path(sys.executable).with_name("buf")
    against = releases()[-1] / CONTRACT
    found = subprocess.run(
        [buf, "breaking", str(changed), "--against", str(against)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 100, found.stderr
    assert "job_id" in found.stdout
