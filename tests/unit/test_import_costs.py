"""What an import brings along: what is heavy, and not wanted by everybody, comes when it
is first needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exportd_server.platform.imports import without

_CLIENT = (
    "aiohttp",
    "click",
    "crc32c",
    "duckdb",
    "exportd._aio",
    "exportd._download",
    "exportd_server",
    "numpy",
    "pandas",
    "polars",
    "pyarrow",
    "rich",
    "sqlalchemy",
)
_SERVER = (
    "adbc_driver_manager.dbapi",
    "aioboto3",
    "aiohttp",
    "alembic",
    "botocore",
    "cryptography.x509",
    "duckdb",
    "exportd._aio",
    "exportd._download",
    "httpx",
    "jinja2",
    "opentelemetry",
    "pandas",
    "psycopg",
    "pyarrow.dataset",
)


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import exportd", _CLIENT),
        ("import exportd_server.cli, exportd_server.app", _SERVER),
    ],
)
def test_an_import_does_without(statement: str, unwanted: tuple[str, ...]) -> None:
    """A fresh interpreter says what it has loaded."""
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = set(json.loads(done.stdout))
    assert statement.split()[1].rstrip(",") in loaded
    assert not loaded.intersection(unwanted)


def test_the_servers_command_does_without_tracebacks_in_colour() -> None:
    """And rich is there all the same for whoever imports it after the start."""
    program = """
import json, sys
from exportd_server.__main__ import main
sys.argv = ["exportd-server", "--version"]
try:
    main()
except SystemExit:
    pass
loaded = sorted({"attr", "pygments", "rich", "structlog"}.intersection(sys.modules))
import rich
print(json.dumps([loaded, rich.__name__]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [["structlog"], "rich"]


def test_a_package_that_is_there_already_stays() -> None:
    """Whoever has it may go on with it."""
    with without("json"):
        assert sys.modules["json"] is json
    assert sys.modules["json"] is json


def test_a_package_is_found_again_after_an_import_that_failed() -> None:
    sys.modules.pop("this", None)
    with pytest.raises(ModuleNotFoundError, match="this"), without("this"):
        import this  # noqa: F401, PLC0415
    assert importlib.util.find_spec("this") is not None


def test_what_comes_later_is_there_all_the_same() -> None:
    """Each name that the client exports leads somewhere, and no other does."""
    program = (
        "import exportd\n"
        "for name in exportd.__all__: assert getattr(exportd, name) is not None, name\n"
        "assert set(exportd.__all__) <= set(dir(exportd))\n"
        "try: exportd.NoSuchThing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "module 'exportd' has no attribute 'NoSuchThing'\n"


def test_all_of_arrow_takes_its_memory_from_the_c_library(tmp_path: Path) -> None:
    """What Parquet's reader and writer take inside of themselves too."""
    program = """
import sys
import exportd_server
import pyarrow as pa
import pyarrow.parquet as pq
pq.write_table(pa.table({"v": list(range(100_000))}), sys.argv[1])
assert pq.ParquetFile(sys.argv[1], buffer_size=4096).read().num_rows == 100_000
print(pa.default_memory_pool().backend_name, pa.mimalloc_memory_pool().max_memory())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "rows")],
        check=True,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "ARROW_DEFAULT_MEMORY_POOL"},
    )
    assert done.stdout == "system 0\n"
