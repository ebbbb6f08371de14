"""What sources tell of rows that hold what their columns cannot."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd_server.errors import ValueNotEncodable
from exportd_server.sources.adbc import AdbcSource
from exportd_server.sources.base import Filter, FilterOperator, Query, Source
from exportd_server.sources.duckdb import FileSource
from exportd_server.sources.postgres import Postgres
from exportd_server.sources.sqlite import Sqlite
from tests.support.holders import table
from tests.support.postgres import PostgresServer

MANY = 30_000
"""More rows than are looked at before the columns' types are settled."""


def told(
    source: Source, query: Query | None = None, *, skip_rows: int = 0
) -> tuple[list[dict[str, Any]], dict[int, tuple[str, Any]]]:
    """The rows that fit; and by their place the others, each with its column and what
    was found there."""
    names = tuple(column.name for column in source.columns())
    query = query or Query(names)
    fitting: list[dict[str, Any]] = []
    found: dict[int, tuple[str, Any]] = {}
    first = 0
    shard = source.plan(query).shards[0]
    with source.open(query, shard, skip_rows=skip_rows) as stream:
        for batch in stream.loose():
            misfits = batch.misfits()
            for row, error in misfits.items():
                column = error.metadata["column"]
                value = batch.values(row)[column]
                is_text = pa.types.is_string(value.type)
                text = value.as_buffer().to_pybytes() if is_text else value.value
                found[first + row] = (column, text)
                with pytest.raises(ValueNotEncodable):
                    batch.take([row]).fit()
            good = [row for row in range(batch.num_rows) if row not in misfits]
            fit = batch.take(good).fit()
            assert fit.schema == stream.schema
            fitting += fit.to_pylist()
            first += batch.num_rows
    return fitting, found


def strict(source: Source, query: Query | None = None) -> list[dict[str, Any]]:
    query = query or Query(tuple(column.name for column in source.columns()))
    with source.open(query, source.plan(query).shards[0]) as stream:
        return [row for batch in stream for row in batch.to_pylist()]


def without(rows: list[dict[str, Any]], *keys: int) -> list[dict[str, Any]]:
    return [row for index, row in enumerate(rows) if index not in keys]


# --- files


def csv_source(path: Path, *bad: tuple[int, str, str]) -> FileSource:
    """A CSV file whose types its first rows tell, or the catalogue."""
    wrong = {(row, name): text for row, name, text in bad}
    with path.open("w") as file:
        file.write("id,guessed,day,amount\n")
        for row in range(MANY):
            cells = [
                str(row),
                wrong.get((row, "guessed"), str(row * 2)),
                wrong.get((row, "day"), "2026-01-31"),
                wrong.get((row, "amount"), "1.50"),
            ]
            file.write(",".join(cells) + "\n")
    os.utime(path, (0, 0))  # settled long ago
    types = {"day": pa.date32(), "amount": pa.decimal128(10, 2)}
    return FileSource("csv", str(path), types)


def test_text_that_is_no_number_or_date_is_told_with_its_row(tmp_path: Path) -> None:
    good = strict(csv_source(tmp_path / "good.csv"))
    source = csv_source(
        tmp_path / "bad.csv",
        (25_001, "guessed", "2.5"),
        (25_002, "guessed", "99999999999999999999"),
        (27_000, "day", "2026-02-30"),
        (29_999, "amount", "a lot"),
    )
    fitting, found = told(source)
    assert found == {
        25_001: ("guessed", b"2.5"),
        25_002: ("guessed", b"99999999999999999999"),
        27_000: ("day", b"2026-02-30"),
        29_999: ("amount", b"a lot"),
    }
    assert fitting == without(good, *found)
    with pytest.raises(ValueNotEncodable):
        strict(source)


def test_a_cell_of_nothing_is_missing_and_no_misfit(tmp_path: Path) -> None:
    source = csv_source(tmp_path / "a.csv", (25_000, "guessed", "  "), (26_000, "day", ""))
    fitting, found = told(source)
    assert not found
    assert fitting == strict(source)
    assert fitting[25_000]["guessed"] is None
    assert fitting[26_000]["day"] is None


def test_a_json_number_that_is_none_is_told_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    lines = [f'{{"id": {row}, "n": {row}}}' for row in range(MANY)]
    lines += ['{"id": 1, "n": 2.5}', '{"id": 2, "n": "oops"}', '{"id": 3, "n": null}']
    path.write_text("\n".join(lines))
    source = FileSource("json", str(path), {"n": pa.int64()})
    fitting, found = told(source)
    assert {row: column for row, (column, _) in found.items()} == {
        MANY: "n",
        MANY + 1: "n",
    }
    assert fitting[-1] == {"id": 3, "n": None}
    assert len(fitting) == MANY + 1


def test_rows_are_skipped_as_they_are_counted(tmp_path: Path) -> None:
    source = csv_source(tmp_path / "a.csv", (100, "day", "never"), (25_000, "day", "x"))
    fitting, found = told(source, skip_rows=101)
    assert found == {24_899: ("day", b"x")}
    assert fitting[0]["id"] == 101


