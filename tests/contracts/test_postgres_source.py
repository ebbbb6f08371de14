"""What a PostgreSQL source promises beyond the common contract."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from datetime import time as clock
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest

from exportd_server.errors import ConfigurationError, SourceFailed, ValueNotEncodable
from exportd_server.sources.adbc import AdbcSource, DatabaseStream, Session
from exportd_server.sources.base import Filter, FilterOperator, Query
from exportd_server.sources.catalogue import load_catalogue
from exportd_server.sources.postgres import Postgres
from tests.support.holders import operator_query, table
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.waits import ENOUGH

TYPES: list[tuple[str, str, pa.DataType, Any]] = [
    ("smallint", "-32768", pa.int16(), -32768),
    ("integer", "2147483647", pa.int32(), 2147483647),
    ("bigint", "-9223372036854775808", pa.int64(), -(2**63)),
    ("real", "1.5", pa.float32(), 1.5),
    ("double precision", "'-Infinity'", pa.float64(), float("-inf")),
    (
        "numeric(38,18)",
        "1.000000000000000001",
        pa.decimal128(38, 18),
        Decimal("1.000000000000000001"),
    ),
    ("numeric(3,0)", "999", pa.decimal128(3, 0), Decimal(999)),
    (
        "numeric",
        "99999999999999999999999999.5",
        pa.string(),
        "99999999999999999999999999.5",
    ),
    ("numeric(78,0)", "1" + "0" * 77, pa.string(), "1" + "0" * 77),
    ("numeric(3,-2)", "12345", pa.string(), "12300"),
    ("amount", "1.5", pa.decimal128(10, 3), Decimal("1.500")),
    ("boolean", "true", pa.bool_(), True),
    ("text", "'x'", pa.string(), "x"),
    ("varchar(5)", "'x'", pa.string(), "x"),
    ("char(5)", "'x'", pa.string(), "x"),
    ("name", "'x'", pa.string(), "x"),
    ('"char"', "'x'", pa.string(), "x"),
    ("bytea", "'\\x00ff'", pa.binary(), b"\x00\xff"),
    ("date", "'2020-02-29'", pa.date32(), date(2020, 2, 29)),
    ("time", "'23:59:59.999999'", pa.time64("us"), clock(23, 59, 59, 999999)),
    ("timetz", "'12:00+02'", pa.string(), "12:00:00+02"),
    (
        "timestamp",
        "'2020-01-01 00:00:00.000001'",
        pa.timestamp("us"),
        datetime(2020, 1, 1, 0, 0, 0, 1),  # noqa: DTZ001 - it has no zone
    ),
    (
        "timestamptz",
        "'2020-01-01 00:00+02'",
        pa.timestamp("us", "UTC"),
        datetime(2019, 12, 31, 22, tzinfo=UTC),
    ),
    ("interval", "'1 day 2 hours'", pa.string(), "P1DT2H"),
    (
        "uuid",
        "'0189a5d0-0000-7000-8000-000000000001'",
        pa.string(),
        "0189a5d0-0000-7000-8000-000000000001",
    ),
    ("json", "'{\"a\": 1}'", pa.string(), '{"a": 1}'),
    ("jsonb", "'{\"a\":[1]}'", pa.string(), '{"a": [1]}'),
    ("int[]", "'{1,NULL,2}'", pa.string(), "[1,null,2]"),
    ("int[][]", "'{{1,2},{3,4}}'", pa.string(), "[[1,2],[3,4]]"),
    ("text[]", '\'{"a,\\"b"}\'', pa.string(), '["a,\\"b"]'),
    ("mood", "'sad'", pa.string(), "sad"),
    ("point_", "'(1,z)'", pa.string(), '{"x":1,"y":"z"}'),
    ("inet", "'10.0.0.1'", pa.string(), "10.0.0.1"),
    ("cidr", "'10.0.0.0/8'", pa.string(), "10.0.0.0/8"),
    ("macaddr", "'08:00:2b:01:02:03'", pa.string(), "08:00:2b:01:02:03"),
    ("int4range", "'[1,5)'", pa.string(), "[1,5)"),
    (
        "tstzrange",
        "'[2020-01-01 00:00+00,infinity)'",
        pa.string(),
        '["2020-01-01 00:00:00+00",infinity)',
    ),
    ("money", "12.5", pa.string(), "12.50"),
    ("oid", "4294967295", pa.int64(), 4294967295),
    ("bit(3)", "'101'", pa.string(), "101"),
    ("point", "'(1,2)'", pa.string(), "(1,2)"),
    ("tsvector", "'a b'", pa.string(), "'a' 'b'"),
]
USER_TYPES = """
CREATE TYPE mood AS ENUM ('happy', 'sad');
CREATE TYPE point_ AS (x int, y text);
CREATE DOMAIN amount AS numeric(10, 3);
"""


@pytest.fixture
def run(postgres: PostgresServer, postgres_database: str) -> Callable[[str], str]:
    return lambda script: postgres.sql(script, database=postgres_database)


def read(source: AdbcSource, query: Query | None = None) -> pa.Table:
    query = query or Query(tuple(column.name for column in source.columns()))
    with source.open(query, source.plan(query).shards[0]) as stream:
        return pa.Table.from_batches(list(stream), stream.schema)


def of_query(url: str, text: str, **types: pa.DataType) -> AdbcSource:
    return AdbcSource(Postgres(url), operator_query(text), types)


def test_every_type_comes_whole_or_as_text(
    run: Callable[[str], str], postgres_url: str
) -> None:
    columns = ", ".join(f"c{n} {kind}" for n, (kind, *_) in enumerate(TYPES))
    values = ", ".join(value for _, value, *_ in TYPES)
    nulls = ", ".join("NULL" for _ in TYPES)
    run(
        f"{USER_TYPES} CREATE TABLE every ({columns});"
        f"INSERT INTO every VALUES ({nulls}); INSERT INTO every VALUES ({values});"
    )
    source = AdbcSource(Postgres(postgres_url), table("every"))
    found = read(source)
    assert found.schema.types == [kind for _, _, kind, _ in TYPES]
    missing, row = found.to_pylist()
    assert set(missing.values()) == {None}
    for number, (kind, _, _, expected) in enumerate(TYPES):
        assert row[f"c{number}"] == expected, kind
    # The columns that come as text are also compared as that text.
    for number, (kind, _, arrow, _) in enumerate(TYPES):
        if pa.types.is_string(arrow):
            name = f"c{number}"
            same = Filter(name, FilterOperator.EQUAL, (row[name],))
            start = Filter(name, FilterOperator.STARTS_WITH, (row[name][:1],))
            assert read(source, Query((name,), (same, start))).num_rows == 1, kind


@pytest.mark.parametrize(
    "value",
    [
        "'infinity'::timestamptz",
        "'-infinity'::timestamp",
        "'294276-01-01'::timestamp",
        "'infinity'::date",
        "'24:00'::time",
        "'NaN'::numeric(10,2)",
    ],
)
def test_a_value_that_no_type_carries_fails_and_names_its_column(
    run: Callable[[str], str], postgres_url: str, value: str
) -> None:
    run(f'CREATE TABLE odd AS SELECT 1 AS id, {value} AS "the ""when"""')
    source = AdbcSource(Postgres(postgres_url), table("odd"))
    with pytest.raises(ValueNotEncodable) as failed:
        read(source)
    assert failed.value.metadata == {"column": 'the "when"'}
    assert read(source, Query(("id",))).num_rows == 1
    as_text = AdbcSource(Postgres(postgres_url), table("odd"), {'the "when"': pa.string()})
    assert isinstance(read(as_text).to_pylist()[0]['the "when"'], str)


