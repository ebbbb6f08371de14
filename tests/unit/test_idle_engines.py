"""Engines that read files wait for the next reader of the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd_server.errors import SourceFailed
from exportd_server.sources import duckdb as module
from exportd_server.sources.base import Filter, FilterOperator, Query
from exportd_server.sources.duckdb import FileSource

QUERY = Query(("v",), (Filter("v", FilterOperator.IS_NOT_NULL),))
"""One with a condition: without, no engine is needed."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[duckdb.DuckDBPyConnection]:
    """The engines that were made, none of which was there before."""
    engines: list[duckdb.DuckDBPyConnection] = []
    make: Callable[..., duckdb.DuckDBPyConnection] = module._engine

    def noted(*arguments: object, **options: object) -> duckdb.DuckDBPyConnection:
        engines.append(make(*arguments, **options))
        return engines[-1]

    monkeypatch.setattr(module, "_engine", noted)
    monkeypatch.setattr(module, "_idle", module._Idle(2))
    return engines


def numbers(folder: Path, name: str, *values: int) -> FileSource:
    pq.write_table(pa.table({"v": values}), folder / f"{name}.parquet")
    source = FileSource("parquet", str(folder / f"{name}.parquet"))
    source.count()  # is remembered; what follows makes engines for reading alone
    return source


def read(source: FileSource) -> list[int]:
    with source.open(QUERY, source.plan(QUERY).shards[0]) as stream:
        return [row["v"] for batch in stream for row in batch.to_pylist()]


def test_the_next_reader_of_the_same_files_makes_no_engine(
    tmp_path: Path, made: list[duckdb.DuckDBPyConnection]
) -> None:
    source = numbers(tmp_path, "a", 1, 2)
    assert read(source) == [1, 2]
    made.clear()
    assert read(source) == [1, 2]
    assert made == []


def test_an_engine_that_waited_reads_what_is_in_the_files_now(
    tmp_path: Path, made: list[duckdb.DuckDBPyConnection]
) -> None:
    source = numbers(tmp_path, "a", 1, 2)
    assert read(source) == [1, 2]
    numbers(tmp_path, "a", 3)
    assert read(source) == [3]


def test_two_readers_at_once_have_an_engine_each(
    tmp_path: Path, made: list[duckdb.DuckDBPyConnection]
) -> None:
    source = numbers(tmp_path, "a", 1)
    read(source)
    made.clear()
    query = QUERY
    shard = source.plan(query).shards[0]
    with source.open(query, shard) as one, source.open(query, shard) as other:
        first, second = iter(one), iter(other)
        assert next(first).num_rows == next(second).num_rows == 1
        assert len(made) == 1


def test_an_engine_whose_reader_stopped_on_the_way_is_not_used_again(
    tmp_path: Path, made: list[duckdb.DuckDBPyConnection]
) -> None:
    source = numbers(tmp_path, "a", *range(100_000))
    made.clear()
    query = QUERY
    with source.open(query, source.plan(query).shards[0]) as stream:
        batches = iter(stream)
        next(batches)
        stream.cancel()
        with pytest.raises(SourceFailed):
            list(batches)
    (stopped,) = made[-1:]
    with pytest.raises(duckdb.ConnectionException):
        stopped.execute("SELECT 1")
    made.clear()
    assert len(read(source)) == 100_000
    assert len(made) == 1


def test_an_engine_that_gave_much_is_closed_and_with_it_goes_what_that_took(
    tmp_path: Path, made: list[duckdb.DuckDBPyConnection]
) -> None:
    source = numbers(tmp_path, "a", *range(module._LITTLE // 8 + 1))
    made.clear()
    read(source)
    (used,) = made
    with pytest.raises(duckdb.ConnectionException):
        used.execute("SELECT 1")


def test_an_engine_reads_no_other_files_than_those_it_was_made_for(
    tmp_path: Path, made: list[duckdb.DuckDBPyConnection]
) -> None:
    one, other = numbers(tmp_path, "a", 1), numbers(tmp_path, "b", 2)
    assert read(one) == [1]
    made.clear()
    assert read(other) == [2]
    assert len(made) == 1


def test_only_the_last_few_engines_are_kept(
    tmp_path: Path, made: list[duckdb.DuckDBPyConnection]
) -> None:
    sources = [numbers(tmp_path, name, 1) for name in "abc"]
    made.clear()
    for source in sources:
        read(source)
    oldest, *kept = made[-3:]
    with pytest.raises(duckdb.ConnectionException):
        oldest.execute("SELECT 1")
    for engine in kept:
        assert engine.execute("SELECT 1").fetchone() == (1,)
        engine.close()
