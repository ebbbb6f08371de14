"""What files as a source promise beyond the common contract."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exportd_server.errors import SourceFailed, ValueNotEncodable
from exportd_server.sources.base import (
    Filter,
    FilterOperator,
    Query,
    Shard,
    SourceChanged,
)
from exportd_server.sources.duckdb import FileSource, write_parquet
from exportd_server.sources.files import cut_rows, cut_sizes
from tests.support.memory import apart, growing

LATE = 25_000
"""More rows than are looked at before the columns' types are settled."""


def rows_of(source: FileSource, *names: str, query: Query | None = None) -> list[Any]:
    query = query or Query(names or tuple(c.name for c in source.columns()))
    with source.open(query, source.plan(query).shards[0]) as stream:
        return [row for batch in stream for row in batch.to_pylist()]


def rows_of_shards(
    source: FileSource, query: Query, shard_rows: int
) -> list[list[dict[str, Any]]]:
    pieces = []
    for shard in source.plan(query, shard_rows=shard_rows).shards:
        with source.open(query, shard) as stream:
            pieces.append([row for batch in stream for row in batch.to_pylist()])
    return pieces


def write_groups(path: Path, groups: list[int], start: int = 0) -> int:
    """Row groups of so many rows each, numbered from `start`; what comes next."""
    schema = pa.schema([("v", pa.int64()), ("s", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in groups:
            values = list(range(start, start + rows))
            texts = [None if v % 7 == 0 else str(v % 5) for v in values]
            writer.write_table(pa.table({"v": values, "s": texts}, schema))
            start += rows
    return start


def text_file(directory: Path, name: str, *lines: str) -> str:
    path = directory / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, value in (("b", 2), ("a", 1), ("c", 3)):
        pq.write_table(pa.table({"v": [value]}), tmp_path / f"{name}.parquet")
    (tmp_path / "d.parquet").mkdir()
    source = FileSource("parquet", str(tmp_path / "*.parquet"))
    assert rows_of(source) == [{"v": 1}, {"v": 2}, {"v": 3}]


def test_a_whole_number_column_of_csv_is_never_rounded(tmp_path: Path) -> None:
    path = text_file(tmp_path, "a.csv", "n,m", *["1,x"] * LATE, "2.5,x")
    source = FileSource("csv", path)
    assert source.columns()[0].type == pa.int64()
    with pytest.raises(ValueNotEncodable) as failed:
        rows_of(source)
    assert failed.value.metadata == {"column": "n"}
    assert len(rows_of(source, "m")) == LATE + 1
    as_float = FileSource("csv", path, {"n": pa.float64()})
    assert rows_of(as_float, "n")[-1] == {"n": 2.5}


def test_a_late_misfit_of_csv_is_an_error(tmp_path: Path) -> None:
    path = text_file(
        tmp_path, "a.csv", "t", *["2020-01-01 00:00:00"] * LATE, "yesterday evening"
    )
    with pytest.raises(ValueNotEncodable):
        rows_of(FileSource("csv", path))


def test_nothing_of_csv_is_taken_for_a_comment_or_a_preamble(tmp_path: Path) -> None:
    path = text_file(tmp_path, "a.csv", "a,b", "#1,x", '"",y', ",z", "#2,#", "#3,")
    assert rows_of(FileSource("csv", path)) == [
        {"a": "#1", "b": "x"},
        {"a": "", "b": "y"},
        {"a": None, "b": "z"},
        {"a": "#2", "b": "#"},
        {"a": "#3", "b": None},
    ]


def test_another_delimiter_may_be_named(tmp_path: Path) -> None:
    path = text_file(tmp_path, "a.tsv", "a\tb", "1,5\tx")
    source = FileSource("csv", path, delimiter="\t")
    assert rows_of(source) == [{"a": "1,5", "b": "x"}]


def test_a_whole_number_column_of_json_is_never_rounded(tmp_path: Path) -> None:
    path = text_file(tmp_path, "a.jsonl", *['{"n": 1}'] * LATE, '{"n": 2.5}')
    source = FileSource("json", path)
    assert source.columns()[0].type == pa.int64()
    with pytest.raises(ValueNotEncodable) as failed:
        rows_of(source)
    assert failed.value.metadata == {"column": "n"}


def test_a_nested_number_of_json_is_never_rounded(tmp_path: Path) -> None:
    lines = ['{"s": {"n": [1]}, "t": "x"}'] * LATE
    path = text_file(tmp_path, "a.jsonl", *lines, '{"s": {"n": [2.5]}, "t": "x"}')
    source = FileSource("json", path)
    with pytest.raises(ValueNotEncodable) as failed:
        rows_of(source)
    assert failed.value.metadata == {"column": "s"}
    assert len(rows_of(source, "t")) == LATE + 1


def test_many_json_files_are_read(tmp_path: Path) -> None:
    for number in range(60):
        text_file(tmp_path, f"{number:02}.jsonl", f'{{"n": {number}, "s": {{"n": [1]}}}}')
    source = FileSource("json", str(tmp_path / "*.jsonl"))
    assert rows_of(source, "n") == [{"n": number} for number in range(60)]
    assert len(rows_of(source, "s")) == 60
    pieces = rows_of_shards(source, Query(("n",)), 20)
    assert [len(rows) for rows in pieces] == [20, 20, 20]


def test_nested_values_of_json_keep_their_shape(tmp_path: Path) -> None:
    path = text_file(
        tmp_path,
        "a.jsonl",
        '{"s": {"n": [1, null], "name": "x"}, "big": 12345678901234567890}',
        '{"s": null}',
    )
    source = FileSource("json", path)
    assert rows_of(source, "s") == [{"s": {"n": [1, None], "name": "x"}}, {"s": None}]
    nested = {column.name: column for column in source.columns()}["s"]
    assert FilterOperator.EQUAL not in nested.operators


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("'y'::ENUM('x', 'y')", "y"),
        ("INTERVAL 90 MINUTE", "01:30:00"),
        ("'0189a5d0-0000-7000-8000-000000000001'::UUID", None),
    ],
)
def test_a_type_that_arrow_lacks_comes_as_text(
    tmp_path: Path, expression: str, expected: str | None
) -> None:
    write_parquet(f"{expression} AS v", "range(1)", tmp_path / "a.parquet")
    source = FileSource("parquet", str(tmp_path / "a.parquet"))
    (row,) = rows_of(source)
    assert source.columns()[0].type == pa.string()
    assert isinstance(row["v"], str)
    assert expected is None or row["v"] == expected


def test_an_infinite_moment_is_refused(tmp_path: Path) -> None:
    path = text_file(tmp_path, "a.csv", "t", "2020-01-01 00:00:00", "infinity")
    source = FileSource("csv", path, {"t": pa.timestamp("us")})
    with pytest.raises(ValueNotEncodable) as failed:
        rows_of(source)
    assert failed.value.metadata == {"column": "t"}


def test_moments_finer_than_microseconds_keep_every_digit(tmp_path: Path) -> None:
    exact = 1_577_836_800_123_456_789
    table = pa.table({"t": pa.array([exact], pa.int64()).cast(pa.timestamp("ns", "UTC"))})
    pq.write_table(table, tmp_path / "a.parquet")
    source = FileSource("parquet", str(tmp_path / "a.parquet"))
    moment = datetime(2020, 1, 1, 0, 0, 0, 123_456, tzinfo=UTC)
    query = Query(("t",), (Filter("t", FilterOperator.GREATER, (moment,)),))
    with source.open(query, source.plan(query).shards[0]) as stream:
        (batch,) = list(stream)
    digits = batch.column(0).cast(pa.int64()).to_pylist()[0]
    assert digits * {"us": 1000, "ns": 1}[batch.schema.field(0).type.unit] == exact


def test_reading_does_not_begin_on_files_that_changed_since_the_plan(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"v": [1]}), path)
    source = FileSource("parquet", str(tmp_path / "*.parquet"))
    query = Query(("v",))
    (shard,) = source.plan(query).shards
    pq.write_table(pa.table({"v": [2]}), tmp_path / "b.parquet")
    with pytest.raises(SourceChanged):
        source.open(query, shard)
    (tmp_path / "b.parquet").unlink()
    with source.open(query, shard) as stream:
        assert sum(batch.num_rows for batch in stream) == 1


