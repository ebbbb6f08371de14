"""What a SQLite source promises beyond the common contract: soundness over columns that
may hold anything."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from datetime import UTC, date, datetime
from datetime import time as clock
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.encoders.registry import open_encoder
from exportd_server.errors import SourceFailed, ValueNotEncodable
from exportd_server.sources.adbc import AdbcSource, Session
from exportd_server.sources.base import Filter, FilterOperator, Query, SourceChanged
from exportd_server.sources.sqlite import Sqlite
from tests.support.holders import operator_query, table
from tests.support.waits import ENOUGH

MISSING_FIRST = 20_000
"""More rows than the driver looks at before it settles a column's type."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    # A name that a URI would take for something else.
    return tmp_path / "a b?c#d%20.db"


@pytest.fixture
def database(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path)) as connection:
        yield connection


def fill(
    database: sqlite3.Connection, declaration: str, *values: Any, missing: int = 0
) -> None:
    database.execute(f"CREATE TABLE t (v {declaration})")
    rows = [(None,)] * missing + [(value,) for value in values]
    database.executemany("INSERT INTO t VALUES (?)", rows)
    database.commit()


def read(path: Path, **types: pa.DataType) -> pa.ChunkedArray:
    source = AdbcSource(Sqlite(path), table("t"), types)
    query = Query(("v",))
    with source.open(query, source.plan(query).shards[0]) as stream:
        return pa.Table.from_batches(list(stream), stream.schema)["v"]


def encoded(path: Path, output: Format) -> bytes:
    source = AdbcSource(Sqlite(path), table("t"), {})
    query = Query(("v",))
    written = BytesIO()
    with source.open(query, source.plan(query).shards[0]) as stream:
        encoder = open_encoder(OutputFormat(output), stream.schema, written)
        for batch in stream:
            encoder.write(batch)
        encoder.close()
    return written.getvalue()


@pytest.mark.parametrize(
    ("declaration", "values", "kind"),
    [
        ("INTEGER", [5, -(2**63)], pa.int64()),
        ("UNSIGNED BIG INT", [2**63 - 1], pa.int64()),
        ("TEXT", ["x", "", "a\0b"], pa.string()),
        ("VARCHAR(3)", ["1"], pa.string()),
        ("REAL", [1.5, 2.0, 1e300], pa.float64()),
        ("BLOB", [b"\0\xff", b""], pa.binary()),
        ("BOOLEAN", [True, False], pa.bool_()),
        ("DECIMAL(10, 2)", [Decimal("12.30"), Decimal(5)], pa.decimal128(10, 2)),
        ("", ["only text here"], pa.string()),
        ("NUMERIC", [7.25], pa.string()),
        ("DATETIME", ["2020-01-31 10:00:00"], pa.string()),
    ],
)
def test_a_column_that_begins_with_missing_values_keeps_its_type(
    path: Path,
    database: sqlite3.Connection,
    declaration: str,
    values: list[Any],
    kind: pa.DataType,
) -> None:
    stored = [str(v) if isinstance(v, Decimal) else v for v in values]
    fill(database, declaration, *stored, missing=MISSING_FIRST)
    found = read(path)
    assert found.type == kind
    assert found.null_count == MISSING_FIRST
    assert found.to_pylist()[MISSING_FIRST:] == (
        ["7.25"] if declaration == "NUMERIC" else values
    )


@pytest.mark.parametrize(
    ("declaration", "good", "bad"),
    [
        ("INTEGER", 1, "abc"),
        ("INTEGER", 1, 1.5),
        ("INTEGER", 1, b"x"),
        ("REAL", 1.5, "abc"),
        ("TEXT", "a", b"\xff"),
        ("BLOB", b"a", "text"),
        ("BOOLEAN", True, 2),
        ("BOOLEAN", True, "yes"),
        ("DECIMAL(4, 2)", "1.25", "1.255"),
        ("DECIMAL(4, 2)", "1.25", "1000"),
        ("DECIMAL(4, 2)", "1.25", "x"),
    ],
)
def test_a_value_that_breaks_its_declared_type_fails_and_names_its_column(
    path: Path, database: sqlite3.Connection, declaration: str, good: Any, bad: Any
) -> None:
    fill(database, declaration, *[good] * MISSING_FIRST, bad)
    with pytest.raises(ValueNotEncodable) as failed:
        read(path)
    assert failed.value.metadata == {"column": "v"}


