"""Tables for the encoders: values of every Arrow type, and decoders for their texts.

Values are plain: a temporal one is the whole number that Arrow stores. So what went in is
known without asking Arrow, and the decoders, written from docs/formats.md on Python's own
parsers, must arrive at the same.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import math
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.types as pat
from hypothesis import strategies as st

from exportd_server.encoders.base import Compression, OutputFormat
from exportd_server.encoders.registry import open_encoder

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
EPOCH = date(1970, 1, 1).toordinal()
DAY = 86_400


class Collector:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.writes = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        self.data += data
        self.writes += 1


@dataclass(frozen=True)
class EncodedPart:
    """One part, and how much of either end the joined file leaves out."""

    data: bytes
    prefix_bytes: int
    suffix_bytes: int


def encode(
    output: OutputFormat, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> EncodedPart:
    """A part of these batches, flushed after each as a careful owner would."""
    sink = Collector()
    encoder = open_encoder(output, schema, sink)
    for batch in batches:
        encoder.write(batch)
        encoder.flush()
    encoder.close()
    return EncodedPart(bytes(sink.data), encoder.prefix_bytes, encoder.suffix_bytes)


def joined(parts: list[EncodedPart]) -> bytes:
    """The parts as one file, by the rule of the seam."""
    pieces = []
    for index, part in enumerate(parts):
        start = part.prefix_bytes if index else 0
        drop = part.suffix_bytes if index < len(parts) - 1 else 0
        pieces.append(part.data[start : len(part.data) - drop])
    return b"".join(pieces)


def decompress(data: bytes, compression: Compression) -> bytes:
    """The plain bytes, by libraries that did not compress them."""
    if compression is Compression.GZIP:
        return gzip.decompress(data)
    if compression is Compression.ZSTD:
        with pa.CompressedInputStream(io.BytesIO(data), "zstd") as stream:
            return bytes(stream.read())
    return data


def csv_cells(data: bytes, path: Path, *, null: str = "") -> list[tuple[str | None, ...]]:
    """Cells of a CSV file with header as DuckDB reads them, every column as text."""
    path.write_bytes(data)
    return query(
        f"SELECT * FROM read_csv('{path}', header=true, delim=',', quote='\"', "
        f"escape='\"', nullstr='{null}', allow_quoted_nulls=false, auto_detect=false, "
        "new_line='\\n', max_line_size=10000000, "
        f"columns={{{_duck_columns(data)}}})"
    )


def query(sql: str) -> list[tuple[Any, ...]]:
    """Rows of a query to a DuckDB of its own."""
    with duckdb.connect() as database:
        return database.execute(sql).fetchall()


def _duck_columns(data: bytes) -> str:
    header = data.split(b"\n", 1)[0].decode().split(",")
    return ", ".join(f"'{name}': 'VARCHAR'" for name in header)


def same(left: Any, right: Any) -> bool:
    """Equality that tells 0.0 from -0.0 and 1 from 1.0, and holds for NaN."""
    if isinstance(left, float) and isinstance(right, float):
        if math.isnan(left) or math.isnan(right):
            return math.isnan(left) and math.isnan(right)
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, Decimal) and isinstance(right, Decimal):
        return left.as_tuple() == right.as_tuple()
    return type(left) is type(right) and bool(left == right)


def from_csv(text: str | None, kind: pa.DataType) -> Any:
    """The plain value that a CSV cell stands for."""
    if text is None:
        return None
    if pat.is_boolean(kind):
        return {"true": True, "false": False}[text]
    if pat.is_integer(kind):
        return int(text)
    if pat.is_floating(kind):
        return _rounded(float(text), kind)
    if pat.is_dictionary(kind) or pat.is_run_end_encoded(kind):
        return from_csv(text, kind.value_type)
    if _is_text(kind):
        return text
    if pat.is_nested(kind):
        return from_json(json.loads(text), kind)
    return _from_text(text, kind)


_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def from_json(value: Any, kind: pa.DataType) -> Any:
    """The plain value that a value of JSON stands for."""
    if value is None:
        return None
    if pat.is_dictionary(kind) or pat.is_run_end_encoded(kind):
        return from_json(value, kind.value_type)
    if pat.is_floating(kind):
        if isinstance(value, str):
            return _WORDS[value]
        assert isinstance(value, float)
        return _rounded(value, kind)
    if pat.is_map(kind):
        if _is_text(kind.key_type):
            return [(key, from_json(item, kind.item_type)) for key, item in value.items()]
        return [
            (
                from_json(pair["key"], kind.key_type),
                from_json(pair["value"], kind.item_type),
            )
            for pair in value
        ]
    if pat.is_struct(kind):
        assert list(value) == [field.name for field in kind]
        return {field.name: from_json(value[field.name], field.type) for field in kind}
    if pat.is_nested(kind):
        return [from_json(item, kind.value_type) for item in value]
    if pat.is_boolean(kind) or pat.is_integer(kind) or _is_text(kind):
        return value
    return _from_text(value, kind)


def _rounded(value: float, kind: pa.DataType) -> float:
    """The nearest number of the column's own width, which is what a text of few digits
    stands for."""
    code = {16: "e", 32: "f", 64: "d"}[kind.bit_width]
    return float(struct.unpack(code, struct.pack(code, value))[0])


def _from_text(text: str, kind: pa.DataType) -> Any:
    if pat.is_decimal(kind):
        assert re.fullmatch(r"-?\d+(\.\d+)?", text)
        return Decimal(text)
    if pat.is_date32(kind):
        return days(text)
    if pat.is_date64(kind):
        return days(text) * DAY * 1000
    if pat.is_time(kind):
        return _fraction(seconds(text), kind.unit)
    if pat.is_timestamp(kind):
        assert text.endswith("Z") == bool(kind.tz)
        day, _, clock = text.removesuffix("Z").partition("T")
        return _fraction(days(day) * DAY + seconds(clock), kind.unit)
    if pat.is_duration(kind):
        sign = -1 if text.startswith("-") else 1
        match = re.fullmatch(r"-?PT(\d+\.\d{6,9})S", text)
        assert match
        return _fraction(sign * Decimal(match[1]), kind.unit)
    return base64.b64decode(text, validate=True)


def days(text: str) -> int:
    """Days since 1970 of an ISO 8601 date, of any year, by the proleptic Gregorian
    calendar."""
    match = re.fullmatch(r"([+-]?\d{4,6})-(\d\d)-(\d\d)", text)
    assert match
    # The calendar repeats itself every 400 years, which have 146 097 days.
    cycles, year = divmod(int(match[1]) - 1600, 400)
    return (
        date(1600 + year, int(match[2]), int(match[3])).toordinal()
        - EPOCH
        + cycles * 146_097
    )


def seconds(text: str) -> Decimal:
    """Seconds since midnight of a time of day."""
    match = re.fullmatch(r"(\d\d):(\d\d):(\d\d\.\d{6}(\d{3})?)", text)
    assert match
    return int(match[1]) * 3600 + int(match[2]) * 60 + Decimal(match[3])


def _fraction(value: Decimal, unit: str) -> int:
    whole = value * UNITS[unit]
    assert whole == int(whole)
    return int(whole)


def _is_text(kind: pa.DataType) -> bool:
    if pat.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(
        pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind)
    )


# Generators.

TEXTS = st.text(
    st.one_of(
        st.sampled_from("\",\n\r\t'=+-@\\N;| {}[]:nul0é\u2028\ufeff😀\x01\x1f\x7f"),
        st.characters(codec="utf-8", exclude_characters="\x00"),
    ),
    max_size=12,
)
"""Text of all kinds but NUL, which DuckDB's CSV reader does not take."""