def test_files_that_change_while_they_are_read_fail_the_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet("i", "range(400000) AS r(i)", path)
    source = FileSource("parquet", str(path))
    query = Query(("i",))
    with source.open(query, source.plan(query).shards[0]) as stream:
        batches = iter(stream)
        next(batches)
        os.utime(path, (1, 1))
        with pytest.raises(SourceFailed):
            for _ in batches:
                pass


def test_files_that_went_away_are_told_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"v": [1]}), path)
    source = FileSource("parquet", str(path))
    path.unlink()
    with pytest.raises(SourceFailed) as failed:
        source.plan(Query(("v",)))
    assert str(tmp_path) not in failed.value.message


def test_a_broken_file_is_told_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"v": range(100_000)}), path, compression="zstd")
    source = FileSource("parquet", str(path))
    data = bytearray(path.read_bytes())
    data[1000:20_000] = os.urandom(19_000)
    path.write_bytes(data)
    query = Query(("v",))
    with pytest.raises((SourceFailed, ValueNotEncodable)) as failed:
        rows_of(source, query=query)
    assert str(tmp_path) not in failed.value.message


def test_cancel_stops_a_long_scan_at_once(tmp_path: Path) -> None:
    write_parquet("md5(i::VARCHAR) AS s", "range(200000) AS r(i)", tmp_path / "0.parquet")
    for number in range(1, 400):
        os.link(tmp_path / "0.parquet", tmp_path / f"{number}.parquet")
    source = FileSource("parquet", str(tmp_path / "*.parquet"))
    query = Query(("s",), (Filter("s", FilterOperator.CONTAINS, ("no hash has this",)),))
    errors: list[SourceFailed] = []
    with source.open(query, source.plan(query).shards[0]) as stream:

        def consume() -> None:
            try:
                list(stream)
            except SourceFailed as error:
                errors.append(error)

        thread = threading.Thread(target=consume)
        thread.start()
        while stream._stop._interrupt is None:
            time.sleep(0.001)
        stream.cancel()
        thread.join()
    # Without it the query would have come to its end.
    assert errors


