"""Parquet that Arrow reads without the engine: the same rows, and only where that is
certain."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.encoders.registry import open_encoder
from exportd_server.errors import SourceFailed, ValueNotEncodable
from exportd_server.sources import duckdb, parquet
from exportd_server.sources.base import Filter, FilterOperator, Query, Shard
from exportd_server.sources.batches import Stop
from exportd_server.sources.duckdb import FileSource
from exportd_server.sources.masks import Mask, Masks
from exportd_server.sources.parquet import PlainRows
from tests.support.memory import apart, growing

SCHEMA = pa.schema(
    [
        ("n", pa.int64()),
        ("small", pa.uint8()),
        ("real", pa.float64()),
        ("half", pa.float32()),
        ("flag", pa.bool_()),
        ("text", pa.string()),
        ("bytes", pa.binary()),
        ("amount", pa.decimal128(38, 18)),
        ("day", pa.date32()),
        ("at", pa.timestamp("us", "UTC")),
        ("local", pa.timestamp("us")),
        ("tags", pa.list_(pa.field("element", pa.string()))),
        ("pair", pa.struct([("a", pa.int32()), ("b", pa.list_(pa.float32()))])),
        ("deep", pa.list_(pa.struct([("x", pa.bool_()), ("y", pa.decimal128(5, 2))]))),
    ]
)


def some_rows(rows: int, seed: int = 0) -> pa.Table:
    rng = random.Random(seed)

    def row(number: int) -> dict[str, Any]:
        moment = datetime.fromtimestamp(rng.randrange(2**31), UTC)
        values = {
            "n": number,
            "small": rng.randrange(256),
            "real": rng.choice([rng.random(), float("nan"), float("-inf"), -0.0]),
            "half": rng.randrange(1000) / 4,
            "flag": rng.random() < 0.5,
            "text": rng.choice(["", "häh", "x" * 300, f"t{number}"]),
            "bytes": rng.randbytes(rng.randrange(20)),
            "amount": Decimal(rng.randrange(10**30)).scaleb(-18),
            "day": date.fromordinal(rng.randrange(1, 3_000_000)),
            "at": moment,
            "local": moment.replace(tzinfo=None),
            "tags": rng.choice([[], ["a"], ["", None, "ü"]]),
            "pair": rng.choice([{"a": 1, "b": []}, {"a": None, "b": [0.5, None]}]),
            "deep": rng.choice([[], [None], [{"x": True, "y": Decimal("1.25")}] * 3]),
        }
        missing = rng.sample(sorted(values), rng.randrange(4))
        return {name: None if name in missing else value for name, value in values.items()}

    return pa.Table.from_pylist([row(number) for number in range(rows)], SCHEMA)


def file_source(path: Path, *, settled: bool = True) -> FileSource:
    if settled:
        for each in path.parent.glob(path.name):
            os.utime(each, (1, 1))
    return FileSource("parquet", str(path))


def read(
    source: FileSource, query: Query, shard: Shard | None = None, skip: int = 0
) -> Any:
    shard = shard or source.plan(query).shards[0]
    with source.open(query, shard, skip_rows=skip) as stream:
        return pa.Table.from_batches(list(stream), stream.schema)


def whole(source: FileSource) -> Query:
    return Query(tuple(column.name for column in source.columns()))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The engines that were asked for."""
    asked: list[object] = []
    make = duckdb._engine

    def noting(*arguments: Any, **named: Any) -> Any:
        asked.append(arguments)
        return make(*arguments, **named)

    monkeypatch.setattr(duckdb, "_engine", noting)
    monkeypatch.setattr(duckdb, "_idle", duckdb._Idle(0))
    return asked


def by_the_engine(read_: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainRows, "of", lambda *_: None)
        return read_()


def test_a_query_without_conditions_needs_no_engine(
    tmp_path: Path, engines: list[object]
) -> None:
    pq.write_table(some_rows(500), tmp_path / "a", row_group_size=100)
    source = file_source(tmp_path / "a")
    query = Query(("text", "n", "at"))
    plan = source.plan(query)
    engines.clear()
    found = read(source, query, plan.shards[0])
    assert not engines
    assert found.column_names == ["text", "n", "at"]
    assert found["n"].to_pylist() == some_rows(500)["n"].to_pylist()


