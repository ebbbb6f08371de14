"""How a PostgreSQL dataset is cut, and that its pieces show one state of the data."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, LiteralString

import psycopg
import pytest

from exportd_server.errors import SourceFailed
from exportd_server.sources import postgres_shards
from exportd_server.sources.adbc import AdbcSource
from exportd_server.sources.base import (
    MOST_SHARDS,
    Filter,
    FilterOperator,
    Plan,
    Query,
    Shard,
    SourceChanged,
)
from exportd_server.sources.postgres import Postgres
from tests.support.holders import operator_query, table
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.standby import standby_of
from tests.support.waits import ENOUGH

ROWS = 4000
FILL = f"INSERT INTO t SELECT i, repeat('x', 40) FROM generate_series(1, {ROWS}) i;"
TABLE = f"CREATE TABLE t (i int, s text); {FILL} ANALYZE t;"
ALL = [(i, "x" * 40) for i in range(1, ROWS + 1)]
WHOLE = Query(("i", "s"))
NUMBERS = Query(("i",))
HOLDERS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() \
AND pid <> pg_backend_pid() AND state = 'idle in transaction'"
WAITERS = "SELECT count(*) FROM pg_locks WHERE NOT granted"

Run = Callable[[str], str]


@pytest.fixture
def run(postgres: PostgresServer, postgres_database: str) -> Run:
    return lambda script: postgres.sql(script, database=postgres_database)


def of_table(url: str, name: str = "t", key: str | None = None) -> AdbcSource:
    return AdbcSource(Postgres(url), table(name), partition_key=key)


def of_query(url: str, text: str, key: str | None = None) -> AdbcSource:
    return AdbcSource(Postgres(url), operator_query(text), partition_key=key)


@contextlib.contextmanager
def cut(source: AdbcSource, query: Query = WHOLE, shard_rows: int = 1000) -> Iterator[Plan]:
    plan = source.plan(query, shard_rows=shard_rows)
    try:
        yield plan
    finally:
        if plan.anchor is not None:
            plan.anchor.close()


def read(
    source: AdbcSource, shard: Shard, query: Query = WHOLE, skip_rows: int = 0
) -> list[tuple[Any, ...]]:
    with source.open(query, shard, skip_rows=skip_rows) as stream:
        return [tuple(row.values()) for batch in stream for row in batch.to_pylist()]


def read_all(
    source: AdbcSource, plan: Plan, query: Query = WHOLE
) -> list[list[tuple[Any, ...]]]:
    return [read(source, shard, query) for shard in plan.shards]


def flat(pieces: list[list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    return sorted(row for piece in pieces for row in piece)


def range_of(shard: Shard) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shard.state)["piece"]["range"]
    return found


def wait_until(condition: Callable[[], bool], seconds: float = ENOUGH) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def transaction(url: str, *statements: LiteralString) -> Iterator[psycopg.Connection[Any]]:
    """Another session's open transaction, committed by the test or rolled back."""
    with psycopg.connect(url) as connection:
        for statement in statements:
            connection.execute(statement)
        yield connection
        connection.rollback()


