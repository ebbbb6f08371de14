"""What the database sink promises, on a real PostgreSQL, on SQLite, and on DuckDB for any
other database that has an ADBC driver."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import adbc_driver_duckdb  # type: ignore[import-untyped] # it has no types
import adbc_driver_manager
import duckdb
import psycopg
import pyarrow as pa
import pytest
from pydantic import ValidationError

from exportd_server.encoders.base import (
    Compression,
    CsvDialect,
    CsvOptions,
    Format,
    OutputFormat,
)
from exportd_server.errors import ConfigurationError, DeliveryFailed, StoreFailed
from exportd_server.platform.threads import left_over
from exportd_server.sinks.base import BadSinkRequest, Delivery, Export, Sink, Takes
from exportd_server.sinks.connections import load_connections
from exportd_server.sinks.database import (
    DatabaseConnection,
    DatabaseRequest,
    DatabaseSink,
    adbc,
    generic,
    sqlite,
    values,
)
from exportd_server.sinks.database.adbc import Session as SinkSession
from exportd_server.sinks.database.postgres_errors import failure, unreachable
from exportd_server.sinks.registry import SinkTypes
from tests.contracts.test_encoders import name_of
from tests.support.database_sink import (
    CSV,
    EVERY_KIND,
    OUTPUTS,
    delivery_of,
    export_of,
    held,
    part_of,
)
from tests.support.memory import apart, growing
from tests.support.postgres import PostgresServer
from tests.support.server import until
from tests.support.sinks import BytesContent, deliver_whole
from tests.support.tables import csv_cells, encode, every_type
from tests.support.waits import ENOUGH

ROWS = pa.table({"id": [1, 2, 3], "name": ["one", "", None]})
MORE = pa.table({"id": [3, 4], "name": ["three", "four"]})
PARQUET = OutputFormat(Format.PARQUET)
ARROW = OutputFormat(Format.ARROW)
COMPRESSED_CSV = OutputFormat(Format.CSV, Compression.ZSTD)
READERS = [
    *(OutputFormat(Format.CSV, compression) for compression in Compression),
    PARQUET,
    ARROW,
]
each_reader = pytest.mark.parametrize("output", READERS, ids=name_of)
every_output = pytest.mark.parametrize("output", OUTPUTS, ids=name_of)


class Database:
    """A database with a sink to it, and its rows as somebody else reads them."""

    kind: str

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection = self.connected()

    def settings(self) -> dict[str, Any]:
        return {"url": self.url}

    def connected(self, **settings: Any) -> DatabaseConnection:
        return DatabaseConnection.model_validate({**self.settings(), **settings})

    async def sink(self, **settings: Any) -> Sink[DatabaseRequest]:
        return await DatabaseSink().open(self.connected(**settings))

    async def deliver(
        self, delivery: Delivery, table: str = "orders", **request: Any
    ) -> str:
        """As the service does: checked, probed, delivered."""
        wanted = DatabaseRequest(table=table, **request)
        DatabaseSink().check(wanted, self.connection, delivery.export)
        sink = await self.sink()
        await sink.probe(wanted, delivery.export)
        return await sink.deliver(wanted, delivery)

    def run(self, *statements: str) -> None:
        raise NotImplementedError

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def orders(self) -> list[tuple[Any, ...]]:
        return self.rows('SELECT id, name FROM "orders" ORDER BY id, name')

    def make_orders(self, columns: str = "id bigint, name text") -> None:
        self.run(f"CREATE TABLE orders ({columns})", "INSERT INTO orders VALUES (0, 'old')")


class Postgres(Database):
    kind = "postgresql"

    def __init__(self, url: str, *, always_stage: bool = False) -> None:
        self.always_stage = always_stage
        self.spool: dict[str, Any] = {}
        super().__init__(url)

    def settings(self) -> dict[str, Any]:
        stages = {"always_stage": True} if self.always_stage else {}
        return {"url": self.url, **stages, **self.spool}

    def run(self, *statements: str) -> None:
        with psycopg.connect(self.url) as link:
            for statement in statements:
                link.execute(statement)

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url) as link:
            return link.execute(statement).fetchall()

    def sessions(self, condition: str = "true") -> list[int]:
        found = self.rows(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'exportd' "
            f"AND datname = current_database() AND {condition}"
        )
        return [pid for (pid,) in found]

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = clock.monotonic() + ENOUGH
        while not condition():
            assert clock.monotonic() < deadline
            await asyncio.sleep(0.02)


class Sqlite(Database):
    kind = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(f"sqlite:///{path}")
        self.run("PRAGMA user_version = 1")

    def run(self, *statements: str) -> None:
        with sqlite3.connect(self.path) as link:
            for statement in statements:
                link.execute(statement)
        link.close()

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.path) as link:
            found = link.execute(statement).fetchall()
        link.close()
        return found


class Duck(Database):
    """A file of DuckDB, through the driver that is inside of its package."""

    kind = "duckdb"

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__("")

    def settings(self) -> dict[str, Any]:
        options = {"path": str(self.path), "memory_limit": "64MB", "threads": "1"}
        return {"driver": "adbc_driver_duckdb", "options": options}

    # Never while a sink has the file open: DuckDB does not see itself.

    def run(self, *statements: str) -> None:
        with duckdb.connect(self.path) as link:
            for statement in statements:
                link.execute(statement)

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        with duckdb.connect(self.path) as link:
            found: pa.Table = link.sql(statement).to_arrow_table()
        return [tuple(row.values()) for row in found.to_pylist()]

    def columns(self) -> list[list[Any]]:
        """What is in `orders`, column by column."""
        return [
            list(column)
            for column in zip(
                *self.rows("SELECT * FROM orders ORDER BY rowid"), strict=True
            )
        ]


@pytest.fixture
def duck(tmp_path: Path) -> Duck:
    return Duck(tmp_path / "target.duckdb")


@pytest.fixture
def postgres_sink(postgres_url: str) -> Postgres:
    return Postgres(postgres_url)


@pytest.fixture
def staged_sink(postgres_url: str) -> Postgres:
    return Postgres(postgres_url, always_stage=True)


@pytest.fixture
def sqlite_sink(tmp_path: Path) -> Sqlite:
    return Sqlite(tmp_path / "target.db")


@pytest.fixture(params=["postgres_sink", "staged_sink", "sqlite_sink", "duck"])
def database(request: pytest.FixtureRequest) -> Database:
    found: Database = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["staged_sink", "sqlite_sink", "duck"])
def staging(request: pytest.FixtureRequest) -> Database:
    """One that touches the target in a short stretch at the end only."""
    found: Database = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["postgres_sink", "staged_sink", "sqlite_sink"])
def known(request: pytest.FixtureRequest) -> Database:
    """One that exportd knows itself, without a driver of the operator's."""
    found: Database = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["straight", "staged"])
