"""Arrow values made ready for the encoders: checked, cut, and put into canonical text.

The rules are those of docs/formats.md. Everything here works on whole columns in C++ or
Rust, with the GIL released; no row passes through Python, but for decimals that Arrow
itself would print with an exponent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from exportd_server.encoders.base import Buffer
from exportd_server.errors import ValueNotEncodable
from exportd_server.platform.lazy import LazyModule

if TYPE_CHECKING:
    import polars as pl
else:
    pl = LazyModule("polars")

_MAX_ROWS = 65_536
_TARGET_BYTES = 4 << 20

_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DIGITS = {"us": 6, "ns": 9}
_DAY = 86_400
# Seconds since 1970 of the first and the last moment with a year of four digits, and of
# those that Polars can put into text at all (years -262143 and 262142, a little inside).
_FOUR_DIGITS = (-62_167_219_200, 253_402_300_799)
_PRINTABLE = (-8_333_000_000_000, 8_209_000_000_000)


@contextmanager
def encoding(column: str | None = None) -> Iterator[None]:
    """Turn what the libraries raise into `ValueNotEncodable`.

    Polars panics raise a `BaseException`, which nobody else would catch. Errors of the
    sink pass, and so does the lack of memory.
    """
    try:
        yield
    except MemoryError:
        raise
    except (
        pa.ArrowException,
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
        ArithmeticError,
    ) as error:
        where = f"column {column!r}" if column else "a column"
        raise ValueNotEncodable(
            f"{where} holds a value that cannot be written losslessly", column=column
        ) from error


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch under the declared schema, once its values are known to be valid.

    Raises `ValueNotEncodable` when a column is not of its declared type, lacks a value
    that it must have, or holds what its type does not allow: text that is not UTF-8, a
    decimal with too many digits, a time of day past midnight.
    """
    if batch.schema.names != schema.names:
        raise ValueNotEncodable("the source's columns are not the declared ones")
    for field, column in zip(schema, batch.columns, strict=True):
        if column.type != field.type:
            raise ValueNotEncodable(
                f"column {field.name!r} is of type {column.type}, not {field.type} as "
                "declared",
                column=field.name,
            )
        if column.null_count and not field.nullable:
            raise ValueNotEncodable(
                f"column {field.name!r} lacks a value, which it is declared never to do",
                column=field.name,
            )
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueNotEncodable(
                f"column {field.name!r} holds a value that its type {field.type} does "
                "not allow",
                column=field.name,
            ) from error
    return pa.RecordBatch.from_arrays(batch.columns, schema=schema)


