"""`python -m bench.peers.duckdb FILES FORMAT TARGET`: DuckDB's COPY of Parquet files, with
its default settings."""

from __future__ import annotations

import sys

import duckdb

from bench.working import working

_OPTIONS = {
    "csv": "FORMAT csv, HEADER",
    "jsonl": "FORMAT json",
    "parquet": "FORMAT parquet, COMPRESSION zstd",
}


def main() -> None:
    """Copy once."""
    files, kind, target = sys.argv[1:]
    with duckdb.connect() as engine, working() as work:
        copied = engine.execute(f"COPY (FROM '{files}') TO '{target}' ({_OPTIONS[kind]})")
        row = copied.fetchone()
        work.rows = row[0] if row else 0


if __name__ == "__main__":
    main()
