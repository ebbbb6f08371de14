"""`python -m bench.peers.rows URL QUERY FORMAT TARGET`: the export that many a service has
by hand: rows of SQLAlchemy by a server-side cursor, written one by one."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from bench.working import working

_ROWS = 10_000
"""Rows that the cursor fetches at a time."""

_SCHEMA = pa.schema(
    {
        "block_number": pa.int64(),
        "block_time": pa.timestamp("us", "UTC"),
        "transaction_hash": pa.string(),
        "log_index": pa.int32(),
        "network": pa.string(),
        "token_address": pa.string(),
        "token_symbol": pa.string(),
        "token_name": pa.string(),
        "from_address": pa.string(),
        "to_address": pa.string(),
        "amount": pa.decimal128(38, 18),
        "amount_usd": pa.float64(),
        "is_contract": pa.bool_(),
        "memo": pa.string(),
    }
)
"""Of the sample data's token transfers."""

_Batches = Iterator[Sequence[sa.Row[Any]]]


def _csv(names: list[str], batches: _Batches, target: Path) -> int:
    count = 0
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for rows in batches:
            writer.writerows(rows)
            count += len(rows)
    return count


def _jsonl(names: list[str], batches: _Batches, target: Path) -> int:
    count = 0
    with target.open("w", encoding="utf-8") as file:
        for rows in batches:
            for row in rows:
                file.write(json.dumps(dict(zip(names, row, strict=True)), default=str))
                file.write("\n")
            count += len(rows)
    return count


def _parquet(names: list[str], batches: _Batches, target: Path) -> int:
    with pq.ParquetWriter(target, _SCHEMA, compression="zstd") as writer:
        return _write(names, batches, writer)


def _arrow(names: list[str], batches: _Batches, target: Path) -> int:
    with pa.ipc.new_stream(str(target), _SCHEMA) as writer:
        return _write(names, batches, writer)


def _write(names: list[str], batches: _Batches, writer: Any) -> int:
    count = 0
    for rows in batches:
        dicts = [dict(zip(names, row, strict=True)) for row in rows]
        writer.write(pa.RecordBatch.from_pylist(dicts, _SCHEMA))
        count += len(rows)
    return count


_WRITERS = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow}
FORMATS = tuple(_WRITERS)


def main() -> None:
    """Export once."""
    url, query, kind, target = sys.argv[1:]
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with (
        engine.connect().execution_options(yield_per=_ROWS) as connection,
        working() as work,
    ):
        result = connection.execute(sa.text(query))
        work.rows = _WRITERS[kind](list(result.keys()), result.partitions(), Path(target))


if __name__ == "__main__":
    main()