@pytest.mark.parametrize("output", list(Format))
def test_text_that_is_no_unicode_is_refused(
    path: Path, database: sqlite3.Connection, output: Format
) -> None:
    fill(database, "TEXT")
    database.execute("INSERT INTO t VALUES (CAST(x'61ff' AS TEXT))")
    database.commit()
    with pytest.raises(ValueNotEncodable) as failed:
        encoded(path, output)
    assert failed.value.metadata == {"column": "v"}


def test_a_float_that_becomes_text_reads_back_the_same(
    path: Path, database: sqlite3.Connection
) -> None:
    values = [0.1, 0.1 + 0.2, 1 / 3, 1e300, 5e-324, 12345.0, 7, "seven"]
    fill(database, "", *values)
    found = read(path).to_pylist()
    assert [float(text) for text in found[:7]] == values[:7]
    assert found[0] == "0.1"
    assert found[7] == "seven"


def test_a_decimal_kept_as_a_float_has_the_digits_that_were_written(
    path: Path, database: sqlite3.Connection
) -> None:
    written = ["12.3", "0.000012345678901235", "973.634881024144", "1000000000000000.5"]
    fill(database, "DECIMAL(38, 18)", *written)
    kinds = {row[0] for row in database.execute("SELECT typeof(v) FROM t")}
    assert kinds == {"real"}
    assert read(path).to_pylist()[:3] == [Decimal(text) for text in written[:3]]


def test_declared_moments_are_read_from_iso_text(
    path: Path, database: sqlite3.Connection
) -> None:
    fill(
        database,
        "TIMESTAMP",
        "2020-01-31 10:00:00",
        "2020-01-31T10:00:00.5Z",
        "2020-01-31 10:00:00.123456+00:00",
        None,
    )
    expected = [
        datetime(2020, 1, 31, 10, tzinfo=UTC),
        datetime(2020, 1, 31, 10, 0, 0, 500_000, tzinfo=UTC),
        datetime(2020, 1, 31, 10, 0, 0, 123_456, tzinfo=UTC),
        None,
    ]
    kind = pa.timestamp("us", "UTC")
    assert read(path, v=kind).to_pylist() == expected
    source = AdbcSource(Sqlite(path), table("t"), {"v": kind})
    for moment in expected[:3]:
        assert moment is not None
        for each, count in (
            (FilterOperator.EQUAL, 1),
            (FilterOperator.LESS, sum(e < moment for e in expected[:3] if e)),
            (FilterOperator.GREATER_OR_EQUAL, sum(e >= moment for e in expected[:3] if e)),
        ):
            query = Query(("v",), (Filter("v", each, (moment,)),))
            with source.open(query, source.plan(query).shards[0]) as stream:
                assert sum(batch.num_rows for batch in stream) == count


@pytest.mark.parametrize(
    ("kind", "good", "value"),
    [
        (pa.date32(), "2020-02-29", date(2020, 2, 29)),
        (pa.time64("us"), "23:59:59.25", clock(23, 59, 59, 250_000)),
        (pa.timestamp("us"), "2020-02-29 01:02:03", None),
    ],
)
def test_what_is_no_iso_text_is_refused(
    path: Path, database: sqlite3.Connection, kind: pa.DataType, good: str, value: Any
) -> None:
    fill(database, "X", good)
    assert value is None or read(path, v=kind).to_pylist() == [value]
    for bad in (
        "2021-02-29",
        "2021-02-29 00:00:00",
        "24:00:00",
        "10:00",
        "",
        "x",
        5,
        1.5,
        "2020-01-01 00:00:00.1234567",
        "2020-01-01 00:00:00+02:00",
        "2020-01-01 00:00:00.12a",
    ):
        database.execute("UPDATE t SET v = ?", (bad,))
        database.commit()
        with pytest.raises(ValueNotEncodable):
            read(path, v=kind)


