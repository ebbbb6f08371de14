"""A finished export of about 2 GiB, in the page cache, over loopback.

exportd's server, Arrow Flight, an ASGI file response and nginx serve the very same file
to readers that do the same with the bytes: take them and drop them. exportd's reader also
verifies the CRC32C of each message, which the others do not have. Servers and readers run
in processes of their own, all with a C library that keeps large blocks
(`MALLOC_*` below), as exportd's server does by itself: it is worth as much to each.

CPU seconds and memory are the server's; the readers' CPU is told apart. The clients'
verified downloads into a file in memory are measured beside them; those of the other
languages are in `clients`, and calls beside a download in `beside`.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import exportd
from bench.contest import (
    Contestant,
    Run,
    beside,
    contest,
    cpu_seconds,
    forget_peak,
    peak_mib,
)
from bench.machine import CACHE, Measured, listening, sample_data, scaled, server
from bench.peers import nginx
from bench.report import Result, smaller_is_better

ROWS = 10_000_000
RANGES = 4

_KEEP = str(64 * 2**20)
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": _KEEP, "MALLOC_TRIM_THRESHOLD_": _KEEP}
_ONE_SHARD = {"EXPORTD_WORKER__SHARD_ROWS": str(10**12)}

_STREAM = "StreamDownload"
_CLIENT = "Python client"
_RANGES = f"{_CLIENT}, {RANGES} ranges"
_FLIGHT = "Arrow Flight"
_NGINX = "nginx sendfile"
_ASGI = "ASGI file response"


def results() -> Iterator[Result]:
    """Measure."""
    catalogue = sample_data(scaled(ROWS))
    with tempfile.TemporaryDirectory(dir=CACHE) as directory, contextlib.ExitStack() as run:
        here = Path(directory)
        exportd_ = run.enter_context(server(here / "exportd", catalogue, _ONE_SHARD))
        job_id, size = _export(exportd_.address)
        (path,) = (p for p in here.rglob("*") if p.is_file() and p.stat().st_size == size)
        race = _Race(size)
        race.enter(_STREAM, exportd_, "exportd", job_id)
        race.enter(_FLIGHT, _peer(run, "flight", path, here), "flight")
        race.enter(_ASGI, _peer(run, "asgi", path, here), "http")
        race.enter(_CLIENT, exportd_, "client", job_id, "1")
        race.enter(_RANGES, exportd_, "client", job_id, str(RANGES))
        if missing := nginx.missing():
            yield Result(f"download by nginx: left out, {missing.reason}", 0, "")
        else:
            served = run.enter_context(nginx.serving(path, here / "nginx"))
            race.enter(_NGINX, served, "http")
        runs = contest(race.contestants)
    yield from _told(runs, race.readers_cpu(), size / 2**30)


def _told(runs: dict[str, Run], readers: dict[str, float], gib: float) -> Iterator[Result]:
    for name, peer, least in (
        (_STREAM, _FLIGHT, 1.0),
        (_STREAM, _NGINX, 0.85),
        (_STREAM, _ASGI, None),
        (_CLIENT, _STREAM, None),
        (_RANGES, _CLIENT, None),
    ):
        if peer not in runs:
            continue
        # CPU is told by the GiB, and whose it is.
        ours, theirs = (replace(runs[each], cpu=None) for each in (name, peer))
        title = f"download, {name} beside {peer}"
        yield from beside(title, ours, peer, theirs, amount=gib, unit="GiB/s", goal=least)
        servers = {each: run.cpu or 0.0 for each, run in runs.items()}
        for whose, cpu in (("server", servers), ("reader", readers)):
            compared = (whose, peer) == ("server", _FLIGHT)
            yield smaller_is_better(
                f"{title}, {whose}'s CPU",
                cpu[name] / gib,
                "CPU s/GiB",
                peer=peer,
                peer_value=cpu[peer] / gib,
                goal=f"ratio >= {1 / 1.2:.2f}" if compared else "",
            )


class _Race:
    """Downloads by readers, and what the readers' own processes took."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._cpu: dict[str, list[float]] = {}
        self.contestants: dict[str, Contestant] = {}

    def enter(self, name: str, served: Measured, *reader: str) -> None:
        """Have a reader download from a server."""
        kind, *arguments = reader
        taken = self._cpu[name] = []

        def download() -> Run:
            forget_peak(served.pid)
            before = cpu_seconds(served.pid)
            done = subprocess.run(
                [sys.executable, "-m", "bench.readers", kind, served.address, *arguments],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **_MALLOC},
            )
            told = json.loads(done.stdout)
            assert told["size"] == self._size, told
            taken.append(told["cpu"])
            used = cpu_seconds(served.pid) - before
            return Run(told["seconds"], used, peak_mib(served.pid))

        self.contestants[name] = download

    def readers_cpu(self) -> dict[str, float]:
        """Medians of the rounds that count."""
        return {name: statistics.median(taken[1:]) for name, taken in self._cpu.items()}


def _export(address: str) -> tuple[str, int]:
    """A finished export in one part."""
    with exportd.Client(address) as client:
        job = client.export("token_transfers", format="csv", max_part_bytes=2**40)
        job.wait(timeout=3600)
        assert job.manifest is not None
        (part,) = job.manifest.parts
        return job.id, part.size


def _peer(run: contextlib.ExitStack, name: str, path: Path, directory: Path) -> Measured:
    argv = [sys.executable, "-m", f"bench.peers.{name}", str(path)]
    return run.enter_context(listening(argv, directory / f"{name}.log", **_MALLOC))