def test_a_filter_on_a_column_that_cannot_be_read_fails_and_drops_no_row(
    tmp_path: Path,
) -> None:
    """Whether the row is wanted is not known: leaving it out unheard would be wrong."""
    source = csv_source(tmp_path / "a.csv", (25_000, "guessed", "oops"))
    wanted = Filter("guessed", FilterOperator.GREATER, (100,))
    with pytest.raises(ValueNotEncodable):
        told(source, Query(("id",), (wanted,)))


def test_what_the_engine_itself_cannot_read_fails(tmp_path: Path) -> None:
    """A type that it guessed by itself, and text that is no UTF-8: it tells no row."""
    path = tmp_path / "a.csv"
    path.write_text("n\n" + "1.5\n" * MANY + "oops\n")
    with pytest.raises(ValueNotEncodable):
        told(FileSource("csv", str(path)))
    path.write_bytes(b"t\n" + b"fine\n" * MANY + b"\xff\xfe\n")
    with pytest.raises(ValueNotEncodable):
        told(FileSource("csv", str(path), {"t": pa.string()}))


def test_a_moment_of_parquet_that_stands_for_infinity_is_told(tmp_path: Path) -> None:
    moments = pa.array([1, 2**63 - 1, 3], pa.int64()).view(pa.timestamp("us"))
    times = pa.array([1, 2, 86_400_000_000 - 1], pa.int64()).view(pa.time64("us"))
    pq.write_table(pa.table({"m": moments, "t": times}), tmp_path / "a.parquet")
    source = FileSource("parquet", str(tmp_path / "a.parquet"))
    fitting, found = told(source)
    assert found == {1: ("m", 2**63 - 1)}
    assert len(fitting) == 2


# --- databases


def sqlite_source(path: Path, **bad: Any) -> AdbcSource:
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            "CREATE TABLE t (id INTEGER, name TEXT, real REAL, day DATE, amount "
            "DECIMAL(10,2), flag BOOLEAN)"
        )
        row = {"name": "n", "real": 1.5, "day": "2026-01-31", "amount": "1.5", "flag": 1}
        rows = [{**row, "id": index} for index in range(MANY)]
        for index, (name, value) in enumerate(bad.items()):
            rows[9_000 + index][name] = value
        database.executemany(
            "INSERT INTO t VALUES (:id, :name, :real, :day, :amount, :flag)", rows
        )
        database.execute("UPDATE t SET name = CAST(x'ff41' AS TEXT) WHERE id = 10000")
        database.commit()
    types = {"day": pa.date32(), "flag": pa.bool_()}
    return AdbcSource(Sqlite(path), table("t"), types)


def test_what_sqlite_holds_in_the_wrong_column_is_told_with_its_row(
    tmp_path: Path,
) -> None:
    source = sqlite_source(
        tmp_path / "a.db", id="oops", real=b"\x00\xff", day="31.1.2026", flag=7
    )
    fitting, found = told(source)
    assert found == {
        9_000: ("id", b"oops"),
        9_001: ("real", b"X'00FF'"),
        9_002: ("day", b"31.1.2026"),
        9_003: ("flag", b"7"),
        10_000: ("name", b"\xffA"),
    }
    good = [row["id"] for row in fitting]
    assert good == [row for row in range(MANY) if row not in found]
    with pytest.raises(ValueNotEncodable):
        strict(source)


def test_postgresql_tells_infinities_and_what_no_type_of_arrows_has(
    postgres: PostgresServer, postgres_database: str, postgres_url: str
) -> None:
    run: Callable[[str], str] = lambda script: postgres.sql(  # noqa: E731 - one use
        script, database=postgres_database
    )
    run(
        "CREATE TABLE t (id int, d date, ts timestamp, tz timestamptz, clock time, "
        "n numeric(10, 2));"
        "INSERT INTO t SELECT i, '2026-01-31', '2026-01-31 10:00', '2026-01-31 10:00+00', "
        "'10:00', 1.5 FROM generate_series(0, 9999) i;"
        "UPDATE t SET d = 'infinity' WHERE id = 1;"
        "UPDATE t SET ts = '-infinity' WHERE id = 2;"
        "UPDATE t SET tz = 'infinity' WHERE id = 3;"
        "UPDATE t SET clock = '24:00' WHERE id = 4;"
        "UPDATE t SET n = 'NaN' WHERE id = 5;"
        "UPDATE t SET d = NULL, ts = NULL, tz = NULL, clock = NULL, n = NULL "
        "WHERE id = 6;"
    )
    source = AdbcSource(Postgres(postgres_url), table("t"))
    fitting, found = told(source)
    assert sorted(found.values()) == sorted(
        [
            ("d", b"infinity"),
            ("ts", b"-infinity"),
            ("tz", b"infinity"),
            ("clock", b"24:00:00"),
            ("n", b"NaN"),
        ]
    )
    assert sorted(row["id"] for row in fitting) == [
        row for row in range(10_000) if row not in range(1, 6)
    ]
    with pytest.raises(ValueNotEncodable):
        strict(source)
