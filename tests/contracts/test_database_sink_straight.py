"""Which rows go straight into a table of PostgreSQL, and what others notice of it."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pyarrow as pa
import pytest

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.errors import DeliveryFailed
from exportd_server.platform.threads import left_over
from exportd_server.sinks.base import BadSinkRequest, Delivery
from exportd_server.sinks.database import postgres, rows
from exportd_server.sinks.database.running import Call
from tests.contracts.test_database_sink import MORE, ROWS, Postgres
from tests.contracts.test_encoders import name_of
from tests.support.database_sink import CSV, delivery_of, held
from tests.support.waits import ENOUGH


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
    "an operator of its own": (
        [
            *PLAIN,
            "CREATE FUNCTION f(text, text) RETURNS bool LANGUAGE sql AS 'SELECT true'",
            "CREATE OPERATOR === (leftarg = text, rightarg = text, function = f)",
            "ALTER TABLE orders ADD CHECK (name === 'x')",
        ],
        {},
        "pg_temp",
    ),
    "a partition": (
        [
            "CREATE TABLE whole (id bigint, name text) PARTITION BY RANGE (id)",
            "CREATE TABLE orders PARTITION OF whole FOR VALUES FROM (0) TO (9)",
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


@pytest.mark.minutes
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


MANY = pa.table({"id": range(100_000), "name": ["x" * 50] * 100_000})


class SmallDisk(io.FileIO):
    """Has room for somewhat more than two MiB."""

    def write(self, data: Any, /) -> int:
        room = 2_200_000 - self.tell()
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(memoryview(data)[:room])


@pytest.mark.parametrize(
    ("lack", "output"),
    [
        ("bytes", CSV),
        ("bytes", OutputFormat(Format.PARQUET)),
        ("disk", CSV),
        ("disk", OutputFormat(Format.PARQUET)),
        # Without one Parquet cannot be read at all.
        ("directory", CSV),
    ],
)
async def test_rows_for_which_the_disk_has_no_room_are_staged(
    database: Postgres,
    into: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: OutputFormat,
    lack: str,
) -> None:
    database.make_orders()
    if lack == "bytes":
        database.spool = {"spool_bytes": 2_200_000}
    elif lack == "disk":
        monkeypatch.setattr(
            rows, "_open_spool", lambda _: SmallDisk(tmp_path / str(uuid4()), "x+")
        )
    else:
        database.spool = {"spool_directory": str(tmp_path / "missing")}
    await database.deliver(delivery_of(MANY, output, parts=3))
    assert into == ["pg_temp"]
    found = database.rows("SELECT id FROM orders WHERE name <> 'old' ORDER BY ctid")
    assert [n for (n,) in found] == list(range(100_000))


async def test_a_part_for_which_the_disk_has_no_room_is_tried_again(
    database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.make_orders()
    monkeypatch.setattr(SmallDisk, "write", lambda *_: os.write(-1, b""))
    monkeypatch.setattr(rows, "_open_spool", lambda _: SmallDisk(tmp_path / "kept", "x+"))
    with pytest.raises(
        DeliveryFailed, match="cannot be kept on the server's disk"
    ) as failed:
        await database.deliver(delivery_of(ROWS, OutputFormat(Format.PARQUET)))
    assert failed.value.retryable
    assert database.orders() == [(0, "old")]


@pytest.mark.parametrize("output", [CSV, OutputFormat(Format.PARQUET)], ids=name_of)
async def test_a_delivery_that_is_cancelled_keeps_no_more_rows(
    database: Postgres, monkeypatch: pytest.MonkeyPatch, output: OutputFormat
) -> None:
    database.make_orders()
    loop, stopped, kept = asyncio.get_running_loop(), threading.Event(), []
    wrote, stop = rows._wrote, Call.stop

    def one(file: Any, piece: Any) -> bool:
        if lines_begin(piece):
            kept.append(len(piece))
            loop.call_soon_threadsafe(task.cancel)
            assert stopped.wait(ENOUGH)
        return wrote(file, piece)

    def lines_begin(piece: Any) -> bool:
        return output.format is Format.CSV or bytes(piece[:4]) != b"PAR1"

    def note(self: Call) -> None:
        stop(self)
        stopped.set()

    monkeypatch.setattr(rows, "_wrote", one)
    monkeypatch.setattr(Call, "stop", note)
    task = asyncio.create_task(database.deliver(delivery_of(MANY, output, parts=1)))
    with pytest.raises(asyncio.CancelledError):
        await task
    await database.until(lambda: "exportd-database-sink" not in left_over())
    assert len(kept) == 1
    assert database.orders() == [(0, "old")]


async def test_damage_that_is_found_while_rows_are_kept_loads_none(
    database: Postgres, into: list[str]
) -> None:
    database.make_orders()
    delivery = delivery_of(ROWS)
    first, *others = delivery.parts
    parts = (replace(first, crc32c=first.crc32c ^ 1), *others)
    with pytest.raises(DeliveryFailed, match="do not match their checksum"):
        await database.deliver(replace(delivery, parts=parts))
    assert not into
    assert database.orders() == [(0, "old")]


async def test_operators_of_others_are_not_asked(
    database: Postgres, into: list[str]
) -> None:
    database.make_orders()
    for kind in ("regclass", "oid"):
        database.run(
            f"CREATE FUNCTION no_{kind}(oid, {kind}) RETURNS bool LANGUAGE plpgsql AS "
            "'BEGIN RAISE EXCEPTION ''asked''; END'",
            f"CREATE OPERATOR public.= (leftarg = oid, rightarg = {kind}, "
            f"function = no_{kind})",
        )
    await database.deliver(delivery_of(ROWS))
    assert into == ["public"]


async def test_rights_on_columns_do_where_the_table_may_be_locked(
    database: Postgres,
) -> None:
    database.make_orders()
    name = f"r_{database.url.rsplit('_', 1)[1]}"
    database.run(
        f"CREATE ROLE {name} LOGIN",
        f"GRANT CREATE ON SCHEMA public TO {name}",
        f"GRANT INSERT (id, name) ON orders TO {name}",
    )
    role = Postgres(database.url.replace("postgres@", f"{name}@"))
    try:
        with pytest.raises(BadSinkRequest, match=r"lacks INSERT on public\.orders"):
            await role.deliver(delivery_of(ROWS))
        database.run(f"GRANT DELETE ON orders TO {name}")
        await role.deliver(delivery_of(ROWS))
        await role.deliver(delivery_of(MORE), mode="REPLACE")
        assert len(database.orders()) == 2
    finally:
        database.run(f"DROP OWNED BY {name}", f"DROP ROLE {name}")


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