def typed(postgres: PostgresServer, request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """One database with some types, for many tests with a table each."""
    name = postgres.create_database()
    found = Postgres(postgres.url(name), always_stage=request.param)
    found.run(
        "CREATE TYPE mood AS ENUM ('sad', 'glad')",
        "CREATE TYPE \"a{b\" AS ENUM ('x')",
        "CREATE DOMAIN positive AS integer CHECK (VALUE > 0)",
        "CREATE TABLE k (v text PRIMARY KEY)",
    )
    yield found
    postgres.drop_database(name)


def one_column(database: Postgres, kind: str) -> str:
    """Makes a table with a column `v`; returns its name."""
    ((number,),) = database.rows("SELECT count(*) FROM pg_class")
    database.run(f"CREATE TABLE t{number} (v {kind})")
    return f"t{number}"


# Values.


def plain(value: Any) -> Any:
    """A value of Arrow's as JSON would have it, for nested ones."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def as_python(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_map(column.type):
        return [None if value is None else dict(value) for value in column.to_pylist()]
    return [plain(value) for value in column.to_pylist()]


@every_output
async def test_every_kind_of_column_comes_back_from_postgresql_as_it_went_in(
    postgres_sink: Postgres, output: OutputFormat
) -> None:
    delivery = delivery_of(EVERY_KIND, output, parts=4)  # the last has no rows
    await postgres_sink.deliver(delivery, create_table=True)
    shown = [
        f'"{name}"::float8' if name in ("f16", "f32") else f'"{name}"'
        for name in EVERY_KIND.column_names
    ]
    found = postgres_sink.rows(f"SELECT {', '.join(shown)} FROM orders")
    for index, name in enumerate(EVERY_KIND.column_names):
        assert [row[index] for row in found] == as_python(EVERY_KIND[name]), name


SQLITE_TEXTS = {
    "u64": ["0", str(2**64 - 1), None],
    "decimal": ["0.000000000000000001", "-10000000000000000000.000000000000000000", None],
    "wide": ["1" + "0" * 59, "-1", None],
    "day": ["0001-01-01", "9999-12-31", None],
    "clock": ["00:00:00.000000", "23:59:59.999999", None],
    "s": ["0001-01-01T00:00:00.000000", "9999-12-31T23:59:59.000000", None],
    "naive": ["1970-01-01T00:00:00.000000", "1970-01-01T00:00:00.000001", None],
    "utc": ["1969-12-31T23:59:59.999999Z", "2023-11-14T22:13:20.123456Z", None],
    "tokyo": ["1969-12-31T23:59:59.999000Z", "2023-11-14T22:13:20.123000Z", None],
    "duration": ["-PT0.000001S", "PT90061.000001S", None],
    "list": ["[1,null]", "[]", None],
    "struct": ['{"b":"x\\n","a":1.5}', '{"b":null,"a":"NaN"}', None],
    "map": ['{"k,":1}', "{}", None],
}


@every_output
async def test_every_kind_of_column_comes_back_from_sqlite_as_documented(
    sqlite_sink: Sqlite, output: OutputFormat
) -> None:
    delivery = delivery_of(EVERY_KIND, output, parts=4)
    await sqlite_sink.deliver(delivery, create_table=True)
    found = sqlite_sink.rows("SELECT * FROM orders ORDER BY rowid")
    for index, name in enumerate(EVERY_KIND.column_names):
        expected = SQLITE_TEXTS.get(name) or EVERY_KIND[name].to_pylist()
        assert [row[index] for row in found] == expected, name


LONE = pa.table({"lone": ["", None, "\\N", "\\.", "x"]})


@pytest.mark.parametrize("output", [CSV, PARQUET, ARROW], ids=name_of)
async def test_one_column_alone_keeps_empty_and_missing_apart(
    database: Database, output: OutputFormat
) -> None:
    await database.deliver(delivery_of(LONE, output), create_table=True)
    assert [v for (v,) in database.rows("SELECT lone FROM orders")] == LONE[
        "lone"
    ].to_pylist()


@pytest.mark.minutes
@pytest.mark.parametrize("output", [CSV, PARQUET, ARROW], ids=name_of)
async def test_every_type_of_arrow_goes_into_text_as_the_formats_say(
    database: Database, output: OutputFormat, tmp_path: Path
) -> None:
    every = every_type()
    names = every.schema.names
    columns = ", ".join(f"{name} text" for name in names)
    database.run(f"CREATE TABLE orders ({columns})")
    whole = pa.Table.from_batches(every.batches())
    await database.deliver(delivery_of(whole, output))
    plain_csv = encode(CSV, every.schema, every.batches()).data
    assert database.rows("SELECT * FROM orders") == csv_cells(plain_csv, tmp_path / "c")


RARE = pa.table(
    {
        "uuid": pa.array([bytes(range(16)), None], pa.uuid()),
        "interval": pa.array([(14, -3, 1_500_000_000), None], pa.month_day_nano_interval()),
        "date64": pa.array([0, None], pa.date64()),
        "time32": pa.array([1, None], pa.time32("s")),
        "runs": pa.RunEndEncodedArray.from_arrays([2], [5]),
    }
)


@pytest.mark.parametrize("output", [CSV, PARQUET, ARROW], ids=name_of)
async def test_rare_types_have_a_type_of_their_own_too(
    postgres_sink: Postgres, output: OutputFormat
) -> None:
    await postgres_sink.deliver(delivery_of(RARE, output), create_table=True)
    assert postgres_sink.rows("SELECT * FROM orders") == [
        (
            UUID(int=0x000102030405060708090A0B0C0D0E0F),
            "P14M-3DT1.500000000S",
            date(1970, 1, 1),
            time(0, 0, 1),
            5,
        ),
        (None, None, None, None, 5),
    ]


US = "timestamp with time zone"
FITTING: list[tuple[str, pa.Array, str | None]] = [
    ("bigint", pa.array([2**63 - 1], pa.uint64()), str(2**63 - 1)),
    ("numeric", pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1)),
    ("numeric(12,4)", pa.array([Decimal("1.25")], pa.decimal128(10, 2)), "1.2500"),
    ("integer", pa.array([Decimal(7)], pa.decimal128(10, 0)), "7"),
    ("double precision", pa.array([0.1], pa.float32()), "0.10000000149011612"),
    ("uuid", pa.array(["00000000-0000-0001-0000-00000000000A"]), None),
    ("numeric", pa.array(["123456789012345678901234567890.5"]), None),
    ("jsonb", pa.array(['{"a": 1}']), None),
    ("varchar(3)", pa.array(["äöü"]), None),
    ("char(3)", pa.array(["EUR"]), None),
    ("mood", pa.array(["sad"]), None),
    ('"a{b"', pa.array(["x"]), None),
    ("positive", pa.array([5]), "5"),
    ("text", pa.array([b"\0\xff"]), "AP8="),
    ("text", pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"),
    ("timestamp", pa.array([1000], pa.timestamp("ns")), "1970-01-01 00:00:00.000001"),
    (US, pa.array([5000], pa.timestamp("ns", "UTC")), "1970-01-01 00:00:00.000005+00"),
    (
        "timestamp(3)",
        pa.array([1000], pa.timestamp("us")),
        "1970-01-01 00:00:00.001",
    ),
    ("time", pa.array([1000], pa.time64("ns")), "00:00:00.000001"),
    ("interval", pa.array([2**63 - 1], pa.duration("us")), "2562047788:00:54.775807"),
    ("interval", pa.array([-(2**63)], pa.duration("us")), "-2562047788:00:54.775808"),
    ("interval", pa.array([-1000], pa.duration("ns")), "-00:00:00.000001"),
]


@pytest.mark.parametrize(("kind", "values", "text"), FITTING)
async def test_a_type_that_holds_the_values_takes_them_exactly(
    typed: Postgres, kind: str, values: pa.Array, text: str | None
) -> None:
    table = one_column(typed, kind)
    await typed.deliver(delivery_of(pa.table({"v": values})), table)
    with psycopg.connect(typed.url, options="-c TimeZone=UTC") as link:
        found = link.execute(f"SELECT v::text FROM {table}").fetchall()
    given = values[0].as_py()
    wanted = text or (given.lower() if kind == "uuid" else given)
    assert found == [(wanted,)]


NOT_FITTING: list[tuple[str, pa.Array]] = [
    ("integer", pa.array(["1"])),
    ("double precision", pa.array([1], pa.int64())),
    ("real", pa.array([0.1])),
    ("numeric", pa.array([0.1])),
    ("numeric(10,1)", pa.array([Decimal("1.25")], pa.decimal128(10, 2))),
    ("integer", pa.array([Decimal("1.25")], pa.decimal128(10, 2))),
    ("timestamp", pa.array([1], pa.timestamp("us", "UTC"))),
    (US, pa.array([1], pa.timestamp("us"))),
    ("interval hour", pa.array([1], pa.duration("us"))),
    ("bytea", pa.array(["x"])),
    ("jsonb", pa.array([b"x"])),
    ("bigint[]", pa.array([[1]])),
    ("boolean", pa.array([1])),
    ("date", pa.array([1], pa.timestamp("us"))),
]


@pytest.mark.parametrize(("kind", "values"), NOT_FITTING)
async def test_a_type_that_would_change_values_is_refused_beforehand(
    typed: Postgres, kind: str, values: pa.Array
) -> None:
    table = one_column(typed, kind)
    delivery = delivery_of(pa.table({"v": values}))
    told = f"'v' of public.{table} is of type"
    with pytest.raises(BadSinkRequest, match=re.escape(told)) as bad:
        await typed.deliver(delivery, table)
    assert bad.value.field == "table"
    assert str(values.type) in bad.value.description
    sink = await typed.sink()
    with pytest.raises(DeliveryFailed, match=re.escape(told)) as failed:
        await sink.deliver(DatabaseRequest(table=table), delivery)
    assert not failed.value.retryable
    assert typed.rows(f"SELECT * FROM {table}") == []


SECRET = "s3cret-value"
REFUSED: list[tuple[str, pa.Array, str]] = [
    ("smallint", pa.array([2**15]), "column 'v' of type smallint: a number is out of"),
    ("numeric(3,2)", pa.array([Decimal("10.5")], pa.decimal128(5, 2)), "column 'v'"),
    ("varchar(3)", pa.array(["abc "]), "'v': a value is too long for character varying"),
    ("char(3)", pa.array(["ab"]), "'v': a value has not the length of character"),
    ("uuid", pa.array([SECRET]), "column 'v' of type uuid: a value does not fit"),
    ("text", pa.array(["nul\0" + SECRET]), "such as a NUL character"),
    ("timestamp", pa.array([1], pa.timestamp("ns")), "'v': a value is finer than"),
    (US, pa.array([1001], pa.timestamp("ns", "UTC")), "'v': a value is finer than"),
    ("timestamp(3)", pa.array([1], pa.timestamp("us")), "'v': a value is finer than"),
    ("time", pa.array([1001], pa.time64("ns")), "'v': a value is finer than"),
    ("interval", pa.array([1], pa.duration("ns")), "'v': a value is finer than"),
    ("interval", pa.array([2**63 - 1], pa.duration("s")), "a duration is out of range"),
    ("date", pa.array([10**7], pa.date32()), "column 'v' of type date: a date or time"),
    ("text NOT NULL", pa.array([None], pa.string()), "column 'v': the table needs"),
    ("text UNIQUE", pa.array([SECRET, SECRET]), "'orders_v_key': a row is there already"),
    ("text CHECK (v = '')", pa.array([SECRET]), "'orders_v_check': a row breaks a rule"),
    ("text REFERENCES k", pa.array([SECRET]), "'orders_v_fkey': a row refers to one"),
    ("positive", pa.array([-5]), "'positive_check': a row breaks a rule"),
]


@pytest.mark.parametrize(("kind", "values", "message"), REFUSED)
async def test_a_value_that_does_not_fit_is_told_by_its_column_and_never_shown(
    typed: Postgres, kind: str, values: pa.Array, message: str
) -> None:
    table = one_column(typed, kind)
    delivery = delivery_of(pa.table({"v": values}), parts=1)
    with pytest.raises(DeliveryFailed) as failed:
        await typed.deliver(delivery, table)
    assert message.replace("orders", table) in failed.value.message
    assert SECRET not in failed.value.message
    assert not failed.value.retryable
    assert typed.rows(f"SELECT * FROM {table}") == []
    noted = f"SELECT * FROM exportd_deliveries WHERE target = 'public.{table}'"
    assert typed.rows(noted) == []


# All or nothing, once.


async def test_a_repeated_delivery_changes_nothing_and_another_one_appends(
    database: Database,
) -> None:
    database.make_orders()
    delivery = delivery_of(ROWS)
    receipt = await database.deliver(delivery)
    assert receipt.startswith("3 rows in ")
    assert receipt.endswith("orders")
    once = database.orders()
    assert sorted(once, key=repr) == sorted(
        [(0, "old"), (1, "one"), (2, ""), (3, None)], key=repr
    )
    assert await database.deliver(replace(delivery, attempt=2)) == receipt
    assert database.orders() == once
    await database.deliver(delivery_of(ROWS))
    assert len(database.orders()) == 7
    noted = database.rows("SELECT delivery_id, job_id, rows FROM exportd_deliveries")
    assert (delivery.delivery_id, delivery.export.job_id, 3) in noted
    assert len(noted) == 2


async def test_a_repeated_delivery_needs_neither_the_parts_nor_the_table(
    database: Database,
) -> None:
    delivery = delivery_of(ROWS)
    receipt = await database.deliver(delivery, create_table=True)
    database.run("DROP TABLE orders")
    gone = [replace(part, content=BytesContent(b"", gone=True)) for part in delivery.parts]
    sink = await database.sink()
    again = replace(delivery, parts=tuple(gone))
    assert await sink.deliver(DatabaseRequest(table="orders"), again) == receipt


async def test_replace_puts_the_rows_in_the_place_of_all(database: Database) -> None:
    database.make_orders()
    await database.deliver(delivery_of(ROWS), mode="REPLACE")
    await database.deliver(delivery_of(MORE), mode="REPLACE")
    assert database.orders() == [(3, "three"), (4, "four")]


async def test_an_export_without_rows_is_delivered_too(database: Database) -> None:
    database.make_orders()
    await database.deliver(delivery_of(ROWS.slice(0, 0)))
    assert database.orders() == [(0, "old")]
    await database.deliver(delivery_of(ROWS.slice(0, 0), parts=1), mode="REPLACE")
    assert database.orders() == []


@pytest.mark.parametrize("output", [CSV, PARQUET], ids=name_of)
async def test_merge_updates_what_is_there_adds_what_is_not_and_the_last_of_a_key_wins(
    postgres_sink: Postgres, output: OutputFormat
) -> None:
    postgres_sink.make_orders("id bigint, name text, kept text DEFAULT 'new', UNIQUE (id)")
    rows = pa.table(
        {"name": ["a", "b", "c", None], "id": [0, 1, 0, 1]},
    )
    await postgres_sink.deliver(
        delivery_of(rows, output), mode="MERGE", key_columns=("id",)
    )
    assert postgres_sink.rows("SELECT * FROM orders ORDER BY id") == [
        (0, "c", "new"),
        (1, None, "new"),
    ]


async def test_merge_takes_several_keys_and_may_have_nothing_else(
    postgres_sink: Postgres,
) -> None:
    postgres_sink.make_orders("id bigint, name text, PRIMARY KEY (name, id)")
    rows = pa.table({"id": [0, 0, 1], "name": ["old", "x", "x"]})
    await postgres_sink.deliver(delivery_of(rows), mode="MERGE", key_columns=("id", "name"))
    assert postgres_sink.orders() == [(0, "old"), (0, "x"), (1, "x")]


async def test_merge_makes_a_table_with_its_key(postgres_sink: Postgres) -> None:
    for table in (ROWS, MORE):
        await postgres_sink.deliver(
            delivery_of(table), mode="MERGE", key_columns=("id",), create_table=True
        )
    assert postgres_sink.orders() == [(1, "one"), (2, ""), (3, "three"), (4, "four")]


async def test_a_key_that_is_missing_is_refused(postgres_sink: Postgres) -> None:
    postgres_sink.make_orders("id bigint UNIQUE, name text")
    rows = pa.table({"id": [1, None], "name": ["a", "b"]})
    with pytest.raises(DeliveryFailed, match="'id': a value is missing"):
        await postgres_sink.deliver(delivery_of(rows), mode="MERGE", key_columns=("id",))
    assert postgres_sink.orders() == [(0, "old")]


@pytest.mark.parametrize(
    "index",
    [
        "CREATE INDEX ON orders (id)",
        "CREATE UNIQUE INDEX ON orders (id, name)",
        "CREATE UNIQUE INDEX ON orders (id) WHERE id > 0",
        "CREATE UNIQUE INDEX ON orders (abs(id))",
        "ALTER TABLE orders ADD UNIQUE (id) DEFERRABLE",
    ],
)
async def test_merge_needs_a_unique_index_on_exactly_its_keys(
    postgres_sink: Postgres, index: str
) -> None:
    postgres_sink.make_orders()
    postgres_sink.run(index)
    delivery = delivery_of(ROWS)
    with pytest.raises(BadSinkRequest, match="no unique constraint on exactly id") as bad:
        await postgres_sink.deliver(delivery, mode="MERGE", key_columns=("id",))
    assert bad.value.field == "key_columns"
    sink = await postgres_sink.sink()
    wanted = DatabaseRequest(table="orders", mode="MERGE", key_columns=("id",))
    with pytest.raises(DeliveryFailed, match="no unique constraint") as failed:
        await sink.deliver(wanted, delivery)
    assert not failed.value.retryable


async def test_a_unique_index_may_carry_other_columns_along(
    postgres_sink: Postgres,
) -> None:
    postgres_sink.make_orders()
    postgres_sink.run("CREATE UNIQUE INDEX ON orders (id) INCLUDE (name)")
    await postgres_sink.deliver(delivery_of(MORE), mode="MERGE", key_columns=("id",))
    assert postgres_sink.orders() == [(0, "old"), (3, "three"), (4, "four")]


async def test_keys_may_be_of_types_that_arrive_as_text(postgres_sink: Postgres) -> None:
    rows = pa.table(
        {
            "id": pa.array([b"\0", b"\0", b""]),
            "span": pa.array([1, 1, -1], pa.duration("us")),
            "name": ["first", "last", "other"],
        }
    )
    for _ in range(2):
        await postgres_sink.deliver(
            delivery_of(rows), mode="MERGE", key_columns=("id", "span"), create_table=True
        )
    assert postgres_sink.orders() == [(b"", "other"), (b"\0", "last")]


async def test_rows_find_their_partitions(postgres_sink: Postgres) -> None:
    postgres_sink.run(
        "CREATE TABLE orders (id bigint, name text) PARTITION BY RANGE (id)",
        "CREATE TABLE low PARTITION OF orders FOR VALUES FROM (0) TO (3)",
        "CREATE TABLE high PARTITION OF orders FOR VALUES FROM (3) TO (9)",
    )
    await postgres_sink.deliver(delivery_of(ROWS), mode="REPLACE")
    assert postgres_sink.rows("SELECT id FROM high") == [(3,)]
    outside = pa.table({"id": [10], "name": ["x"]})
    with pytest.raises(DeliveryFailed) as failed:
        await postgres_sink.deliver(delivery_of(outside))
    assert not failed.value.retryable


# What breaks off.


def spoiled(delivery: Delivery, content: BytesContent) -> Delivery:
    """The last part has another content than its manifest says."""
    *others, last = delivery.parts
    return replace(delivery, parts=(*others, replace(last, content=content)))


@each_reader
@pytest.mark.parametrize(
    "content",
    [
        BytesContent(b"x" * 100, fails=StoreFailed()),
        BytesContent(b"", gone=True),
    ],
    ids=["fails", "gone"],
)
async def test_what_the_store_raises_reaches_the_caller_and_the_table_is_as_it_was(
    database: Database, output: OutputFormat, content: BytesContent
) -> None:
    database.make_orders()
    with pytest.raises((StoreFailed, KeyError)):
        await database.deliver(spoiled(delivery_of(ROWS, output), content), mode="REPLACE")
    assert database.orders() == [(0, "old")]
    assert database.rows("SELECT * FROM exportd_deliveries") == []


@each_reader
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "nothing", "swapped"])
async def test_damaged_parts_are_never_loaded(
    sqlite_sink: Sqlite, output: OutputFormat, damage: str
) -> None:
    database = sqlite_sink  # what reads parts is the same for both
    database.make_orders()
    delivery = delivery_of(ROWS, output)
    content = delivery.parts[-1].content
    assert isinstance(content, BytesContent)
    data = content.data
    middle = len(data) // 2
    bad = {
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "cut": data[:-2],
        "longer": data + data,
        "nothing": b"",
        "swapped": delivery.parts[0].content.data,  # type: ignore[attr-defined] # it has bytes
    }[damage]
    with pytest.raises(DeliveryFailed):
        await database.deliver(spoiled(delivery, BytesContent(bad)))
    assert database.orders() == [(0, "old")]


async def test_parts_with_fewer_rows_than_the_manifest_says_are_refused(
    database: Database,
) -> None:
    database.make_orders()
    delivery = delivery_of(ROWS)
    *others, last = delivery.parts
    parts = (*others, replace(last, rows=last.rows + 1))
    with pytest.raises(DeliveryFailed, match="3 rows were read of the 4"):
        await database.deliver(replace(delivery, parts=parts))
    assert database.orders() == [(0, "old")]


@pytest.mark.parametrize("output", [CSV, PARQUET, ARROW], ids=name_of)
async def test_a_delivery_that_is_cancelled_ends_soon_and_leaves_the_table_as_it_was(
    database: Database, output: OutputFormat
) -> None:
    database.make_orders()
    delivery, content = held(delivery_of(ROWS, output))
    task = asyncio.create_task(database.deliver(delivery, mode="REPLACE"))
    await content.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert database.orders() == [(0, "old")]
    await until(lambda: "exportd-database-sink" not in left_over())
    if isinstance(database, Postgres):
        found = database
        await found.until(lambda: not found.sessions())
    content.go_on.set()
    await database.deliver(delivery, mode="REPLACE")
    assert len(database.orders()) == 3


async def test_a_delivery_that_waits_for_a_lock_is_cancelled_soon(
    postgres_sink: Postgres,
) -> None:
    postgres_sink.make_orders()
    with psycopg.connect(postgres_sink.url) as other:
        other.execute("LOCK TABLE orders IN SHARE MODE")
        task = asyncio.create_task(postgres_sink.deliver(delivery_of(ROWS)))
        await postgres_sink.until(
            lambda: bool(postgres_sink.sessions("wait_event_type = 'Lock'"))
        )
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The server notices as well, and waits for the lock no longer.
        await postgres_sink.until(lambda: not postgres_sink.sessions())
    assert postgres_sink.orders() == [(0, "old")]


async def test_a_session_that_the_server_ends_is_tried_again_and_leaves_nothing(
    staged_sink: Postgres,
) -> None:
    staged_sink.make_orders()
    delivery, content = held(delivery_of(ROWS))
    task = asyncio.create_task(staged_sink.deliver(delivery))
    await content.reached.wait()
    (pid,) = staged_sink.sessions("query LIKE 'COPY%'")
    staged_sink.rows(f"SELECT pg_terminate_backend({pid}, 5000)")
    content.go_on.set()
    with pytest.raises(DeliveryFailed) as failed:
        await task
    assert failed.value.retryable
    assert staged_sink.orders() == [(0, "old")]
    await staged_sink.deliver(delivery)
    assert len(staged_sink.orders()) == 4


async def test_two_attempts_at_once_load_the_rows_once(known: Database) -> None:
    known.make_orders()
    delivery = delivery_of(ROWS)
    answers = await asyncio.gather(
        *(known.deliver(replace(delivery, attempt=n)) for n in range(1, 5))
    )
    assert len(set(answers)) == 1
    assert len(known.orders()) == 4


async def test_first_deliveries_at_once_make_their_tables_once(
    postgres_sink: Postgres,
) -> None:
    delivery = delivery_of(ROWS)
    for _ in range(10):
        postgres_sink.run("DROP TABLE IF EXISTS orders, exportd_deliveries")
        answers = await asyncio.gather(
            *(postgres_sink.deliver(delivery, create_table=True) for _ in range(5)),
            return_exceptions=True,
        )
        failed = [each for each in answers if isinstance(each, BaseException)]
        # The target may have been made meanwhile, which the next attempt finds.
        for error in failed:
            assert isinstance(error, DeliveryFailed)
            assert error.retryable
        assert len(failed) < len(answers)
        assert len(postgres_sink.orders()) == 3


async def test_an_attempt_that_hangs_holds_up_no_other_and_finds_its_work_done(
    database: Database,
) -> None:
    database.make_orders()
    whole = delivery_of(ROWS)
    hanging, content = held(whole)
    zombie = asyncio.create_task(database.deliver(hanging, mode="REPLACE"))
    await content.reached.wait()
    receipt = await database.deliver(replace(whole, attempt=2), mode="REPLACE")
    await database.deliver(delivery_of(MORE))  # and others go on
    content.go_on.set()
    assert await zombie == receipt
    assert len(database.orders()) == 5


async def test_replacements_at_once_leave_the_rows_of_one(postgres_sink: Postgres) -> None:
    postgres_sink.make_orders()
    tables = [pa.table({"id": [n] * 500, "name": [str(n)] * 500}) for n in range(4)]
    await asyncio.gather(
        *(postgres_sink.deliver(delivery_of(each), mode="REPLACE") for each in tables)
    )
    ((rows, different),) = postgres_sink.rows(
        "SELECT count(*), count(DISTINCT id) FROM orders"
    )
    assert (rows, different) == (500, 1)


async def test_readers_see_the_old_rows_until_the_new_ones_are_all_there(
    postgres_sink: Postgres,
) -> None:
    postgres_sink.make_orders()
    with psycopg.connect(postgres_sink.url) as reader:
        query = "SELECT count(*) FROM orders"
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        before = reader.execute(query).fetchone()
        await postgres_sink.deliver(delivery_of(ROWS), mode="REPLACE")
        assert reader.execute(query).fetchone() == before
    assert len(postgres_sink.orders()) == 3


CHILD = """
import asyncio, json, sys
from dataclasses import dataclass, replace
from exportd_server.sinks.database import *
from tests.support.held_content import HeldContent
from tests.support.sinks import BytesContent, a_part, an_export, deliver_whole

async def main(settings, delivery_id, stops):
    data = b'id,name\\n1,one\\n2,""\\n3,\\n'
    content = HeldContent(data) if stops == "copy" else BytesContent(data)
    part = a_part(data, rows=3, prefix_bytes=8, content=content)
    delivery = replace(deliver_whole(an_export(), part), delivery_id=delivery_id)
    sink = await DatabaseSink().open(DatabaseConnection(**json.loads(settings)))
    request = DatabaseRequest(table="orders", mode="REPLACE")
    task = asyncio.create_task(sink.deliver(request, delivery))
    if stops == "copy":
        await content.reached.wait()
    print("ready", flush=True)
    await task

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def child(database: Database, delivery: Delivery, stops: str) -> Iterator[Any]:
    """A process in the middle of delivering."""
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            CHILD,
            json.dumps(database.settings()),
            delivery.delivery_id,
            stops,
        ],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.minutes
