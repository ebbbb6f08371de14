"""Which rows go straight into a table of PostgreSQL, and what others notice of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pyarrow as pa
import pytest

from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import Delivery
from tests.contracts.test_database_sink import MORE, ROWS, Postgres
from tests.support.database_sink import delivery_of, held


@pytest.fixture
def database(postgres_url: str) -> Postgres:
    return Postgres(postgres_url)


@asynccontextmanager
async def loading(
    database: Postgres, delivery: Delivery | None = None, **request: Any
) -> AsyncIterator[asyncio.Task[str]]:
    """A delivery that is in the middle of its rows; they go on afterwards."""
    slow, content = held(delivery or delivery_of(ROWS))
    task = asyncio.create_task(database.deliver(slow, **request))
    try:
        await content.reached.wait()
        yield task
    finally:
        content.go_on.set()
        await asyncio.wait([task])


def copies(database: Postgres) -> str:
    """Into which schema rows are being copied now."""
    ((schema,),) = database.rows(
        "SELECT split_part(query, '\"', 2) FROM pg_stat_activity "
        "WHERE query LIKE 'COPY%' AND datname = current_database() AND state = 'active'"
    )
    return str(schema)


PLAIN = ["CREATE TABLE orders (id bigint, name text)"]
WAYS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "plain": (PLAIN, {}, "public"),
    "no table yet": ([], {"create_table": True}, "public"),
    "an index": ([*PLAIN, "CREATE INDEX ON orders (id)"], {}, "public"),
    "defaults": (
        [
            (
                "CREATE TABLE orders (n bigserial NOT NULL, id int NOT NULL, name varchar, "
                "at timestamptz NOT NULL DEFAULT now(), "
                "twice int GENERATED ALWAYS AS (id * 2) STORED)"
            )
        ],
        {},
        "public",
    ),
    # Whoever adds the same key would wait until all rows are there.
    "a key": (["CREATE TABLE orders (id bigint PRIMARY KEY, name text)"], {}, "pg_temp"),
    "a unique index": (
        [*PLAIN, "CREATE UNIQUE INDEX ON orders (id) WHERE id > 5"],
        {},
        "pg_temp",
    ),
    "an exclusion": (
        ["CREATE TABLE orders (id bigint, name text, EXCLUDE (id WITH =))"],
        {},
        "pg_temp",
    ),
    "partitions": (
        [
            "CREATE TABLE orders (id bigint, name text) PARTITION BY RANGE (id)",
            "CREATE TABLE few PARTITION OF orders (id UNIQUE) FOR VALUES FROM (0) TO (9)",
        ],
        {},
        "pg_temp",
    ),
    "another table's key": (
        [
            "CREATE TABLE ids (id bigint PRIMARY KEY)",
            "INSERT INTO ids VALUES (1), (2), (3)",
            "CREATE TABLE orders (id bigint REFERENCES ids, name text)",
        ],
        {},
        "pg_temp",
    ),
    # COPY passes them by, or does not work with them.
    "a rule": (
        [
            *PLAIN,
            "CREATE TABLE seen (id bigint)",
            (
                "CREATE RULE also AS ON INSERT TO orders "
                "DO ALSO INSERT INTO seen VALUES (new.id)"
            ),
        ],
        {},
        "pg_temp",
    ),
    "policies": ([*PLAIN, "ALTER TABLE orders ENABLE ROW LEVEL SECURITY"], {}, "pg_temp"),
    # What the target would change is looked for beforehand.
    "a length": (["CREATE TABLE orders (id bigint, name varchar(9))"], {}, "pg_temp"),
    "the rows of all": (PLAIN, {"mode": "REPLACE"}, "pg_temp"),
    "keys to be made": (
        [],
        {"mode": "MERGE", "key_columns": ("id",), "create_table": True},
        "pg_temp",
    ),
}


@pytest.mark.parametrize(("statements", "request_", "schema"), WAYS.values(), ids=WAYS)
async def test_rows_go_straight_into_a_table_where_that_makes_nobody_wait_and_no_difference(
    database: Postgres, statements: list[str], request_: dict[str, Any], schema: str
) -> None:
    database.run(*statements)
    async with loading(database, **request_) as task:
        assert copies(database) == schema
    assert await task == "3 rows in public.orders"
    assert database.orders() == [(1, "one"), (2, ""), (3, None)]
    if database.rows("SELECT to_regclass('seen')") != [(None,)]:
        assert database.rows("SELECT id FROM seen ORDER BY id") == [(1,), (2,), (3,)]


NOT_ITS_OWN_TEXT = [
    ("double precision", pa.array([0.1], pa.float32()), 0.10000000149011612),
    ("bytea", pa.array([b"ab"]), b"ab"),
    ("interval", pa.array([1_500_000], pa.duration("us")), "00:00:01.5"),
]


@pytest.mark.parametrize(("kind", "values", "text"), NOT_ITS_OWN_TEXT)
async def test_a_column_that_would_read_the_text_as_another_value_is_staged(
    database: Postgres, kind: str, values: pa.Array, text: Any
) -> None:
    database.run(f"CREATE TABLE orders (v {kind})")
    async with loading(database, delivery_of(pa.table({"v": values}))):
        assert copies(database) == "pg_temp"
    ((found,),) = database.rows(f"SELECT v{'::text' * isinstance(text, str)} FROM orders")
    assert found == text


async def test_an_operator_may_have_all_rows_staged(database: Postgres) -> None:
    database.always_stage = True
    database.run(*PLAIN)
    async with loading(database):
        assert copies(database) == "pg_temp"


async def test_while_rows_go_straight_into_a_table_others_read_and_write_it(
    database: Postgres,
) -> None:
    database.make_orders()
    async with loading(database) as task:
        database.run("INSERT INTO orders VALUES (9, 'meanwhile')", "ANALYZE orders")
        await database.deliver(delivery_of(MORE))
        there = database.orders()
        # Who alters it waits, as with any COPY.
        with pytest.raises(psycopg.errors.LockNotAvailable):
            database.run("SET lock_timeout = '10ms'", "ALTER TABLE orders ADD extra text")
    await task
    assert [name for _, name in there] == ["old", "three", "four", "meanwhile"]
    assert len(database.orders()) == 4 + 3


async def test_an_attempt_that_hangs_straight_before_a_table_takes_its_rows_back(
    database: Postgres,
) -> None:
    database.make_orders()
    whole = delivery_of(ROWS)
    async with loading(database, whole) as zombie:
        receipt = await database.deliver(replace(whole, attempt=2))
        once = database.orders()
    assert await zombie == receipt
    assert database.orders() == once
    assert len(once) == 4


async def test_a_table_that_is_being_filled_keeps_nobody_from_making_it(
    database: Postgres,
) -> None:
    delivery = delivery_of(ROWS)
    async with loading(database, delivery, create_table=True) as task:
        assert database.rows("SELECT * FROM pg_tables WHERE tablename LIKE '%order%'") == []
        await database.deliver(delivery_of(MORE), create_table=True)
    with pytest.raises(DeliveryFailed, match="was made while rows were loaded") as failed:
        await task
    assert failed.value.retryable
    assert len(database.orders()) == 2
    await database.deliver(delivery, create_table=True)
    assert len(database.orders()) == 5
    left = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    assert sorted(database.rows(left)) == [("exportd_deliveries",), ("orders",)]


async def test_a_table_that_changed_before_it_was_locked_is_looked_at_again(
    database: Postgres,
) -> None:
    database.make_orders()
    with psycopg.connect(database.url) as other:
        other.execute("ALTER TABLE orders ADD COLUMN extra text")
        # The planning waits for nobody; what it has seen is altered then.
        task = asyncio.create_task(database.deliver(delivery_of(ROWS)))
        await database.until(lambda: bool(database.sessions("wait_event_type = 'Lock'")))
    with pytest.raises(DeliveryFailed, match="was changed") as failed:
        await task
    assert failed.value.retryable
    assert database.orders() == [(0, "old")]


NAMES = ["c1", 'v: "x', "v", "a, column b", "täble", "%s"]


@pytest.mark.parametrize("wrong", NAMES)
async def test_a_value_that_does_not_fit_is_told_by_its_column_whatever_that_is_called(
    database: Postgres, wrong: str
) -> None:
    values = {name: ["7fc56270-e7a7-4fa8-8f2b-3d2b1f9a0c11"] for name in NAMES}
    values[wrong] = ['s3cret, column v: "7']
    with psycopg.connect(database.url) as link:
        link.execute(
            psycopg.sql.SQL('CREATE TABLE "or(ders" ({})').format(
                psycopg.sql.SQL(", ").join(
                    psycopg.sql.SQL("{} uuid").format(psycopg.sql.Identifier(name))
                    for name in NAMES
                )
            )
        )
    with pytest.raises(DeliveryFailed) as failed:
        await database.deliver(delivery_of(pa.table(values), parts=1), "or(ders")
    assert failed.value.message.startswith(f"column {wrong!r} of type uuid: a value")
    assert "s3cret" not in failed.value.message