class Chunks:
    """The text of one slice, in the pieces that it was made in; a file to write to."""

    def __init__(self) -> None:
        self._chunks: list[Buffer] = []
        self.size = 0

    def write(self, data: Buffer, /) -> int:
        """Keep `data`, which nobody changes any more."""
        self._chunks.append(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> Iterator[Buffer]:
        """The pieces in order; each is let go of before the next."""
        self._chunks.reverse()
        while self._chunks:
            yield self._chunks.pop()


class Slicer:
    """Cuts batches so that the text of each slice stays near 4 MiB, however wide the
    rows; it learns from the slices before how much text a row makes."""

    def __init__(self) -> None:
        self._row_bytes = 0.0

    def slices(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """The batch in order, in slices of at least one row."""
        offset = 0
        while offset < batch.num_rows:
            row_bytes = max(self._row_bytes, batch.nbytes / batch.num_rows, 1.0)
            rows = max(1, min(_MAX_ROWS, int(_TARGET_BYTES / row_bytes)))
            if not self._row_bytes:
                # Nothing is known yet of how Arrow's bytes compare with the text's.
                rows = min(rows, 1024)
            yield batch.slice(offset, rows)
            offset += rows

    def learn(self, rows: int, size: int) -> None:
        """Take note of how many bytes of text a slice made."""
        self._row_bytes = size / rows


def simple(array: pa.Array) -> pa.Array:
    """The same values under a type that both text formats write by themselves, where
    there is one: dictionaries and extensions unpacked, and every scalar that is no
    number, boolean or text put into its canonical text. Nested arrays come back as they
    are, but for their own wrapping."""
    kind = array.type
    while (unpack := _unpacking(kind)) is not None:
        array = unpack(array)
        kind = array.type
    text = _texting(kind)
    return array if text is None else text(array)


def unwrapped(kind: pa.DataType) -> pa.DataType:
    """The type of the values inside dictionaries, runs and extensions."""
    if pat.is_dictionary(kind) or pat.is_run_end_encoded(kind):
        return unwrapped(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType) and not is_uuid(kind):
        return unwrapped(kind.storage_type)
    return kind


def is_uuid(kind: pa.DataType) -> bool:
    """Whether this is Arrow's UUID extension."""
    return isinstance(kind, pa.UuidType)


def is_text(kind: pa.DataType) -> bool:
    """Whether values are Unicode text."""
    return bool(
        pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, in any of Arrow's layouts."""
    return bool(
        pat.is_list(kind)
        or pat.is_large_list(kind)
        or pat.is_fixed_size_list(kind)
        or pat.is_list_view(kind)
        or pat.is_large_list_view(kind)
    )


def list_offsets(array: pa.Array) -> pa.Array:
    """Where each list begins in `array.flatten()`, and where the last one ends; for any
    layout of lists."""
    lengths = pc.if_else(array.is_valid(), pc.list_value_length(array), 0)
    ends = pc.cumulative_sum_checked(lengths.cast(pa.int32()))
    return pa.concat_arrays([pa.array([0], pa.int32()), ends])


def map_entries(array: pa.Array) -> pa.Array:
    """A map as the list of pairs that it is in memory, uncopied."""
    fields = [
        pa.field("key", array.type.key_type, nullable=False),
        pa.field("value", array.type.item_type),
    ]
    pairs = pa.StructArray.from_arrays([array.keys, array.items], fields=fields)
    return pa.Array.from_buffers(
        pa.list_(pairs.type),
        len(array),
        array.buffers()[:2],
        offset=array.offset,
        children=[pairs],
    )


_Step = Callable[[pa.Array], pa.Array]


def _unpacking(kind: pa.DataType) -> _Step | None:
    if pat.is_dictionary(kind):
        return _decode_dictionary
    if pat.is_run_end_encoded(kind):
        return _decode_runs
    if is_uuid(kind):
        return _uuid_text
    if isinstance(kind, pa.BaseExtensionType):
        return _storage
    return None


def _texting(kind: pa.DataType) -> _Step | None:
    for test, text in _TEXTS:
        if test(kind):
            return text
    return None


def _decode_dictionary(array: pa.Array) -> pa.Array:
    return array.dictionary_decode()


def _decode_runs(array: pa.Array) -> pa.Array:
    return pc.run_end_decode(array)


def _storage(array: pa.Array) -> pa.Array:
    return array.storage


class _Exported:
    """A batch that shows nothing of itself but Arrow's C data interface.

    By it Polars takes all columns over at once, where it is asked. What it knows to be of
    pyarrow it spreads over its pool of threads, whose handing over and spinning cost two
    encoders side by side twice the time.
    https://arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface.html
    """

    def __init__(self, values: pa.RecordBatch) -> None:
        self._values = values

    def __arrow_c_array__(self, requested_schema: object = None) -> tuple[object, object]:
        exported: tuple[object, object] = self._values.__arrow_c_array__(requested_schema)
        return exported


def polars_frame(names: Sequence[str], arrays: Sequence[pa.Array]) -> pl.DataFrame:
    """The columns as Polars holds them."""
    batch = pa.RecordBatch.from_arrays(list(arrays), names=list(names))
    return pl.DataFrame(_Exported(batch))


def string_array(series: pl.Series) -> pa.Array:
    """Text of Polars as Arrow's plain text; 2 GiB at most."""
    return series.to_arrow().cast(pa.string())


def text_bytes(lines: pa.Array) -> memoryview:
    """All the text of a column that was just made, end to end, without a copy."""
    _, ends, data = lines.buffers()
    last = pa.Array.from_buffers(pa.int32(), 1, [None, ends], offset=len(lines))
    return memoryview(data)[: last[0].as_py()]


def join(*pieces: pa.Array | str) -> pa.Array:
    """Text columns and constants side by side; missing where a column is."""
    return pc.binary_join_element_wise(*pieces, "")


def _decimal_text(array: pa.Array) -> pa.Array:
    text = array.cast(pa.string())
    odd = pc.match_substring(text, "E")
    if not pc.any(odd).as_py():
        return text
    plain = [format(Decimal(value), "f") for value in text.filter(odd).to_pylist()]
    return pc.replace_with_mask(text, odd, pa.array(plain, pa.string()))


def _small_decimal(array: pa.Array) -> pa.Array:
    # Polars knows one decimal type, which it writes plainly and at full scale.
    return array.cast(pa.decimal128(array.type.precision, array.type.scale))


def _binary_text(array: pa.Array) -> pa.Array:
    return string_array(pl.Series(array.cast(pa.large_binary())).bin.encode("base64"))


def _uuid_text(array: pa.Array) -> pa.Array:
    digits = string_array(
        pl.Series(array.storage.cast(pa.large_binary())).bin.encode("hex")
    )
    ends = (0, 8, 12, 16, 20, 32)
    groups = [
        pc.binary_replace_slice(pc.binary_replace_slice(digits, end, 32, ""), 0, begin, "")
        for begin, end in pairwise(ends)
    ]
    return pc.binary_join_element_wise(*groups, "-")


def _timestamp_text(array: pa.Array) -> pa.Array:
    unit, zone = array.type.unit, array.type.tz
    # What is stored is UTC when there is a zone; dropping its name changes no value.
    array = array.view(pa.int64()).view(pa.timestamp(unit))
    if unit in {"s", "ms"}:
        array = array.cast(pa.timestamp("us"))
        unit = "us"
    mark = "Z" if zone else ""
    first, last = _range(array, pa.int64(), _UNITS[unit])
    if first < _FOUR_DIGITS[0] or last > _FOUR_DIGITS[1]:
        _printable(first, last)
        pattern = f"%Y-%m-%dT%H:%M:%S%.{_DIGITS[unit]}f{mark}"
        return string_array(pl.Series(array).dt.strftime(pattern))
    # Three times as fast as a pattern, and every text has the same length.
    text = pc.binary_replace_slice(array.cast(pa.string()), 10, 11, "T")
    if not mark:
        return text
    size = len("2000-01-01T00:00:00.") + _DIGITS[unit]
    return pc.binary_replace_slice(text, size, size, mark)


def _date_text(array: pa.Array) -> pa.Array:
    array = array.cast(pa.date32())
    first, last = _range(array, pa.int32(), 1)
    if first * _DAY < _FOUR_DIGITS[0] or last * _DAY > _FOUR_DIGITS[1]:
        _printable(first * _DAY, last * _DAY)
        return string_array(pl.Series(array).dt.strftime("%Y-%m-%d"))
    return array.cast(pa.string())


def _range(array: pa.Array, stored: pa.DataType, scale: int) -> tuple[int, int]:
    bounds = pc.min_max(array.view(stored))
    first, last = bounds["min"].as_py(), bounds["max"].as_py()
    return (0, 0) if first is None else (first // scale, last // scale)


def _printable(first: int, last: int) -> None:
    if first < _PRINTABLE[0] or last > _PRINTABLE[1]:
        raise pa.ArrowInvalid("the year has more than six digits")


def _time_text(array: pa.Array) -> pa.Array:
    if pat.is_time32(array.type):
        array = array.cast(pa.time64("us"))
    return array.cast(pa.string())


def _duration_text(array: pa.Array) -> pa.Array:
    unit = array.type.unit
    digits = len(str(_UNITS[unit])) - 1
    # The same 128 bits, read as seconds with a fraction: nothing is rounded.
    seconds = (
        array.view(pa.int64())
        .cast(pa.decimal128(19, 0))
        .view(pa.decimal128(38, digits))
        .cast(pa.decimal128(38, max(digits, 6)))
    )
    return pc.if_else(
        pc.less(array.view(pa.int64()), 0),
        join("-PT", _plain(pc.negate(seconds)), "S"),
        join("PT", _plain(seconds), "S"),
    )


def _interval_text(array: pa.Array) -> pa.Array:
    # Sixteen bytes a value: months and days in 32 bits each, nanoseconds in 64.
    rows, data = len(array), array.buffers()[1]
    halves = _words(pa.int32(), 4, rows, array.offset, data)
    wholes = _words(pa.int64(), 2, rows, array.offset, data)
    nanos = pc.list_element(wholes, 1)
    text = join(
        "P",
        pc.list_element(halves, 0).cast(pa.string()),
        "M",
        pc.list_element(halves, 1).cast(pa.string()),
        "DT",
        _plain(nanos.cast(pa.decimal128(19, 0)).view(pa.decimal128(38, 9))),
        "S",
    )
    return pc.if_else(array.is_valid(), text, pa.scalar(None, pa.string()))


def _words(
    kind: pa.DataType, each: int, rows: int, offset: int, data: pa.Buffer
) -> pa.Array:
    flat = pa.Array.from_buffers(kind, each * rows, [None, data], offset=each * offset)
    return pa.FixedSizeListArray.from_arrays(flat, each)


def _plain(decimals: pa.Array) -> pa.Array:
    return string_array(pl.Series(decimals).cast(pl.String))


def _is_large_decimal(kind: pa.DataType) -> bool:
    return bool(pat.is_decimal(kind) and (pat.is_decimal256(kind) or kind.scale < 0))


def _is_small_decimal(kind: pa.DataType) -> bool:
    return bool(pat.is_decimal32(kind) or pat.is_decimal64(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes, in any of Arrow's layouts."""
    return bool(
        pat.is_binary(kind)
        or pat.is_large_binary(kind)
        or pat.is_binary_view(kind)
        or pat.is_fixed_size_binary(kind)
    )


_TEXTS: tuple[tuple[Callable[[pa.DataType], bool], _Step], ...] = (
    (_is_large_decimal, _decimal_text),
    (_is_small_decimal, _small_decimal),
    (is_bytes, _binary_text),
    (pat.is_timestamp, _timestamp_text),
    (pat.is_date, _date_text),
    (pat.is_time, _time_text),
    (pat.is_duration, _duration_text),
    (pat.is_interval, _interval_text),
)