@contextlib.contextmanager
def in_background(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(ENOUGH)
        assert not thread.is_alive()


def test_a_table_is_cut_into_blocks_of_about_the_rows_asked_for(
    run: Run, postgres_url: str
) -> None:
    run(TABLE)
    source = of_table(postgres_url)
    with cut(source) as plan:
        assert len(plan.shards) == 4
        assert plan.estimated_rows == ROWS
        pieces = read_all(source, plan)
        assert flat(pieces) == ALL
        assert all(900 <= len(piece) <= 1100 for piece in pieces)
        assert range_of(plan.shards[0])["from"] is None
        assert range_of(plan.shards[-1])["to"] is None


def test_a_materialized_view_is_cut_like_a_table(run: Run, postgres_url: str) -> None:
    run(f"{TABLE} CREATE MATERIALIZED VIEW m AS SELECT * FROM t; ANALYZE m;")
    source = of_table(postgres_url, "m")
    with cut(source) as plan:
        assert len(plan.shards) == 4
        assert flat(read_all(source, plan)) == ALL


def test_all_shards_show_the_data_as_it_was_when_the_plan_was_made(
    run: Run, postgres_url: str
) -> None:
    run(TABLE)
    source = of_table(postgres_url)
    changes = (
        "UPDATE t SET s = 'changed' WHERE i % 3 = 0",
        "DELETE FROM t WHERE i % 5 = 0",
        "INSERT INTO t SELECT i, 'new' FROM generate_series(1, 3000) i",
        "DELETE FROM t WHERE s = 'new' OR i < 2000",
    )
    with cut(source) as plan:
        assert len(plan.shards) == len(changes)
        pieces = []
        for shard, change in zip(plan.shards, changes, strict=True):
            run(change)
            run("VACUUM (INDEX_CLEANUP ON, TRUNCATE ON) t")
            pieces.append(read(source, shard))
        assert flat(pieces) == ALL
        assert flat(read_all(source, plan)) == ALL
    with cut(source) as plan:
        assert flat(read_all(source, plan)) != ALL


def test_a_table_that_is_filled_anew_while_a_plan_waits_for_it_is_not_seen_empty(
    run: Run, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(TABLE)
    source = of_table(postgres_url)
    plans: list[Plan] = []
    with transaction(postgres_url, "TRUNCATE t") as other:
        other.execute("INSERT INTO t SELECT -i, 'anew' FROM generate_series(1, 3000) i")
        # The estimate, in a session of its own, would wait first.
        own = of_table(postgres_url)
        monkeypatch.setattr(own, "_estimate", lambda _: None)
        with in_background(lambda: plans.append(own.plan(WHOLE, shard_rows=500))):
            wait_until(lambda: run(WAITERS).strip() == "1")
            other.commit()
    (plan,) = plans
    assert plan.anchor is not None
    try:
        assert len(plan.shards) > 1
        assert flat(read_all(source, plan)) == [(-i, "anew") for i in range(3000, 0, -1)]
    finally:
        plan.anchor.close()


@pytest.mark.parametrize("rewriting", ["VACUUM FULL t", "TRUNCATE t", "CLUSTER t USING x"])
def test_whoever_wants_to_rewrite_a_table_waits_and_a_shard_gives_in(
    run: Run, postgres_url: str, monkeypatch: pytest.MonkeyPatch, rewriting: str
) -> None:
    monkeypatch.setitem(postgres_shards.READER_SETTINGS, "lock_timeout", "100")
    run(f"{TABLE} CREATE INDEX x ON t (s); DELETE FROM t WHERE i % 2 = 0")
    source = of_table(postgres_url)
    with contextlib.ExitStack() as stack:
        plan = source.plan(WHOLE, shard_rows=1000)
        assert plan.anchor is not None
        assert len(plan.shards) > 1
        stack.enter_context(in_background(lambda: run(rewriting)))
        stack.callback(plan.anchor.close)
        wait_until(lambda: run(WAITERS).strip() == "1")
        with pytest.raises(SourceChanged):
            read(source, plan.shards[0])
    expected = [] if rewriting.startswith("TRUNCATE") else ALL[::2]
    with cut(source) as plan:
        assert flat(read_all(source, plan)) == expected


def test_without_its_anchor_no_shard_is_opened_and_open_ones_finish(
    run: Run, postgres_url: str
) -> None:
    run(TABLE)
    run("INSERT INTO t SELECT i, repeat('y', 900) FROM generate_series(1, 20000) i")
    run("ANALYZE t")
    source = of_table(postgres_url)
    with cut(source, shard_rows=12_000) as plan:
        first, second = plan.shards
        whole = read(source, first)
        with source.open(WHOLE, first) as stream:
            batches = iter(stream)
            found = next(batches).num_rows
            assert found < len(whole)
            # The only one that is idle; the stream is in the middle of its COPY.
            assert run(f"SELECT pg_terminate_backend(pid) FROM ({HOLDERS}) h") == "t\n"
            wait_until(lambda: not run(HOLDERS))
            run("DELETE FROM t")
            for shard in (first, second):
                for skip in (0, 5):
                    with pytest.raises(SourceChanged):
                        read(source, shard, skip_rows=skip)
            assert found + sum(batch.num_rows for batch in batches) == len(whole)


def test_a_reader_that_has_the_snapshot_still_needs_the_anchor(
    run: Run, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between taking up the snapshot and locking the table the anchor may die, and
    somebody empty the table."""
    run(TABLE)
    vendor = Postgres(postgres_url)
    settle = vendor.settle
    source = AdbcSource(vendor, table("t"))
    with cut(source) as plan:

        def begin_and_lose_the_anchor(session: Any, settings: Any) -> None:
            settle(session, settings)
            assert plan.anchor is not None
            plan.anchor.close()
            wait_until(lambda: run(HOLDERS).count("\n") == 1)
            run("TRUNCATE t")

        monkeypatch.setattr(vendor, "settle", begin_and_lose_the_anchor)
        with pytest.raises(SourceChanged):
            read(source, plan.shards[0])


def test_a_snapshot_of_the_same_name_is_not_taken_for_the_plans(
    run: Run, postgres_url: str
) -> None:
    """Names begin anew when the server starts, and each server has its own."""
    run(TABLE)
    source = of_table(postgres_url)
    with cut(source) as old:
        run("DELETE FROM t WHERE i % 2 = 0")
        with cut(source, shard_rows=500) as new:
            state = json.loads(old.shards[0].state)
            newer = json.loads(new.shards[0].state)["piece"]["snapshot"]
            for names in (("id",), ("id", "holder"), ("holder",)):
                state["piece"]["snapshot"] |= {name: newer[name] for name in names}
                with pytest.raises(SourceChanged):
                    read(source, Shard(0, json.dumps(state)))


def test_a_server_that_started_again_has_changed_and_one_that_is_gone_has_failed() -> None:
    with running_postgres(durable=True) as server:
        server.sql(TABLE)
        source = of_table(server.url())
        plan = source.plan(WHOLE, shard_rows=1000)
        assert plan.anchor is not None
        server.stop("immediate")
        with pytest.raises(SourceFailed):
            read(source, plan.shards[0])
        server.start()
        with pytest.raises(SourceChanged):
            read(source, plan.shards[0])
        plan.anchor.close()
        with cut(source) as plan:
            assert flat(read_all(source, plan)) == ALL


def test_a_shard_of_blocks_goes_on_where_an_earlier_attempt_ended(
    run: Run, postgres_url: str
) -> None:
    run(f"{TABLE} CREATE INDEX ON t (i)")
    source = of_table(postgres_url)
    wanted = Query(("i",), (Filter("i", FilterOperator.GREATER, (600,)),))
    for query in (WHOLE, wanted):
        with cut(source, query) as plan:
            before = read_all(source, plan, query)
            run("UPDATE t SET s = s || 'z'; ")
            run("DELETE FROM t WHERE i % 7 = 0")
            run("VACUUM ANALYZE t")
            for shard, rows in zip(plan.shards, before, strict=True):
                for skip in (1, len(rows) // 2, len(rows)):
                    assert read(source, shard, query, skip_rows=skip) == rows[skip:]


def test_rows_are_skipped_only_where_their_order_is_sure(
    run: Run, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(f"{TABLE} CREATE INDEX ON t (i); ANALYZE t")
    source = of_table(postgres_url)
    with cut(source) as plan:
        monkeypatch.setitem(postgres_shards._BLOCK_SETTINGS, "enable_tidscan", "off")
        monkeypatch.setitem(postgres_shards._BLOCK_SETTINGS, "enable_seqscan", "on")
        assert flat(read_all(source, plan)) == ALL
        with pytest.raises(SourceChanged):
            read(source, plan.shards[1], skip_rows=1)


KEYED = f"""
CREATE TABLE base (i int, id bigint, day date, at timestamptz, plain timestamp);
INSERT INTO base SELECT i, i * 1000003::bigint, '2020-01-01'::date + i / 10,
    '2020-01-01 00:00+00'::timestamptz + i * interval '1 minute',
    '0500-01-01'::timestamp + i * interval '1 day'
FROM generate_series(1, {ROWS}) i;
UPDATE base SET id = NULL, day = NULL, at = NULL, plain = NULL WHERE i % 10 = 0;
INSERT INTO base SELECT i, i, e::date, e::timestamptz, e::timestamp FROM (VALUES
    (-4, '20000-01-01'), (-3, '-infinity'), (-2, '4000-01-01 BC'), (-1, 'infinity')
) v (i, e);
CREATE TABLE parted (LIKE base) PARTITION BY RANGE (i);
CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (MINVALUE) TO (1500);
CREATE TABLE parted_high PARTITION OF parted FOR VALUES FROM (1500) TO (MAXVALUE);
INSERT INTO parted SELECT * FROM base;
CREATE VIEW seen AS SELECT * FROM base;
ANALYZE;
"""
KEYED_ROWS = [*range(-4, 0), *range(1, ROWS + 1)]


@pytest.mark.minutes
@pytest.mark.parametrize("key", ["i", "id", "day", "at", "plain"])
def test_what_has_no_blocks_is_cut_by_its_partition_key(
    run: Run, postgres_url: str, key: str
) -> None:
    run(KEYED)
    for source in (
        of_table(postgres_url, "parted", key),
        of_table(postgres_url, "seen", key),
        of_query(postgres_url, "SELECT * FROM base -- all of it\n", key),
    ):
        with cut(source, NUMBERS) as plan:
            assert 2 <= len(plan.shards) <= 5
            run(
                "INSERT INTO parted (i) VALUES (99999); INSERT INTO base (i) VALUES (99999)"
            )
            pieces = read_all(source, plan, NUMBERS)
            assert [i for (i,) in flat(pieces)] == KEYED_ROWS
            assert sorted(map(len, pieces))[-2] > ROWS / 10
        run("DELETE FROM parted WHERE i = 99999; DELETE FROM base WHERE i = 99999")


def test_a_shard_of_keys_begins_anew(run: Run, postgres_url: str) -> None:
    run(f"{TABLE} CREATE VIEW v AS SELECT * FROM t")
    source = of_table(postgres_url, "v", "i")
    with cut(source) as plan:
        assert len(plan.shards) == 4
        with pytest.raises(SourceChanged):
            source.open(WHOLE, plan.shards[0], skip_rows=1)


def test_a_partition_that_comes_while_shards_are_read_is_not_half_seen(
    run: Run, postgres_url: str
) -> None:
    run(f"{TABLE} CREATE TABLE p (LIKE t) PARTITION BY RANGE (i);")
    run("CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (1) TO (2001)")
    run("CREATE TABLE p2 (LIKE t); INSERT INTO p1 SELECT * FROM t WHERE i <= 2000")
    run("INSERT INTO p2 SELECT * FROM t WHERE i > 2000; ANALYZE p")
    source = of_table(postgres_url, "p", "i")
    with cut(source, shard_rows=500) as plan:
        assert flat(read_all(source, plan)) == ALL[:2000]
    run("ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (2001) TO (4001)")
    few = Query(("i", "s"), (Filter("i", FilterOperator.LESS, (1001,)),))
    with cut(source, few, 250) as plan:
        assert len(plan.shards) > 1
        assert flat(read_all(source, plan, few)) == ALL[:1000]
    run("ALTER TABLE p DETACH PARTITION p2")
    with cut(source, shard_rows=500) as plan:
        run("ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (2001) TO (9999)")
        with pytest.raises(SourceChanged):
            read(source, plan.shards[0])


def test_a_child_that_comes_while_blocks_are_read_is_not_half_seen(
    run: Run, postgres_url: str
) -> None:
    run(f"{TABLE} CREATE TABLE child (LIKE t); INSERT INTO child VALUES (0, 'child')")
    source = of_table(postgres_url)
    with cut(source) as plan:
        run("ALTER TABLE child INHERIT t; CREATE INDEX ON t (i)")
        with pytest.raises(SourceChanged):
            read(source, plan.shards[0])
        run("ALTER TABLE child NO INHERIT t")
        assert flat(read_all(source, plan)) == ALL


def sessions(run: Run) -> int:
    return int(
        run(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND application_name = 'exportd'"
        )
    )


def test_what_cannot_be_cut_or_is_small_is_one_shard_and_holds_nothing(
    run: Run, postgres_url: str
) -> None:
    run(f"{TABLE} CREATE VIEW v AS SELECT * FROM t; CREATE TABLE empty (i int, s text)")
    run("CREATE TABLE p (LIKE t) PARTITION BY RANGE (i)")
    run("CREATE TABLE p1 PARTITION OF p DEFAULT; INSERT INTO p SELECT * FROM t; ANALYZE p")
    run("CREATE TABLE parent (LIKE t); INSERT INTO parent SELECT * FROM t")
    run("CREATE TABLE heir () INHERITS (parent); ANALYZE parent")
    run("CREATE TABLE nulls AS SELECT i, s, NULL::int AS k FROM t; ANALYZE nulls")
    run("CREATE TABLE same AS SELECT i, s, 7 AS k FROM t; ANALYZE same")
    for source, shard_rows, rows in (
        (of_table(postgres_url), ROWS, ALL),
        (of_table(postgres_url, "v"), 1000, ALL),
        (of_table(postgres_url, "v", "i"), ROWS, ALL),
        (of_table(postgres_url, "p"), 1000, ALL),
        (of_table(postgres_url, "parent"), 1000, ALL),
        (of_query(postgres_url, "SELECT * FROM t"), 1000, ALL),
        (of_query(postgres_url, "SELECT * FROM nulls", "k"), 1000, ALL),
        (of_query(postgres_url, "SELECT * FROM same", "k"), 1000, ALL),
        (of_table(postgres_url, "empty", "i"), 1, []),
    ):
        with cut(source, shard_rows=shard_rows) as plan:
            assert len(plan.shards) == 1
            assert plan.anchor is None
            wait_until(lambda: sessions(run) == 0)
            assert flat(read_all(source, plan)) == rows


def test_blocks_win_over_a_key(run: Run, postgres_url: str) -> None:
    run(TABLE)
    with cut(of_table(postgres_url, key="i")) as plan:
        assert "column" not in range_of(plan.shards[0])


def test_a_filter_that_an_index_answers_is_cut_by_key_or_not_at_all(
    run: Run, postgres_url: str
) -> None:
    run(
        "CREATE TABLE t AS SELECT i, repeat('x', 40) AS s FROM generate_series(1, 40000) i;"
        "CREATE INDEX ON t (i); VACUUM ANALYZE t"
    )
    query = Query(("i",), (Filter("i", FilterOperator.LESS_OR_EQUAL, (2000,)),))
    source = of_table(postgres_url)
    with cut(source, query, 500) as plan:
        assert len(plan.shards) == 1
        assert len(read_all(source, plan, query)[0]) == 2000
    source = of_table(postgres_url, key="i")
    with cut(source, query, 500) as plan:
        assert 4 <= len(plan.shards) <= 5
        assert range_of(plan.shards[0])["column"] == "i"
        pieces = read_all(source, plan, query)
        assert [i for (i,) in flat(pieces)] == list(range(1, 2001))
        assert max(map(len, pieces)) <= 600


def weak_url(url: str) -> str:
    return url.replace("postgres@", "weak@")


@pytest.fixture
def weak(run: Run) -> Iterator[Run]:
    """A role that may read t and little else."""
    run("DROP ROLE IF EXISTS weak; CREATE ROLE weak LOGIN")
    run(f"{TABLE} GRANT SELECT ON t TO weak")
    yield run
    run("DROP OWNED BY weak; DROP ROLE weak")


def test_the_settings_of_a_role_do_not_change_how_it_is_cut(
    weak: Run, postgres_url: str
) -> None:
    url = weak_url(postgres_url)
    weak(
        "ALTER ROLE weak SET idle_in_transaction_session_timeout = '150ms';"
        "ALTER ROLE weak SET transaction_timeout = '10s';"
        "ALTER ROLE weak SET default_transaction_isolation = 'serializable';"
        "ALTER ROLE weak SET default_transaction_deferrable = on;"
        "ALTER ROLE weak SET enable_tidscan = off;"
        "ALTER ROLE weak SET lock_timeout = '1ms';"
        "ALTER ROLE weak SET statement_timeout = '5s';"
    )
    source = of_table(url)
    with cut(source) as plan, psycopg.connect(url) as other:
        assert len(plan.shards) == 4
        other.execute("SELECT 1")
        assert weak(HOLDERS).count("\n") == 2
        wait_until(lambda: weak(HOLDERS).count("\n") == 1)
        assert flat(read_all(source, plan)) == ALL
        assert read(source, plan.shards[0], skip_rows=1)
        other.close()


def test_a_role_without_the_rights_is_given_one_shard(weak: Run, postgres_url: str) -> None:
    source = of_table(weak_url(postgres_url))
    with cut(source) as plan:
        assert len(plan.shards) == 4
    weak("REVOKE EXECUTE ON FUNCTION pg_export_snapshot() FROM PUBLIC")
    with cut(source) as plan:
        assert len(plan.shards) == 1
        assert plan.anchor is None
        assert flat(read_all(source, plan)) == ALL


def test_row_security_holds_in_every_shard(weak: Run, postgres_url: str) -> None:
    weak(
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY p ON t USING (i % 2 = 0);"
        "CREATE TABLE allowed AS SELECT 7 AS i; GRANT SELECT ON allowed TO weak"
    )
    source = of_table(weak_url(postgres_url))
    with cut(source, shard_rows=5) as plan:
        assert len(plan.shards) > 1
        assert flat(read_all(source, plan)) == ALL[1::2]
    weak("DROP POLICY p ON t; CREATE POLICY p ON t USING (i IN (SELECT i FROM allowed))")
    with cut(source, shard_rows=5) as plan:
        assert len(plan.shards) == 1
        assert flat(read_all(source, plan)) == [ALL[6]]


def test_a_standby_is_cut_too() -> None:
    with running_postgres() as server:
        server.sql(TABLE)
        with standby_of(server) as standby:
            source = of_table(standby.url())
            with cut(source) as plan:
                assert len(plan.shards) == 4
                server.sql("DELETE FROM t WHERE i % 2 = 0")
                wait_until(lambda: standby.sql("SELECT count(*) FROM t") == "2000\n")
                assert flat(read_all(source, plan)) == ALL
                assert plan.anchor is not None
                plan.anchor.close()
                with pytest.raises(SourceChanged):
                    read(source, plan.shards[0])


def test_a_server_that_does_not_answer_is_a_failure_not_one_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running_postgres() as server:
        server.sql(TABLE)
        source = of_table(server.url())
        server.stop("immediate")
        with pytest.raises(SourceFailed):
            source.plan(WHOLE)
        monkeypatch.setattr(source, "_estimate", lambda _: None)
        with pytest.raises(SourceFailed):
            source.plan(WHOLE, shard_rows=1000)


def test_what_a_state_says_never_becomes_sql(run: Run, postgres_url: str) -> None:
    run(f"{TABLE} CREATE VIEW v AS SELECT * FROM t")
    source = of_table(postgres_url, "v", "i")
    evil = "1'::int); DROP VIEW v; --"
    with cut(source) as plan:
        for name in ("from", "to"):
            state = json.loads(plan.shards[1].state)
            state["piece"]["range"][name] = evil
            with pytest.raises(SourceFailed):
                read(source, Shard(1, json.dumps(state)))
        for name in ("id", "holder"):
            state = json.loads(plan.shards[1].state)
            state["piece"]["snapshot"][name] = evil
            with pytest.raises(SourceChanged):
                read(source, Shard(1, json.dumps(state)))
        assert flat(read_all(source, plan)) == ALL


def test_a_guess_that_is_wrong_by_far_makes_no_more_shards_than_there_may_be() -> None:
    """The planner thinks of billions of rows where it knows nothing."""
    assert postgres_shards._pieces(1.5e11, 1) == MOST_SHARDS
    assert postgres_shards._pieces(10.0, 3) == 4
