"""The rows of an export as Arrow batches, in types of the taker's choosing.

What `csv_lines` gives are texts; here they are read, and each becomes exactly the value
that it was written for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pyarrow as pa

from exportd_server.encoders.base import Buffer, CsvOptions
from exportd_server.errors import DeliveryFailed
from exportd_server.platform.lazy import LazyModule
from exportd_server.sinks.base import Delivery
from exportd_server.sinks.database.rows import Feed, csv_lines, csv_options
from exportd_server.sinks.database.running import Call

if TYPE_CHECKING:
    import polars as pl
else:
    pl = LazyModule("polars")

_PIECE_BYTES = 1 << 20

Convert: TypeAlias = Callable[[pa.Array], pa.Array]
"""Makes values of texts; raises an error of Arrow's or of Polars' for one that does not
fit."""


def row_count(delivery: Delivery) -> int:
    """How many rows the delivery has."""
    return sum(part.rows for part in delivery.parts)


def batches(
    call: Call,
    feed: Feed,
    delivery: Delivery,
    converts: Sequence[Convert],
    spool: Path | None,
) -> Iterator[pa.RecordBatch]:
    """All rows in order, as columns `c0`, `c1` and so on, in batches of about a MiB of
    text. Raises `DeliveryFailed` for values that do not fit and for rows that are missing,
    `Stopped`, and what the content raised."""
    names = [f"c{index}" for index in range(len(converts))]
    options = csv_options(delivery.export)
    found = 0
    for piece in _records(csv_lines(feed, delivery.export, delivery.parts, spool)):
        call.check()
        texts = _parsed(piece, names, options)
        arrays = [
            _converted(column.name, convert, text)
            for column, convert, text in zip(
                delivery.export.columns, converts, texts.columns, strict=True
            )
        ]
        yield pa.RecordBatch.from_arrays(arrays, names=names)
        found += texts.num_rows
    if found != row_count(delivery):
        raise DeliveryFailed(
            f"{found} rows were read of the {row_count(delivery)} that the export has",
            retryable=False,
        )


def _records(lines: Iterable[Buffer]) -> Iterator[bytes]:
    """Whole records, about a MiB of them at a time, or one that is longer."""
    held = bytearray()
    wanted = _PIECE_BYTES
    for piece in lines:
        held += piece
        if len(held) < wanted:
            continue
        end = held.rfind(b"\n") + 1
        # A line end between an odd number of quotes and the rest is inside of a value.
        odd = held.count(b'"', 0, end) & 1
        while end and odd:
            before = held.rfind(b"\n", 0, end - 1) + 1
            odd ^= held.count(b'"', before, end) & 1
            end = before
        wanted = _PIECE_BYTES if end else 2 * len(held)
        if end:
            yield bytes(held[:end])
            del held[:end]
    if held:
        yield bytes(held)


def _parsed(piece: bytes, names: list[str], options: CsvOptions) -> pa.RecordBatch:
    """Each cell as text."""
    from pyarrow import csv  # noqa: PLC0415 - rarely wanted

    try:
        table = csv.read_csv(
            pa.BufferReader(piece),
            read_options=csv.ReadOptions(
                column_names=names, block_size=len(piece) + 1, use_threads=False
            ),
            parse_options=csv.ParseOptions(
                delimiter=options.delimiter,
                newlines_in_values=True,
                ignore_empty_lines=False,
            ),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[options.null_marker],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DeliveryFailed("a part is no valid CSV", retryable=False) from error
    (batch,) = table.combine_chunks().to_batches()
    return batch


def _converted(name: str, convert: Convert, text: pa.Array) -> pa.Array:
    try:
        return convert(text)
    except (pa.ArrowInvalid, pl.exceptions.PolarsError) as error:
        raise DeliveryFailed(
            f"column {name!r}: a value does not fit the type of its column",
            retryable=False,
        ) from error


# Texts as values.


def as_it_is(text: pa.Array) -> pa.Array:
    """The text itself."""
    return text


def float32s(text: pa.Array) -> pa.Array:
    """The text of a narrow number is exact in its own width only."""
    return text.cast(pa.float32())


def float16s(text: pa.Array) -> pa.Array:
    """Numbers of 16 bits, which Arrow does not read."""
    return text.cast(pa.float64()).cast(pa.float16())


def binaries(text: pa.Array) -> pa.Array:
    """The bytes that base64 stands for."""
    return pl.Series(text).str.decode("base64").to_arrow().cast(pa.large_binary())