def test_a_path_with_quotes_is_a_path(tmp_path: Path) -> None:
    directory = tmp_path / 'it\'s "odd"; --'
    directory.mkdir()
    pq.write_table(pa.table({"v": [1]}), directory / "a'b.parquet")
    assert rows_of(FileSource("parquet", str(directory / "*.parquet"))) == [{"v": 1}]


def test_a_column_name_with_quotes_is_a_name(tmp_path: Path) -> None:
    name = "a\"b'; DROP TABLE x; --"
    pq.write_table(pa.table({name: ["x"]}), tmp_path / "a.parquet")
    source = FileSource("parquet", str(tmp_path / "a.parquet"))
    query = Query((name,), (Filter(name, FilterOperator.EQUAL, ("x",)),))
    assert rows_of(source, query=query) == [{name: "x"}]


def reading(path: str) -> tuple[int, float, float, float]:
    """Rows of a file, MiB that reading them takes, and the longest time for which
    another thread did not get its turn, with the whole time, in seconds."""
    source = FileSource("parquet", path)
    query = Query(tuple(column.name for column in source.columns()))
    turns, done = [time.perf_counter()], threading.Event()

    def turn() -> None:
        while not done.wait(0.001):
            turns.append(time.perf_counter())

    thread = threading.Thread(target=turn)
    thread.start()
    rows = 0
    with growing() as growth, source.open(query, source.plan(query).shards[0]) as stream:
        for batch in stream:
            rows += batch.num_rows
    done.set()
    thread.join()
    turns.append(time.perf_counter())
    pause = max(after - before for before, after in pairwise(turns))
    return rows, growth.mib, pause, turns[-1] - turns[0]


