"""What every source promises, shown by each of them over the same table."""

from __future__ import annotations

import contextlib
import json
import operator
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exportd_server.errors import SourceFailed
from exportd_server.sources.base import (
    Filter,
    FilterOperator,
    Plan,
    Query,
    Scalar,
    Shard,
    Source,
    SourceChanged,
)
from tests.support import holders
from tests.support.holders import SCHEMA, TEXTS, Holder
from tests.support.waits import ENOUGH

O = FilterOperator  # noqa: E741 - reads well in a long table
KINDS = ("parquet", "csv", "json", "sqlite", "postgres")


def make(kind: str, request: pytest.FixtureRequest) -> Holder:
    if kind == "postgres":
        return holders.hold_postgres(request.getfixturevalue("postgres"))
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    maker: Callable[..., Holder] = getattr(holders, f"hold_{kind}")
    return maker(factory.mktemp(kind))


@pytest.fixture(scope="module", params=KINDS)
def holder(request: pytest.FixtureRequest) -> Holder:
    """A source of each kind, which no test changes."""
    return make(request.param, request)


@pytest.fixture(params=KINDS)
def own_holder(request: pytest.FixtureRequest) -> Holder:
    """A source of each kind, to be changed."""
    return make(request.param, request)


def read(source: Source, query: Query, *, skip_rows: int = 0) -> list[dict[str, Any]]:
    plan = source.plan(query)
    rows: list[dict[str, Any]] = []
    for shard in plan.shards:
        with source.open(query, shard, skip_rows=skip_rows) as stream:
            for batch in stream:
                assert batch.schema == stream.schema
                rows += batch.to_pylist()
    return rows


def test_rows_come_loose_as_they_come_otherwise(holder: Holder) -> None:
    """Where nothing is wrong, a stream that would tell what is gives the same rows."""
    query = Query(holder.columns)
    (shard,) = holder.source.plan(query).shards
    for skip in (0,) if holder.kind == "postgres" else (0, 3):
        with holder.source.open(query, shard, skip_rows=skip) as stream:
            strict = pa.Table.from_batches(list(stream), stream.schema)
        with holder.source.open(query, shard, skip_rows=skip) as stream:
            batches = list(stream.loose())
            assert not any(batch.misfits() for batch in batches)
            loose = pa.Table.from_batches([b.fit() for b in batches], stream.schema)
        assert loose.equals(strict)
        assert strict.num_rows


def test_every_row_comes_back_in_order_with_its_exact_values(holder: Holder) -> None:
    query = Query(holder.columns)
    (shard,) = holder.source.plan(query).shards
    with holder.source.open(query, shard) as stream:
        types = [SCHEMA.field(name).type for name in holder.columns]
        assert stream.schema.types == types
        found = pa.Table.from_batches(list(stream), stream.schema).to_pylist()
    expected = [{name: row[name] for name in holder.columns} for row in holder.rows]
    assert found == expected
    if holder.kind == "sqlite":
        return  # it stores whole floats as integers, so minus zero is lost on the way in
    assert [repr(row["score"]) for row in found] == [repr(r["score"]) for r in expected]


def test_the_columns_are_told_before_anything_is_read(holder: Holder) -> None:
    found = {column.name: column.type for column in holder.source.columns()}
    assert {name: found[name] for name in holder.columns} == {
        name: SCHEMA.field(name).type for name in holder.columns
    }


def test_columns_come_in_the_order_asked_for(holder: Holder) -> None:
    rows = read(holder.source, Query(("name", "id"), limit=50))
    assert [list(row) for row in rows] == [["name", "id"]] * 50
    assert rows == [{"name": r["name"], "id": r["id"]} for r in holder.rows[:50]]


def test_a_limit_is_exact(holder: Holder) -> None:
    for limit in (1, 7, 239, 240, 241):
        query = Query(("id",), limit=limit)
        assert len(read(holder.source, query)) == min(limit, 240)
        estimate = holder.source.plan(query).estimated_rows
        assert estimate is None or estimate <= limit


def test_a_query_that_matches_nothing_gives_no_batch_with_rows(holder: Holder) -> None:
    query = Query(("id",), (Filter("name", O.EQUAL, ("no such name",)),))
    assert read(holder.source, query) == []


