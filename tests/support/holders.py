"""One table of awkward values, held by every kind of source.

`Holder` is a source with the rows it should give. What a kind cannot hold at all (bytes
in CSV and JSON) is left out of its columns; everything else must come back the same.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlglot import exp

from exportd_server.sources.adbc import AdbcSource
from exportd_server.sources.base import Source
from exportd_server.sources.duckdb import FileSource
from exportd_server.sources.postgres import Postgres
from exportd_server.sources.sqlite import Sqlite
from tests.support.postgres import PostgresServer

TEXTS = (
    "",
    "a",
    "A",
    "ab",
    "Ab",
    "aB%",
    "%",
    "_",
    "a_b",
    "it's",
    "'",
    "''",
    'say "hi"',
    "back\\slash",
    "\\'",
    "'; DROP TABLE rows; --",
    "' OR '1'='1",
    "/* x */ -- y",
    "$$ $1 ? :x {y} %s @z",
    "NULL",
    "null",
    "a,b;c\td",
    "line\nbreak",
    "cr\rlf\r\n",
    "naïve",
    "nai\u0308ve",
    "\u00a0nbsp\u2028",
    "日本語",
    "😀",
    "e'\\n'",
    " padded ",
    "1",
    "true",
    "2020-01-01",
)
_FLOATS = (0.0, -0.0, 0.1, 0.1 + 0.2, 1e308, 5e-324, -1.5, 123456789.123456789, 2.0**53)
_INTS = (0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1, 42)
_SMALL = (0, 1, -1, 2**31 - 1, -(2**31), 7)
_START = datetime(2020, 1, 1, tzinfo=UTC)

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("big", pa.int64()),
        ("small", pa.int32()),
        ("score", pa.float64()),
        ("name", pa.string()),
        ("flag", pa.bool_()),
        ("born", pa.date32()),
        ("seen", pa.timestamp("us", "UTC")),
        ("amount", pa.decimal128(20, 4)),
        ("data", pa.binary()),
    ]
)


def make_rows(count: int = 240) -> list[dict[str, Any]]:
    """The rows; the first ones are missing nearly everything."""
    rng = random.Random(7)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {
            "id": number,
            "big": _INTS[number % len(_INTS)],
            "small": _SMALL[number % len(_SMALL)],
            "score": _FLOATS[number % len(_FLOATS)],
            "name": TEXTS[number % len(TEXTS)],
            "flag": number % 3 == 0,
            "born": date(1999, 12, 31) + timedelta(days=number * 7),
            "seen": _START + timedelta(hours=number, microseconds=number * 1001),
            "amount": Decimal(rng.randrange(-(10**12), 10**12)).scaleb(-4),
            "data": bytes(rng.randrange(256) for _ in range(number % 5)),
        }
        for name in SCHEMA.names[1:]:
            if number < 5 or rng.random() < 0.15:
                row[name] = None
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Holder:
    """A source, its columns, and the rows it should give, in order."""

    kind: str
    source: Source
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    touch: Callable[[], None]
    """Changes the data after the fact."""


def _columns(*without: str) -> tuple[str, ...]:
    return tuple(name for name in SCHEMA.names if name not in without)


def _thirds(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    third = len(rows) // 3
    return [rows[:third], rows[third : 2 * third], rows[2 * third :]]


def _settle(path: Path) -> None:
    """Make a file look as if it had been written a while ago."""
    moment = datetime(2021, 1, 1, tzinfo=UTC).timestamp()
    os.utime(path, (moment, moment))


def hold_parquet(directory: Path) -> Holder:
    rows = make_rows()
    for number, part in enumerate(_thirds(rows)):
        path = directory / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), path, row_group_size=17)
        _settle(path)

    def touch() -> None:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), directory / "1.parquet")

    source = FileSource("parquet", str(directory / "*.parquet"))
    return Holder("parquet", source, _columns(), rows, touch)


def to_csv(rows: list[dict[str, Any]], names: tuple[str, ...], *, header: bool) -> str:
    """CSV with text quoted, so that a missing text and an empty one differ."""
    stream = io.StringIO()
    if header:
        csv.writer(stream, lineterminator="\n").writerow(names)
    for row in rows:
        cells = []
        for name in names:
            value = row[name]
            match value:
                case None:
                    cells.append("")
                case str():
                    cells.append('"' + value.replace('"', '""') + '"')
                case bool():
                    cells.append(str(value).lower())
                case bytes():
                    cells.append("\\x" + value.hex())
                case float():
                    cells.append(repr(value))
                case _:
                    cells.append(str(value))
        stream.write(",".join(cells) + "\n")
    return stream.getvalue()


_TEXT_TYPES = {
    "small": pa.int32(),
    "amount": pa.decimal128(20, 4),
    "seen": pa.timestamp("us", "UTC"),
    "born": pa.date32(),
    "score": pa.float64(),
    "name": pa.string(),
    "flag": pa.bool_(),
    "big": pa.int64(),
}


def hold_csv(directory: Path) -> Holder:
    rows = make_rows()
    names = _columns("data")
    for number, part in enumerate(_thirds(rows)):
        path = directory / f"{number}.csv"
        path.write_text(to_csv(part, names, header=True), encoding="utf-8", newline="")
        _settle(path)

    def touch() -> None:
        with (directory / "1.csv").open("a") as file:
            file.write("\n")

    source = FileSource("csv", str(directory / "*.csv"), _TEXT_TYPES)
    return Holder("csv", source, names, rows, touch)


def hold_json(directory: Path) -> Holder:
    rows = make_rows()
    names = _columns("data")
    for number, part in enumerate(_thirds(rows)):
        path = directory / f"{number}.jsonl"
        lines = [
            json.dumps({name: _json(row[name]) for name in names}, ensure_ascii=False)
            for row in part
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _settle(path)

    def touch() -> None:
        with (directory / "1.jsonl").open("a") as file:
            file.write("\n")

    source = FileSource("json", str(directory / "*.jsonl"), _TEXT_TYPES)
    return Holder("json", source, names, rows, touch)


def _json(value: Any) -> Any:
    if isinstance(value, Decimal | datetime | date):
        return str(value)
    return value


def table(name: str) -> exp.Table:
    """A table by its name."""
    return exp.Table(this=exp.to_identifier(name, quoted=True))


def operator_query(text: str) -> exp.Subquery:
    """A query of the operator's own."""
    alias = exp.TableAlias(this=exp.to_identifier("t", quoted=True))
    return exp.Subquery(this=exp.Var(this=text), alias=alias)


