"""Memory does not grow with the size of a part."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from exportd_server.encoders.base import Compression, Format

MEBIBYTE = 1 << 20

SCRIPT = """
import json, sys
import psutil, pyarrow as pa, pyarrow.compute as pc
from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.encoders.registry import open_encoder

class Counter:
    size = 0
    def write(self, data, /):
        self.size += len(data)

rows = 65_536
numbers = pa.array(range(rows))
text = pc.binary_repeat(numbers.cast(pa.string()), 20)
batch = pa.record_batch({
    "i": numbers, "a": text, "b": text,
    "when": numbers.cast(pa.timestamp("us", "UTC")),
    "f": pc.divide(numbers.cast(pa.float64()), 7.0),
    "n": pa.StructArray.from_arrays([numbers, text], names=["x", "y"]),
})
sink = Counter()
encoder = open_encoder(
    OutputFormat(Format[sys.argv[1]], Compression[sys.argv[2]]), batch.schema, sink
)
process, resident = psutil.Process(), []
for _ in range(32):
    encoder.write(batch)
    encoder.flush()
    resident.append(process.memory_info().rss)
encoder.close()
print(json.dumps({"warm": max(resident[:8]), "peak": max(resident),
                  "arrow": 32 * batch.nbytes}))
"""


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
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, form, compression],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = json.loads(run.stdout)
    assert found["arrow"] > 600 * MEBIBYTE
    assert found["peak"] - found["warm"] < 64 * MEBIBYTE
