"""Rows that cannot be exported are kept apart from those that can, whatever the format."""

from __future__ import annotations

import base64
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.encoders.registry import open_encoder
from exportd_server.errors import TooManyRowErrors, ValueNotEncodable
from exportd_server.pipeline.sift import ROW_BYTES, VALUE_BYTES, Sifted, line, sift
from exportd_server.sources.loose import LooseBatch, Shape
from tests.contracts.test_encoders import every_format, every_output
from tests.support.loose import BAD, SCHEMA, SHAPE, good, lines, loose
from tests.support.tables import Collector

PLAIN = [OutputFormat(form) for form in Format]


def written(
    output: OutputFormat, batches: list[pa.RecordBatch], schema: pa.Schema = SCHEMA
) -> bytes:
    sink = Collector()
    encoder = open_encoder(output, schema, sink)
    for batch in batches:
        encoder.write(batch)
    encoder.close()
    return bytes(sink.data)


def sifted(
    output: OutputFormat, batches: list[LooseBatch], schema: pa.Schema = SCHEMA
) -> tuple[bytes, list[Sifted]]:
    sink = Collector()
    encoder = open_encoder(output, schema, sink)
    found = []
    for batch in batches:
        before = bytes(sink.data)
        one = sift(batch, encoder.stage, lambda _: None)
        assert sink.data == before, "nothing is written before it is known to be good"
        one.write()
        found.append(one)
    encoder.close()
    return bytes(sink.data), found


def one_column(
    kind: pa.DataType, values: pa.Array, *, nullable: bool = True
) -> tuple[pa.Schema, LooseBatch]:
    schema = pa.schema(
        [("n", pa.int64()), pa.field("v", kind, nullable=nullable)],
    )
    numbers = pa.array(range(len(values)), pa.int64())
    batch = pa.RecordBatch.from_arrays([numbers, values], names=["n", "v"])
    return schema, LooseBatch(batch, Shape(schema))


@every_output
@pytest.mark.parametrize("column", BAD)
def test_the_good_rows_make_the_bytes_they_would_make_alone(
    output: OutputFormat, column: str
) -> None:
    bad: list[str | None] = [None] * 3000
    for row in (0, 1, 1700, 2999):
        bad[row] = column
    data, (one,) = sifted(output, [loose(0, bad)])
    assert [refused.row for refused in one.refused] == [0, 1, 1700, 2999]
    assert {refused.error.metadata["column"] for refused in one.refused} == {column}
    assert one.rows == 2996
    assert data == written(output, [good(0, bad)])


@every_output
def test_without_bad_rows_it_is_one_attempt_and_the_same_bytes(
    output: OutputFormat,
) -> None:
    bad: list[str | None] = [None] * 5000
    sink = Collector()
    encoder = open_encoder(output, SCHEMA, sink)
    attempts = []

    def stage(batch: pa.RecordBatch) -> Any:
        attempts.append(batch.num_rows)
        return encoder.stage(batch)

    one = sift(loose(0, bad), stage, lambda _: pytest.fail("nothing is bad"))
    one.write()
    encoder.close()
    assert attempts == [5000]
    assert not one.refused
    assert sink.data == written(output, [good(0, bad)])


@every_format
@settings(deadline=None, max_examples=40)
@given(
    batches=st.lists(
        st.lists(st.sampled_from([None, None, None, *BAD]), min_size=1, max_size=30),
        min_size=1,
        max_size=4,
    )
)
def test_every_row_is_either_written_or_refused(
    output: OutputFormat, batches: list[list[str | None]]
) -> None:
    data, found = sifted(output, [loose(100 * i, bad) for i, bad in enumerate(batches)])
    for bad, one in zip(batches, found, strict=True):
        assert one.rows + len(one.refused) == len(bad)
        for refused in one.refused:
            assert bad[refused.row] == refused.error.metadata["column"]
    assert data == written(output, [good(100 * i, bad) for i, bad in enumerate(batches)])


# What only some formats refuse.
TWICE = pa.array(
    [[("k", 1)], [("k", 1), ("k", 2)], [("l", 3)]], pa.map_(pa.string(), pa.int64())
)
LATE = pa.array([0, 10**16, 1], pa.int64()).view(pa.timestamp("s"))


@pytest.mark.parametrize(
    ("values", "refusing"),
    [(TWICE, {Format.CSV, Format.JSONL}), (LATE, {Format.CSV, Format.JSONL, "PARQUET"})],
    ids=["a key twice in a map", "a moment in a far year"],
)
@every_format
def test_what_a_format_refuses_is_refused_by_it_alone(
    output: OutputFormat, values: pa.Array, refusing: set[Format]
) -> None:
    schema, batch = one_column(values.type, values)
    data, (one,) = sifted(output, [batch], schema)
    expected = [1] if output.format in refusing else []
    assert [refused.row for refused in one.refused] == expected
    rows = [row for row in range(3) if row not in expected]
    assert data == written(output, [batch.take(rows).fit()], schema)


@every_format
def test_a_missing_value_where_none_may_be_is_its_rows_fault(output: OutputFormat) -> None:
    schema, batch = one_column(pa.int64(), pa.array([1, None, 3]), nullable=False)
    data, (one,) = sifted(output, [batch], schema)
    assert [refused.row for refused in one.refused] == [1]
    assert data == written(output, [batch.take([0, 2]).fit()], schema)