@pytest.mark.minutes
def test_a_large_file_is_read_in_little_memory_and_without_holding_up_other_threads(
    tmp_path: Path,
) -> None:
    values = "i, md5(i::VARCHAR) AS a, md5((i + 1)::VARCHAR) AS b, (i / 7)::DOUBLE AS c"
    write_parquet(values, "range(2500000) AS r(i)", tmp_path / "large.parquet")
    rows, grown, pause, whole = apart(reading, str(tmp_path / "large.parquet"))
    assert rows == 2_500_000
    # Of the 210 MiB that the rows are. It was 46 of twice as many.
    assert grown < 120
    assert pause < whole / 2


def test_a_batch_holds_a_bounded_number_of_bytes(tmp_path: Path) -> None:
    write_parquet("repeat('x', 4096) || i AS s", "range(20000) AS r(i)", tmp_path / "a")
    source = FileSource("parquet", str(tmp_path / "a"))
    query = Query(("s",))
    with source.open(query, source.plan(query).shards[0]) as stream:
        sizes = [batch.nbytes for batch in stream]
    assert sum(sizes) > 80_000_000
    assert max(sizes) < 50_000_000


def test_a_large_file_is_cut_between_its_row_groups_and_small_ones_are_joined(
    tmp_path: Path,
) -> None:
    start = write_groups(tmp_path / "a", [10, 10, 10, 10, 10])
    for name in "bcdef":
        start = write_groups(tmp_path / name, [5], start)
    write_groups(tmp_path / "g", [100], start)
    source = FileSource("parquet", str(tmp_path / "?"))
    pieces = rows_of_shards(source, Query(("v",)), 20)
    assert [len(rows) for rows in pieces] == [20, 30, 25, 100]
    assert [row["v"] for rows in pieces for row in rows] == list(range(175))


FILES = st.lists(
    st.lists(st.sampled_from([0, 1, 3, 8, 30]), max_size=6), min_size=1, max_size=6
)
CONDITIONS = st.lists(
    st.sampled_from(
        [
            Filter("v", FilterOperator.GREATER_OR_EQUAL, (20,)),
            Filter("v", FilterOperator.LESS, (60,)),
            Filter("v", FilterOperator.IN, (0, 7, 29, 30, 31)),
            Filter("s", FilterOperator.IS_NULL),
            Filter("s", FilterOperator.EQUAL, ("3",)),
            Filter("s", FilterOperator.NOT_EQUAL, ("3",)),
        ]
    ),
    max_size=2,
    unique=True,
)


@settings(max_examples=25, deadline=None)
@given(
    files=FILES,
    shard_rows=st.one_of(st.integers(1, 40), st.integers(40, 10_000)),
    conditions=CONDITIONS,
)
def test_shards_of_any_files_give_the_rows_of_the_uncut_read_in_its_order(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[int]],
    shard_rows: int,
    conditions: list[Filter],
) -> None:
    directory = tmp_path_factory.mktemp("any")
    start = 0
    for number, groups in enumerate(files):
        start = write_groups(directory / f"{number}.parquet", groups, start)
        os.utime(directory / f"{number}.parquet", (1, 1))
    source = FileSource("parquet", str(directory / "*.parquet"))
    query = Query(("s", "v"), tuple(conditions))
    uncut = rows_of(source, query=query)
    assert uncut or conditions or not start
    pieces = rows_of_shards(source, query, shard_rows)
    assert [row for rows in pieces for row in rows] == uncut
    plan = source.plan(query, shard_rows=shard_rows)
    for shard, whole in zip(plan.shards, pieces, strict=True):
        skip = len(whole) // 2
        with source.open(query, shard, skip_rows=skip) as stream:
            assert [row for b in stream for row in b.to_pylist()] == whole[skip:]


