"""What files as a source promise beyond the common contract."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd_server.errors import SourceFailed, ValueNotEncodable
from exportd_server.sources.base import Filter, FilterOperator, Query, SourceChanged
from exportd_server.sources.duckdb import FileSource, write_parquet

LATE = 25_000
"""More rows than are looked at before the columns' types are settled."""


def rows_of(source: FileSource, *names: str, query: Query | None = None) -> list[Any]:
    query = query or Query(names or tuple(c.name for c in source.columns()))
    with source.open(query, source.plan(query).shards[0]) as stream:
        return [row for batch in stream for row in batch.to_pylist()]


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


def test_cancel_stops_a_long_scan_within_a_second(tmp_path: Path) -> None:
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
        begin = time.monotonic()
        stream.cancel()
        thread.join()
        assert time.monotonic() - begin < 1
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


MEASURE = """
import sys, threading, time
import psutil
from exportd_server.sources.base import Query
from exportd_server.sources.duckdb import FileSource

source = FileSource("parquet", sys.argv[1])
process = psutil.Process()
late, peak, done = 0.0, 0, False

def tick():
    global late, peak
    while not done:
        begin = time.perf_counter()
        time.sleep(0.001)
        late = max(late, time.perf_counter() - begin)
        peak = max(peak, process.memory_info().rss)

before = process.memory_info().rss
thread = threading.Thread(target=tick)
thread.start()
query = Query(tuple(column.name for column in source.columns()))
rows = 0
with source.open(query, source.plan(query).shards[0]) as stream:
    for batch in stream:
        rows += batch.num_rows
done = True
thread.join()
print(rows, (peak - before) // 2**20, round(late * 1000))
"""


def test_a_large_file_is_read_in_little_memory_and_without_holding_up_other_threads(
    tmp_path: Path,
) -> None:
    values = "i, md5(i::VARCHAR) AS a, md5((i + 1)::VARCHAR) AS b, (i / 7)::DOUBLE AS c"
    write_parquet(values, "range(5000000) AS r(i)", tmp_path / "large.parquet")
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "large.parquet")],
        check=True,
        capture_output=True,
        text=True,
    )
    rows, growth, late = map(int, measured.stdout.split())
    assert rows == 5_000_000
    assert growth < 150, f"{growth} MiB"
    assert late < 250, f"{late} ms"


def test_a_batch_holds_a_bounded_number_of_bytes(tmp_path: Path) -> None:
    write_parquet("repeat('x', 4096) || i AS s", "range(20000) AS r(i)", tmp_path / "a")
    source = FileSource("parquet", str(tmp_path / "a"))
    query = Query(("s",))
    with source.open(query, source.plan(query).shards[0]) as stream:
        sizes = [batch.nbytes for batch in stream]
    assert sum(sizes) > 80_000_000
    assert max(sizes) < 50_000_000