def test_what_parquet_refuses_as_it_writes_is_found_before() -> None:
    """A row group is written long after its rows were taken."""
    schema, batch = one_column(LATE.type, LATE)
    data, _ = sifted(OutputFormat(Format.PARQUET), [batch, batch], schema)
    assert pq.read_table(io.BytesIO(data)).num_rows == 4


@every_format
def test_a_batch_that_is_not_the_declared_one_is_no_rows_fault(
    output: OutputFormat,
) -> None:
    schema = pa.schema([("v", pa.int64())])
    other = pa.RecordBatch.from_arrays([pa.array([[1]] * 50)], names=["v"])
    encoder = open_encoder(output, schema, Collector())
    with pytest.raises(ValueNotEncodable):
        sift(LooseBatch(other, Shape(schema)), encoder.stage, lambda _: None)


@every_format
def test_the_search_ends_when_too_many_are_found(output: OutputFormat) -> None:
    values = pa.array([None] * 20_000, pa.int64())
    schema, batch = one_column(pa.int64(), values, nullable=False)
    encoder = open_encoder(output, schema, Collector())
    heard = []

    def found(count: int) -> None:
        heard.append(count)
        if count > 10:
            raise TooManyRowErrors(10, count)

    with pytest.raises(TooManyRowErrors):
        sift(batch, encoder.stage, found)
    assert heard[-1] == 11, "it does not go on to the end of the batch"


@pytest.mark.parametrize("compression", Compression)
def test_a_staged_batch_that_is_never_written_leaves_no_trace(
    compression: Compression,
) -> None:
    for form in (Format.CSV, Format.JSONL):
        output = OutputFormat(form, compression)
        sink = Collector()
        encoder = open_encoder(output, SCHEMA, sink)
        encoder.stage(good(0, [None] * 5000))
        encoder.stage(good(7, [None] * 300))()
        encoder.close()
        assert sink.data == written(output, [good(7, [None] * 300)])


# --- how a refused row is told


def told(batch: LooseBatch) -> list[dict[str, Any]]:
    encoder = open_encoder(OutputFormat(Format.CSV), SCHEMA, Collector())
    one = sift(batch, encoder.stage, lambda _: None)
    return lines(b"".join(line(batch, each, 3, 50 + each.row) for each in one.refused))


def test_a_refused_row_is_told_with_what_it_held() -> None:
    rows = told(loose(0, [None, *BAD]))
    assert [row["row"] for row in rows] == [51, 52, 53, 54, 55]
    assert {row["shard"] for row in rows} == {3}
    assert [row["column"] for row in rows] == list(BAD)
    text, small, at, texts, what = (row["values"] for row in rows)
    assert base64.b64decode(text["text"]) == b"\xff\xfe"
    assert rows[0]["base64"] == ["text"]
    assert small["small"] == str(2**31)
    assert at["at"] == str(2**63 - 1), "no calendar has it: the number that is stored"
    assert list(texts) == SCHEMA.names
    assert (what["what"], what["id"], what["texts"]) == ("five", "5", '["fine", "5"]')
    assert not any(row["truncated"] for row in rows)


def test_long_values_are_cut_short_and_many_left_out() -> None:
    names = [f"column_{index}" for index in range(100)]
    schema = pa.schema([(name, pa.string()) for name in names])
    long = "ä" * VALUE_BYTES
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array([long.encode()], pa.binary()).view(pa.string()),
            *[pa.array([long])] * 98,
            pa.array([b"\xff"], pa.binary()).view(pa.string()),
        ],
        names=names,
    )
    wide = LooseBatch(batch, Shape(schema, check_text=True))
    encoder = open_encoder(OutputFormat(Format.JSONL), schema, Collector())
    one = sift(wide, encoder.stage, lambda _: None)
    data = line(wide, one.refused[0], 0, 0)
    (row,) = lines(data)
    assert row["truncated"]
    assert row["column"] == "column_99"
    assert row["values"]["column_0"] == "ä" * (VALUE_BYTES // 2)
    assert not row["base64"], "a character cut in two is still text"
    assert len(row["values"]) < 40
    assert len(data) < 2 * ROW_BYTES


def test_a_value_within_the_bound_is_told_whole() -> None:
    schema = pa.schema([("a", pa.string()), ("b", pa.string())])
    exact = "ä" * (VALUE_BYTES // 2)
    batch = pa.RecordBatch.from_arrays(
        [pa.array([exact]), pa.array([b"\xff"], pa.binary()).view(pa.string())],
        names=["a", "b"],
    )
    whole = LooseBatch(batch, Shape(schema, check_text=True))
    encoder = open_encoder(OutputFormat(Format.JSONL), schema, Collector())
    one = sift(whole, encoder.stage, lambda _: None)
    (row,) = lines(line(whole, one.refused[0], 0, 0))
    assert row["values"]["a"] == exact
    assert not row["truncated"]


def test_the_shape_of_the_fixture_is_what_its_rows_are() -> None:
    assert loose(0, [None] * 3).fit().schema == SCHEMA
    assert SHAPE.schema == SCHEMA
