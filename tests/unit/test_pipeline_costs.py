"""What a pipeline costs is counted, not timed: calls of Python, bytes that Arrow allocates
and Python holds, and hand-overs, each held to about what it takes today. A step that was
added for each row, or one more copy of the data, is over its bound by far."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.errors import SourceFailed
from exportd_server.pipeline.budget import Handover
from exportd_server.pipeline.run import PartLimits, ShardRun, ShardTask, Stopped
from exportd_server.platform import malloc
from exportd_server.sources.base import Query, Shard
from exportd_server.sources.batches import BATCH_BYTES, Stop, gather
from exportd_server.sources.duckdb import FileSource
from exportd_server.sources.parquet import PlainRows
from exportd_server.store.base import Buffer, OutputStore
from exportd_server.store.key import JobPrefix, OutputKey
from tests.support.waits import ENOUGH

PREFIX = JobPrefix("acme", "0197c1f0-7a3e-7000-8000-000000000001")
MIB = 2**20
OUTPUTS = {
    "csv": OutputFormat(Format.CSV),
    "csv+gzip": OutputFormat(Format.CSV, Compression.GZIP),
    "jsonl": OutputFormat(Format.JSONL),
    "jsonl+zstd": OutputFormat(Format.JSONL, Compression.ZSTD),
    "parquet": OutputFormat(Format.PARQUET),
    "arrow": OutputFormat(Format.ARROW),
}


def batch(rows: int) -> pa.RecordBatch:
    """Rows of about 200 bytes, of the kinds that exports mostly are of."""
    numbers = pa.array(range(rows), pa.int64())
    hashes = pa.array([f"0x{number:064x}" for number in range(rows)])
    columns = {
        "block": numbers,
        "time": numbers.cast(pa.timestamp("us")).cast(pa.timestamp("us", "UTC")),
        "hash": hashes,
        "account": pa.array([f"0x{number:040x}" for number in range(rows)]),
        "amount": numbers.cast(pa.decimal128(38, 18)),
        "price": numbers.cast(pa.float64()),
        "memo": pa.array([None if row % 3 else "rent, May" for row in range(rows)]),
    }
    return pa.record_batch(columns)


class Batches:
    """A source of batches that are there already; its stream as well."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.batches = batches
        self.schema = batches[0].schema

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return iter(self.batches)

    def cancel(self) -> None:
        pass


@dataclass
class Nowhere:
    """A store whose parts are not kept, only how long each write was."""

    sizes: list[int] = field(default_factory=list)

    def create(self, key: OutputKey) -> Self:
        return self

    def write(self, data: Buffer, /) -> int:
        self.sizes.append(len(data))
        return len(data)

    def finalize(self) -> None:
        pass

    def abort(self) -> None:
        pass


def run(
    source: Any,
    output: OutputFormat,
    store: Nowhere | None = None,
    begins: Callable[[ShardRun], None] = lambda _: None,
) -> Nowhere:
    store = store or Nowhere()
    schema = source.schema if isinstance(source, Batches) else None
    names = schema.names if schema else [column.name for column in source.columns()]
    query = Query(tuple(names))
    shard = Shard(0) if schema else source.plan(query).shards[0]
    task = ShardTask(source, query, shard, output, PartLimits(), PREFIX, token=1)
    own = ShardRun(
        task,
        cast("OutputStore", store),
        commit=lambda _: None,
        check=lambda *_: None,
        max_bytes_in_flight=8 * MIB,
    )
    begins(own)
    own()
    return store