MOMENT = datetime(2020, 1, 3, 4, 0, 0, 52 * 1001, tzinfo=UTC)
CASES: dict[str, list[tuple[Scalar, ...]]] = {
    "big": [(0,), (2**63 - 1,), (-(2**63),), (2**53 + 1,), (0, 1, 2**53 + 1)],
    "small": [(0,), (2**31 - 1,), (2**40,), (-1, 7)],
    "score": [(0.0,), (0.1,), (0.1 + 0.2,), (5e-324,), (float("inf"),), (0.1, 1e308)],
    "flag": [(True,), (False,)],
    "born": [(date(2000, 1, 28),), (date(2000, 1, 28), date(2001, 1, 5))],
    "seen": [(MOMENT,), (datetime(2020, 1, 2, tzinfo=UTC),)],
    "amount": [(Decimal("0.0001"),), (Decimal("-12.5"),)],
    "data": [(b"",), (b"\x00",), (bytes(3), b"")],
    "name": [
        ("a",),
        ("",),
        ("%",),
        ("_",),
        ("'",),
        ("\\",),
        ("nai\u0308ve",),
        ("\u00a0",),
        ("it's", "A", "日本語", "😀"),
    ],
}
COMPARE: dict[FilterOperator, Callable[[Any, Any], bool]] = {
    O.EQUAL: operator.eq,
    O.NOT_EQUAL: operator.ne,
    O.LESS: operator.lt,
    O.LESS_OR_EQUAL: operator.le,
    O.GREATER: operator.gt,
    O.GREATER_OR_EQUAL: operator.ge,
    O.STARTS_WITH: lambda value, start: value.startswith(start),
    O.CONTAINS: lambda value, part: part in value,
}


def holds(condition: Filter, value: Any) -> bool:
    """The meaning of a condition, in Python."""
    match condition.operator:
        case O.IS_NULL:
            return value is None
        case O.IS_NOT_NULL:
            return value is not None
        case O.IN:
            return value is not None and value in condition.values
        case O.NOT_IN:
            return value is not None and value not in condition.values
        case single:
            return value is not None and COMPARE[single](value, condition.values[0])


def conditions(column: str, operators: tuple[FilterOperator, ...]) -> Iterator[Filter]:
    for each in operators:
        if each in (O.IS_NULL, O.IS_NOT_NULL):
            yield Filter(column, each)
            continue
        many = each in (O.IN, O.NOT_IN)
        whole = each in (O.EQUAL, O.IN, O.STARTS_WITH, O.CONTAINS)
        for values in CASES[column][: None if whole else 2]:
            yield Filter(column, each, values if many else values[:1])


@pytest.mark.parametrize("column", [name for name in SCHEMA.names if name != "id"])
def test_a_filter_matches_exactly_the_rows_it_means(holder: Holder, column: str) -> None:
    known = {each.name: each for each in holder.source.columns()}
    if column not in holder.columns:
        pytest.skip(f"{holder.kind} cannot hold {column}")
    operators = known[column].operators
    assert operators or (holder.kind, column) == ("sqlite", "amount")
    matched = 0
    for condition in conditions(column, operators):
        expected = [row["id"] for row in holder.rows if holds(condition, row[column])]
        found = read(holder.source, Query(("id",), (condition,)))
        assert sorted(row["id"] for row in found) == expected, condition
        matched += len(expected)
    assert matched or not operators


def test_conditions_must_all_hold(holder: Holder) -> None:
    both = (
        Filter("flag", O.EQUAL, (True,)),
        Filter("score", O.GREATER, (0.05,)),
        Filter("score", O.LESS, (1e308,)),
        Filter("name", O.NOT_IN, ("a", "A")),
    )
    expected = [
        row["id"] for row in holder.rows if all(holds(c, row[c.column]) for c in both)
    ]
    found = read(holder.source, Query(("id",), both))
    assert sorted(row["id"] for row in found) == expected
    assert expected


def test_a_thousand_values_fit_into_a_condition(holder: Holder) -> None:
    values = (*(f"x{number}" for number in range(999)), "it's")
    found = read(holder.source, Query(("name",), (Filter("name", O.IN, values),)))
    assert {row["name"] for row in found} == {"it's"}
    floats = (*(number / 7 for number in range(999)), 0.1)
    found = read(holder.source, Query(("score",), (Filter("score", O.IN, floats),)))
    assert 0.1 in {row["score"] for row in found}


ATTACK = st.one_of(
    st.sampled_from(TEXTS),
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    st.lists(
        st.sampled_from(["'", '"', "\\", "--", ";", "/*", "*/", "$$", "%", "_", "\n", "?"]),
        max_size=6,
    ).map("".join),
)


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(value=ATTACK, kind=st.sampled_from([O.EQUAL, O.STARTS_WITH, O.CONTAINS, O.LESS]))
def test_sql_in_a_filter_value_is_data(
    holder: Holder, value: str, kind: FilterOperator
) -> None:
    condition = Filter("name", kind, (value,))
    expected = [row["id"] for row in holder.rows if holds(condition, row["name"])]
    found = read(holder.source, Query(("id",), (condition,)))
    assert sorted(row["id"] for row in found) == expected