def test_an_operators_query_is_a_dataset_too(
    path: Path, database: sqlite3.Connection
) -> None:
    fill(database, "INTEGER", 1, 2, 3)
    source = AdbcSource(
        Sqlite(path),
        operator_query("\nSELECT v, v * 1.5 AS w, 'k' || v AS k FROM t -- x\n"),
    )
    assert [column.type for column in source.columns()] == [
        pa.int64(),
        pa.float64(),
        pa.string(),
    ]
    query = Query(("k",), (Filter("w", FilterOperator.GREATER, (2.5,)),))
    with source.open(query, source.plan(query).shards[0]) as stream:
        assert [row["k"] for batch in stream for row in batch.to_pylist()] == ["k2", "k3"]


def test_the_file_is_never_written(path: Path, database: sqlite3.Connection) -> None:
    fill(database, "INTEGER", 1)
    before = path.read_bytes()
    read(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_missing_is_told_cleanly_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(SourceFailed) as failed:
        AdbcSource(Sqlite(tmp_path / "none.db"), table("t"))
    assert failed.value.message == "the source of the dataset failed"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_broken_in_the_middle_fails(
    path: Path, database: sqlite3.Connection
) -> None:
    fill(database, "TEXT", *("x" * 500 for _ in range(20_000)))
    database.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(os.urandom(size // 4))
    with pytest.raises((SourceFailed, ValueNotEncodable)):
        read(path)


def test_a_write_that_is_only_in_the_log_counts_as_a_change(
    path: Path, database: sqlite3.Connection
) -> None:
    database.execute("PRAGMA journal_mode = WAL")
    fill(database, "INTEGER", *range(100))
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.utime(path, (1_600_000_000, 1_600_000_000))
    source = AdbcSource(Sqlite(path), table("t"))
    query = Query(("v",))
    (shard,) = source.plan(query).shards
    with source.open(query, shard, skip_rows=98) as stream:
        assert [batch.num_rows for batch in stream] == [2]
    stat = path.stat()
    database.execute("UPDATE t SET v = -1 WHERE v = 0")
    database.commit()
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    with pytest.raises(SourceChanged):
        source.open(query, shard, skip_rows=98)


def test_cancel_lets_the_reader_go_at_once(
    path: Path, database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database, "INTEGER", 1)
    text = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 15000000)"
        " SELECT i FROM n WHERE i < 0"
    )
    source = AdbcSource(Sqlite(path), operator_query(text), {"i": pa.int64()})
    query = Query(("i",))
    failures: list[SourceFailed] = []
    asked, begun = threading.Event(), threading.Event()
    rows, last_look = Session.stream, Session._interrupting

    def ask(session: Session, *given: Any) -> Iterator[pa.RecordBatch]:
        asked.set()
        return rows(session, *given)

    def begin(session: Session, cursor: Any) -> AbstractContextManager[None]:
        """Before a statement, whether it is still wanted."""
        look = last_look(session, cursor)
        if asked.is_set():
            begun.set()
        return look

    with source.open(query, source.plan(query).shards[0]) as stream:
        monkeypatch.setattr(Session, "stream", ask)
        monkeypatch.setattr(Session, "_interrupting", begin)
        thread = threading.Thread(target=lambda: failures.append(failing(stream)))
        thread.start()
        assert begun.wait(ENOUGH)
        stream.cancel()
        thread.join()
    assert failures
    # The driver cannot be interrupted: its thread ends with its statement, later.
    assert stream._thread is not None
    assert stream._thread.is_alive()
    stream._thread.join(ENOUGH)
    assert not stream._thread.is_alive()


def failing(stream: Any) -> SourceFailed:
    with pytest.raises(SourceFailed) as failed:
        list(stream)
    return failed.value
