"""Arrow Flight serving a file: `python -m bench.peers.flight FILE`.

The file is mapped, and each batch is one binary value of 1 MiB that lies in the map, so
that Flight copies nothing before it sends.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import flight

CHUNK = 2**20
SCHEMA = pa.schema([pa.field("data", pa.large_binary(), nullable=False)])


class FileServer(flight.FlightServerBase):  # type: ignore[misc] # it has no types
    """Gives the whole file for any ticket."""

    def __init__(self, path: Path) -> None:
        super().__init__("grpc://127.0.0.1:0")
        with path.open("rb") as file:
            self._whole = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def do_get(
        self, _context: flight.ServerCallContext, _ticket: flight.Ticket
    ) -> flight.FlightDataStream:
        """See Flight."""
        return flight.GeneratorStream(SCHEMA, self._batches())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, self._whole.size, CHUNK):
            data = self._whole.slice(start, min(CHUNK, self._whole.size - start))
            ends = pa.array([0, data.size], pa.int64()).buffers()[1]
            value = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])
            yield pa.record_batch([value], schema=SCHEMA)


if __name__ == "__main__":
    server = FileServer(Path(sys.argv[1]))
    print(f"127.0.0.1:{server.port}", flush=True)
    server.serve()