async def test_a_process_that_is_stopped_holds_up_nobody_and_killed_leaves_nothing(
    database: Database,
) -> None:
    database.make_orders()
    delivery = delivery_of(ROWS)
    with child(database, delivery, "copy") as process:
        process.send_signal(signal.SIGSTOP)
        await database.deliver(delivery_of(MORE))
        there = database.orders()
    assert database.orders() == there == [(0, "old"), (3, "three"), (4, "four")]
    await database.deliver(delivery, mode="REPLACE")
    assert len(database.orders()) == 3


async def test_a_process_killed_before_it_commits_leaves_nothing(
    postgres_sink: Postgres,
) -> None:
    postgres_sink.make_orders()
    delivery = delivery_of(ROWS)
    with psycopg.connect(postgres_sink.url) as other:
        other.execute("LOCK TABLE orders IN SHARE MODE")
        with child(postgres_sink, delivery, "lock"):
            await postgres_sink.until(
                lambda: bool(postgres_sink.sessions("wait_event_type = 'Lock'"))
            )
        await postgres_sink.until(lambda: not postgres_sink.sessions())
    assert postgres_sink.orders() == [(0, "old")]
    await postgres_sink.deliver(delivery, mode="REPLACE")
    assert len(postgres_sink.orders()) == 3