def _temporal(low: int, high: int, unit: str) -> st.SearchStrategy[int]:
    scale = UNITS[unit]
    return st.integers(max(low * scale, -(2**63)), min(high * scale + scale - 1, 2**63 - 1))


def _decimals(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    top = 10**precision - 1
    # Built from its digits: arithmetic would round to the context's 28.
    return st.one_of(st.integers(-top, top), st.sampled_from([0, 1, -1, top, -top])).map(
        lambda digits: Decimal((int(digits < 0), tuple(map(int, str(abs(digits)))), -scale))
    )


Leaf = tuple[pa.DataType, st.SearchStrategy[Any]]
# The seconds of the years -9999 to 20000: more than RFC 3339 has, within every unit.
_MOMENTS = (-377_705_116_800, 568_971_820_799)


def leaves() -> list[Leaf]:
    """Every type without children, with its values."""
    found: list[Leaf] = [
        (pa.bool_(), st.booleans()),
        (pa.null(), st.none()),
        (pa.float64(), st.floats()),
        (pa.float32(), st.floats(width=32)),
        (pa.float16(), st.floats(width=16)),
        (pa.date32(), st.integers(-4_000_000, 6_000_000)),
        (
            pa.date64(),
            st.integers(-4_000_000, 6_000_000).map(lambda day: day * DAY * 1000),
        ),
        (pa.binary(4), st.binary(min_size=4, max_size=4)),
        (pa.dictionary(pa.int8(), pa.string()), TEXTS),
        (pa.dictionary(pa.int32(), pa.int64()), st.integers(-(2**63), 2**63 - 1)),
    ]
    found += [(kind, TEXTS) for kind in (pa.string(), pa.large_string(), pa.string_view())]
    found += [
        (kind, st.binary(max_size=9))
        for kind in (pa.binary(), pa.large_binary(), pa.binary_view())
    ]
    for bits, signed, unsigned in (
        (8, pa.int8(), pa.uint8()),
        (16, pa.int16(), pa.uint16()),
        (32, pa.int32(), pa.uint32()),
        (64, pa.int64(), pa.uint64()),
    ):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        found.append((signed, st.integers(low, high)))
        found.append((unsigned, st.integers(0, 2**bits - 1)))
    for unit, scale in UNITS.items():
        moments = _temporal(*_MOMENTS, unit)
        clock = st.integers(0, DAY * scale - 1)
        found.append((pa.timestamp(unit), moments))
        found.append((pa.timestamp(unit, "UTC"), moments))
        found.append((pa.timestamp(unit, "Asia/Tokyo"), moments))
        found.append((pa.duration(unit), st.integers(-(2**63), 2**63 - 1)))
        time = pa.time32 if unit in {"s", "ms"} else pa.time64
        found.append((time(unit), clock))
    for kind, precision, scale in (
        (pa.decimal128, 38, 18),
        (pa.decimal128, 5, 0),
        (pa.decimal256, 76, 38),
        (pa.decimal256, 60, 0),
        (pa.decimal64, 18, 4),
        (pa.decimal32, 9, 2),
    ):
        found.append((kind(precision, scale), _decimals(precision, scale)))
    return found


def _nullable(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def _listed(item: Leaf) -> list[Leaf]:
    kind, values = item
    lists = st.lists(_nullable(values), max_size=4)
    pairs = st.lists(_nullable(values), min_size=2, max_size=2)
    return [
        (pa.list_(kind), lists),
        (pa.large_list(kind), lists),
        (pa.list_view(kind), lists),
        (pa.list_(kind, 2), pairs),
    ]


def _mapped(item: Leaf) -> list[Leaf]:
    kind, values = item

    def maps(keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        pairs = st.tuples(keys, _nullable(values))
        return st.lists(pairs, max_size=3, unique_by=lambda pair: pair[0])

    return [
        (pa.map_(pa.string(), kind), maps(TEXTS)),
        (pa.map_(pa.int64(), kind), maps(st.integers(-(2**63), 2**63 - 1))),
    ]


def _combined(first: Leaf, second: Leaf) -> Leaf:
    kind = pa.struct([("first", first[0]), ('se"cond,\n', second[0])])
    values = {"first": _nullable(first[1]), 'se"cond,\n': _nullable(second[1])}
    in_order = st.fixed_dictionaries(values).map(
        lambda found: {name: found[name] for name in values}
    )
    return kind, in_order


def types() -> st.SearchStrategy[Leaf]:
    """A type, nested at will, and its values."""
    inner = [leaf for leaf in leaves() if not pat.is_dictionary(leaf[0])]
    nested = st.recursive(
        st.sampled_from(inner),
        lambda below: st.one_of(
            below.flatmap(lambda item: st.sampled_from(_listed(item))),
            below.flatmap(lambda item: st.sampled_from(_mapped(item))),
            st.builds(_combined, below, below),
        ),
        max_leaves=4,
    )
    return st.one_of(st.sampled_from(leaves()), nested)


@dataclass(frozen=True)
class Table:
    """A schema, plain values by column, and where they are cut into batches."""

    schema: pa.Schema
    values: list[list[Any]]
    cuts: list[int]

    def __repr__(self) -> str:
        return f"Table({self.schema.types}, {self.values}, cuts={self.cuts})"

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """The plain values by row."""
        return list(zip(*self.values, strict=True))

    def batches(self) -> list[pa.RecordBatch]:
        """The batches: slices of one, as sources make them."""
        whole = pa.RecordBatch.from_arrays(
            [
                array_of(values, field.type)
                for values, field in zip(self.values, self.schema, strict=True)
            ],
            schema=self.schema,
        )
        edges = [0, *self.cuts, whole.num_rows]
        return [whole.slice(start, end - start) for start, end in pairwise(edges)]


def array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array of plain values."""
    if pat.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def plain_values(array: pa.Array, kind: pa.DataType) -> list[Any]:
    """The plain values of an array that holds what a column of type `kind` held, in
    whatever unit and layout a reader chose."""
    if pat.is_dictionary(kind):
        return plain_values(array, kind.value_type)
    if pat.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pat.is_struct(kind):
        columns = [
            plain_values(child, field.type)
            for child, field in zip(array.flatten(), kind, strict=True)
        ]
        names = [field.name for field in kind]
        present = array.is_valid().to_pylist()
        return [
            dict(zip(names, row, strict=True)) if there else None
            for row, there in zip(zip(*columns, strict=True), present, strict=True)
        ]
    if pat.is_nested(kind):
        return [_plain_items(item, kind) if item.is_valid else None for item in array]
    if pat.is_temporal(kind):
        width = pa.int32() if kind.bit_width == 32 else pa.int64()
        return list(array.cast(kind).view(width).to_pylist())
    return list(array.to_pylist())


def _plain_items(item: pa.Scalar, kind: pa.DataType) -> list[Any]:
    if pat.is_map(kind):
        keys, values = item.values.flatten()
        return list(
            zip(
                plain_values(keys, kind.key_type),
                plain_values(values, kind.item_type),
                strict=True,
            )
        )
    return plain_values(item.values, kind.value_type)


@st.composite
def tables(draw: Callable[[st.SearchStrategy[Any]], Any], *, least: int = 1) -> Table:
    """A table of one to four columns and up to eight rows."""
    rows = draw(st.integers(0, 8))
    fields, columns = [], []
    for index in range(draw(st.integers(least, 4))):
        kind, values = draw(types())
        nullable = pat.is_null(kind) or draw(st.booleans())
        values = _nullable(values) if nullable else values
        columns.append(draw(st.lists(values, min_size=rows, max_size=rows)))
        fields.append(pa.field(f"c{index}", kind, nullable=nullable))
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=2)))
    return Table(pa.schema(fields), columns, cuts)


@functools.cache
def every_type(rows: int = 40) -> Table:
    """A table with every type there is, on its own and inside of others, with values
    chosen to be hard; the same each time."""
    columns: list[tuple[pa.DataType, list[Any]]] = [
        (kind, _hard(kind)) for kind, _ in leaves()
    ]
    for kind, _ in leaves():
        if pat.is_dictionary(kind):
            continue
        hard = _hard(kind)
        columns.append((pa.list_(kind), [hard, [], None, hard[:1]]))
        columns.append((pa.struct([("f", kind)]), [{"f": value} for value in hard]))
        columns.append((pa.map_(pa.string(), kind), [[("k,", v)] for v in hard]))
    fields = [pa.field(f"c{i}", kind) for i, (kind, _) in enumerate(columns)]
    values = [[hard[row % len(hard)] for row in range(rows)] for _, hard in columns]
    return Table(pa.schema(fields), values, [rows // 3, rows // 2])


HARD_TEXTS = [
    "",
    None,
    "plain",
    'quote " here',
    "comma, semi; tab\t pipe|",
    "line\nfeed",
    "carriage\rreturn",
    "both\r\n",
    "\n",
    '"',
    '""',
    " spaces ",
    "\\N",
    "NULL",
    "null",
    "naïve café 😀 日本",
    "\u2028\u2029\ufeff",
    "\x01\x1f\x7f",
    "'apostrophe",
    "=1+1",
    "+1",
    "-1",
    "@x",
    "\\",
    "\\n",
    "#comment",
    "{}",
    "0",
    "true",
    "long" * 1000,
]


def _hard(kind: pa.DataType) -> list[Any]:
    if pat.is_dictionary(kind):
        return _hard(kind.value_type)
    return next(values(kind) for test, values in _HARD if test(kind))


def _hard_integers(kind: pa.DataType) -> list[Any]:
    bits = kind.bit_width
    if pat.is_unsigned_integer(kind):
        return [0, 1, None, 2**bits - 1]
    return [0, -1, None, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))]


def _hard_floats(kind: pa.DataType) -> list[Any]:
    least, most, third = {
        16: (2.0**-24, 65504.0, 0.333251953125),
        32: (2.0**-149, (2 - 2**-23) * 2.0**127, 0.3333333432674408),
        64: (5e-324, 1.7976931348623157e308, 1 / 3),
    }[kind.bit_width]
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, None, 1.0, 1.5]
    return [*special, least, -least, most, -most, third]


def _hard_decimals(kind: pa.DataType) -> list[Any]:
    found: list[Any] = [None, Decimal((0, (0,), -kind.scale))]
    for digits in ((1,), (5, 0), (9,) * kind.precision):
        found += [Decimal((sign, digits, -kind.scale)) for sign in (0, 1)]
    return found


def _hard_dates(kind: pa.DataType) -> list[Any]:
    scale = 1 if pat.is_date32(kind) else DAY * 1000
    some = ("1970-01-01", "1969-12-31", "0001-01-01", "0000-01-01", "9999-12-31")
    odd = ("-0001-12-31", "+10000-01-01", "-44000-03-15", "2024-02-29")
    return [None, *(days(text) * scale for text in some + odd)]


def _hard_times(kind: pa.DataType) -> list[Any]:
    return [0, 1, None, DAY * UNITS[kind.unit] - 1]


def _hard_timestamps(kind: pa.DataType) -> list[Any]:
    if kind.unit == "ns":
        return [0, 1, -1, None, 2**63 - 1, -(2**63)]
    edges = [days("0000-01-01") * DAY, days("+10000-01-01") * DAY]
    near = [edge * UNITS[kind.unit] + step for edge in edges for step in (-1, 0)]
    return [0, 1, -1, None, *near]


def _hard_durations(kind: pa.DataType) -> list[Any]:
    return [0, 1, -1, None, 2**63 - 1, -(2**63), 90_061 * UNITS[kind.unit]]


_HARD: tuple[
    tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType], list[Any]]], ...
] = (
    (pat.is_boolean, lambda _: [True, False, None]),
    (pat.is_null, lambda _: [None]),
    (pat.is_integer, _hard_integers),
    (pat.is_floating, _hard_floats),
    (pat.is_decimal, _hard_decimals),
    (_is_text, lambda _: HARD_TEXTS),
    (pat.is_date, _hard_dates),
    (pat.is_time, _hard_times),
    (pat.is_timestamp, _hard_timestamps),
    (pat.is_duration, _hard_durations),
    (pat.is_fixed_size_binary, lambda _: [b"\x00\xff\xfe\n", b"abcd", None]),
    (lambda _: True, lambda _: [b"", b"\x00", None, b"\xff\xfe", bytes(range(256))]),
)
