"""Which encoder writes which format, and what it cannot carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.types as pat

from exportd_server.encoders.arrow import ArrowEncoder
from exportd_server.encoders.base import (
    ByteSink,
    Compression,
    Encoder,
    Format,
    OutputFormat,
)
from exportd_server.encoders.csv import CsvEncoder
from exportd_server.encoders.jsonl import JsonlEncoder
from exportd_server.encoders.parquet import ParquetEncoder
from exportd_server.encoders.values import is_list
from exportd_server.errors import InvalidRequest, ValueNotEncodable

_ENCODERS: dict[Format, Callable[[OutputFormat, pa.Schema, ByteSink], Encoder]] = {
    Format.CSV: CsvEncoder,
    Format.JSONL: JsonlEncoder,
    Format.PARQUET: ParquetEncoder,
    Format.ARROW: ArrowEncoder,
}
_TEXT = (Format.CSV, Format.JSONL)


def open_encoder(output: OutputFormat, schema: pa.Schema, sink: ByteSink) -> Encoder:
    """Begin one part; what is known of it already, such as a CSV header, goes to the
    sink at once.

    Raises `ValueNotEncodable` for a schema that `unsupported` objects to, and
    `InvalidRequest` for compression around a format that has its own inside.
    """
    if output.format not in _TEXT and output.compression is not Compression.NONE:
        raise InvalidRequest.of(
            "compression", f"{output.format} is compressed by its own options"
        )
    for column, why in unsupported(output, schema):
        raise ValueNotEncodable(f"column {column!r}: {why}", column=column)
    return _ENCODERS[output.format](output, schema, sink)


def unsupported(output: OutputFormat, schema: pa.Schema) -> list[tuple[str, str]]:
    """Columns that the format cannot carry, each with the reason; mostly none."""
    if not len(schema):
        return [("", "there is no column at all")]
    found = []
    if output.format is Format.JSONL:
        for name, times in Counter(schema.names).items():
            if times > 1:
                found.append((name, "JSON carries a name only once"))
    for field in schema:
        why = next(_objections(output.format, field.type), None)
        if why:
            found.append((field.name, why))
    return found


def _objections(target: Format, kind: pa.DataType, *, top: bool = True) -> Iterator[str]:
    if target is Format.ARROW:
        return
    if pat.is_union(kind):
        yield f"{target} has no union types"
    if target is Format.PARQUET:
        if not top and (pat.is_interval(kind) or pat.is_run_end_encoded(kind)):
            yield f"Parquet carries {kind} only outside of other types"
        if pat.is_struct(kind) and not kind.num_fields:
            yield "Parquet has no struct without fields"
    elif pat.is_struct(kind) and len({field.name for field in kind}) < kind.num_fields:
        yield "JSON carries a name only once"
    for child in _children(kind):
        yield from _objections(target, child, top=False)


def _children(kind: pa.DataType) -> list[pa.DataType]:
    if pat.is_map(kind):
        return [kind.key_type, kind.item_type]
    if is_list(kind) or pat.is_dictionary(kind) or pat.is_run_end_encoded(kind):
        return [kind.value_type]
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.storage_type]
    if pat.is_struct(kind):
        return [field.type for field in kind]
    return []