@settings(max_examples=300, deadline=None)
@given(files=FILES, rows=st.integers(1, 300))
def test_pieces_are_neither_many_nor_large_nor_empty(
    files: list[list[int]], rows: int
) -> None:
    counts = [sum(groups) for groups in files]
    pieces = cut_rows(counts, rows, files.__getitem__)
    sizes = []
    for piece in pieces:
        if piece.rows is None:
            sizes.append(sum(counts[piece.first : piece.last]))
        else:
            assert piece.last == piece.first + 1
            sizes.append(piece.rows[1] - piece.rows[0])
    assert sum(sizes) == sum(counts)
    assert len(pieces) == 1 or 0 not in sizes
    largest_group = max((group for groups in files for group in groups), default=0)
    assert max(sizes) <= 1.5 * rows + max(1.5 * rows, largest_group)
    assert len(pieces) <= 2 * sum(counts) / rows + 2
    whole = cut_sizes(counts, rows)
    assert sum(sum(counts[piece.first : piece.last]) for piece in whole) == sum(counts)
    assert all(piece.rows is None for piece in whole)


def test_a_shard_reads_its_own_row_groups_and_no_others(tmp_path: Path) -> None:
    """All other row groups are broken, so that reading one of them would fail."""
    path = tmp_path / "a.parquet"
    rng = random.Random(1)
    table = pa.table({"v": [rng.randbytes(500).hex() for _ in range(4000)]})
    pq.write_table(table, path, row_group_size=1000, compression="zstd")
    footer = pq.read_metadata(path)
    source = FileSource("parquet", str(path))
    healthy = path.read_bytes()
    for own in range(4):
        data = bytearray(healthy)
        for other in {0, 1, 2, 3} - {own}:
            column = footer.row_group(other).column(0)
            start = column.dictionary_page_offset or column.data_page_offset
            end = start + column.total_compressed_size
            data[start:end] = bytes(end - start)
        path.write_bytes(data)
        query = Query(("v",))
        shards = source.plan(query, shard_rows=1000).shards
        assert len(shards) == 4
        with source.open(query, shards[own]) as stream:
            found = pa.Table.from_batches(list(stream), stream.schema)
        assert found.equals(table.slice(own * 1000, 1000))
        with (
            pytest.raises((SourceFailed, ValueNotEncodable)),
            source.open(query, shards[own - 1]) as stream,
        ):
            list(stream)


OPEN = """
import json, sys
from exportd_server.sources.base import Query, Shard
from exportd_server.sources.duckdb import FileSource

source = FileSource("parquet", sys.argv[1])
query = Query(("v",))
with source.open(query, Shard(int(sys.argv[2]), sys.argv[3]), skip_rows=2) as stream:
    print(json.dumps([row["v"] for batch in stream for row in batch.to_pylist()]))
"""


def test_a_shard_is_opened_by_another_process_than_the_one_that_planned_it(
    tmp_path: Path,
) -> None:
    start = write_groups(tmp_path / "a.parquet", [10, 10])
    write_groups(tmp_path / "b.parquet", [10, 10], start)
    for name in "ab":
        os.utime(tmp_path / f"{name}.parquet", (1, 1))
    pattern = str(tmp_path / "*.parquet")
    plan = FileSource("parquet", pattern).plan(Query(("v",)), shard_rows=10)
    assert len(plan.shards) == 4
    shard = plan.shards[3]
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, pattern, str(shard.index), shard.state],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(opened.stdout) == list(range(32, 40))