def test_a_declared_type_is_a_cast(run: Callable[[str], str], postgres_url: str) -> None:
    source = of_query(
        postgres_url,
        "SELECT '12.50' AS a, 7 AS b, '2020-01-01' AS c, 1577836800.5 AS d",
        a=pa.decimal128(10, 2),
        b=pa.string(),
        c=pa.timestamp("us", "UTC"),
        d=pa.float64(),
    )
    (row,) = read(source).to_pylist()
    assert row == {
        "a": Decimal("12.50"),
        "b": "7",
        "c": datetime(2020, 1, 1, tzinfo=UTC),
        "d": 1577836800.5,
    }
    matching = Filter("a", FilterOperator.GREATER, (Decimal("12.49"),))
    assert read(source, Query(("a",), (matching,))).num_rows == 1


def test_a_query_keeps_its_declared_digits(
    run: Callable[[str], str], postgres_url: str
) -> None:
    run("CREATE TABLE t (n numeric(20, 5)); INSERT INTO t VALUES (1.5)")
    source = of_query(postgres_url, "SELECT n, n + 1 AS m FROM t -- a comment\n")
    assert [column.type for column in source.columns()] == [
        pa.decimal128(20, 5),
        pa.string(),
    ]


def test_a_role_that_may_make_no_view_can_still_have_a_query(
    run: Callable[[str], str], postgres: PostgresServer, postgres_database: str
) -> None:
    run(
        "CREATE TABLE t (n numeric(20, 5), d date); INSERT INTO t VALUES (1.5);"
        f'REVOKE TEMP ON DATABASE "{postgres_database}" FROM PUBLIC;'
        "DROP ROLE IF EXISTS weak; CREATE ROLE weak LOGIN; GRANT SELECT ON t TO weak;"
    )
    url = postgres.url(postgres_database).replace("postgres@", "weak@")
    try:
        source = of_query(url, "SELECT n, d FROM t")
        assert [column.type for column in source.columns()] == [pa.string(), pa.date32()]
        assert read(source).to_pylist() == [{"n": "1.50000", "d": None}]
    finally:
        run("DROP OWNED BY weak; DROP ROLE weak")


