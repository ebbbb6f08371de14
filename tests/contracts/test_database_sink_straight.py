"""Which rows go straight into a table of PostgreSQL, and what others notice of it."""

from __future__ import annotations

import asyncio
import errno
import io
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pyarrow as pa
import pytest

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import Delivery
from exportd_server.sinks.database import postgres
from tests.contracts.test_database_sink import MORE, ROWS, Postgres
from tests.contracts.test_encoders import name_of
from tests.support.database_sink import CSV, delivery_of, held


@pytest.fixture
def database(postgres_url: str) -> Postgres:
    return Postgres(postgres_url)


@pytest.fixture
def into(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Schemas of the tables that rows were copied into."""
    copy, seen = postgres._Loading._copy, []

    def note(self: Any, schema: str, *others: Any) -> None:
        seen.append(schema)
        copy(self, schema, *others)

    monkeypatch.setattr(postgres._Loading, "_copy", note)
    return seen


@asynccontextmanager
async def coming(
    database: Postgres, delivery: Delivery | None = None, **request: Any
) -> AsyncIterator[asyncio.Task[str]]:
    """A delivery of which the rows have not all come; the others do afterwards."""
    slow, content = held(delivery or delivery_of(ROWS))
    task = asyncio.create_task(database.deliver(slow, **request))
    try:
        await content.reached.wait()
        yield task
    finally:
        content.go_on.set()
        await asyncio.wait([task])


PLAIN = ["CREATE TABLE orders (id bigint, name text)"]
COUNTER = [
    "CREATE TABLE counter AS SELECT 0 AS n",
    (
        "CREATE FUNCTION next_number() RETURNS bigint LANGUAGE sql AS "
        "'UPDATE counter SET n = n + 1 RETURNING n'"
    ),
]
WAYS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "plain": (PLAIN, {}, "public"),
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
    # To others, such as a publication's subscribers, a table is made and filled at once.
    "no table yet": ([], {"create_table": True}, "pg_temp"),
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
    "a function of its own": (
        [
            *COUNTER,
            "CREATE TABLE orders (id bigint, name text, n bigint DEFAULT next_number())",
        ],
        {},
        "pg_temp",
    ),
    "a check by a function": (
        [*COUNTER, *PLAIN, "ALTER TABLE orders ADD CHECK (next_number() > 0)"],
        {},
        "pg_temp",
    ),
    "a domain": (
        ["CREATE DOMAIN d AS bigint", "CREATE TABLE orders (id d, name text)"],
        {},
        "pg_temp",
    ),
    "heirs": (
        [*PLAIN, "CREATE TABLE heirs () INHERITS (orders)"],
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
async def test_rows_go_straight_into_a_table_where_that_makes_no_difference_but_in_time(
    database: Postgres,
    into: list[str],
    statements: list[str],
    request_: dict[str, Any],
    schema: str,
) -> None:
    database.run(*statements)
    receipt = await database.deliver(delivery_of(ROWS), **request_)
    assert into == [schema]
    assert receipt == "3 rows in public.orders"
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
    database: Postgres, into: list[str], kind: str, values: pa.Array, text: Any
) -> None:
    database.run(f"CREATE TABLE orders (v {kind})")
    await database.deliver(delivery_of(pa.table({"v": values})))
    assert into == ["pg_temp"]
    ((found,),) = database.rows(f"SELECT v{'::text' * isinstance(text, str)} FROM orders")
    assert found == text


async def test_an_operator_may_have_all_rows_staged(
    database: Postgres, into: list[str]
) -> None:
    database.always_stage = True
    database.run(*PLAIN)
    await database.deliver(delivery_of(ROWS))
    assert into == ["pg_temp"]


@pytest.mark.parametrize("output", [CSV, OutputFormat(Format.PARQUET)], ids=name_of)
async def test_while_rows_come_nothing_is_locked_and_no_session_is_open(
    database: Postgres, into: list[str], output: OutputFormat
) -> None:
    database.make_orders()
    async with coming(database, delivery_of(ROWS, output)) as task:
        await database.until(lambda: not database.sessions())
        database.run(
            "SET lock_timeout = '1s'",
            "ALTER TABLE orders ADD extra text",
            "CREATE INDEX ON orders (id)",
        )
        await database.deliver(delivery_of(MORE), mode="REPLACE")
    await task
    # Replaced meanwhile, and planned for as the table is then.
    assert [name for _, name in database.orders()] == ["one", "", "three", None, "four"]
    assert into == ["pg_temp", "public"]


async def test_a_table_that_does_not_take_rows_straight_any_more_has_them_staged(
    database: Postgres, into: list[str]
) -> None:
    database.make_orders()
    async with coming(database) as task:
        database.run("CREATE UNIQUE INDEX ON orders (id)")
    await task
    assert into == ["pg_temp"]
    assert len(database.orders()) == 4


async def test_of_two_attempts_that_load_straight_at_once_one_takes_its_rows_back(
    database: Postgres, into: list[str]
) -> None:
    database.make_orders()
    await database.deliver(delivery_of(MORE))  # makes the table of deliveries
    into.clear()
    whole = delivery_of(ROWS)
    with psycopg.connect(database.url) as other:
        other.execute("LOCK TABLE orders IN SHARE MODE")
        attempts = [
            asyncio.create_task(database.deliver(replace(whole, attempt=n))) for n in (1, 2)
        ]
        await database.until(
            lambda: len(database.sessions("wait_event_type = 'Lock'")) == len(attempts)
        )
    first, second = await asyncio.gather(*attempts)
    assert first == second
    assert into == ["public", "public"]
    assert len(database.orders()) == 3 + 3


async def test_rows_that_do_not_fit_on_the_disk_are_tried_again_and_leave_nothing(
    database: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.make_orders()

    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(
        DeliveryFailed, match="cannot be kept on the server's disk"
    ) as failed:
        await database.deliver(delivery_of(ROWS))
    assert failed.value.retryable
    assert database.orders() == [(0, "old")]


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
