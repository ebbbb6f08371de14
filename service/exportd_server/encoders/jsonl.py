"""JSON Lines: one JSON object a line; docs/formats.md has the exact rules."""

from __future__ import annotations

from typing import IO, cast

import pyarrow as pa

from exportd_server.encoders.json_text import Member, members
from exportd_server.encoders.text import TextEncoder
from exportd_server.encoders.values import (
    Chunks,
    encoding,
    join,
    polars_frame,
    text_bytes,
)


class JsonlEncoder(TextEncoder):
    """Writes one part as JSON Lines."""

    def _encode(self, piece: pa.RecordBatch) -> Chunks:
        parts = []
        for field, column in zip(self._schema, piece.columns, strict=True):
            with encoding(field.name):
                parts.append(Member(field.name, column))
        chunks = Chunks()
        with encoding():
            if all(part.by_polars for part in parts):
                arrays = [part.array for part in parts]
                polars_frame(self._schema.names, arrays).write_ndjson(
                    cast("IO[bytes]", chunks)
                )
            else:
                chunks.write(text_bytes(join("{", members(parts), "}\n")))
        return chunks