# What is refused, and why.

CONNECTIONS = {
    "postgresql": DatabaseConnection.model_validate({"url": "postgresql://h/d"}),
    "sqlite": DatabaseConnection.model_validate({"url": "sqlite:////x.db"}),
}
SAFE = OutputFormat(Format.CSV, csv=CsvOptions(dialect=CsvDialect.SPREADSHEET_SAFE))
TWICE = pa.schema([("a", pa.int64()), ("a", pa.int64())])
AS_A_TABLE = pa.schema([("id", pa.int64()), ("name", pa.string())])


@pytest.mark.parametrize(
    ("request_", "export", "field", "mend"),
    [
        (
            {},
            export_of(AS_A_TABLE, OutputFormat(Format.JSONL)),
            "",
            "CSV, PARQUET or ARROW",
        ),
        ({}, export_of(AS_A_TABLE, SAFE), "", "RAW"),
        ({}, export_of(TWICE), "", "'a'"),
        ({"table": ""}, export_of(AS_A_TABLE), "table", "TABLE or SCHEMA.TABLE"),
        ({"table": "a.b.c"}, export_of(AS_A_TABLE), "table", "double quotes"),
        ({"table": "a."}, export_of(AS_A_TABLE), "table", "double quotes"),
        ({"table": '"a"b'}, export_of(AS_A_TABLE), "table", "double quotes"),
        ({"table": 'a"b'}, export_of(AS_A_TABLE), "table", "double quotes"),
        ({"table": "a\0"}, export_of(AS_A_TABLE), "table", "double quotes"),
        ({"table": "pg_catalog.pg_class"}, export_of(AS_A_TABLE), "table", "its own"),
        ({"table": "exportd_deliveries"}, export_of(AS_A_TABLE), "table", "delivered"),
        ({"mode": "MERGE"}, export_of(AS_A_TABLE), "key_columns", "needs"),
        ({"key_columns": ("id",)}, export_of(AS_A_TABLE), "key_columns", "MERGE"),
        (
            {"mode": "MERGE", "key_columns": ("x",)},
            export_of(AS_A_TABLE),
            "key_columns",
            "no column",
        ),
        (
            {"mode": "MERGE", "key_columns": ("id", "id")},
            export_of(AS_A_TABLE),
            "key_columns",
            "twice",
        ),
    ],
)
def test_a_request_that_cannot_work_is_refused_without_asking_the_database(
    request_: dict[str, Any], export: Export, field: str, mend: str
) -> None:
    wanted = DatabaseRequest.model_validate({"table": "orders", **request_})
    with pytest.raises(BadSinkRequest) as bad:
        DatabaseSink().check(wanted, CONNECTIONS["postgresql"], export)
    assert bad.value.field == field
    assert mend in bad.value.description.replace("the database's own", "its own")


@pytest.mark.parametrize(
    ("request_", "field"),
    [({"table": "a.b"}, "table"), ({"mode": "MERGE", "key_columns": ("id",)}, "mode")],
)
def test_sqlite_has_neither_schemas_nor_merge(request_: dict[str, Any], field: str) -> None:
    wanted = DatabaseRequest.model_validate({"table": "orders", **request_})
    with pytest.raises(BadSinkRequest) as bad:
        DatabaseSink().check(wanted, CONNECTIONS["sqlite"], export_of(AS_A_TABLE))
    assert bad.value.field == field


def test_a_good_request_takes_the_whole_export() -> None:
    wanted = DatabaseRequest(table='"we.ird ""name"""."ordérs"')
    plan = DatabaseSink().check(wanted, CONNECTIONS["postgresql"], export_of(AS_A_TABLE))
    assert plan.takes is Takes.WHOLE


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "mysql://user:hunter2@host/db"},
        {"url": "sqlite://hunter2"},
        {"url": "sqlite:///"},
        {"url": "sqlite:////hunter2", "schemas": ["public"]},
        {"url": "postgresql://user:hunter2@host/db", "nope": 1},
        {"url": "postgresql://user:hunter2@host/db", "statement_timeout": 0},
        {"url": "postgresql://user:hunter2@host/db", "deliveries_table": "a.b.c"},
    ],
)
def test_a_bad_connection_is_refused_and_its_password_is_never_shown(
    settings: dict[str, Any],
) -> None:
    with pytest.raises(ValidationError) as bad:
        DatabaseConnection.model_validate(settings)
    told = [error["msg"] + str(error["loc"]) for error in bad.value.errors()]
    assert "hunter2" not in "".join(told)
    good = DatabaseConnection.model_validate({"url": "postgresql://user:hunter2@host/db"})
    assert "hunter2" not in f"{good!r}{good.model_dump()}{good.model_dump_json()}"


def test_a_request_has_no_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        DatabaseRequest.model_validate({"table": "orders", "sql": "DROP TABLE orders"})


async def test_only_what_the_operator_allows_is_written_to(
    postgres_sink: Postgres,
) -> None:
    postgres_sink.run(
        "CREATE SCHEMA other",
        "CREATE TABLE other.orders (id bigint, name text)",
        "CREATE TABLE public.orders (id bigint, name text)",
    )
    delivery = delivery_of(ROWS)

    async def attempt(table: str, **settings: Any) -> None:
        wanted = DatabaseRequest(table=table, create_table=True)
        sink = await postgres_sink.sink(**settings)
        await sink.probe(wanted, delivery.export)
        DatabaseSink().check(wanted, postgres_sink.connected(**settings), delivery.export)

    await attempt("other.orders", schemas=["other"], tables=["ord*"])
    for table, settings, told in (
        ("public.orders", {"schemas": ["other"]}, "'public' may not"),
        # The database resolves the name, and to another schema than is allowed.
        ("orders", {"schemas": ["other"]}, "'public' may not"),
        ("fresh", {"schemas": ["other"]}, "'public' may not"),
        ("orders", {"tables": ["export_*", "x"]}, "'orders' may not"),
        ("export", {"tables": ["export_*", "x"]}, "'export' may not"),
    ):
        with pytest.raises(BadSinkRequest, match=told) as bad:
            await attempt(table, **settings)
        assert bad.value.field == "table"


async def test_sqlite_tables_are_held_against_the_list_by_their_own_names(
    sqlite_sink: Sqlite,
) -> None:
    sqlite_sink.make_orders()
    sink = await sqlite_sink.sink(tables=["ORDERS"])
    with pytest.raises(BadSinkRequest, match="'orders' may not"):
        await sink.probe(DatabaseRequest(table="ORDERS"), export_of(AS_A_TABLE))


PROBED = [
    ("CREATE TABLE o (id bigint, name text)", "there is no table '?orders"),
    ("CREATE TABLE orders (id bigint)", "has no column 'name'"),
    ('CREATE TABLE orders (id bigint, "NAME" text)', "has no column 'name'"),
    ("CREATE TABLE orders (id bigint, name text, x text NOT NULL)", "'x' of "),
    (
        "CREATE TABLE orders (id bigint, a text, name text GENERATED ALWAYS AS (a) STORED)",
        "'name' of ",
    ),
    ("CREATE VIEW orders AS SELECT 1 AS id, 'x' AS name", "is no table"),
]


@pytest.mark.parametrize(("made", "told"), PROBED)
async def test_a_table_that_does_not_fit_is_told_before_the_job_runs(
    known: Database, made: str, told: str
) -> None:
    known.run(made)
    with pytest.raises(BadSinkRequest, match=told) as bad:
        await known.deliver(delivery_of(ROWS))
    assert bad.value.field == "table"
    sink = await known.sink()
    with pytest.raises(DeliveryFailed, match=told) as failed:
        await sink.deliver(DatabaseRequest(table="orders"), delivery_of(ROWS))
    assert not failed.value.retryable


async def test_probing_leaves_no_trace(database: Database) -> None:
    sink = await database.sink()
    await sink.probe(
        DatabaseRequest(table="orders", create_table=True), export_of(AS_A_TABLE)
    )
    tables = {
        "postgresql": "SELECT relname FROM pg_class WHERE relnamespace = "
        "'public'::regnamespace",
        "sqlite": "SELECT name FROM sqlite_schema",
        "duckdb": "SELECT table_name FROM duckdb_tables()",
    }
    assert database.rows(tables[database.kind]) == []


async def test_columns_that_number_themselves_or_have_defaults_may_be_left_out(
    known: Database,
) -> None:
    number = {
        "postgresql": "bigint GENERATED ALWAYS AS IDENTITY",
        "sqlite": "INTEGER PRIMARY KEY",
    }[known.kind]
    known.run(
        f"CREATE TABLE orders (n {number}, id int, name text, d text NOT NULL DEFAULT 'd')"
    )
    await known.deliver(delivery_of(MORE))
    assert known.rows("SELECT * FROM orders ORDER BY n") == [
        (1, 3, "three", "d"),
        (2, 4, "four", "d"),
    ]


@pytest.fixture
def role(postgres: PostgresServer, postgres_sink: Postgres) -> Iterator[Postgres]:
    """The same database for somebody without any rights but to connect."""
    name = f"r_{postgres_sink.url.rsplit('_', 1)[1]}"
    postgres_sink.run(
        f"CREATE ROLE {name} LOGIN",
        "CREATE TABLE orders (id bigint, name text, UNIQUE (id))",
    )
    yield Postgres(postgres_sink.url.replace("postgres@", f"{name}@"))
    postgres_sink.run(f"DROP OWNED BY {name}", f"DROP ROLE {name}")


