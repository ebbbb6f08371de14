"""Arrow IPC, the stream format: https://arrow.apache.org/docs/format/Columnar.html."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyarrow as pa

from exportd_server.encoders.base import ArrowCompression, ByteSink, OutputFormat
from exportd_server.encoders.compress import Tap
from exportd_server.encoders.values import conform, encoding

_CODECS = {
    ArrowCompression.UNCOMPRESSED: None,
    ArrowCompression.LZ4: "lz4",
    ArrowCompression.ZSTD: "zstd",
}


class ArrowEncoder:
    """Writes one part as an Arrow stream. The schema message is the prefix, the mark of
    the stream's end the suffix."""

    def __init__(self, output: OutputFormat, schema: pa.Schema, sink: ByteSink) -> None:
        self._schema = schema
        self._tap = Tap(sink)
        self._writer = pa.ipc.new_stream(
            self._tap.file(),
            schema,
            options=pa.ipc.IpcWriteOptions(compression=_CODECS[output.arrow.compression]),
        )
        # The writer would put the schema out with the first batch, or at the end; whoever
        # keeps checksums of the prefix wants it now.
        message = memoryview(schema.serialize())
        with self._tap.open():
            self._tap.write(message)
        self._tap.skip(len(message))
        self.prefix_bytes = len(message)
        self.suffix_bytes = 0

    @property
    def buffered_bytes(self) -> int:
        """Nothing."""
        return 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Encode one batch."""
        self.stage(batch)()

    def stage(self, batch: pa.RecordBatch) -> Callable[[], None]:
        """Make sure of one batch: Arrow writes every value that its types allow."""
        return partial(self._put, conform(batch, self._schema))

    def _put(self, batch: pa.RecordBatch) -> None:
        with self._tap.open(), encoding():
            self._writer.write_batch(batch)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Write the mark of the end."""
        before = self._tap.written
        with self._tap.open(), encoding():
            self._writer.close()
        self.suffix_bytes = self._tap.written - before
