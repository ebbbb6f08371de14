"""The promise of `encoders.base.Encoder`, held for every format and compression."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from exportd_server.encoders.base import (
    ArrowCompression,
    ArrowOptions,
    Compression,
    Format,
    OutputFormat,
    ParquetCompression,
    ParquetOptions,
)
from exportd_server.encoders.registry import open_encoder, unsupported
from exportd_server.errors import InvalidRequest, StoreFailed, ValueNotEncodable
from tests.support.tables import (
    Collector,
    Table,
    csv_cells,
    decompress,
    encode,
    every_type,
    from_csv,
    from_json,
    joined,
    plain_values,
    same,
    tables,
)

OUTPUTS = [
    *(OutputFormat(Format.CSV, compression) for compression in Compression),
    *(OutputFormat(Format.JSONL, compression) for compression in Compression),
    *(
        OutputFormat(Format.PARQUET, parquet=ParquetOptions(compression=compression))
        for compression in ParquetCompression
    ),
    *(
        OutputFormat(Format.ARROW, arrow=ArrowOptions(compression=compression))
        for compression in ArrowCompression
    ),
]
PLAIN = [OutputFormat(form) for form in Format]


def name_of(output: OutputFormat) -> str:
    inner = {
        Format.PARQUET: output.parquet.compression,
        Format.ARROW: output.arrow.compression,
    }
    return f"{output.format}-{inner.get(output.format, output.compression)}"


every_output = pytest.mark.parametrize("output", OUTPUTS, ids=name_of)
every_format = pytest.mark.parametrize("output", PLAIN, ids=name_of)


def read_back(output: OutputFormat, data: bytes, schema: pa.Schema, path: Path) -> Any:
    """Plain rows of a text file, or the table of a binary one, by somebody else's
    reader."""
    plain = decompress(data, output.compression)
    if output.format is Format.CSV:
        null = "\\N" if len(schema) == 1 else ""
        cells = csv_cells(plain, path, null=null)
        shown = [[null if cell is None else cell for cell in row] for row in cells]
        by_python = list(csv.reader(io.StringIO(plain.decode(), newline="")))
        assert by_python == [schema.names, *shown]
        kinds = schema.types
        return [tuple(map(from_csv, row, kinds)) for row in cells]
    if output.format is Format.JSONL:
        assert not plain or plain.endswith(b"\n")
        rows = []
        for line in plain.split(b"\n")[:-1]:
            record = json.loads(line, parse_constant=pytest.fail)
            assert list(record) == schema.names
            rows.append(tuple(from_json(record[f.name], f.type) for f in schema))
        return rows
    if output.format is Format.PARQUET:
        return pq.read_table(io.BytesIO(plain))
    with pa.ipc.open_stream(plain) as reader:
        return reader.read_all()


def assert_same(output: OutputFormat, table: Table, data: bytes, path: Path) -> None:
    found = read_back(output, data, table.schema, path)
    if output.format in {Format.CSV, Format.JSONL}:
        expected = table.rows
        assert len(found) == len(expected)
        for row, wanted in zip(found, expected, strict=True):
            for value, want, field in zip(row, wanted, table.schema, strict=True):
                assert same(value, want), (field, value, want)
        return
    found.validate(full=True)
    if output.format is Format.ARROW:
        assert found.schema.equals(table.schema, check_metadata=True)
    assert found.num_rows == len(table.rows)
    for field, values in zip(table.schema, table.values, strict=True):
        assert found.schema.field(field.name).nullable == field.nullable
        back = plain_values(found.column(field.name).combine_chunks(), field.type)
        assert same(back, values), field


@every_output
def test_every_type_comes_back_as_it_went_in(output: OutputFormat, tmp_path: Path) -> None:
    table = every_type()
    part = encode(output, table.schema, table.batches())
    assert_same(output, table, part.data, tmp_path / "part")


@pytest.mark.minutes
@every_format
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(table=tables())
def test_any_table_comes_back_as_it_went_in(
    output: OutputFormat, table: Table, tmp_path: Path
) -> None:
    part = encode(output, table.schema, table.batches())
    assert_same(output, table, part.data, tmp_path / "part")


@every_output
def test_joined_parts_are_one_valid_file_and_each_is_valid_alone(
    output: OutputFormat, tmp_path: Path
) -> None:
    table = every_type()
    batches = table.batches()
    groups = [[], batches[:1], [], batches[1:2], batches[2:], []]
    parts = [encode(output, table.schema, group) for group in groups]
    for part, group in zip(parts, groups, strict=True):
        found = read_back(output, part.data, table.schema, tmp_path / "alone")
        rows = found if isinstance(found, list) else range(found.num_rows)
        assert len(rows) == sum(batch.num_rows for batch in group)
    if output.joinable:
        assert_same(output, table, joined(parts), tmp_path / "joined")


TOOLS = {Compression.GZIP: "gzip", Compression.ZSTD: "zstd"}


@pytest.mark.minutes
@pytest.mark.parametrize("form", [Format.CSV, Format.JSONL])
@pytest.mark.parametrize("compression", list(TOOLS))
def test_the_command_line_tool_unpacks_joined_parts(
    form: Format, compression: Compression
) -> None:
    tool = shutil.which(TOOLS[compression])
    if tool is None:
        pytest.skip(f"{TOOLS[compression]} is not installed")
    table = every_type()
    packed = OutputFormat(form, compression)
    parts = [encode(packed, table.schema, [batch]) for batch in table.batches()]
    whole = encode(OutputFormat(form), table.schema, table.batches())
    for data, expected in (
        (joined(parts), whole.data),
        (encode(packed, table.schema, []).data, whole.data[: whole.prefix_bytes]),
    ):
        run = subprocess.run([tool, "-dc"], input=data, capture_output=True, check=True)
        assert run.stdout == expected


@pytest.mark.parametrize("output", [o for o in OUTPUTS if o.joinable], ids=name_of)
def test_the_prefix_is_the_same_in_every_part_and_decodes_alone(
    output: OutputFormat,
) -> None:
    table = every_type()
    full = encode(output, table.schema, table.batches())
    empty = encode(output, table.schema, [])
    prefix = full.data[: full.prefix_bytes]
    assert prefix == empty.data[: empty.prefix_bytes]
    assert full.suffix_bytes == empty.suffix_bytes
    if output.format is Format.CSV:
        header = ",".join(table.schema.names) + "\n"
        assert decompress(prefix, output.compression) == header.encode()
    if output.format is Format.JSONL:
        assert not prefix
    if output.format is Format.ARROW:
        assert pa.ipc.read_schema(pa.py_buffer(prefix)) == table.schema
        end = full.data[len(full.data) - full.suffix_bytes :]
        assert end == b"\xff\xff\xff\xff\0\0\0\0"


@every_output
def test_a_part_without_rows_is_a_valid_file(output: OutputFormat, tmp_path: Path) -> None:
    table = every_type()
    for batches in ([], [table.batches()[0].slice(0, 0)]):
        part = encode(output, table.schema, batches)
        if output.compression is not Compression.NONE:
            assert part.data
        found = read_back(output, part.data, table.schema, tmp_path / "part")
        if isinstance(found, list):
            assert found == []
        else:
            assert found.num_rows == 0
            assert found.schema.names == table.schema.names


@every_output
def test_the_same_rows_make_the_same_bytes(output: OutputFormat) -> None:
    table = every_type()
    first = encode(output, table.schema, table.batches())
    assert encode(output, table.schema, table.batches()) == first


@every_output
def test_bytes_reach_the_sink_as_the_rows_come(output: OutputFormat) -> None:
    schema = pa.schema([("text", pa.string())])
    batch = pa.record_batch([[f"{row:0100x}" for row in range(8192)]], schema=schema)
    sink = Collector()
    encoder = open_encoder(output, schema, sink)
    grown = len(sink.data)
    for _ in range(3):
        encoder.write(batch)
        encoder.flush()
        if output.format is not Format.PARQUET:
            assert len(sink.data) > grown
            assert encoder.buffered_bytes == 0
        grown = len(sink.data)
    held = encoder.buffered_bytes
    encoder.close()
    if output.format is Format.PARQUET:
        # Held back until the row group is full, and owned up to; the footer is extra.
        assert grown + held >= len(sink.data) * 0.9


def bad(values: list[Any], kind: pa.DataType, *, view: pa.DataType) -> pa.Array:
    return pa.array(values, kind).view(view)


BAD_VALUES = {
    "text that is no UTF-8": bad([b"ok", b"\xff\xfe"], pa.binary(), view=pa.string()),
    "text in a list that is no UTF-8": pa.ListArray.from_arrays(
        [0, 1], bad([b"\xff"], pa.binary(), view=pa.string())
    ),
    "a time of day past midnight": bad([86_400_000_000], pa.int64(), view=pa.time64("us")),
    "a date that is no whole day": bad([1], pa.int64(), view=pa.date64()),
}


@every_format
@pytest.mark.parametrize("what", BAD_VALUES)
def test_a_value_that_breaks_its_type_is_an_error_with_its_column(
    output: OutputFormat, what: str
) -> None:
    column = BAD_VALUES[what]
    schema = pa.schema([("good", pa.int64()), ("bad", column.type)])
    encoder = open_encoder(output, schema, Collector())
    batch = pa.record_batch([pa.array(range(len(column))), column], schema=schema)
    with pytest.raises(ValueNotEncodable) as caught:
        encoder.write(batch)
    assert caught.value.metadata == {"column": "bad"}


@every_format
def test_a_missing_value_where_none_may_be_is_an_error(output: OutputFormat) -> None:
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False)])
    encoder = open_encoder(output, schema, Collector())
    with pytest.raises(ValueNotEncodable) as caught:
        encoder.write(pa.record_batch({"id": pa.array([1, None])}))
    assert caught.value.metadata == {"column": "id"}


@every_format
@pytest.mark.parametrize(
    "batch",
    [
        pa.record_batch({"id": pa.array([1], pa.int32())}),
        pa.record_batch({"other": pa.array([1], pa.int64())}),
        pa.record_batch({"id": pa.array([1]), "more": pa.array([1])}),
    ],
    ids=["another type", "another name", "another column"],
)
def test_a_batch_of_another_schema_is_an_error(
    output: OutputFormat, batch: pa.RecordBatch
) -> None:
    encoder = open_encoder(output, pa.schema([("id", pa.int64())]), Collector())
    with pytest.raises(ValueNotEncodable):
        encoder.write(batch)


class FullSink:
    """Takes so many bytes and no more; remembers what came after it had failed."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.failed = False
        self.late = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        if self.failed:
            self.late += 1
        self.room -= len(data)
        if self.room < 0:
            self.failed = True
            raise StoreFailed(full=True)