async def test_rights_that_are_missing_are_told_one_by_one(
    postgres_sink: Postgres, role: Postgres
) -> None:
    name = role.url.split("//")[1].split("@")[0]
    delivery = delivery_of(ROWS)
    steps: list[tuple[dict[str, Any], str, str]] = [
        ({}, "lacks INSERT on", "INSERT ON orders"),
        ({"mode": "REPLACE"}, "lacks DELETE on", "DELETE ON orders"),
        (
            {"mode": "MERGE", "key_columns": ("id",)},
            "lacks UPDATE and SELECT on",
            "SELECT (id, name), UPDATE (name) ON orders",
        ),
    ]
    for request, told, right in steps:
        with pytest.raises(BadSinkRequest, match=told):
            await role.deliver(delivery, **request)
        postgres_sink.run(f"GRANT {right} TO {name}")
    with pytest.raises(BadSinkRequest, match="may not make tables") as bad:
        await role.deliver(delivery, "fresh", create_table=True)
    assert bad.value.field == "create_table"
    with pytest.raises(DeliveryFailed, match="exportd_deliveries is missing") as failed:
        await role.deliver(delivery)
    assert not failed.value.retryable
    await postgres_sink.deliver(delivery)  # its owner makes it
    with pytest.raises(DeliveryFailed, match=r"lacks a right .*42501") as failed:
        await role.deliver(delivery_of(ROWS))
    assert not failed.value.retryable
    postgres_sink.run(f"GRANT SELECT, INSERT ON exportd_deliveries TO {name}")
    for request, _, _ in steps[:0:-1]:
        await role.deliver(delivery_of(MORE), **request)
    assert postgres_sink.orders() == [(3, "three"), (4, "four")]


async def test_a_role_without_temporary_tables_is_told_so(
    postgres_sink: Postgres, role: Postgres
) -> None:
    name = role.url.split("//")[1].split("@")[0]
    database = role.url.rsplit("/", 1)[1]
    postgres_sink.run(
        f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
        f"GRANT INSERT ON orders TO {name}",
    )
    with pytest.raises(DeliveryFailed, match="TEMPORARY") as failed:
        await role.deliver(delivery_of(ROWS))
    assert not failed.value.retryable


@pytest.mark.parametrize(
    ("pattern", "instead", "retryable", "told"),
    [
        ("postgres@", "nobody-here@", False, "role is refused"),
        ("/t_", "/hunter2_t_", False, "does not exist"),
        (r"127.0.0.1:\d+", "127.0.0.1:1", True, "cannot be reached"),
    ],
)
async def test_a_database_that_cannot_be_used_is_told_without_its_address(
    postgres_sink: Postgres, pattern: str, instead: str, retryable: bool, told: str
) -> None:
    url = re.sub(pattern, instead, postgres_sink.url)
    sink = await DatabaseSink().open(DatabaseConnection.model_validate({"url": url}))
    request = DatabaseRequest(table="orders")
    for call in (
        sink.probe(request, export_of(AS_A_TABLE)),
        sink.deliver(request, delivery_of(ROWS)),
    ):
        with pytest.raises(DeliveryFailed, match=told) as failed:
            await call
        assert failed.value.retryable is retryable
        assert "127.0.0.1" not in failed.value.message
        assert "hunter2" not in failed.value.message


@pytest.mark.parametrize(
    ("text", "retryable"),
    [
        ('FATAL:  password authentication failed for user "u"', False),
        ("fe_sendauth: no password supplied", False),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1"', False),
        ('FATAL:  role "u" is not permitted to log in', False),
        ("server does not support SSL, but SSL was required", False),
        ("FATAL:  sorry, too many clients already", True),
        ("FATAL:  the database system is starting up", True),
        ('could not translate host name "h" to address', True),
        ("connection timeout expired", True),
    ],
)
def test_what_the_operator_must_mend_is_not_tried_again(text: str, retryable: bool) -> None:
    told = unreachable(psycopg.OperationalError(text))
    assert told.retryable is retryable
    assert text not in told.message


@pytest.mark.parametrize(
    ("state", "retryable"),
    [
        ("08006", True),
        ("25006", True),
        ("25P03", True),
        ("40001", True),
        ("40P01", True),
        ("53100", True),
        ("53300", True),
        ("55P03", True),
        ("57014", True),
        ("57P01", True),
        ("XX000", True),
        ("0A000", False),
        ("22P02", False),
        ("23505", False),
        ("42501", False),
        ("42703", False),
        ("42P01", False),
        ("P0001", False),
    ],
)
def test_a_state_says_whether_to_try_again(state: str, retryable: bool) -> None:
    told = failure(psycopg.errors.lookup(state)(SECRET))
    assert told.retryable is retryable
    assert state in told.message
    assert SECRET not in told.message


LOCKER = """
import sqlite3, sys
link = sqlite3.connect(sys.argv[1], isolation_level=None)
link.execute("BEGIN IMMEDIATE")
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(database: Sqlite) -> Iterator[None]:
    """Somebody writes to it, in a process of its own: locks that two SQLite libraries in
    one process hold do not meet."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, database.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            yield
        finally:
            other.kill()


