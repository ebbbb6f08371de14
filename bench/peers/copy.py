"""A file of CSV into a table as plainly as it goes: PostgreSQL's COPY through psycopg or
psql, and SQLite's inserts of rows that `csv` has read."""

from __future__ import annotations

import csv
import itertools
import sqlite3
import sys
from pathlib import Path

import psycopg
from psycopg import sql

from bench.contest import Run, command
from bench.peers import psql
from bench.store_run import BLOCK, timed


def main() -> None:
    """`python -m bench.peers.copy postgresql|sqlite URL TABLE FILE`: once, in one
    transaction; prints what it took as JSON."""
    what, place, table, path = sys.argv[1:]
    {"postgresql": postgresql, "sqlite": sqlite}[what](place, table, Path(path))


def postgresql(url: str, table: str, path: Path) -> None:
    """COPY from standard input."""
    statement = sql.SQL("COPY {} FROM STDIN (FORMAT csv, HEADER)").format(
        sql.Identifier(table)
    )
    with psycopg.connect(url) as session:
        session.execute("SELECT 1")
        with path.open("rb", buffering=0) as data, timed():
            with session.cursor() as cursor, cursor.copy(statement) as copy:
                while block := data.read(BLOCK):
                    copy.write(block)
            session.commit()


def sqlite(place: str, table: str, path: Path) -> None:
    """Inserts of many rows at a time; the columns' affinities make numbers of text."""
    session = sqlite3.connect(place, isolation_level=None)
    session.execute("PRAGMA synchronous = FULL")
    with path.open(encoding="utf-8", newline="") as data, timed():
        rows = csv.reader(data)
        marks = ", ".join("?" * len(next(rows)))
        session.execute("BEGIN")
        statement = f'INSERT INTO "{table}" VALUES ({marks})'
        while chunk := list(itertools.islice(rows, 10_000)):
            session.executemany(statement, chunk)
        session.execute("COMMIT")
    session.close()


def psql_copy(url: str, table: str, path: Path) -> Run:
    """The `copy` of psql, whose start is part of the time."""
    binary = psql.binary()
    assert binary is not None
    script = f"\\copy \"{table}\" FROM '{path}' (FORMAT csv, HEADER)"
    return command([binary, url, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", script])


if __name__ == "__main__":
    main()