def test_text_that_sql_cannot_carry_is_refused_before_it_is_sent(holder: Holder) -> None:
    for value in ("a\0b", "\ud800"):
        with pytest.raises(ValueError):
            read(holder.source, Query(("id",), (Filter("name", O.EQUAL, (value,)),)))


def test_reading_goes_on_where_an_earlier_attempt_ended(holder: Holder) -> None:
    query = Query(("id", "name"), (Filter("flag", O.EQUAL, (True,)),), limit=40)
    (shard,) = holder.source.plan(query).shards
    with holder.source.open(query, shard) as stream:
        whole = [row for batch in stream for row in batch.to_pylist()]
    if holder.kind == "postgres":
        # Another snapshot may hold other rows.
        with pytest.raises(SourceChanged):
            holder.source.open(query, shard, skip_rows=1)
        return
    for skip in (1, 17, 40):
        with holder.source.open(query, shard, skip_rows=skip) as stream:
            rest = [row for batch in stream for row in batch.to_pylist()]
        assert rest == whole[skip:]


def test_rows_are_not_skipped_in_data_that_changed(own_holder: Holder) -> None:
    query = Query(("id",))
    (shard,) = own_holder.source.plan(query).shards
    own_holder.touch()
    with pytest.raises(SourceChanged):
        own_holder.source.open(query, shard, skip_rows=10)


def test_data_that_may_yet_change_unseen_is_not_gone_on_with(own_holder: Holder) -> None:
    own_holder.touch()  # the modification time is now: another change might not move it
    query = Query(("id",))
    (shard,) = own_holder.source.plan(query).shards
    with pytest.raises(SourceChanged):
        own_holder.source.open(query, shard, skip_rows=10)
    with own_holder.source.open(query, shard) as stream:
        assert sum(batch.num_rows for batch in stream) >= 240


def test_a_stream_that_was_cancelled_before_it_began_gives_nothing(holder: Holder) -> None:
    query = Query(("id",))
    with holder.source.open(query, holder.source.plan(query).shards[0]) as stream:
        stream.cancel()
        with pytest.raises(SourceFailed):
            list(stream)


def test_a_stream_that_is_left_in_the_middle_frees_its_threads(holder: Holder) -> None:
    before = threading.active_count()
    query = Query(holder.columns)
    with holder.source.open(query, holder.source.plan(query).shards[0]) as stream:
        next(iter(stream))
    deadline = time.monotonic() + ENOUGH
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_several_threads_read_at_once(holder: Holder) -> None:
    query = Query(("id",))
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(len(read(holder.source, query))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [240] * 4


def test_the_rows_are_estimated_where_the_source_can_tell(holder: Holder) -> None:
    estimate = holder.source.plan(Query(("id",))).estimated_rows
    assert estimate == holder.source.count()
    if holder.kind == "parquet":
        assert estimate == 240
        assert holder.source.plan(Query(("id",), limit=10)).estimated_rows == 10
    elif holder.kind == "postgres":
        assert estimate is not None
    else:
        assert estimate is None


CUTS = (1, 7, 17, 50, 120, 240, 10_000)
"""Rows of a shard. The table has 240, in files of 80."""

SOME = {
    "all": (),
    "half": (Filter("flag", O.EQUAL, (True,)),),
    "few": (Filter("id", O.IN, (3, 79, 80, 81, 239)),),
    "one shard's": (Filter("id", O.GREATER, (200,)),),
    "none": (Filter("name", O.EQUAL, ("no such name",)),),
}


@contextlib.contextmanager
def cut(source: Source, query: Query, shard_rows: int) -> Iterator[Plan]:
    """A plan of shards, readable until this is left."""
    plan = source.plan(query, shard_rows=shard_rows)
    try:
        yield plan
    finally:
        if plan.anchor is not None:
            plan.anchor.close()


def read_shard(
    source: Source, query: Query, shard: Shard, *, skip_rows: int = 0
) -> list[dict[str, Any]]:
    with source.open(query, shard, skip_rows=skip_rows) as stream:
        return [row for batch in stream for row in batch.to_pylist()]


def read_shards(source: Source, query: Query, plan: Plan) -> list[dict[str, Any]]:
    return [row for each in plan.shards for row in read_shard(source, query, each)]


def by_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: int(row["id"]))