async def test_a_sqlite_file_that_another_one_writes_to_is_tried_again(
    sqlite_sink: Sqlite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_MILLISECONDS", 50)
    delivery = delivery_of(ROWS)
    await sqlite_sink.deliver(delivery_of(ROWS), create_table=True)
    with locked(sqlite_sink), pytest.raises(DeliveryFailed) as failed:
        await sqlite_sink.deliver(delivery)
    assert failed.value.retryable
    assert "lock" in failed.value.message
    await sqlite_sink.deliver(delivery)
    assert len(sqlite_sink.orders()) == 6


async def test_a_sqlite_file_that_is_missing_or_no_database_is_told(
    tmp_path: Path, sqlite_sink: Sqlite
) -> None:
    junk = tmp_path / "junk.db"
    junk.write_bytes(b"junk" * 1000)
    for path in (tmp_path / "none.db", junk):
        url = f"sqlite:///{path}"
        sink = await DatabaseSink().open(DatabaseConnection.model_validate({"url": url}))
        with pytest.raises(DeliveryFailed) as failed:
            await sink.deliver(DatabaseRequest(table="orders"), delivery_of(ROWS))
        assert not failed.value.retryable
        assert str(tmp_path) not in failed.value.message
    assert not (tmp_path / "none.db").exists()


NAMES = [
    "plain",
    "Capital",
    "with space",
    "dot.ted",
    'quo"ted',
    "semi;colon",
    "x); DROP TABLE victim; --",
    '"; DROP TABLE victim; --',
    "'; DROP TABLE victim; --",
    "%s %(x)s {} {0}",
    "ünïcode 表 😀",
    "select",
    "c0",
    "place",
    "\\",
    "a\nb",
]


@pytest.mark.minutes
async def test_names_are_only_names(database: Database) -> None:
    database.run("CREATE TABLE victim (id bigint)", "INSERT INTO victim VALUES (1)")
    for name in NAMES:
        quoted = '"' + name.replace('"', '""') + '"'
        for mode in ("REPLACE",) if database.kind == "duckdb" else ("APPEND", "REPLACE"):
            rows = pa.table({each: [len(name)] for each in NAMES})
            await database.deliver(
                delivery_of(rows, parts=1), quoted, mode=mode, create_table=True
            )
        assert database.rows(f"SELECT * FROM {quoted}") == [(len(name),) * len(NAMES)]
    assert database.rows("SELECT * FROM victim") == [(1,)]


async def test_names_are_only_names_in_a_merge_and_in_messages(
    postgres_sink: Postgres,
) -> None:
    postgres_sink.run("CREATE TABLE victim (id bigint)")
    rows = pa.table({each: [1] for each in NAMES})
    for _ in range(2):
        await postgres_sink.deliver(
            delivery_of(rows),
            '"; DROP TABLE victim; --"',
            mode="MERGE",
            key_columns=tuple(NAMES[:4]),
            create_table=True,
        )
    assert len(postgres_sink.rows('SELECT * FROM "; DROP TABLE victim; --"')) == 1
    with pytest.raises(BadSinkRequest, match="DROP TABLE victim"):
        await postgres_sink.deliver(delivery_of(rows), '"x; DROP TABLE victim"')
    assert postgres_sink.rows("SELECT * FROM victim") == []


async def test_a_name_that_the_database_would_cut_is_refused(
    postgres_sink: Postgres,
) -> None:
    for table, column in (("n" * 64, "id"), ("t", "é" * 32)):
        rows = pa.table({column: [1]})
        with pytest.raises(BadSinkRequest, match="63 bytes"):
            await postgres_sink.deliver(delivery_of(rows), table, create_table=True)
    await postgres_sink.deliver(
        delivery_of(pa.table({"é" * 31: [1]})), "n" * 63, create_table=True
    )


async def test_settings_of_the_database_change_no_value(postgres_sink: Postgres) -> None:
    name = postgres_sink.url.rsplit("/", 1)[1]
    postgres_sink.run(
        f"ALTER DATABASE {name} SET DateStyle = 'SQL, DMY'",
        f"ALTER DATABASE {name} SET IntervalStyle = 'sql_standard'",
        f"ALTER DATABASE {name} SET TimeZone = 'Asia/Kathmandu'",
        f"ALTER DATABASE {name} SET default_transaction_read_only = on",
        f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'",
        f"ALTER DATABASE {name} SET standard_conforming_strings = on",
    )
    names = ["day", "naive", "utc", "duration", "clock", "f64", "dot"]
    rows = EVERY_KIND.select(names)
    await postgres_sink.deliver(delivery_of(rows), create_table=True)
    columns = ", ".join(f'"{n}"' for n in names if n != "duration")
    with psycopg.connect(postgres_sink.url, options="-c DateStyle=ISO") as link:
        found = link.execute(f"SELECT {columns} FROM orders").fetchall()
        spans = link.execute("SELECT extract(epoch FROM duration) FROM orders").fetchall()
    assert found == [
        tuple(row[n] for n in names if n != "duration") for row in rows.to_pylist()
    ]
    assert [s for (s,) in spans] == [Decimal("-0.000001"), Decimal("90061.000001"), None]


async def test_rows_come_in_the_order_of_the_output(database: Database) -> None:
    rows = pa.table({"id": range(50_000), "name": ["x" * 50] * 50_000})
    await database.deliver(delivery_of(rows, parts=3), create_table=True)
    order = "ctid" if database.kind == "postgresql" else "rowid"
    found = database.rows(f"SELECT id FROM orders ORDER BY {order}")
    assert [n for (n,) in found] == list(range(50_000))


async def test_a_table_that_changes_while_rows_are_loaded_is_looked_at_again(
    staging: Database,
) -> None:
    staging.make_orders()
    delivery, content = held(delivery_of(ROWS))
    task = asyncio.create_task(staging.deliver(delivery))
    await content.reached.wait()
    staging.run("ALTER TABLE orders ADD COLUMN extra text")
    content.go_on.set()
    with pytest.raises(DeliveryFailed, match="was changed") as failed:
        await task
    assert failed.value.retryable
    assert staging.orders() == [(0, "old")]
    if staging.kind == "duckdb":  # where all columns must be given
        staging.run("ALTER TABLE orders DROP COLUMN extra")
    await staging.deliver(delivery)
    assert len(staging.orders()) == 4


async def test_values_with_line_ends_and_quotes_of_any_length_reach_sqlite(
    sqlite_sink: Sqlite,
) -> None:
    texts = ['"\n' * 700_000, "\n" * 1_500_000, '""', '"', ',\n"x"\n', "é" * 600_000] * 2
    rows = pa.table({"id": range(12), "name": texts})
    await sqlite_sink.deliver(delivery_of(rows, parts=1), create_table=True)
    assert [t for (_, t) in sqlite_sink.orders()] == texts


SQLITE_REFUSED = [
    ("numeric", pa.array(["007"])),
    ("integer", pa.array(["007"])),
    ("decimal(10,2)", pa.array([Decimal("1.50")], pa.decimal128(5, 2))),
    ("real", pa.array([2**53 + 1])),
    ("numeric", pa.array([1.5])),
    ("real", pa.array([b"x"])),
    ("integer", pa.array([1], pa.uint64())),
]


@pytest.mark.parametrize(("kind", "values"), SQLITE_REFUSED)
async def test_an_affinity_that_would_change_values_is_refused(
    sqlite_sink: Sqlite, kind: str, values: pa.Array
) -> None:
    sqlite_sink.run(f"CREATE TABLE orders (v {kind})")
    with pytest.raises(BadSinkRequest, match="'v' of 'orders' has the affinity"):
        await sqlite_sink.deliver(delivery_of(pa.table({"v": values})))


SQLITE_FITTING = [
    ("varchar(2)", pa.array([1]), "1", "text"),
    ("text", pa.array([b"\0\xff"]), "AP8=", "text"),
    ("text", pa.array([True]), "true", "text"),
    ("", pa.array(["007"]), "007", "text"),
    ("timestamp", pa.array([0], pa.timestamp("us")), "1970-01-01T00:00:00.000000", "text"),
    ("date", pa.array([0], pa.date32()), "1970-01-01", "text"),
    ("decimal", pa.array([2**53 + 1]), 2**53 + 1, "integer"),
    ("boolean", pa.array([True]), 1, "integer"),
    ("double", pa.array([0.1], pa.float32()), 0.10000000149011612, "real"),
]


@pytest.mark.parametrize(("kind", "values", "value", "stored"), SQLITE_FITTING)
async def test_an_affinity_that_keeps_values_takes_them(
    sqlite_sink: Sqlite, kind: str, values: pa.Array, value: Any, stored: str
) -> None:
    sqlite_sink.run(f"CREATE TABLE orders (v {kind})")
    await sqlite_sink.deliver(delivery_of(pa.table({"v": values})))
    assert sqlite_sink.rows("SELECT v, typeof(v) FROM orders") == [(value, stored)]


@pytest.mark.parametrize(
    ("made", "values", "told"),
    [
        ("v text NOT NULL", pa.array([None], pa.string()), "NOT NULL constraint"),
        ("v text UNIQUE", pa.array([SECRET, SECRET]), "UNIQUE constraint"),
        ("v text CHECK (v = '')", pa.array([SECRET]), "CHECK constraint"),
        ("v text REFERENCES k (v)", pa.array([SECRET]), "FOREIGN KEY constraint"),
        ("v real", pa.array([math.nan]), "'v': a value does not fit"),
    ],
)
async def test_sqlite_tells_the_constraint_that_breaks_and_no_value(
    sqlite_sink: Sqlite, made: str, values: pa.Array, told: str
) -> None:
    sqlite_sink.run("CREATE TABLE k (v text UNIQUE)", f"CREATE TABLE orders ({made})")
    with pytest.raises(DeliveryFailed, match=told) as failed:
        await sqlite_sink.deliver(delivery_of(pa.table({"v": values})))
    assert SECRET not in failed.value.message
    assert "INSERT" not in failed.value.message
    assert not failed.value.retryable
    assert sqlite_sink.rows("SELECT * FROM orders") == []


# Any other database, by a driver of the operator's.

MADE_TEXTS = {
    "f16": [2.0**-24, 65504.0, None],
    "wide": ["1" + "0" * 59, "-1", None],
    "duration": SQLITE_TEXTS["duration"],
    "list": SQLITE_TEXTS["list"],
    "struct": SQLITE_TEXTS["struct"],
    "map": SQLITE_TEXTS["map"],
}
MADE_TYPES = {
    "bool": "BOOLEAN",
    "i8": "SMALLINT",
    "i16": "SMALLINT",
    "i32": "INTEGER",
    "i64": "BIGINT",
    "u32": "BIGINT",
    "u64": "DECIMAL(20,0)",
    "f16": "FLOAT",
    "f32": "FLOAT",
    "f64": "DOUBLE",
    "infinite": "DOUBLE",
    "decimal": "DECIMAL(38,18)",
    "number": "INTEGER",
    "binary": "BLOB",
    "fixed": "BLOB",
    "day": "DATE",
    "clock": "TIME",
    "s": "TIMESTAMP",
    "naive": "TIMESTAMP",
    "utc": "TIMESTAMP WITH TIME ZONE",
    "tokyo": "TIMESTAMP WITH TIME ZONE",
}
"""All others are made of text."""


@pytest.mark.minutes
@every_output
async def test_every_kind_of_column_comes_back_through_a_driver_as_documented(
    duck: Duck, output: OutputFormat
) -> None:
    delivery = delivery_of(EVERY_KIND, output, parts=4)
    await duck.deliver(delivery, create_table=True)
    for name, found in zip(EVERY_KIND.column_names, duck.columns(), strict=True):
        assert found == (MADE_TEXTS.get(name) or EVERY_KIND[name].to_pylist()), name
    made = duck.rows("SELECT column_name, data_type FROM duckdb_columns()")
    types = {name: kind for name, kind in made if name in EVERY_KIND.column_names}
    assert types == {
        name: MADE_TYPES.get(name, "VARCHAR") for name in EVERY_KIND.column_names
    }


DUCK_FITTING: list[tuple[str, pa.Array, Any]] = [
    ("UBIGINT", pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    ("TINYINT", pa.array([-128], pa.int64()), -128),
    ("DECIMAL(20,1)", pa.array([2**63 - 1], pa.int64()), Decimal(2**63 - 1)),
    ("DECIMAL(12,4)", pa.array([Decimal("1.25")], pa.decimal128(10, 2)), Decimal("1.25")),
    ("INTEGER", pa.array([Decimal(7)], pa.decimal128(10, 0)), 7),
    ("DOUBLE", pa.array([0.1], pa.float32()), 0.10000000149011612),
    ("TIME", pa.array([1000], pa.time64("ns")), time(0, 0, 0, 1)),
    ("TIMESTAMP_S", pa.array([1], pa.timestamp("s")), datetime(1970, 1, 1, 0, 0, 1)),  # noqa: DTZ001 - it has no zone
    ("TIMESTAMP", pa.array([1000], pa.timestamp("ns")), datetime(1970, 1, 1, 0, 0, 0, 1)),  # noqa: DTZ001 - it has no zone
    (
        "TIMESTAMPTZ",
        pa.array([5000], pa.timestamp("ns", "UTC")),
        datetime(1970, 1, 1, 0, 0, 0, 5, UTC),
    ),
    ("VARCHAR", pa.array([b"\0\xff"]), "AP8="),
    ("VARCHAR", pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"),
]


@pytest.mark.minutes
@pytest.mark.parametrize(("kind", "values", "value"), DUCK_FITTING)
async def test_a_column_that_holds_the_values_takes_them_through_a_driver_exactly(
    duck: Duck, kind: str, values: pa.Array, value: Any
) -> None:
    duck.run(f"CREATE TABLE orders (v {kind})")
    await duck.deliver(delivery_of(pa.table({"v": values})))
    assert duck.columns() == [[value]]


DUCK_NOT_FITTING: list[tuple[str, pa.Array]] = [
    ("INTEGER", pa.array(["1"])),
    ("DOUBLE", pa.array([1], pa.int64())),
    ("FLOAT", pa.array([0.1])),
    ("DECIMAL(10,2)", pa.array([0.1])),
    ("DECIMAL(10,1)", pa.array([Decimal("1.25")], pa.decimal128(10, 2))),
    ("INTEGER", pa.array([Decimal("1.25")], pa.decimal128(10, 2))),
    ("TIMESTAMP", pa.array([1], pa.timestamp("us", "UTC"))),
    ("TIMESTAMPTZ", pa.array([1], pa.timestamp("us"))),
    ("DATE", pa.array([1], pa.timestamp("us"))),
    ("BLOB", pa.array(["x"])),
    ("BIGINT[]", pa.array([[1]])),
    ("INTERVAL", pa.array([1], pa.duration("us"))),
    ("BOOLEAN", pa.array([1])),
    ("ENUM('x')", pa.array(["x"])),
]


@pytest.mark.minutes
@pytest.mark.parametrize(("kind", "values"), DUCK_NOT_FITTING)
async def test_a_column_that_would_change_values_is_refused_before_a_driver_sees_them(
    duck: Duck, kind: str, values: pa.Array
) -> None:
    duck.run(f"CREATE TABLE orders (v {kind})")
    delivery = delivery_of(pa.table({"v": values}))
    with pytest.raises(BadSinkRequest, match="column 'v' of orders is of type") as bad:
        await duck.deliver(delivery)
    assert bad.value.field == "table"
    assert str(values.type) in bad.value.description
    sink = await duck.sink()
    with pytest.raises(DeliveryFailed, match="column 'v'") as failed:
        await sink.deliver(DatabaseRequest(table="orders"), delivery)
    assert not failed.value.retryable
    assert duck.rows("SELECT * FROM orders") == []


DUCK_REFUSED: list[tuple[str, pa.Array, str]] = [
    ("SMALLINT", pa.array([2**15]), "column 'v': a value does not fit"),
    ("DECIMAL(3,2)", pa.array([Decimal("10.5")], pa.decimal128(5, 2)), "column 'v'"),
    ("DECIMAL(3,2)", pa.array([10]), "column 'v'"),
    ("TIMESTAMP", pa.array([1], pa.timestamp("ns")), "column 'v'"),
    ("TIMESTAMP_S", pa.array([1], pa.timestamp("us")), "column 'v'"),
    ("TIME", pa.array([1001], pa.time64("ns")), "column 'v'"),
    ("UUID", pa.array([SECRET]), "database"),
    ("VARCHAR NOT NULL", pa.array([None], pa.string()), "breaks a constraint"),
    ("VARCHAR UNIQUE", pa.array([SECRET, SECRET]), "breaks a constraint"),
    ("VARCHAR CHECK (v = '')", pa.array([SECRET]), "breaks a constraint"),
]


@pytest.mark.minutes
@pytest.mark.parametrize(("kind", "values", "told"), DUCK_REFUSED)
async def test_a_value_that_does_not_fit_is_refused_through_a_driver_and_never_shown(
    duck: Duck, kind: str, values: pa.Array, told: str
) -> None:
    duck.run(f"CREATE TABLE orders (v {kind})")
    with pytest.raises(DeliveryFailed, match=told) as failed:
        await duck.deliver(delivery_of(pa.table({"v": values}), parts=1))
    assert SECRET not in failed.value.message
    # DuckDB's driver has one status for nearly all; texts of its own are not read.
    assert failed.value.retryable is (kind == "UUID")
    assert duck.rows("SELECT * FROM orders") == []
    assert duck.rows("SELECT * FROM exportd_deliveries") == []


DUCK_PROBED = [
    ("CREATE TABLE o (id BIGINT, name VARCHAR)", "there is no table orders"),
    ("CREATE TABLE orders (id BIGINT)", "has no column 'name'"),
    ('CREATE TABLE orders (id BIGINT, "NAME" VARCHAR)', "has no column 'name'"),
    ("CREATE TABLE orders (id BIGINT, name VARCHAR, x INT)", "'x', which the export lacks"),
    ("CREATE VIEW orders AS SELECT 1::BIGINT AS id, 'x' AS name", "orders is no table"),
    ('CREATE TABLE "ORDERS" (id BIGINT, name VARCHAR)', "there is no table orders"),
]


@pytest.mark.minutes
@pytest.mark.parametrize(("made", "told"), DUCK_PROBED)
async def test_a_table_that_does_not_fit_is_told_through_a_driver_before_the_job_runs(
    duck: Duck, made: str, told: str
) -> None:
    duck.run(made)
    with pytest.raises(BadSinkRequest, match=told) as bad:
        await duck.deliver(delivery_of(ROWS))
    assert bad.value.field == "table"
    sink = await duck.sink()
    with pytest.raises(DeliveryFailed, match=told) as failed:
        await sink.deliver(DatabaseRequest(table="orders"), delivery_of(ROWS))
    assert not failed.value.retryable


async def test_columns_are_found_by_their_names_whatever_their_order(duck: Duck) -> None:
    duck.run("CREATE TABLE orders (name VARCHAR, id BIGINT)")
    await duck.deliver(delivery_of(ROWS))
    assert duck.columns() == [["one", "", None], [1, 2, 3]]


async def test_schemas_are_held_against_the_list_through_a_driver_too(duck: Duck) -> None:
    duck.run("CREATE SCHEMA other", "CREATE TABLE other.orders (id BIGINT, name VARCHAR)")
    duck.make_orders()
    delivery = delivery_of(ROWS)
    connection = duck.connected(schemas=["other"])
    sink_type = DatabaseSink()
    for table, told in (("orders", "name one of other"), ("main.orders", "'main' may not")):
        wanted = DatabaseRequest(table=table)
        with pytest.raises(BadSinkRequest, match=told):
            sink_type.check(wanted, connection, delivery.export)
    wanted = DatabaseRequest(table="other.orders", mode="REPLACE")
    sink_type.check(wanted, connection, delivery.export)
    sink = await sink_type.open(connection)
    await sink.probe(wanted, delivery.export)
    assert await sink.deliver(wanted, delivery) == "3 rows in other.orders"
    assert duck.rows("SELECT id FROM other.orders ORDER BY id") == [(1,), (2,), (3,)]
    assert duck.orders() == [(0, "old")]


def test_merge_through_a_driver_is_refused_with_the_mend(duck: Duck) -> None:
    wanted = DatabaseRequest(table="orders", mode="MERGE", key_columns=("id",))
    with pytest.raises(BadSinkRequest, match="takes APPEND and REPLACE") as bad:
        DatabaseSink().check(wanted, duck.connection, export_of(AS_A_TABLE))
    assert bad.value.field == "mode"


async def arrives(database: Database, delivery: Delivery, **request: Any) -> str:
    """As the service does: tried again while that may help."""
    sink = await database.sink()
    for _ in range(20):
        try:
            return await sink.deliver(DatabaseRequest(table="orders", **request), delivery)
        except DeliveryFailed as error:
            if not error.retryable:
                raise
    raise AssertionError("it never arrived")


async def test_two_attempts_at_once_through_a_driver_load_the_rows_once(
    duck: Duck,
) -> None:
    duck.make_orders()
    rows = pa.table({"id": range(30_000), "name": ["x"] * 30_000})
    delivery = delivery_of(rows, parts=1)
    answers = await asyncio.gather(
        *(arrives(duck, replace(delivery, attempt=n)) for n in range(1, 5))
    )
    assert set(answers) == {"30000 rows in orders"}
    assert duck.rows("SELECT count(*), count(DISTINCT id) FROM orders") == [
        (30_001, 30_000)
    ]


async def test_deliveries_at_once_share_the_file_and_all_arrive(duck: Duck) -> None:
    duck.make_orders()
    tables = [pa.table({"id": [n] * 500, "name": [str(n)] * 500}) for n in range(6)]
    await asyncio.gather(*(arrives(duck, delivery_of(each)) for each in tables))
    assert duck.rows("SELECT count(*), count(DISTINCT id) FROM orders") == [(3_001, 6)]
    await asyncio.gather(
        *(arrives(duck, delivery_of(each), mode="REPLACE") for each in tables[1:])
    )
    assert duck.rows("SELECT count(*), count(DISTINCT id) FROM orders") == [(500, 1)]


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is given to the driver alone."""
    monkeypatch.setattr(generic, "_INGEST_BYTES", 1)
    monkeypatch.setattr(values, "_PIECE_BYTES", 1 << 10)


class Gate:
    """Stops the third piece of rows on its way into the target."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.fails = False
        self._seen = 0
        self._ingest = SinkSession.ingest
        gate = self

        def ingest(session: SinkSession, table: str, rows: Any, **said: Any) -> None:
            gate.before(table)
            gate._ingest(session, table, rows, **said)

        monkeypatch.setattr(SinkSession, "ingest", ingest)

    def before(self, table: str) -> None:
        self._seen += table == "orders"
        if table == "orders" and self._seen == 3:
            self.reached.set()
            assert self.go_on.wait(ENOUGH)
            if self.fails:
                raise DeliveryFailed("the link broke", retryable=True)


MANY = pa.table({"id": range(1_000), "name": ["x" * 20] * 1_000})


async def test_a_failure_in_the_middle_of_loading_leaves_the_table_as_it_was(
    duck: Duck, monkeypatch: pytest.MonkeyPatch
) -> None:
    duck.make_orders()
    in_pieces(monkeypatch)
    delivery = delivery_of(MANY)
    sink = await duck.sink()
    wanted = DatabaseRequest(table="orders", mode="REPLACE")
    with monkeypatch.context() as within:
        gate = Gate(within)
        gate.fails = True
        gate.go_on.set()
        with pytest.raises(DeliveryFailed, match="the link broke"):
            await sink.deliver(wanted, delivery)
        assert gate.reached.is_set()
    assert duck.orders() == [(0, "old")]
    assert duck.rows("SELECT * FROM exportd_deliveries") == []
    await sink.deliver(wanted, delivery)
    assert duck.rows("SELECT count(*) FROM orders") == [(1_000,)]


async def test_a_constraint_that_the_last_row_breaks_leaves_the_table_as_it_was(
    duck: Duck, monkeypatch: pytest.MonkeyPatch
) -> None:
    duck.make_orders("id BIGINT CHECK (id < 999), name VARCHAR")
    in_pieces(monkeypatch)
    for mode in ("APPEND", "REPLACE"):
        with pytest.raises(DeliveryFailed, match="constraint") as failed:
            await duck.deliver(delivery_of(MANY), mode=mode)
        assert not failed.value.retryable
        assert duck.orders() == [(0, "old")]
        assert duck.rows("SELECT * FROM exportd_deliveries") == []


async def test_a_delivery_cancelled_while_a_driver_loads_leaves_the_table_as_it_was(
    duck: Duck, monkeypatch: pytest.MonkeyPatch
) -> None:
    duck.make_orders()
    in_pieces(monkeypatch)
    gate = Gate(monkeypatch)
    sink = await duck.sink()
    delivery = delivery_of(MANY)
    wanted = DatabaseRequest(table="orders", mode="REPLACE")
    task = asyncio.create_task(sink.deliver(wanted, delivery))
    await asyncio.to_thread(gate.reached.wait, ENOUGH)
    task.cancel()
    await asyncio.sleep(0)
    gate.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert duck.orders() == [(0, "old")]
    await sink.deliver(wanted, delivery)
    assert duck.rows("SELECT count(*) FROM orders") == [(1_000,)]


KILLED = """
import asyncio, json, sys
from exportd_server.sinks.database import *
from exportd_server.sinks.database.adbc import Session
from tests.support.sinks import a_part, an_export, deliver_whole

def commit(session):
    print("ready", flush=True)
    sys.stdin.read()

async def main(settings):
    sink = await DatabaseSink().open(DatabaseConnection(**json.loads(settings)))
    data = b'id,name\\n1,one\\n2,""\\n3,\\n'
    delivery = deliver_whole(an_export(), a_part(data, rows=3, prefix_bytes=8))
    Session.commit = commit
    await sink.deliver(DatabaseRequest(table="orders", mode="REPLACE"), delivery)

asyncio.run(main(sys.argv[1]))
"""


@contextmanager
def committing(duck: Duck) -> Iterator[None]:
    """A process with everything done but the commit; killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(duck.settings())],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


async def test_a_process_killed_before_its_driver_commits_leaves_nothing(
    duck: Duck,
) -> None:
    duck.make_orders()
    sink = await duck.sink()
    # Meanwhile the file is another's, which passes.
    with committing(duck), pytest.raises(DeliveryFailed) as failed:
        await sink.deliver(DatabaseRequest(table="orders"), delivery_of(ROWS))
    assert failed.value.retryable
    assert str(duck.path) not in failed.value.message
    assert duck.orders() == [(0, "old")]
    assert duck.rows("SELECT * FROM exportd_deliveries") == []
    await duck.deliver(delivery_of(ROWS))
    assert len(duck.orders()) == 4


async def test_a_commit_that_arrived_although_it_was_told_to_have_failed_is_known(
    duck: Duck, monkeypatch: pytest.MonkeyPatch
) -> None:
    duck.make_orders()
    committed = SinkSession.commit

    def commit(session: SinkSession) -> None:
        committed(session)
        raise DeliveryFailed("the link broke", retryable=True)

    monkeypatch.setattr(SinkSession, "commit", commit)
    assert await duck.deliver(delivery_of(ROWS)) == "3 rows in orders"
    assert len(duck.orders()) == 4


async def test_a_table_of_deliveries_without_a_key_is_refused(duck: Duck) -> None:
    duck.make_orders()
    duck.run(
        "CREATE TABLE exportd_deliveries (delivery_id VARCHAR, job_id VARCHAR, "
        "target VARCHAR, rows BIGINT, delivered_at TIMESTAMP)"
    )
    sink = await duck.sink()
    wanted = DatabaseRequest(table="orders")
    for call in (
        sink.probe(wanted, export_of(AS_A_TABLE)),
        sink.deliver(wanted, delivery_of(ROWS)),
    ):
        with pytest.raises(DeliveryFailed, match="needs a primary key") as failed:
            await call
        assert not failed.value.retryable
    assert duck.orders() == [(0, "old")]
    assert duck.rows("SELECT * FROM exportd_deliveries") == []


async def test_a_table_of_deliveries_of_another_make_is_refused(duck: Duck) -> None:
    duck.make_orders()
    duck.run(
        "CREATE TABLE exportd_deliveries "
        "(delivery_id VARCHAR PRIMARY KEY, target VARCHAR, rows BIGINT)"
    )
    with pytest.raises(DeliveryFailed, match="must have the columns") as failed:
        await duck.deliver(delivery_of(ROWS))
    assert not failed.value.retryable


def not_supported(*_: Any, **__: Any) -> None:
    error = adbc_driver_manager.NotSupportedError("not here")
    error.status_code = adbc_driver_manager.AdbcStatusCode.NOT_IMPLEMENTED
    raise error


@pytest.mark.parametrize(
    ("made", "lacks", "told"),
    [
        ("AdbcConnection", "set_autocommit", "no transactions"),
        ("AdbcStatement", "bind_stream", "no bulk ingest"),
        ("AdbcStatement", "set_options", "no bulk ingest"),
        ("AdbcConnection", "get_table_schema", "cannot do what this sink needs"),
    ],
)
async def test_what_a_driver_cannot_do_is_told_when_it_is_probed(
    duck: Duck, monkeypatch: pytest.MonkeyPatch, made: str, lacks: str, told: str
) -> None:
    duck.make_orders()
    sink = await duck.sink()
    poorer = type(made, (getattr(adbc_driver_manager, made),), {lacks: not_supported})
    monkeypatch.setattr(adbc, made, poorer)
    wanted = DatabaseRequest(table="orders")
    for call in (
        lambda: sink.probe(wanted, export_of(AS_A_TABLE)),
        lambda: sink.deliver(wanted, delivery_of(ROWS)),
    ):
        with pytest.raises(DeliveryFailed, match=told) as failed:
            await call()
        assert not failed.value.retryable
    monkeypatch.undo()
    assert duck.orders() == [(0, "old")]


async def test_a_driver_that_lists_no_tables_is_asked_for_their_columns(
    postgres_sink: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    poorer = type(
        "Poorer", (adbc_driver_manager.AdbcConnection,), {"get_objects": not_supported}
    )
    monkeypatch.setattr(adbc, "AdbcConnection", poorer)
    sink = await by_driver("adbc_driver_postgresql", postgres_sink.url)
    for count in (3, 6):
        wanted = DatabaseRequest(table="orders", create_table=True)
        await sink.deliver(wanted, delivery_of(ROWS))
        assert postgres_sink.rows("SELECT count(*) FROM orders") == [(count,)]


async def by_driver(driver: str, uri: str) -> Sink[DatabaseRequest]:
    connection = {"driver": driver, "options": {"uri": uri}}
    return await DatabaseSink().open(DatabaseConnection.model_validate(connection))


async def test_another_driver_serves_too(postgres_sink: Postgres) -> None:
    postgres_sink.make_orders("id bigint NOT NULL, name text NOT NULL")
    sink = await by_driver("adbc_driver_postgresql", postgres_sink.url)
    delivery = delivery_of(MORE)
    for mode, expected in (
        ("APPEND", [(0, "old"), (3, "three"), (4, "four")]),
        ("REPLACE", [(3, "three"), (4, "four")]),
    ):
        each = replace(delivery, delivery_id=f"{mode}-1")
        wanted = DatabaseRequest(table="orders", mode=mode)
        await sink.probe(wanted, each.export)
        for _ in range(2):
            assert await sink.deliver(wanted, each) == "2 rows in orders"
            assert postgres_sink.orders() == expected
    postgres_sink.run("CREATE TABLE keyed (id bigint PRIMARY KEY, name text)")
    postgres_sink.run("INSERT INTO keyed VALUES (4, 'there')")
    with pytest.raises(DeliveryFailed, match="constraint") as failed:
        await sink.deliver(DatabaseRequest(table="keyed"), delivery_of(MORE))
    assert not failed.value.retryable
    assert postgres_sink.rows("SELECT * FROM keyed") == [(4, "there")]


async def test_a_driver_that_guesses_types_is_refused(sqlite_sink: Sqlite) -> None:
    sink = await by_driver("adbc_driver_sqlite", str(sqlite_sink.path))
    with pytest.raises(DeliveryFailed, match="columns of other types") as failed:
        await sink.deliver(
            DatabaseRequest(table="orders", create_table=True), delivery_of(ROWS)
        )
    assert not failed.value.retryable


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"driver": "/no/such/hunter.so"}, "driver: '/no/such/hunter.so' cannot be loaded"),
        ({"driver": "nosuchdriver"}, "driver: 'nosuchdriver' cannot be loaded"),
        ({"driver": "adbc_driver_manager"}, "driver: package 'adbc_driver_manager' brings"),
        ({"driver": adbc_driver_duckdb.driver_path()}, "as options.entrypoint"),
    ],
)
async def test_a_driver_that_cannot_be_loaded_is_told_by_its_key(
    settings: dict[str, Any], told: str
) -> None:
    connection = DatabaseConnection.model_validate(
        {**settings, "options": {"password": "hunter2"}}
    )
    with pytest.raises(ConfigurationError) as failed:
        await DatabaseSink().open(connection)
    assert told in str(failed.value)
    assert "hunter2" not in str(failed.value)


async def test_a_library_is_named_by_its_path_and_its_entry_point(duck: Duck) -> None:
    duck.make_orders()
    options = {"path": str(duck.path), "entrypoint": "duckdb_adbc_init"}
    sink = await duck.sink(driver=adbc_driver_duckdb.driver_path(), options=options)
    await sink.deliver(DatabaseRequest(table="orders"), delivery_of(ROWS))
    assert len(duck.orders()) == 4


async def test_options_that_a_database_refuses_are_told_without_them(duck: Duck) -> None:
    options = {"path": str(duck.path), "no_such_option": "hunter2"}
    sink = await duck.sink(options=options)
    with pytest.raises(DeliveryFailed) as failed:
        await sink.probe(DatabaseRequest(table="orders"), export_of(AS_A_TABLE))
    assert "hunter2" not in failed.value.message


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"driver": ""},
        {"driver": "d", "url": "sqlite:////hunter2"},
        {"url": "sqlite:////x", "options": {"password": "hunter2"}},
        {"driver": "d", "options": {"driver": "hunter2"}},
        {"driver": "d", "options": {"number": 1}},
    ],
)
def test_a_bad_connection_with_a_driver_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as bad:
        DatabaseConnection.model_validate(settings)
    assert "hunter2" not in "".join(error["msg"] for error in bad.value.errors())


def test_options_come_from_the_environment_and_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAREHOUSE_KEY", "hunter2")
    file = tmp_path / "connections.toml"
    file.write_text(
        "[connections.warehouse]\ntype = 'database'\ndriver = 'd'\n"
        "[connections.warehouse.options]\nkey = '${WAREHOUSE_KEY}'\n"
    )
    found = load_connections(file, SinkTypes({"database": DatabaseSink()}))
    connection = found.get("warehouse")
    assert connection is not None
    settings = connection.settings
    assert isinstance(settings, DatabaseConnection)
    assert settings.options["key"].get_secret_value() == "hunter2"
    assert "hunter2" not in f"{settings!r}{settings.model_dump()}"
    assert "hunter2" not in settings.model_dump_json()


BESIDE = """
import asyncio, json, sys, threading
import duckdb
from exportd_server.sinks.database import *
from tests.support.sinks import a_part, an_export, deliver_whole

def query(stop, seen):
    while not stop.is_set() or not seen:
        link = duckdb.connect()
        assert link.sql("SELECT sum(i) FROM range(100000) t(i)").fetchone()
        try:
            link.execute("SELECT nothing")
        except duckdb.Error:
            seen.append(1)
        link.close()

async def main(settings):
    stop, seen = threading.Event(), []
    thread = threading.Thread(target=query, args=(stop, seen))
    thread.start()
    data = b'id,name\\n1,one\\n2,""\\n3,\\n'
    request = DatabaseRequest(table="orders", create_table=True)
    for each in json.loads(settings):
        sink = await DatabaseSink().open(DatabaseConnection(**each))
        for _ in range(5):
            delivery = deliver_whole(an_export(), a_part(data, rows=3, prefix_bytes=8))
            await sink.probe(request, delivery.export)
            print(await sink.deliver(request, delivery))
    stop.set()
    thread.join()
    with open("/proc/self/maps") as maps:
        print(len({line.split()[-1] for line in maps if "duckdb" in line}))

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.minutes
@pytest.mark.parametrize("copies", [1, 2])
def test_duckdb_serves_sources_and_a_sink_in_one_process(
    duck: Duck, tmp_path: Path, copies: int
) -> None:
    connections = [duck.settings()]
    if copies == 2:  # a library of the operator's beside the one of the package
        other = tmp_path / "libduckdb.so"
        shutil.copy(adbc_driver_duckdb.driver_path(), other)
        options = {"path": str(tmp_path / "o.db"), "entrypoint": "duckdb_adbc_init"}
        connections.append({"driver": str(other), "options": options})
    ended = subprocess.run(
        [sys.executable, "-c", BESIDE, json.dumps(connections)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    *receipts, libraries = ended.stdout.splitlines()
    assert receipts == ["3 rows in orders"] * 5 * copies
    assert libraries == str(copies)


# Bounds.


def large(output: OutputFormat, parts: int) -> Delivery:
    """About 200 MiB of rows in parts that share their bytes."""
    rows = 200 * 2**20 // parts // 1024
    texts = [f"{n:08d}" * 127 for n in range(rows)]
    table = pa.table({"id": range(rows), "name": texts})
    part = part_of(table.to_batches(max_chunksize=4096), table.schema, output)
    return deliver_whole(
        export_of(table.schema, output),
        *(replace(part, sequence=n, file_name=f"part-{n}") for n in range(parts)),
    )


@dataclass(frozen=True)
class Cost:
    """What a large delivery took: memory in MiB, times in seconds."""

    memory: float
    longest_pause: float
    """Between two turns that the event loop gave to others."""
    whole: float
    rows: int


def cost_of_a_delivery(settings: dict[str, Any], output: OutputFormat) -> Cost:
    """Of a large one, after a small one."""

    async def deliver() -> Cost:
        sink = await DatabaseSink().open(DatabaseConnection.model_validate(settings))
        request = DatabaseRequest(table="orders", create_table=True)
        await sink.deliver(request, delivery_of(ROWS, output))  # loads libraries
        delivery = large(output, 50)
        turns = [clock.monotonic()]

        async def turn() -> None:
            while True:
                await asyncio.sleep(0.001)
                turns.append(clock.monotonic())

        turning = asyncio.create_task(turn())
        with growing() as growth:
            await sink.deliver(request, delivery)
        turning.cancel()
        turns.append(clock.monotonic())
        return Cost(
            growth.mib,
            max(after - before for before, after in pairwise(turns)),
            turns[-1] - turns[0],
            ROWS.num_rows + sum(part.rows for part in delivery.parts),
        )

    return asyncio.run(deliver())


# Each database and each way to read a part.
@pytest.mark.parametrize(
    ("database", "output"),
    [
        ("postgres_sink", COMPRESSED_CSV),
        ("postgres_sink", PARQUET),
        ("sqlite_sink", COMPRESSED_CSV),
        ("duck", PARQUET),
    ],
    indirect=["database"],
    ids=["PostgreSQL-CSV", "PostgreSQL-Parquet", "SQLite-CSV", "DuckDB-Parquet"],
)
@pytest.mark.minutes
def test_memory_is_bounded_and_the_event_loop_is_free(
    database: Database, output: OutputFormat
) -> None:
    cost = apart(cost_of_a_delivery, database.settings(), output)
    assert database.rows("SELECT count(*) FROM orders") == [(cost.rows,)]
    # It was 30 MiB for CSV, 50 for Parquet and 130 with DuckDB, of which 64 are what its
    # connection allows it.
    own = 80 if database.kind == "duckdb" else 0
    assert cost.memory < 80 + own
    assert cost.longest_pause < cost.whole / 2
