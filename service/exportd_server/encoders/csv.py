"""CSV, RFC 4180 with LF as line end; docs/formats.md has the exact rules."""

from __future__ import annotations

import re
from typing import IO, TYPE_CHECKING, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from exportd_server.encoders.base import ByteSink, CsvDialect, CsvOptions, OutputFormat
from exportd_server.encoders.json_text import json_text
from exportd_server.encoders.text import TextEncoder
from exportd_server.encoders.values import (
    Chunks,
    encoding,
    is_text,
    polars_frame,
    simple,
    unwrapped,
)
from exportd_server.platform.lazy import LazyModule

if TYPE_CHECKING:
    import polars as pl
else:
    pl = LazyModule("polars")

# A missing value alone in its line would be an empty line, which most readers skip.
_LONE_MARKER = "\\N"
# Characters that numbers and booleans are made of, and markers that could be one.
_TYPED_CHARACTERS = frozenset("0123456789+-.abcdefghijklmnopqrstuvwxyzEN")
_TYPED_MARKER = re.compile(r"[-+]?[\d.].*|[-+]?inf|NaN|true|false", re.DOTALL)
# What a spreadsheet takes for a formula, whatever it drops before it; the wide forms of
# the four signs count as them where Japanese is written.
# https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = "^(?:[\\s\\x00-\\x1f\u200b\ufeff]*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\\t\\r\\n])"


class CsvEncoder(TextEncoder):
    """Writes one part as CSV."""

    def __init__(self, output: OutputFormat, schema: pa.Schema, sink: ByteSink) -> None:
        super().__init__(output, schema, sink)
        self._options = output.csv
        # Names need not differ.
        self._places = [*map(str, range(len(schema)))]
        self._armed = [
            place
            for place, field in zip(self._places, schema, strict=True)
            if self._options.dialect is CsvDialect.SPREADSHEET_SAFE
            and not _is_number(unwrapped(field.type))
        ]
        self._marker = self._options.null_marker
        if not self._marker and len(schema) == 1:
            self._marker = _LONE_MARKER
        self._all_text = self._options.delimiter in _TYPED_CHARACTERS or bool(
            _TYPED_MARKER.fullmatch(self._marker)
        )
        if self._options.header:
            self._out.write(_header(schema.names, self._options))
            self._out.end_frame()
        self.prefix_bytes = self._out.written

    def _encode(self, piece: pa.RecordBatch) -> Chunks:
        cells = []
        for field, column in zip(self._schema, piece.columns, strict=True):
            with encoding(field.name):
                cells.append(_cells(column))
        with encoding():
            frame = polars_frame(self._places, cells)
            if self._all_text:
                frame = frame.cast(pl.String)
            if self._armed:
                frame = frame.with_columns(_harmless(pl.col(self._armed)))
            style: Literal["necessary", "never"] = "necessary"
            if self._marker and self._ambiguous(frame):
                frame = frame.with_columns(self._quoted(pl.col(pl.String)))
                style = "never"
            chunks = Chunks()
            frame.write_csv(
                cast("IO[bytes]", chunks),
                include_header=False,
                separator=self._options.delimiter,
                null_value=self._marker,
                quote_style=style,
            )
        return chunks

    def _ambiguous(self, frame: pl.DataFrame) -> bool:
        """Whether some text reads like the marker of a missing value."""
        texts = frame.select(pl.col(pl.String) == self._marker)
        return texts.width > 0 and texts.select(pl.any_horizontal(pl.all()).any()).item()

    def _quoted(self, text: pl.Expr) -> pl.Expr:
        special = [self._options.delimiter, '"', "\n", "\r"]
        needed = text.is_in(["", self._marker]) | text.str.contains_any(special)
        quoted = pl.format('"{}"', text.str.replace_all('"', '""', literal=True))
        return pl.when(needed).then(quoted).otherwise(text)


def _cells(array: pa.Array) -> pa.Array:
    array = simple(array)
    if _is_number(array.type) or is_text(array.type):
        return array
    if pat.is_null(array.type):
        return array.cast(pa.string())
    missing = pa.scalar(None, pa.string())
    return pc.if_else(array.is_valid(), json_text(array), missing)


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pat.is_boolean(kind)
        or pat.is_integer(kind)
        or pat.is_floating(kind)
        or pat.is_decimal(kind)
    )


def is_formula(text: str) -> bool:
    """Whether a spreadsheet may take a cell with this text for a formula."""
    return bool(re.match(_FORMULA, text))


def _harmless(text: pl.Expr) -> pl.Expr:
    armed = text.str.contains(_FORMULA)
    return pl.when(armed).then(pl.format("'{}", text)).otherwise(text).name.keep()


def _header(names: list[str], options: CsvOptions) -> bytes:
    safe = options.dialect is CsvDialect.SPREADSHEET_SAFE
    cells = []
    for name in names:
        text = "'" + name if safe and is_formula(name) else name
        if not text or any(mark in text for mark in (options.delimiter, '"', "\n", "\r")):
            text = '"' + text.replace('"', '""') + '"'
        cells.append(text)
    return (options.delimiter.join(cells) + "\n").encode()
