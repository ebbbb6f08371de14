"""Each language's verified download of about 1 GiB over loopback, beside Python's.

The drivers of the tests download the same output in turn (A B C D A B C D ...), each in a
fresh process that writes to a disk in memory, so that no disk is measured. Seconds are
those of the download alone, as the driver tells them; CPU seconds are of its whole
process, start included. A language that is not installed is left out, and said so.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import exportd
from bench.machine import CACHE, sample_data, server
from bench.report import Result, smaller_is_better
from tests.clients.languages import Language
from tests.clients.test_go import GoClient
from tests.clients.test_java import JavaClient
from tests.clients.test_python import PythonClient
from tests.clients.test_typescript import TypeScriptClient

ROWS = 5_000_000
ROUNDS = 5
MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it


def results() -> Iterator[Result]:
    """Measure."""
    languages: list[Language] = [
        PythonClient(),
        GoClient(),
        JavaClient(),
        TypeScriptClient(),
    ]
    for language in list(languages):
        if reason := language.missing():
            yield Result(f"download by {language.name}: left out, {reason}", 0, "")
            languages.remove(language)
        else:
            language.build()
    catalogue = sample_data(ROWS)
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as data,
        server(Path(data), catalogue) as measured,
    ):
        with exportd.Client(measured.address) as client:
            job = client.export("token_transfers", format="csv").wait(timeout=600)
        assert job.manifest is not None
        gib = job.manifest.size / 2**30
        runs: dict[str, list[tuple[float, float]]] = {}
        for number in range(ROUNDS + 1):
            for language in languages:
                took = download(language, measured.address, job.id)
                if number:  # the first fills caches
                    runs.setdefault(language.name, []).append(took)
    seconds = {
        name: statistics.median(took for took, _ in each) for name, each in runs.items()
    }
    cpu = {name: statistics.median(used for _, used in each) for name, each in runs.items()}
    for name, wall in seconds.items():
        goal = "at least 1 x Python's" if name in {"go", "java"} else ""
        yield smaller_is_better(
            f"download by {name}, verified",
            wall / gib,
            "s/GiB",
            peer="python",
            peer_value=seconds["python"] / gib,
            goal=goal,
        )
        yield smaller_is_better(
            f"download by {name}, CPU of the process",
            cpu[name] / gib,
            "CPU s/GiB",
            peer="python",
            peer_value=cpu["python"] / gib,
            goal="",
        )


def download(language: Language, address: str, job_id: str) -> tuple[float, float]:
    """Seconds of one download, and CPU seconds of its process."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [*language.driver(), "download", job_id, str(Path(directory) / "output")],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "EXPORTD_SERVER": address.replace("127.0.0.1", "localhost")},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(done.stdout)
    assert told["verified_by"] == "sha256"
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return told["seconds"], used
