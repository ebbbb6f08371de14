"""From a downloaded output to Arrow, Polars and pandas. The libraries are extras."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from exportd._model import JobInfo
from exportd.errors import InvalidRequest, MissingExtra

if TYPE_CHECKING:
    from exportd._download import Download

Fetch: TypeAlias = "Callable[[Path], Download]"


def to_arrow(job: JobInfo, fetch: Fetch) -> Any:
    """A `pyarrow.Table` of a Parquet or Arrow output, with its exact types."""
    pyarrow = require("pyarrow", "arrow")
    if job.format not in {"parquet", "arrow"}:
        raise InvalidRequest.of(
            "format",
            f"a {job.format} file does not carry the columns' types; export as parquet "
            "or arrow, or download() the file and read it as you need",
        )
    import tempfile  # noqa: PLC0415 - rarely wanted

    with tempfile.TemporaryDirectory(prefix="exportd-") as directory:
        download = fetch(Path(directory))
        if job.format == "arrow":
            ipc = require("pyarrow.ipc", "arrow")
            with pyarrow.OSFile(str(download.files[0])) as source:
                return ipc.open_stream(source).read_all()
        parquet = require("pyarrow.parquet", "arrow")
        return pyarrow.concat_tables(
            [parquet.read_table(str(f), partitioning=None) for f in download.files]
        )


def to_polars(job: JobInfo, fetch: Fetch) -> Any:
    """A `polars.DataFrame`."""
    polars = require("polars", "polars")
    return polars.from_arrow(to_arrow(job, fetch))


def to_pandas(job: JobInfo, fetch: Fetch) -> Any:
    """A `pandas.DataFrame` with Arrow-backed columns: NumPy's would turn integers with
    missing values into floats."""
    pandas = require("pandas", "pandas")
    return to_arrow(job, fetch).to_pandas(types_mapper=pandas.ArrowDtype)


def require(module: str, extra: str) -> Any:
    """Import a library, or say which extra brings it. Raises `MissingExtra`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtra(
            f"{name} is not installed; pip install 'exportd[{extra}]'"
        ) from error