def hold_sqlite(directory: Path) -> Holder:
    rows = make_rows()
    path = directory / "rows.db"
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE rows (id INTEGER PRIMARY KEY, big BIGINT, small INT, score REAL,"
            " name TEXT COLLATE NOCASE, flag BOOLEAN, born DATE, seen TIMESTAMP,"
            " amount DECIMAL(20, 4), data BLOB)"
        )
        database.executemany(
            f"INSERT INTO rows VALUES ({', '.join('?' * len(SCHEMA))})",
            [[_sqlite(row[name]) for name in SCHEMA.names] for row in rows],
        )
    database.close()
    _settle(path)

    def touch() -> None:
        other = sqlite3.connect(path)
        other.execute("UPDATE rows SET name = 'changed' WHERE id = 9")
        other.commit()
        other.close()

    types = {
        "small": pa.int32(),
        "born": pa.date32(),
        "seen": pa.timestamp("us", "UTC"),
    }
    source = AdbcSource(Sqlite(path), table("rows"), types)
    return Holder("sqlite", source, _columns(), rows, touch)


def _sqlite(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat(" ")
    if isinstance(value, Decimal | date):
        return str(value)
    return value


def hold_postgres(server: PostgresServer) -> Holder:
    rows = make_rows()
    database = server.create_database()
    body = to_csv(rows, tuple(SCHEMA.names), header=False)
    server.sql(
        "CREATE TABLE rows (id bigint PRIMARY KEY, big bigint, small int,"
        " score double precision, name text, flag boolean, born date, seen timestamptz,"
        " amount numeric(20, 4), data bytea);\n"
        f"COPY rows FROM STDIN (FORMAT csv);\n{body}\\.\n",
        database=database,
    )

    def touch() -> None:
        server.sql("UPDATE rows SET name = 'x' WHERE id = 9", database=database)

    source = AdbcSource(Postgres(server.url(database)), table("rows"))
    return Holder("postgres", source, _columns(), rows, touch)
