"""Time of a small export, from the call that creates it until it has succeeded."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import exportd
from bench.machine import CACHE, sample_data, server
from bench.report import Result

ROWS = 1000
RUNS = 50
GOAL_MS = 60


def results() -> Iterator[Result]:
    """Measure."""
    catalogue = sample_data(1_000_000)
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as data,
        server(Path(data), catalogue) as measured,
        exportd.Client(measured.address) as client,
    ):
        formats: tuple[Literal["csv", "parquet"], ...] = ("csv", "parquet")
        for fmt in formats:
            times = []
            for _ in range(RUNS):
                started = time.perf_counter()
                client.export("token_transfers", format=fmt, limit=ROWS).wait()
                times.append(1000 * (time.perf_counter() - started))
            yield Result(
                f"create to succeeded, {ROWS:,} rows, {fmt}, median",
                statistics.median(times),
                "ms",
                goal=f"< {GOAL_MS}",
            )