def test_no_shard_is_opened_once_any_file_changed_since_the_plan(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [10, 10])
    write_groups(tmp_path / "b.parquet", [10, 10], 20)
    source = FileSource("parquet", str(tmp_path / "*.parquet"))
    query = Query(("v",))
    shards = source.plan(query, shard_rows=10).shards
    with source.open(query, shards[0]) as stream:
        assert sum(batch.num_rows for batch in stream) == 10
    for shard in shards:
        with pytest.raises(SourceChanged):  # the files are too young to be sure of
            source.open(query, shard, skip_rows=1)
    os.utime(tmp_path / "b.parquet", (1, 1))
    for shard in shards:
        with pytest.raises(SourceChanged):
            source.open(query, shard)


def test_a_shard_fails_when_a_file_of_its_own_changes_while_it_is_read(
    tmp_path: Path,
) -> None:
    for name in "ab":
        write_parquet("i", "range(400000) AS r(i)", tmp_path / f"{name}.parquet")
    source = FileSource("parquet", str(tmp_path / "*.parquet"))
    query = Query(("i",))
    first, second = source.plan(query, shard_rows=400_000).shards
    with source.open(query, first) as one, source.open(query, second) as other:
        begun, begun_too = iter(one), iter(other)
        rows = next(begun).num_rows
        next(begun_too)
        os.utime(tmp_path / "b.parquet", (1, 1))
        assert rows + sum(batch.num_rows for batch in begun) == 400_000
        with pytest.raises(SourceFailed):
            list(begun_too)


def test_the_first_file_rules_the_types_in_every_shard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([1], pa.int32()), "b": ["x"]}), tmp_path / "0")
    pq.write_table(pa.table({"b": [1.0, 2.5], "a": [7, 8]}), tmp_path / "1")
    pq.write_table(pa.table({"a": [9], "b": ["z"], "c": [1]}), tmp_path / "2")
    source = FileSource("parquet", str(tmp_path / "?"))
    query = Query(("a", "b"), (Filter("b", FilterOperator.NOT_EQUAL, ("2.5",)),))
    uncut = rows_of(source, query=query)
    assert uncut == [{"a": 1, "b": "x"}, {"a": 7, "b": "1.0"}, {"a": 9, "b": "z"}]
    pieces = rows_of_shards(source, query, 1)
    assert len(pieces) == 3
    assert [row for rows in pieces for row in rows] == uncut


@pytest.mark.parametrize("name", ["file_row_number", "File_Index"])
def test_columns_named_like_a_rows_place_are_data(tmp_path: Path, name: str) -> None:
    table = pa.table({name: [5, 4, 3, 2, 1, 0]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    source = FileSource("parquet", str(tmp_path / "a.parquet"))
    assert len(source.plan(Query((name,)), shard_rows=1).shards) == 1
    condition = Filter(name, FilterOperator.GREATER, (3,))
    assert rows_of_shards(source, Query((name,), (condition,)), 1) == [
        [{name: 5}, {name: 4}]
    ]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ("2020-01-01", "03/04/2020"),
        ("13/04/2020", "03/04/2020"),
        ("2020-01-01 10:00:00", "03/04/2020 10:00:00"),
        ("13/04/2020 10:00:00", "03/04/2020 10:00:00"),
        ("2020-01-01 10:00:00", "2020-01-02 11:00:00"),
    ],
)
def test_the_first_file_rules_how_dates_are_read_in_every_shard(
    tmp_path: Path, first: str, later: str
) -> None:
    for name, day in (("a", first), ("b", later), ("c", later)):
        text_file(tmp_path, f"{name}.csv", "day,x", f"{day},x")
    source = FileSource("csv", str(tmp_path / "*.csv"))
    query = Query(("day",))
    shards = source.plan(query, shard_rows=1).shards
    assert len(shards) == 3
    try:
        uncut = rows_of(source, query=query)
    except ValueNotEncodable:
        for shard in shards[1:]:
            with (
                pytest.raises(ValueNotEncodable),
                source.open(query, shard) as stream,
            ):
                list(stream)
    else:
        pieces = rows_of_shards(source, query, 1)
        assert [row for rows in pieces for row in rows] == uncut