@pytest.mark.minutes
@settings(max_examples=25, deadline=None)
@given(
    files=st.lists(
        st.tuples(st.integers(0, 400), st.sampled_from([1, 7, 64, 1000])),
        min_size=1,
        max_size=4,
    ),
    shard_rows=st.one_of(st.none(), st.integers(1, 500)),
    limit=st.one_of(st.none(), st.integers(0, 900)),
    skip=st.floats(0, 1),
    columns=st.permutations(SCHEMA.names).map(lambda names: names[:4]),
    dictionary=st.booleans(),
)
def test_it_gives_what_the_engine_gives(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[int, int]],
    shard_rows: int | None,
    limit: int | None,
    skip: float,
    columns: list[str],
    *,
    dictionary: bool,
) -> None:
    directory = tmp_path_factory.mktemp("same")
    for number, (rows, group) in enumerate(files):
        pq.write_table(
            some_rows(rows, number),
            directory / f"{number}",
            row_group_size=group,
            use_dictionary=dictionary,
            compression="zstd",
        )
    source = file_source(directory / "*")
    query = Query(tuple(columns), (), limit)
    shards = source.plan(query, shard_rows=shard_rows).shards
    # A dozen of them: there may be as many as rows.
    for shard in shards[:: -(-len(shards) // 12)]:
        ours = read(source, query, shard)
        theirs = by_the_engine(partial(read, source, query, shard))
        assert str(ours.to_pydict()) == str(theirs.to_pydict())  # NaN is not itself
        assert ours.schema.equals(theirs.schema, check_metadata=True)
        left = round(skip * ours.num_rows)
        rest = read(source, query, shard, left)
        assert str(rest.to_pydict()) == str(ours.slice(left).to_pydict())


@pytest.mark.parametrize("output", list(Format))
def test_what_is_written_of_it_is_the_same(tmp_path: Path, output: Format) -> None:
    pq.write_table(some_rows(3000), tmp_path / "a", row_group_size=1000)
    source = file_source(tmp_path / "a")
    query = whole(source)

    def written() -> bytes | str:
        data = BytesIO()
        table = read(source, query)
        encoder = open_encoder(OutputFormat(output), table.schema, data)
        for batch in table.combine_chunks().to_batches():
            encoder.write(batch)
        encoder.close()
        if output is Format.ARROW:
            # What lies under a missing value may be anything.
            found = pa.ipc.open_stream(data.getvalue()).read_all()
            return f"{found.schema}{found.to_pydict()}"
        return data.getvalue()

    ours = written()
    assert len(ours) >= 3000
    assert ours == by_the_engine(written)


def test_columns_are_told_as_the_engine_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(some_rows(5), tmp_path / "a")
    ours = file_source(tmp_path / "a").columns()
    monkeypatch.setattr(duckdb, "plain_columns", lambda _: None)
    theirs = file_source(tmp_path / "a").columns()
    assert ours == theirs
    assert [str(each.type) for each in ours] == [str(each.type) for each in theirs]


def test_a_server_on_plain_files_does_not_load_the_engine(tmp_path: Path) -> None:
    """It takes 45 MiB."""
    pq.write_table(some_rows(5), tmp_path / "a.parquet")
    catalogue = tmp_path / "datasets.toml"
    catalogue.write_text('[datasets.d]\nparquet = "a.parquet"\n')
    script = """
    import sys
    from pathlib import Path
    from exportd_server import app
    from exportd_server.errors import SourceFailed
    from exportd_server.sources.base import Query
    from exportd_server.sources.catalogue import load_catalogue
    dataset = load_catalogue(Path(sys.argv[1])).find("d", "default")
    query = Query(tuple(column.name for column in dataset.columns))
    plan = dataset.source.plan(query, shard_rows=2)
    with dataset.source.open(query, plan.shards[0]) as stream:
        assert sum(batch.num_rows for batch in stream) == 5
    with dataset.source.open(query, plan.shards[0]) as stream:
        stream.cancel()
        try:
            list(stream)
        except SourceFailed:
            pass
        else:
            raise AssertionError("a cancelled read went on")
    assert "duckdb" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(catalogue)]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def odd(table: pa.Table, **options: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(table, path, **options)


@pytest.mark.parametrize(
    "write",
    [
        odd(pa.table({"v": pa.array(["a", "b", "a"]).dictionary_encode()})),
        odd(pa.table({"v": pa.array(["a", "b"], pa.large_string())})),
        odd(
            pa.table({"v": pa.array([1, 2], pa.timestamp("ns"))}),
            use_deprecated_int96_timestamps=True,
        ),
        odd(pa.table({"v": pa.array([1, 2], pa.timestamp("us", "Europe/Berlin"))})),
        odd(pa.table({"v": pa.array([1, 2], pa.timestamp("ms"))})),
        odd(pa.table({"v": [[1], [2, 3]]}), use_compliant_nested_type=False),
        odd(pa.table({"v": pa.array([[1], [2]], pa.large_list(pa.int64()))})),
        odd(pa.table({"v": pa.array([[1], [2]], pa.list_(pa.int64(), 1))})),
        odd(pa.table({"v": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))})),
        odd(pa.table({"v": [{"a.b": 1}]})),
        odd(pa.table({"v": pa.array([1, 2], pa.time64("us"))})),
        odd(pa.table({"a.b": [1, 2]})),
        odd(pa.table([pa.array([1]), pa.array([2])], names=["v", "V"])),
        odd(pa.table({"v": pa.array([None, None], pa.null())})),
    ],
    ids=[
        *("dictionary", "large text", "INT96", "time zone", "milliseconds", "old list"),
        *("large list", "list of one", "map", "dot inside", "time of day"),
        *("dot", "letter case", "null"),
    ],
)
def test_a_column_that_is_not_plain_is_the_engines(
    tmp_path: Path, engines: list[object], write: Callable[[Path], None]
) -> None:
    write(tmp_path / "a")
    source = file_source(tmp_path / "a")
    query = whole(source)
    plan = source.plan(query)
    engines.clear()
    found = read(source, query, plan.shards[0])
    assert engines
    assert found.num_rows == pq.read_metadata(tmp_path / "a").num_rows


def test_one_file_of_another_type_makes_all_of_them_the_engines(
    tmp_path: Path, engines: list[object]
) -> None:
    """Its values take on the type that the first one has."""
    pq.write_table(pa.table({"v": pa.array([1, 2], pa.int64())}), tmp_path / "1")
    pq.write_table(pa.table({"v": pa.array([3], pa.int16())}), tmp_path / "2")
    source = file_source(tmp_path / "*")
    engines.clear()
    assert read(source, Query(("v",)))["v"].to_pylist() == [1, 2, 3]
    assert engines


@pytest.mark.parametrize("mask", Mask)
def test_masks_hold(tmp_path: Path, mask: Mask) -> None:
    pq.write_table(some_rows(50), tmp_path / "a")
    masked = file_source(tmp_path / "a").masked(Masks({"text": mask, "n": mask}, "key"))
    query = Query(("n", "text", "flag"))
    ours = read(masked, query)
    assert ours == by_the_engine(lambda: read(masked, query))
    assert ours["text"].to_pylist() != some_rows(50)["text"].to_pylist()


def test_conditions_are_the_engines(tmp_path: Path, engines: list[object]) -> None:
    pq.write_table(some_rows(50), tmp_path / "a")
    source = file_source(tmp_path / "a")
    query = Query(("n",), (Filter("n", FilterOperator.LESS, (3,)),))
    plan = source.plan(query)
    engines.clear()
    assert read(source, query, plan.shards[0]).num_rows <= 3
    assert engines


@pytest.mark.parametrize("damage", ["cut", "scribbled", "gone", "replaced"])
def test_a_file_that_is_damaged_after_it_was_opened_fails_the_read(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "a"
    # Of no pattern, so that what is broken cannot be skipped by luck.
    values = [os.urandom(1000) for _ in range(20_000)]
    pq.write_table(pa.table({"v": values}), path, row_group_size=5_000)
    source = file_source(path)
    query = Query(("v",))
    with source.open(query, source.plan(query).shards[0]) as stream:
        batches = iter(stream)
        next(batches)
        match damage:
            case "cut":
                os.truncate(path, path.stat().st_size // 2)
            case "scribbled":
                with path.open("r+b") as file:
                    file.seek(path.stat().st_size // 2)
                    file.write(bytes(1_000_000))
            case "gone":
                path.unlink()
            case "replaced":
                pq.write_table(pa.table({"v": values[:5]}), tmp_path / "b")
                (tmp_path / "b").rename(path)
        with pytest.raises(SourceFailed):
            list(batches)


def test_cancel_ends_it_at_the_next_batch(tmp_path: Path) -> None:
    values = [os.urandom(1000) for _ in range(20_000)]
    pq.write_table(pa.table({"v": values}), tmp_path / "a")
    source = file_source(tmp_path / "a")
    query = Query(("v",))
    with source.open(query, source.plan(query).shards[0]) as stream:
        batches = iter(stream)
        next(batches)
        stream.cancel()
        with pytest.raises(SourceFailed):
            list(batches)


def test_a_batch_of_wide_rows_is_short(tmp_path: Path) -> None:
    wide = pa.table({"v": [os.urandom(2**20) for _ in range(24)]})
    pq.write_table(wide, tmp_path / "a", use_dictionary=False)
    source = file_source(tmp_path / "a")
    query = Query(("v",))
    with source.open(query, source.plan(query).shards[0]) as stream:
        sizes = [batch.nbytes for batch in stream]
    assert sum(sizes) >= 24 * 2**20
    assert max(sizes) < 6 * 2**20


def test_one_wide_row_makes_no_other_batch_short(tmp_path: Path) -> None:
    schema = pa.schema([("v", pa.string()), ("unread", pa.binary())])
    with pq.ParquetWriter(tmp_path / "a", schema, use_dictionary=False) as writer:
        narrow = {"v": ["x"] * 50_000, "unread": [os.urandom(1000)] * 50_000}
        for group in (narrow, {"v": ["x" * 5_000_000], "unread": [b""]}, narrow):
            writer.write_table(pa.table(group, schema))
    source = file_source(tmp_path / "a")
    query = Query(("v",))
    rows = PlainRows.of([str(tmp_path / "a")], source.columns()[:1], 0, None)
    assert rows is not None
    sizes = [batch.num_rows for batch in rows.batches(Stop())]
    assert sum(sizes) == read(source, query).num_rows == 100_001
    assert len(sizes) < 20


def test_a_limit_looks_at_no_file_that_it_does_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        pq.write_table(some_rows(10), tmp_path / f"{number}")
    source = file_source(tmp_path / "*")
    query = Query(("n",), (), 15)
    plan = source.plan(query)
    opened: list[str] = []
    of = parquet._Footer.of

    def noting(path: str) -> Any:
        opened.append(path)
        return of(path)

    monkeypatch.setattr(parquet._Footer, "of", noting)
    assert read(source, query, plan.shards[0]).num_rows == 15
    assert len(opened) == 2


def test_many_files_are_the_engines(
    tmp_path: Path, engines: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at all their footers takes long, and nobody could stop it."""
    monkeypatch.setattr(parquet, "_MOST_FILES", 3)
    for number in range(4):
        pq.write_table(some_rows(10), tmp_path / f"{number}")
    source = file_source(tmp_path / "*")
    engines.clear()
    assert read(source, Query(("n",))).num_rows == 40
    assert engines


def test_what_is_no_text_is_refused_under_a_mask_too(tmp_path: Path) -> None:
    """Of its hash no encoder can tell."""
    broken = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"v": broken}), tmp_path / "a")
    masked = file_source(tmp_path / "a").masked(Masks({"v": Mask.HASH}, "key"))
    with pytest.raises(ValueNotEncodable) as failed:
        read(masked, Query(("v",)))
    assert failed.value.metadata == {"column": "v"}


@pytest.mark.minutes
def test_a_large_row_group_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    schema = pa.schema([(f"c{number}", pa.binary()) for number in range(8)])
    with pq.ParquetWriter(path, schema, use_dictionary=False, compression="none") as writer:
        group = {name: [os.urandom(32) for _ in range(400_000)] for name in schema.names}
        writer.write_table(pa.table(group, schema), row_group_size=400_000)
    assert pq.read_metadata(path).num_row_groups == 1
    assert path.stat().st_size > 110e6
    assert apart(_grown, path) < 50


def _grown(path: Path) -> float:
    source = file_source(path)
    query = whole(source)
    shard = source.plan(query).shards[0]
    few = Query(query.columns, (), 10)
    read(source, few)  # what is loaded once
    with growing() as growth, source.open(query, shard) as stream:
        assert sum(batch.num_rows for batch in stream) == 400_000
    return growth.mib
