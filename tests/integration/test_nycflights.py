"""Real flights in real databases, read through the catalogue and compared with the data
frame they came from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from exportd_server.sources.base import Filter, FilterOperator, Query
from exportd_server.sources.catalogue import Dataset, load_catalogue
from tests.support.flights import ROWS, TYPES

CATALOGUE = """
[connections.main]
url = "{url}"

[datasets.flights]
description = "Flights that left New York in 2013."
connection = "main"
table = "flights"
target_column = "tailnum"
network_column = "carrier"
time_column = "time_hour"
{extra}

[datasets.delays]
description = "Delays by carrier."
connection = "main"
query = '''
SELECT carrier, COUNT(*) AS flights, SUM(CAST(dep_delay AS {real})) AS minutes
FROM flights WHERE dep_delay IS NOT NULL GROUP BY carrier ORDER BY carrier
'''
{query_extra}
"""


@pytest.fixture(params=["sqlite", "postgres"])
def catalogue_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "datasets.toml"
    if request.param == "sqlite":
        url = f"sqlite:///{request.getfixturevalue('flights_sqlite')}"
        extra = '[datasets.flights.column.time_hour]\ntype = "timestamp"\n'
        query_extra = ""
        real = "REAL"
    else:
        url = request.getfixturevalue("flights_postgres")
        extra, query_extra, real = "", "", "double precision"
    path.write_text(
        CATALOGUE.format(url=url, extra=extra, query_extra=query_extra, real=real)
    )
    return path


def get(path: Path, name: str) -> Dataset:
    dataset = load_catalogue(path).get(name)
    assert dataset is not None
    return dataset


def read(dataset: Dataset, *filters: Filter, columns: tuple[str, ...] = ()) -> pa.Table:
    query = Query(columns or tuple(c.name for c in dataset.columns), filters)
    plan = dataset.source.plan(query)
    with dataset.source.open(query, plan.shards[0]) as stream:
        batches = list(stream)
    assert max((batch.num_rows for batch in batches), default=0) <= 65_536
    return pa.Table.from_batches(batches, stream.schema)


@pytest.mark.minutes
def test_every_flight_comes_back(catalogue_path: Path, flights: pd.DataFrame) -> None:
    table = read(get(catalogue_path, "flights"))
    assert table.num_rows == len(flights) == ROWS
    assert table.column_names == list(TYPES)
    for name in TYPES:
        column, expected = table[name], flights[name]
        assert column.null_count == expected.isna().sum(), name
        found = column.to_pandas()
        if name == "time_hour":
            expected = pd.to_datetime(expected, utc=True)
            found = found.astype(expected.dtype)
        if pd.api.types.is_numeric_dtype(expected):
            found = pd.to_numeric(found).astype("float64")
            expected = expected.astype("float64")
            assert found.sum() == expected.sum(), name
        # The same rows in the same order, values and gaps alike.
        both_missing = found.isna().to_numpy() & expected.isna().to_numpy()
        same = (found.to_numpy() == expected.to_numpy()) | both_missing
        assert same.all(), name


@pytest.mark.minutes
def test_filters_find_the_flights_that_pandas_finds(
    catalogue_path: Path, flights: pd.DataFrame
) -> None:
    dataset = get(catalogue_path, "flights")
    late = read(
        dataset,
        Filter("carrier", FilterOperator.IN, ("AA", "UA")),
        Filter("dep_delay", FilterOperator.GREATER, (120.0,)),
        Filter("tailnum", FilterOperator.STARTS_WITH, ("N3",)),
        Filter("month", FilterOperator.EQUAL, (7,)),
        columns=("flight", "tailnum"),
    )
    expected = flights[
        flights.carrier.isin(["AA", "UA"])
        & (flights.dep_delay > 120)
        & flights.tailnum.str.startswith("N3", na=False)
        & (flights.month == 7)
    ]
    assert late.num_rows == len(expected) > 0
    assert sorted(late["flight"].to_pylist()) == sorted(expected.flight)
    missing = read(dataset, Filter("tailnum", FilterOperator.IS_NULL), columns=("flight",))
    assert missing.num_rows == flights.tailnum.isna().sum()


def test_a_half_open_hour_finds_its_flights(
    catalogue_path: Path, flights: pd.DataFrame
) -> None:
    moments = pd.to_datetime(flights.time_hour, utc=True)
    start = pd.Timestamp("2013-07-04 12:00", tz="UTC")
    end = pd.Timestamp("2013-07-04 15:00", tz="UTC")
    found = read(
        get(catalogue_path, "flights"),
        Filter("time_hour", FilterOperator.GREATER_OR_EQUAL, (start.to_pydatetime(),)),
        Filter("time_hour", FilterOperator.LESS, (end.to_pydatetime(),)),
        columns=("time_hour",),
    )
    assert found.num_rows == ((moments >= start) & (moments < end)).sum() > 0


def test_an_operators_query_is_a_dataset(
    catalogue_path: Path, flights: pd.DataFrame
) -> None:
    found = read(get(catalogue_path, "delays")).to_pandas()
    expected = flights.dropna(subset=["dep_delay"]).groupby("carrier").dep_delay
    assert found.carrier.tolist() == expected.sum().index.tolist()
    assert found.flights.tolist() == expected.count().tolist()
    assert found.minutes.tolist() == expected.sum().tolist()
