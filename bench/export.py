"""Token transfers from PostgreSQL and from Parquet into a file of each format.

Twice: the pipeline alone, as a worker runs it, into a local store; and the whole
service, from the call that creates the export until the client has downloaded it and
verified its checksums. Beside them what else one would take: psql's copy and sling,
DuckDB's COPY, and rows of SQLAlchemy written one by one. The last one and sling are slow:
they export a part of the rows, and are told as if they had gone on so.

The wheel of ADBC's driver for PostgreSQL is built without optimisation. Where
ADBC_POSTGRESQL_LIBRARY names a driver that is built with it, exportd runs with that one
as well.

Of the service, CPU seconds and memory are the server's; the client's CPU is told apart.
PostgreSQL's own are nobody's, though it works on the same cores.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import psycopg

from bench.contest import Run, beside, contest
from bench.export_race import DATASET, Race
from bench.machine import CACHE, sample_data, scaled, server
from bench.peers import psql, rows, sling
from bench.report import Result
from tests.support.postgres import PostgresServer, running_postgres

ROWS = 5_000_000
SLOW_SHARE = 10
"""The slow peers export one row in so many."""
SLOW_ROUNDS = 3

_FORMATS = ("csv", "csv+gzip", "jsonl", "jsonl+zstd", "parquet", "arrow")
_SERVED = ("csv", "jsonl", "parquet")
"""Formats that the whole service is measured with, too: compressed by gzip or zstd, or as
Arrow, it does the same work around another pipeline."""
_COMPARED: tuple[Sequence[str], Sequence[str]] = (("csv", "jsonl", "parquet"), ("csv",))
"""What psql has a goal for, which the second driver runs alone."""
_WAYS = ("pipeline", "service")
_LIBRARY = os.environ.get("ADBC_POSTGRESQL_LIBRARY", "")
"""By this name ADBC's own packages know the file."""
_OPTIMISED = "PostgreSQL by an optimised driver"
_PSQL_GOALS = {
    ("csv", "pipeline"): 1.1,
    ("csv", "service"): 0.8,
    ("jsonl", "pipeline"): 0.9,
    ("parquet", "pipeline"): 0.9,
}
_ROWS_GOAL = 8.0
_DUCKDB_GOALS = {("csv", "pipeline"): 1.5, ("jsonl", "pipeline"): 1.5}
_DUCKDB_FORMATS = ("csv", "jsonl", "parquet")

_TABLE = f"""
CREATE TABLE {DATASET} (
    block_number bigint, block_time timestamptz, transaction_hash text, log_index integer,
    network text, token_address text, token_symbol text, token_name text,
    from_address text, to_address text, amount numeric(38, 18),
    amount_usd double precision, is_contract boolean, memo text
)
"""


def results() -> Iterator[Result]:
    """Measure."""
    total = scaled(ROWS)
    files = sample_data(total)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        yield from _from_postgresql(files, Path(name), total)
        yield from _from_parquet(files, Path(name), total)