def test_nothing_can_be_written(run: Callable[[str], str], postgres_url: str) -> None:
    run(
        "CREATE TABLE log (x int); CREATE FUNCTION sly() RETURNS int LANGUAGE sql AS "
        "'INSERT INTO log VALUES (1) RETURNING x'"
    )
    source = of_query(postgres_url, "SELECT sly() AS x")
    with pytest.raises(SourceFailed):
        read(source)
    assert run("SELECT count(*) FROM log").strip() == "0"


def test_a_stream_sees_one_state_of_the_data(
    run: Callable[[str], str], postgres_url: str
) -> None:
    run(
        "CREATE TABLE t AS "
        "SELECT i, repeat('x', 200) AS s FROM generate_series(1, 200000) i"
    )
    source = AdbcSource(Postgres(postgres_url), table("t"))
    query = Query(("i", "s"))
    with source.open(query, source.plan(query).shards[0]) as stream:
        batches = iter(stream)
        count = next(batches).num_rows
        run("DELETE FROM t")
        count += sum(batch.num_rows for batch in batches)
    assert count == 200_000
    assert read(source).num_rows == 0


def test_a_table_that_was_emptied_and_filled_meanwhile_never_looks_empty(
    run: Callable[[str], str], postgres_url: str
) -> None:
    """A reader's snapshot is older than the lock it waits for, and TRUNCATE empties a
    table for every snapshot."""
    run("CREATE TABLE t (id int8); INSERT INTO t SELECT generate_series(1, 500)")
    source = AdbcSource(Postgres(postgres_url), table("t"))
    query = Query(("id",))
    (shard,) = source.plan(query).shards
    with psycopg.connect(postgres_url) as writer:
        writer.execute("TRUNCATE t")
        writer.execute("INSERT INTO t SELECT generate_series(1, 500)")
        with source.open(query, shard) as stream:
            thread, failures = blocked(stream)
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: run(waiting).strip() == "1")
            writer.commit()
            thread.join(ENOUGH)
    (failure,) = failures
    assert isinstance(failure, SourceFailed)
    assert failure.retryable
    assert read(source, query).num_rows == 500


def test_a_connection_that_the_server_closed_is_an_error_and_not_the_end(
    run: Callable[[str], str], postgres_url: str
) -> None:
    """Not the end of the process, that is, which some drivers make of it."""
    vendor = Postgres(postgres_url)
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    for act in (
        lambda session: session.fetch("SELECT 1 AS one"),
        lambda session: session.run("SET LOCAL TimeZone = 'UTC'"),
        lambda session: list(session.stream("SELECT 1 AS one")),
    ):
        with Session(vendor) as session:
            run(others)
            with pytest.raises(SourceFailed):
                act(session)


def test_a_backend_that_is_killed_before_its_first_row_is_an_error() -> None:
    with running_postgres() as server:
        server.sql("CREATE TABLE t (id int8)")
        slow = of_query(
            server.url(), "SELECT 1::int8 AS id, pg_sleep(600)::text AS s FROM t"
        )
        server.sql("INSERT INTO t VALUES (1)")
        query = Query(("id", "s"))
        with slow.open(query, slow.plan(query).shards[0]) as stream:
            thread, failures = blocked(stream)
            running = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'COPY%'"
            wait_until(lambda: bool(server.sql(running).strip()))
            os.kill(int(server.sql(running).strip()), signal.SIGKILL)
            thread.join(ENOUGH)
        (failure,) = failures
        assert isinstance(failure, SourceFailed)