@every_output
def test_an_error_of_the_sink_comes_through_and_nothing_is_written_after(
    output: OutputFormat,
) -> None:
    table = long_table()
    whole = Collector()
    write_all(output, table, whole)
    size = len(whole.data)
    sinks = []
    for room in (0, 1, size // 2, size - 1):
        sink = FullSink(room)
        with pytest.raises(StoreFailed):
            write_all(output, table, sink)
        assert sink.failed
        sinks.append(sink)
    gc.collect()
    assert not any(sink.late for sink in sinks)


def long_table() -> Table:
    rows = 5000
    values: list[list[Any]] = [
        list(range(rows)),
        [f"{row * 7919:x}" for row in range(rows)],
        [[float(row), math.nan] for row in range(rows)],
    ]
    fields = [("i", pa.int64()), ("t", pa.string()), ("l", pa.list_(pa.float64()))]
    return Table(pa.schema(fields), values, [rows // 2])


def write_all(output: OutputFormat, table: Table, sink: Any) -> None:
    encoder = open_encoder(output, table.schema, sink)
    for batch in table.batches():
        encoder.write(batch)
    encoder.close()


@every_output
def test_an_encoder_that_is_thrown_away_writes_nothing_more(output: OutputFormat) -> None:
    table = every_type()
    sink = Collector()
    encoder = open_encoder(output, table.schema, sink)
    for batch in table.batches():
        encoder.write(batch)
    writes = sink.writes
    del encoder
    gc.collect()
    assert sink.writes == writes


@pytest.mark.parametrize("form", [Format.PARQUET, Format.ARROW])
@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD])
def test_compression_around_a_compressed_format_is_refused(
    form: Format, compression: Compression
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_encoder(
            OutputFormat(form, compression), pa.schema([("a", pa.int64())]), Collector()
        )
    assert [violation.field for violation in caught.value.violations] == ["compression"]


UNION = pa.sparse_union([pa.field("a", pa.int64())])
TWICE = pa.struct([pa.field("x", pa.int64()), pa.field("x", pa.int64())])
UNSUPPORTED: list[tuple[Format, list[tuple[str, pa.DataType]], list[str]]] = [
    (Format.CSV, [("u", UNION)], ["u"]),
    (Format.JSONL, [("u", pa.list_(UNION))], ["u"]),
    (Format.PARQUET, [("u", UNION)], ["u"]),
    (Format.ARROW, [("u", UNION)], []),
    (Format.JSONL, [("a", pa.int64()), ("a", pa.int64())], ["a"]),
    (Format.CSV, [("a", pa.int64()), ("a", pa.int64())], []),
    (Format.CSV, [("s", TWICE)], ["s"]),
    (Format.JSONL, [("m", pa.map_(pa.string(), TWICE))], ["m"]),
    (Format.PARQUET, [("e", pa.struct([]))], ["e"]),
    (Format.CSV, [("e", pa.struct([]))], []),
    (Format.PARQUET, [("i", pa.list_(pa.month_day_nano_interval()))], ["i"]),
    (Format.PARQUET, [("i", pa.month_day_nano_interval())], []),
]


@pytest.mark.parametrize(("form", "fields", "expected"), UNSUPPORTED)
def test_what_a_format_cannot_carry_is_known_beforehand(
    form: Format, fields: list[tuple[str, pa.DataType]], expected: list[str]
) -> None:
    schema = pa.schema([pa.field(name, kind) for name, kind in fields])
    output = OutputFormat(form)
    assert [name for name, _ in unsupported(output, schema)] == expected
    if expected:
        with pytest.raises(ValueNotEncodable) as caught:
            open_encoder(output, schema, Collector())
        assert caught.value.metadata == {"column": expected[0]}
    else:
        encode(output, schema, [])


def test_a_schema_without_columns_is_refused() -> None:
    for output in PLAIN:
        assert unsupported(output, pa.schema([]))
