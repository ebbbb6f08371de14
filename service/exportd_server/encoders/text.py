"""What CSV and JSON Lines have in common: rows as text, slice by slice, through whatever
compresses them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import pyarrow as pa

from exportd_server.encoders.base import ByteSink, OutputFormat
from exportd_server.encoders.compress import open_output
from exportd_server.encoders.values import Chunks, Slicer, conform


class TextEncoder(ABC):
    """Writes one part as text; what the text is, a format says."""

    def __init__(self, output: OutputFormat, schema: pa.Schema, sink: ByteSink) -> None:
        self._schema = schema
        self._out = open_output(sink, output.compression)
        self._slicer = Slicer()
        self.prefix_bytes = 0
        self.suffix_bytes = 0

    @abstractmethod
    def _encode(self, piece: pa.RecordBatch) -> Chunks:
        """The text of some rows."""

    @property
    def buffered_bytes(self) -> int:
        """Nothing that `flush` would not push out."""
        return 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Encode one batch."""
        for chunks in self._encoded(batch, self._slicer):
            self._put(chunks)

    def stage(self, batch: pa.RecordBatch) -> Callable[[], None]:
        """Make the text of one batch, to be written later."""
        slicer = copy.copy(self._slicer)
        staged = list(self._encoded(batch, slicer))

        def write() -> None:
            self._slicer = slicer
            for chunks in staged:
                self._put(chunks)

        return write

    def flush(self) -> None:
        """Push out what the compressor holds."""
        self._out.flush()

    def close(self) -> None:
        """Finish the file."""
        self._out.close()

    def _encoded(self, batch: pa.RecordBatch, slicer: Slicer) -> Iterator[Chunks]:
        for piece in slicer.slices(conform(batch, self._schema)):
            chunks = self._encode(piece)
            slicer.learn(piece.num_rows, chunks.size)
            yield chunks

    def _put(self, chunks: Chunks) -> None:
        for chunk in chunks.take():
            self._out.write(chunk)