@pytest.mark.parametrize("file_format", ["csv", "json"])
def test_text_files_are_cut_between_files_by_their_size(
    tmp_path: Path, file_format: Any
) -> None:
    line, header = {"csv": ("{},text", ["n,t"]), "json": ('{{"n": {}, "t": "text"}}', [])}[
        file_format
    ]
    start = 0
    for name, rows in zip("abcdefg", (100, 100, 10, 10, 80, 0, 100), strict=True):
        numbers = range(start + 10_000, start + 10_000 + rows)
        text_file(tmp_path, name, *header, *[line.format(n) for n in numbers])
        start += rows
    source = FileSource(file_format, str(tmp_path / "?"))
    query = Query(("n",))
    for shard_rows, expected in (
        (1, [100, 100, 100, 100]),
        (100, [100, 100, 100, 100]),
        (200, [200, 200]),
        (1000, [400]),
    ):
        pieces = rows_of_shards(source, query, shard_rows)
        assert [len(rows) for rows in pieces] == expected
        assert [row for rows in pieces for row in rows] == rows_of(source, query=query)


def test_a_plan_of_text_does_not_judge_its_values(tmp_path: Path) -> None:
    text_file(tmp_path, "a.csv", "t,m", *["2020-01-01 00:00:00,x"] * LATE, "yesterday,x")
    text_file(tmp_path, "b.csv", "t,m", *["2020-01-01 00:00:00,x"] * LATE)
    source = FileSource("csv", str(tmp_path / "*.csv"))
    query = Query(("m",))
    for shard_rows, expected in ((1_000_000, [2 * LATE + 1]), (LATE, [LATE + 1, LATE])):
        pieces = rows_of_shards(source, query, shard_rows)
        assert [len(rows) for rows in pieces] == expected


def test_ten_thousand_row_groups_are_planned_quickly(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_groups(path, [300] * 10_000)
    source = FileSource("parquet", str(path))
    query = Query(("v",))
    begin = time.process_time()
    plan = source.plan(query, shard_rows=1)
    # It takes a tenth of a second, and far longer were each group to look at all of them.
    assert time.process_time() - begin < 20
    # Each shard reads the whole footer, which is most of this file: so it is not cut.
    assert len(plan.shards) == 1
    assert plan.estimated_rows == 3_000_000


@pytest.mark.minutes
def test_shards_cost_little_more_than_the_uncut_read(tmp_path: Path) -> None:
    values = "i, md5(i::VARCHAR) AS a, md5((i + 1)::VARCHAR) AS b, (i / 7)::DOUBLE AS c"
    write_parquet(values, "range(2000000) AS r(i)", tmp_path / "a.parquet")
    source = FileSource("parquet", str(tmp_path / "a.parquet"))
    query = Query(("i", "a", "b", "c"))

    def cost(shard_rows: int | None) -> float:
        begin = time.process_time()
        rows = 0
        shards: tuple[Shard, ...] = source.plan(query, shard_rows=shard_rows).shards
        assert len(shards) == (1 if shard_rows is None else 4)
        for shard in shards:
            with source.open(query, shard) as stream:
                rows += sum(batch.num_rows for batch in stream)
        assert rows == 2_000_000
        return time.process_time() - begin

    uncut = min(cost(None) for _ in range(3))
    shards = min(cost(500_000) for _ in range(3))
    # Reading all of the file for each shard would cost four times as much. What a shard
    # adds is an engine's start, of some hundredths of a second.
    assert shards < 2.5 * uncut, f"{uncut} s, {shards} s"