def test_texts_of_another_encoding_come_as_unicode(
    postgres: PostgresServer, run: Callable[[str], str]
) -> None:
    name = "latin_test"
    postgres.sql(f"DROP DATABASE IF EXISTS {name}")
    postgres.sql(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        postgres.sql("CREATE TABLE t AS SELECT chr(233) AS s", database=name)
        source = AdbcSource(Postgres(postgres.url(name)), table("t"))
        assert read(source).to_pylist() == [{"s": "é"}]
    finally:
        postgres.drop_database(name)


def test_a_collation_does_not_decide_what_is_equal(
    run: Callable[[str], str], postgres_url: str
) -> None:
    run("CREATE TABLE t AS SELECT unnest(ARRAY['a', 'A', 'b']) COLLATE \"C\" AS s")
    source = AdbcSource(Postgres(postgres_url), table("t"))
    for condition, expected in (
        (Filter("s", FilterOperator.EQUAL, ("a",)), ["a"]),
        (Filter("s", FilterOperator.LESS, ("a",)), ["A"]),
    ):
        found = read(source, Query(("s",), (condition,)))
        assert found["s"].to_pylist() == expected


def blocked(stream: DatabaseStream) -> tuple[threading.Thread, list[BaseException]]:
    """Read a stream in a thread, until it has ended."""
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            list(stream)
        except SourceFailed as error:
            errors.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    return thread, errors


def wait_until(condition: Callable[[], bool], seconds: float = ENOUGH) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


READING = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'COPY%'"
SLEEPING = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' \
AND state = 'active' AND pid <> pg_backend_pid()"


def test_cancel_stops_a_statement_that_is_blocked_in_the_server(
    run: Callable[[str], str], postgres_url: str
) -> None:
    source = of_query(postgres_url, "SELECT pg_sleep(600)::text AS s")
    query = Query(("s",))
    with source.open(query, source.plan(query).shards[0]) as stream:
        thread, errors = blocked(stream)
        wait_until(lambda: run(SLEEPING).strip() == "1")
        stream.cancel()
        thread.join(ENOUGH)
        assert not thread.is_alive()
    assert len(errors) == 1
    wait_until(lambda: run(SLEEPING).strip() == "0")


def test_leaving_a_stream_ends_its_statement(
    run: Callable[[str], str], postgres_url: str
) -> None:
    source = of_query(
        postgres_url,
        "SELECT repeat('x', 200) AS s, pg_sleep(i / 100000)::text AS t "
        "FROM generate_series(1, 150000) i",
    )
    query = Query(("s", "t"))
    with source.open(query, source.plan(query).shards[0]) as stream:
        next(iter(stream))
    wait_until(lambda: run(SLEEPING).strip() == "0")


def test_a_statement_has_a_time_limit_where_the_operator_set_one(
    postgres_url: str,
) -> None:
    source = AdbcSource(
        Postgres(postgres_url, timeout_seconds=0.2),
        operator_query("SELECT pg_sleep(600)::text AS s"),
    )
    with pytest.raises(SourceFailed):
        read(source)


def test_another_library_of_the_driver_reads_where_the_catalogue_names_one(
    run: Callable[[str], str], postgres_url: str, tmp_path: Path
) -> None:
    run("CREATE TABLE named (i int); INSERT INTO named VALUES (1), (2)")
    installed = find_spec("adbc_driver_postgresql")
    assert installed is not None
    assert installed.origin is not None
    (library,) = Path(installed.origin).parent.glob("lib*.so")
    shutil.copy(library, tmp_path / "another.so")
    catalogue = tmp_path / "datasets.toml"
    catalogue.write_text(
        f'[connections.c]\nurl = "{postgres_url}"\ndriver = "another.so"\n'
        '[datasets.named]\nconnection = "c"\ntable = "named"\n'
    )
    dataset = load_catalogue(catalogue).find("named", "default")
    assert dataset is not None
    query = Query(("i",))
    (shard,) = dataset.source.plan(query).shards
    with dataset.source.open(query, shard) as stream:
        assert sum(batch.num_rows for batch in stream) == 2
    assert str(tmp_path / "another.so") in Path("/proc/self/maps").read_text()


def test_a_library_that_is_no_driver_is_told_by_its_dataset(
    postgres_url: str, tmp_path: Path
) -> None:
    (tmp_path / "text.so").write_text("no library")
    catalogue = tmp_path / "datasets.toml"
    catalogue.write_text(
        f'[connections.c]\nurl = "{postgres_url}"\ndriver = "text.so"\n'
        '[datasets.t]\nconnection = "c"\ntable = "t"\n'
    )
    with pytest.raises(ConfigurationError, match=r"datasets\.t: .*text\.so"):
        load_catalogue(catalogue)


def assert_clean(error: SourceFailed) -> None:
    """Nothing of the inside shows in what a caller may read."""
    assert error.message == "the source of the dataset failed"
    assert error.__cause__ is not None


def test_a_server_that_is_gone_is_told_cleanly() -> None:
    with pytest.raises(SourceFailed) as failed:
        AdbcSource(Postgres("postgresql://postgres@127.0.0.1:1/none"), table("t"))
    assert_clean(failed.value)


def test_a_server_that_dies_in_the_middle_is_an_error_not_an_end() -> None:
    with running_postgres() as server:
        server.sql("CREATE VIEW big AS SELECT i FROM generate_series(1, 5000000) i")
        source = AdbcSource(Postgres(server.url()), table("big"))
        query = Query(("i",))
        with source.open(query, source.plan(query).shards[0]) as stream:
            batches = iter(stream)
            assert next(batches).num_rows
            (backend,) = server.sql(READING).split()
            os.kill(int(backend), signal.SIGKILL)
            with pytest.raises(SourceFailed) as failed:
                for _ in batches:
                    pass
        assert_clean(failed.value)