def calls(work: Callable[[], object]) -> int:
    """How many functions Python calls meanwhile, its own and those of libraries, in
    whatever thread."""
    count = itertools.count()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            next(count)

    # What it finds may call functions, and no bound knows when it comes by.
    gc.disable()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        gc.enable()
    return next(count)


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows whenever free memory is given back; just now it was."""
    times: list[str] = []
    monkeypatch.setattr(malloc, "_releases", malloc._Releases())
    malloc._releases.due_after(0)
    monkeypatch.setattr(malloc, "release_free_memory", lambda: times.append("all"))
    monkeypatch.setattr(malloc, "RELEASE_SECONDS", 1e6)
    return times


def test_small_exports_leave_free_memory_to_the_next_and_large_ones_give_it_back(
    released: list[str],
) -> None:
    small = Batches([batch(1000)])
    for _ in range(20):
        run(small, OUTPUTS["csv"])
    assert not released
    run(Batches([batch(8192)] * 40), OUTPUTS["csv"])
    assert len(released) == 1
    # Whether it goes through at one go or in many exports.
    malloc.release_memory_after(malloc.RELEASE_BYTES - 1)
    run(small, OUTPUTS["csv"])
    assert len(released) == 2


def test_after_a_while_the_next_export_gives_free_memory_back_however_small(
    released: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Batches([batch(1)]), OUTPUTS["csv"])
    assert not released
    monkeypatch.setattr(malloc, "RELEASE_SECONDS", 0.0)
    run(Batches([batch(1)]), OUTPUTS["csv"])
    assert len(released) == 1


@pytest.mark.parametrize("stops", ["fails", "is cancelled"])
def test_a_source_that_ends_before_its_first_row_leaves_no_part(stops: str) -> None:
    made = threading.Event()

    class Ends(Batches):
        def __iter__(self) -> Iterator[pa.RecordBatch]:
            assert made.wait(ENOUGH)
            if stops == "fails":
                raise SourceFailed("it is away")
            runs[0].cancel()
            return iter(())

    class Tells(Nowhere):
        aborted = 0

        def create(self, key: OutputKey) -> Self:
            made.set()
            return self

        def finalize(self) -> None:
            raise AssertionError

        def abort(self) -> None:
            self.aborted += 1

    runs: list[ShardRun] = []
    store = Tells()
    with pytest.raises(SourceFailed if stops == "fails" else Stopped):
        run(Ends([batch(10)]), OUTPUTS["csv"], store, runs.append)
    assert store.aborted == 1


def test_the_first_part_is_made_while_the_source_looks_for_its_first_rows() -> None:
    made = threading.Event()

    class Waits(Batches):
        def __iter__(self) -> Iterator[pa.RecordBatch]:
            assert made.wait(ENOUGH)
            return iter(self.batches)

    class Tells(Nowhere):
        def create(self, key: OutputKey) -> Self:
            made.set()
            return self

    store = run(Waits([batch(10)]), OUTPUTS["csv"], Tells())
    assert sum(store.sizes) > 0


@contextmanager
def allocated() -> Iterator[list[int]]:
    """How many bytes Arrow allocates meanwhile, freed or not; there once it has ended."""
    pool = pa.default_memory_pool()
    before = pool.total_bytes_allocated()
    found: list[int] = []
    yield found
    found.append(pool.total_bytes_allocated() - before)


@pytest.mark.parametrize("name", OUTPUTS)
def test_python_is_called_as_often_for_many_rows_as_for_few(name: str) -> None:
    few, many = Batches([batch(1024)] * 8), Batches([batch(8192)] * 8)
    run(few, OUTPUTS[name])  # what is imported or set up the first time
    more = calls(lambda: run(many, OUTPUTS[name])) - calls(lambda: run(few, OUTPUTS[name]))
    assert more / (8 * (8192 - 1024)) < 0.05


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("csv", 1050),
        ("csv+gzip", 1075),
        ("jsonl", 720),
        ("jsonl+zstd", 770),
        ("parquet", 300),
        ("arrow", 450),
    ],
)
def test_a_batch_takes_so_many_calls_of_python(name: str, most: int) -> None:
    some, twice = Batches([batch(8192)] * 8), Batches([batch(8192)] * 16)
    run(some, OUTPUTS[name])
    more = calls(lambda: run(twice, OUTPUTS[name])) - calls(
        lambda: run(some, OUTPUTS[name])
    )
    assert more / 8 < most


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("csv", 0.8),  # moments become text, and decimals and texts what Polars has
        ("jsonl", 0.8),
        ("parquet", 3.5),  # dictionaries, pages, and pages compressed
        ("arrow", 0.05),
    ],
)
def test_encoding_allocates_so_much_for_each_byte(name: str, most: float) -> None:
    source = Batches([batch(8192)] * 16)
    run(source, OUTPUTS[name])
    with allocated() as found:
        run(source, OUTPUTS[name])
    assert found[0] / sum(each.nbytes for each in source.batches) < most


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("csv", 2.2),  # the text of one batch, 1.4 MiB of it
        ("csv+gzip", 2.7),
        ("jsonl", 2.8),  # here 1.9 MiB
        ("jsonl+zstd", 2.9),
        ("parquet", 0.8),
        ("arrow", 0.8),
    ],
)
def test_python_itself_holds_so_many_mebibytes_at_most(name: str, most: float) -> None:
    source = Batches([batch(8192)] * 8)
    run(source, OUTPUTS[name])
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        run(source, OUTPUTS[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (peak - before) / MIB < most


def test_rows_of_a_file_come_to_the_store_uncopied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.Table.from_batches([batch(8192)] * 16), tmp_path / "rows.parquet")
    source = FileSource("parquet", str(tmp_path / "*.parquet"))
    weights: list[int] = []
    put = Handover.put

    def noted(self: Any, each: Any) -> None:
        weights.append(each.nbytes)
        put(self, each)

    monkeypatch.setattr(Handover, "put", noted)
    run(source, OUTPUTS["arrow"])
    weights.clear()
    with allocated() as found:
        store = run(source, OUTPUTS["arrow"])
    size = sum(weights)
    assert sum(store.sizes) > 0.9 * size > 16 * MIB
    columns = source.columns()
    rows = PlainRows.of([str(tmp_path / "rows.parquet")], columns, 0, None)
    assert rows is not None
    with allocated() as read:
        assert sum(each.num_rows for each in rows.batches(Stop())) == 16 * 8192
    assert (found[0] - read[0]) / size < 0.1
    assert len(weights) / (size / MIB) < 1


def test_small_batches_are_handed_over_together() -> None:
    batches = [batch(64)] * 1000
    weights = [each.nbytes for each in gather(batches)]
    assert len(weights) <= sum(weights) / BATCH_BYTES + 1


def test_large_batches_are_handed_over_as_they_are() -> None:
    large = batch(8192)
    found = list(gather([large, batch(64), large]))
    assert [each.num_rows for each in found] == [8192, 64, 8192]
    addresses = [
        [part and part.address for part in each["hash"].buffers()] for each in found
    ]
    assert (
        addresses[0]
        == addresses[2]
        == [part and part.address for part in large["hash"].buffers()]
    )
