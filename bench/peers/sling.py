"""sling, which copies a query's result into a file.

Its telemetry is turned off by its own setting. Nothing turns off its look for a newer
version, so its proxy is a port of this machine that nobody listens on.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench.contest import Missing, Run, command

FORMATS = ("csv", "jsonl", "parquet")
_NOBODY = "http://127.0.0.1:9"


def missing() -> Missing | None:
    """Why it cannot be measured, if so."""
    return None if _binary() else Missing("the sling-linux-amd64 wheel is not installed")


def export(url: str, query: str, target: Path) -> Run:
    """Write a query's rows in the format that the target's extension names."""
    binary = _binary()
    assert binary is not None
    return command(
        [
            *(str(binary), "run", "--src-conn", "BENCH", "--src-stream", query),
            *("--tgt-object", f"file://{target}"),
        ],
        BENCH=f"{url}?sslmode=disable",
        SLING_HOME_DIR=str(target.parent / "sling"),
        SLING_DISABLE_TELEMETRY="TRUE",
        # It would fetch a program to write Parquet, which it can do by itself.
        SLING_DUCKDB_COMPUTE="FALSE",
        HTTP_PROXY=_NOBODY,
        HTTPS_PROXY=_NOBODY,
    )


def _binary() -> Path | None:
    package = importlib.util.find_spec("sling_linux_amd64")
    if package is None or not package.submodule_search_locations:
        return None
    (directory,) = package.submodule_search_locations
    binary = Path(directory) / "bin" / "sling-linux-amd64"
    return binary if binary.is_file() else None
