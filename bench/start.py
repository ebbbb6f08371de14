"""How soon things are ready: the client's import, and the embedded server's first answer.

The client's is the time of an interpreter that imports it and ends, less that of one that
does nothing. The server's is from the command to the health service's first `SERVING`.
"""

from __future__ import annotations

import compileall
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.contest import Contestant, Run, command, contest, cpu_seconds, peak_mib
from bench.machine import CACHE, ROOT, sample_data
from bench.report import Result

ROUNDS = 9
SAMPLE_ROWS = 1_000_000
GOAL_IMPORT_MS = 150
GOAL_READY_S = 1.0


def results() -> Iterator[Result]:
    """Measure."""
    # An installed package has its bytecode; a tree that was edited may not.
    for source in (ROOT / "service", ROOT / "clients" / "python" / "src"):
        compileall.compile_dir(source, quiet=1)
    imports = contest(
        {
            "nothing": _python("pass"),
            "grpc": _python("import grpc"),
            "exportd": _python("import exportd"),
        },
        ROUNDS,
    )
    nothing = imports["nothing"]
    ours, grpcs = imports["exportd"], imports["grpc"]
    for what, own, peer, goal in (
        (
            "client import",
            ours.seconds - nothing.seconds,
            grpcs.seconds - nothing.seconds,
            f"<= {GOAL_IMPORT_MS}",
        ),
        ("client import, CPU", _cpu(ours) - _cpu(nothing), _cpu(grpcs) - _cpu(nothing), ""),
    ):
        yield Result(
            what,
            1000 * own,
            "ms" if "CPU" not in what else "CPU ms",
            "import grpc alone",
            1000 * peer,
            peer / own,
            goal,
        )
    catalogue = sample_data(SAMPLE_ROWS)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        data = Path(directory)
        starts = contest(
            {
                "again": lambda: start(data / "kept", catalogue),
                "first": lambda: _first(data, catalogue),
            },
            ROUNDS,
        )
    for name, run in (
        ("server ready", starts["again"]),
        ("server ready, the ledger made anew", starts["first"]),
    ):
        yield Result(name, run.seconds, "s", goal=f"<= {GOAL_READY_S}")
        yield Result(f"{name}, CPU", _cpu(run), "CPU s")
    yield Result("server ready, memory", starts["again"].peak or 0, "MiB")


def _python(statement: str) -> Contestant:
    return lambda: command([sys.executable, "-c", statement])


def _cpu(run: Run) -> float:
    assert run.cpu is not None
    return run.cpu


def _first(directory: Path, catalogue: Path) -> Run:
    with tempfile.TemporaryDirectory(dir=directory) as fresh:
        return start(Path(fresh), catalogue)


def start(data_dir: Path, catalogue: Path) -> Run:
    """Start a server, and end it; the run is that until it serves."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "exportd_server", "serve"),
            *("--listen", "127.0.0.1:0", "--data-dir", str(data_dir)),
            *("--catalogue", str(catalogue), "--log-level", "warning"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "it did not start; what it said stands above"
        with grpc.insecure_channel(address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True
            )
        run = Run(
            time.perf_counter() - began, cpu_seconds(process.pid), peak_mib(process.pid)
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        process.terminate()
        assert process.wait(60) == 0
        return run
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
