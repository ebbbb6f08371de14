"""Figures kept in bench/results: one file for each bench, the machine first, then one JSON
object a line."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.machine import SCALE
from bench.report import Result

RESULTS = Path(__file__).resolve().parent / "results"
_LIBRARIES = (
    "exportd-server",
    "grpcio",
    "pyarrow",
    "polars",
    "duckdb",
    "adbc-driver-postgresql",
    "adbc-driver-sqlite",
    "aioboto3",
    "sqlalchemy",
)


def save(name: str, results: Iterable[Result]) -> None:
    """Replace what was kept of a bench."""
    lines = [json.dumps(machine()), *(result.line(as_json=True) for result in results)]
    (RESULTS / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def saved(name: str) -> tuple[dict[str, Any], list[Result]]:
    """The machine, and what was kept of a bench. Raises `FileNotFoundError`."""
    text = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8")
    first, *rest = (json.loads(line) for line in text.splitlines())
    return first, [Result(**each) for each in rest]


def machine() -> dict[str, Any]:
    """The machine a figure was measured on, and what ran there."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "scale": SCALE,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        ),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