@pytest.mark.parametrize(
    ("wanted", "shard_rows"),
    [(wanted, rows) for wanted in SOME for rows in (CUTS if wanted == "all" else (7, 120))],
)
def test_shards_together_give_each_row_of_the_uncut_table_once(
    holder: Holder, wanted: str, shard_rows: int
) -> None:
    query = Query(("id", "name", "seen"), SOME[wanted])
    uncut = read(holder.source, query)
    assert [row["id"] for row in by_id(uncut)] == [
        row["id"]
        for row in holder.rows
        if all(holds(each, row[each.column]) for each in query.filters)
    ]
    with cut(holder.source, query, shard_rows) as plan:
        assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
        assert by_id(read_shards(holder.source, query, plan)) == by_id(uncut)


@pytest.mark.parametrize("shard_rows", CUTS)
def test_there_are_not_many_more_shards_than_asked_for(
    holder: Holder, shard_rows: int
) -> None:
    with cut(holder.source, Query(("id",)), shard_rows) as plan:
        assert 1 <= len(plan.shards) <= 2 * -(-240 // shard_rows)
        if shard_rows == max(CUTS):
            assert len(plan.shards) == 1


def test_a_table_is_cut_only_on_request_and_never_under_a_limit(holder: Holder) -> None:
    whole, some = Query(("id",)), Query(("id",), limit=200)
    for plan in (
        holder.source.plan(whole),
        holder.source.plan(whole, shard_rows=None),
        holder.source.plan(some, shard_rows=1),
    ):
        assert len(plan.shards) == 1
        assert plan.anchor is None
    with cut(holder.source, some, 1) as plan:
        assert len(read_shards(holder.source, some, plan)) == 200


def test_cutting_does_not_change_what_is_estimated(holder: Holder) -> None:
    for wanted in SOME.values():
        query = Query(("id",), wanted)
        with cut(holder.source, query, 17) as plan:
            assert plan.estimated_rows == holder.source.plan(query).estimated_rows


def test_shards_may_be_read_in_any_order_and_all_at_once(holder: Holder) -> None:
    query = Query(holder.columns)
    with cut(holder.source, query, 17) as plan, ThreadPoolExecutor(4) as pool:
        expected = [read_shard(holder.source, query, shard) for shard in plan.shards]
        found = list(
            pool.map(
                lambda shard: read_shard(holder.source, query, shard),
                reversed(plan.shards),
            )
        )
        assert found[::-1] == expected


def test_a_shard_is_all_in_its_state(holder: Holder) -> None:
    query = Query(("id",))
    with cut(holder.source, query, 17) as plan:
        for shard in plan.shards:
            again = Shard(shard.index, json.dumps(json.loads(shard.state)))
            assert read_shard(holder.source, query, again) == read_shard(
                holder.source, query, shard
            )


def test_each_shard_goes_on_where_an_earlier_attempt_ended(holder: Holder) -> None:
    for wanted in ("all", "half", "one shard's"):
        query = Query(("id", "name"), SOME[wanted])
        with cut(holder.source, query, 50) as plan:
            for shard in plan.shards:
                whole = read_shard(holder.source, query, shard)
                for skip in {1, len(whole) // 2, len(whole)} - {0}:
                    try:
                        rest = read_shard(holder.source, query, shard, skip_rows=skip)
                    except SourceChanged:
                        # A snapshot of its own may hold other rows.
                        assert holder.kind == "postgres"
                    else:
                        assert rest == whole[skip:]


def test_shards_give_the_state_that_their_plan_saw_or_say_that_it_is_gone(
    own_holder: Holder,
) -> None:
    query = Query(("id", "name"))
    with cut(own_holder.source, query, 17) as plan:
        if len(plan.shards) == 1:
            pytest.skip(f"{own_holder.kind} is one shard")
        before = [read_shard(own_holder.source, query, shard) for shard in plan.shards]
        own_holder.touch()
        for shard, rows in zip(plan.shards, before, strict=True):
            for skip in (0, 3):
                with contextlib.suppress(SourceChanged):
                    found = read_shard(own_holder.source, query, shard, skip_rows=skip)
                    assert found == rows[skip:]


def test_shards_are_not_opened_without_their_anchor(holder: Holder) -> None:
    query = Query(("id",))
    with cut(holder.source, query, 17) as plan:
        if plan.anchor is None:
            pytest.skip(f"{holder.kind} needs no anchor")
        first = plan.shards[0]
        with holder.source.open(query, first) as stream:
            batches = iter(stream)
            rows = next(batches).num_rows
            plan.anchor.close()
            plan.anchor.close()
            rows += sum(batch.num_rows for batch in batches)
        assert rows
        for shard in plan.shards:
            with pytest.raises(SourceChanged):
                read_shard(holder.source, query, shard)