def _from_postgresql(files: Path, directory: Path, total: int) -> Iterator[Result]:
    sources = {"PostgreSQL": ""}
    if _LIBRARY:
        sources[_OPTIMISED] = f'driver = "{Path(_LIBRARY).resolve()}"\n'
    with running_postgres() as database:
        _load(database, files, directory)
        url, race = database.url(), Race(directory, total)
        with contextlib.ExitStack() as servers:
            for source, library in sources.items():
                catalogue = directory / f"{source}.toml"
                catalogue.write_text(
                    f'[connections.db]\nurl = "{url}"\n{library}'
                    f'[datasets.{DATASET}]\nconnection = "db"\n'
                    f'table = "public.{DATASET}"\n'
                )
                running = servers.enter_context(server(directory / source, catalogue))
                formats, served = _COMPARED if library else (_FORMATS, _SERVED)
                race.exportd(source, formats, served, catalogue, running)
            if psql.missing() is None:
                race.peer("psql", "csv", lambda to: psql.copy(url, DATASET, to))
            runs = contest(race.contestants)
        runs |= _slow(url, directory, max(1, total // SLOW_SHARE))
    for peer in (psql, sling):
        if why := peer.missing():
            name = peer.__name__.rpartition(".")[2]
            yield Result(f"export by {name}: left out, {why.reason}", 0, "")
    if not _LIBRARY:
        yield Result(f"{_OPTIMISED}: left out, ADBC_POSTGRESQL_LIBRARY is not set", 0, "")
    for source, fmt in itertools.product(sources, _FORMATS):
        for way in _WAYS:
            ours = f"{source} to {fmt}, {way}"
            goal = _PSQL_GOALS.get((fmt, way))
            yield from _pair(runs, ours, "psql to csv", "psql", total, goal)
        ours = f"{source} to {fmt}, pipeline"
        yield from _pair(runs, ours, f"rows to {fmt}", "rows", total, _ROWS_GOAL)
        yield from _pair(runs, ours, f"sling to {fmt}", "sling", total)
    yield from race.clients_cpu()


def _slow(url: str, directory: Path, some: int) -> Mapping[str, Run]:
    """The slow peers, as if they had exported all."""
    query = f"SELECT * FROM {DATASET} LIMIT {some}"
    race = Race(directory, some)
    for fmt in rows.FORMATS:
        race.program("rows", fmt, "bench.peers.rows", url, query, fmt)
    for fmt in sling.FORMATS if sling.missing() is None else ():
        race.peer("sling", fmt, lambda to: sling.export(url, query, to))
    runs = contest(race.contestants, SLOW_ROUNDS)
    return {
        name: Run(run.seconds * SLOW_SHARE, (run.cpu or 0.0) * SLOW_SHARE, run.peak)
        for name, run in runs.items()
    }


def _from_parquet(files: Path, directory: Path, total: int) -> Iterator[Result]:
    source = f"{files.parent / DATASET}/*.parquet"
    race = Race(directory, total)
    with server(directory / "parquet", files) as running:
        race.exportd("Parquet", _FORMATS, _SERVED, files, running)
        for fmt in _DUCKDB_FORMATS:
            race.program("DuckDB", fmt, "bench.peers.duckdb", source, fmt)
        runs = contest(race.contestants)
    for fmt in _FORMATS:
        peer = fmt if fmt in _DUCKDB_FORMATS else fmt.replace("arrow", "parquet")
        peer = f"DuckDB to {peer.partition('+')[0]}"
        for way in _WAYS:
            ours, goal = f"Parquet to {fmt}, {way}", _DUCKDB_GOALS.get((fmt, way))
            yield from _pair(runs, ours, peer, "", total, goal)
    yield from race.clients_cpu()


def _pair(
    runs: Mapping[str, Run],
    ours: str,
    peer: str,
    told: str,
    total: int,
    goal: float | None = None,
) -> Iterator[Result]:
    """`ours` beside `peer`, if both ran; the name tells which where there are several."""
    if ours in runs and peer in runs:
        yield from beside(
            f"{ours}, beside {told}" if told else ours,
            runs[ours],
            peer,
            runs[peer],
            amount=total / 1e6,
            unit="Mrow/s",
            goal=goal,
        )


def _load(database: PostgresServer, files: Path, directory: Path) -> None:
    """Make the table, of what is in the Parquet files."""
    text = directory / "load.csv"
    duckdb.execute(
        f"COPY (FROM '{files.parent / DATASET}/*.parquet') TO '{text}' (FORMAT csv, HEADER)"
    )
    with (
        contextlib.closing(psycopg.connect(database.url())) as connection,
        connection,
        connection.cursor() as cursor,
        text.open("rb") as file,
    ):
        cursor.execute(_TABLE)
        with cursor.copy(f"COPY {DATASET} FROM STDIN (FORMAT csv, HEADER)") as copy:
            while data := file.read(1 << 20):
                copy.write(data)
    text.unlink()
    database.sql(f"VACUUM (ANALYZE) {DATASET}")
