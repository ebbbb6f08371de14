"""Memory does not grow with the size of a part."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.encoders.registry import open_encoder
from tests.support.memory import MIB, apart, growing

ROWS = 65_536


class Nowhere:
    """Takes bytes and forgets them."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        return len(data)


def a_batch() -> pa.RecordBatch:
    numbers = pa.array(range(ROWS))
    text = pc.binary_repeat(numbers.cast(pa.string()), 20)
    return pa.record_batch(
        {
            "i": numbers,
            "a": text,
            "b": text,
            "when": numbers.cast(pa.timestamp("us", "UTC")),
            "f": pc.divide(numbers.cast(pa.float64()), 7.0),
            "n": pa.StructArray.from_arrays([numbers, text], names=["x", "y"]),
        }
    )


def encoding(form: Format, compression: Compression) -> tuple[float, float]:
    """MiB of the rows of a long part, and what they take beyond a short one."""
    batch = a_batch()
    encoder = open_encoder(OutputFormat(form, compression), batch.schema, Nowhere())

    def write(batches: int) -> None:
        for _ in range(batches):
            encoder.write(batch)
            encoder.flush()

    write(8)
    with growing() as growth:
        write(24)
    encoder.close()
    return 32 * batch.nbytes / MIB, growth.mib


@pytest.mark.minutes
@pytest.mark.parametrize(
    ("form", "compression"),
    [
        (Format.CSV, Compression.NONE),
        (Format.CSV, Compression.ZSTD),
        (Format.JSONL, Compression.GZIP),
        (Format.PARQUET, Compression.NONE),
        (Format.ARROW, Compression.NONE),
    ],
)
def test_a_long_part_takes_no_more_memory_than_a_short_one(
    form: Format, compression: Compression
) -> None:
    size, grown = apart(encoding, form, compression)
    assert size > 600
    # It was 32 for Parquet and at most 16 for the others.
    assert grown < 64
