"""A million rows to each sink.

By the service: from when the first delivery of a job is due until the last has arrived,
both by the ledger's clock. By the database sink alone, in a process of its own, beside a
plain COPY of the same file into a table just like it. Receivers are real ones on this
machine and share its cores: PostgreSQL, SQLite, SeaweedFS, an HTTP server that reads all
and keeps nothing, a directory.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from bench.contest import (
    Contestant,
    Missing,
    Run,
    beside,
    contest,
    cpu_seconds,
    forget_peak,
    peak_mib,
)
from bench.machine import CACHE, Measured, sample_data, scaled, server
from bench.peers import copy, psql
from bench.receiver import receiving
from bench.report import Result
from exportd import (
    Client,
    DeliveryState,
    Job,
    Sink,
    to_database,
    to_file,
    to_s3,
    to_webhook,
)
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.seaweed import SeaweedServer, running_seaweed

ROWS = scaled(1_000_000)
GOAL_COPY = 0.8
_SECRET = "whsec_" + "A" * 32


def results() -> Iterator[Result]:
    """Measure."""
    catalogue = sample_data(ROWS)
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as name,
        running_postgres(durable=True) as postgres,
        running_seaweed(Path(name) / "seaweed") as seaweed,
        receiving(_Receiver) as receiver,
    ):
        place = _Place(Path(name), postgres, seaweed)
        variables = {"EXPORTD_SINKS": str(place.sinks_file(receiver))}
        with server(place.directory / "data", catalogue, variables) as running:
            yield from _service(running, place)
            with Client(running.address) as client:
                job = client.export("token_transfers", format="csv").wait(timeout=600)
                yield from _sinks_alone(place, _told(job, place))
                job.delete()


class _Place:
    """Where deliveries go."""

    def __init__(
        self, directory: Path, postgres: PostgresServer, seaweed: SeaweedServer
    ) -> None:
        self.directory = directory
        self.delivered = directory / "delivered"
        self.delivered.mkdir()
        self.postgres = postgres
        self.database = postgres.create_database()
        self.url = postgres.url(self.database)
        self.sqlite = directory / "warehouse.db"
        with closing(sqlite3.connect(self.sqlite)) as made:
            made.execute("PRAGMA journal_mode = WAL")
        self.s3 = seaweed.options()

    def sinks_file(self, receiver: str) -> Path:
        """The operator's connections."""
        path = self.directory / "sinks.toml"
        path.write_text(
            f'[connections.files]\ntype = "local_file"\nroot = "{self.delivered}"\n'
            f'[connections.web]\ntype = "webhook"\nallow_http = true\nurl = "{receiver}"\n'
            'allow_private = ["127.0.0.0/8"]\n'
            '[connections.lake]\ntype = "object_storage"\n'
            f'bucket = "{self.s3.bucket}"\nprefix = "{self.s3.prefix}"\n'
            f'endpoint_url = "{self.s3.endpoint_url}"\nregion = "{self.s3.region}"\n'
            "path_style = true\n"
            f'access_key_id = "{self.s3.access_key_id}"\n'
            f'secret_access_key = "{self.s3.secret_access_key}"\n'
            f'[connections.warehouse]\ntype = "database"\nurl = "{self.url}"\n'
            f'[connections.lite]\ntype = "database"\nurl = "sqlite:///{self.sqlite}"\n',
            encoding="utf-8",
        )
        return path

    def postgres_rows(self, table: str) -> int:
        """Rows of a table."""
        return int(
            self.postgres.sql(f'SELECT count(*) FROM "{table}"', database=self.database)
        )

    def empty_postgres(self, table: str) -> None:
        """As if nothing had been delivered. A checkpoint that one run has left to do
        would fall on the next one."""
        self.postgres.sql(f'TRUNCATE "{table}"', database=self.database)
        self.postgres.sql("CHECKPOINT", database=self.database)

    def sqlite_rows(self, table: str) -> int:
        """Rows of a table."""
        with closing(sqlite3.connect(self.sqlite)) as database:
            ((count,),) = database.execute(f'SELECT count(*) FROM "{table}"')
        return int(count)

    def empty_sqlite(self, table: str) -> None:
        """As if nothing had been delivered."""
        with closing(sqlite3.connect(self.sqlite)) as database:
            database.execute(f'DELETE FROM "{table}"')
            database.commit()
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _service(running: Measured, place: _Place) -> Iterator[Result]:
    """Each sink by itself, in turns."""
    sinks = {
        "local_file": to_file("files"),
        "webhook": to_webhook(connection="web", secret=_SECRET, mode="PUSH_PARTS"),
        "object_storage": to_s3("lake"),
        "database (PostgreSQL)": to_database("warehouse", "served", create_table=True),
        "database (SQLite)": to_database("lite", "served", create_table=True),
    }
    check = {
        "database (PostgreSQL)": (place.postgres_rows, place.empty_postgres),
        "database (SQLite)": (place.sqlite_rows, place.empty_sqlite),
    }
    with Client(running.address) as client:

        def contestant(name: str, sink: Sink) -> Contestant:
            def deliver() -> Run:
                if "webhook" in name:
                    _Receiver.got = 0
                run, size = _delivered(client, running.pid, sink)
                if name in check:
                    count, empty = check[name]
                    assert count("served") == ROWS
                    empty("served")
                elif "webhook" in name:
                    assert _Receiver.got >= size
                elif "local" in name:
                    files = [p for p in place.delivered.rglob("*.csv") if p.is_file()]
                    assert sum(path.stat().st_size for path in files) == size
                    for path in files:
                        path.unlink()
                return run

            return deliver

        runs = contest({name: contestant(name, sink) for name, sink in sinks.items()})
    for name, run in runs.items():
        title = f"delivery of {ROWS:,} rows to {name}, service"
        yield Result(title, ROWS / run.seconds / 1e6, "Mrow/s")
        yield Result(f"{title}, CPU", run.cpu or 0, "CPU s")
        yield Result(f"{title}, peak memory", run.peak or 0, "MiB")


def _delivered(client: Client, pid: int, sink: Sink) -> tuple[Run, int]:
    """One export to one sink: its delivery, and bytes of its parts. CPU is that of the
    server from when the export has succeeded; what was delivered before is not in it."""
    job = client.export("token_transfers", format="csv", sinks=[sink])
    job.wait(timeout=600)
    forget_peak(pid)
    before = cpu_seconds(pid)
    for _ in job.watch(until_delivered=True):
        pass
    cpu, peak = cpu_seconds(pid) - before, peak_mib(pid)
    found = list(job.deliveries())
    assert found
    assert all(each.state is DeliveryState.DELIVERED for each in found), found
    began = min(each.create_time for each in found if each.create_time is not None)
    ended = max(each.finish_time for each in found if each.finish_time is not None)
    manifest = job.refresh().manifest
    assert manifest is not None
    assert manifest.rows == ROWS
    job.delete()
    # Each part has its header: together they are more than the joined output.
    size = sum(part.size for part in manifest.parts)
    return Run((ended - began).total_seconds(), cpu, peak), size


def _told(job: Job, place: _Place) -> dict[str, Any]:
    """What `bench.delivery_run` is told of an export, and of its file."""
    manifest = job.refresh().manifest
    assert manifest is not None
    stored = sorted((place.directory / "data" / "outputs").rglob("output/*"))
    stored = [path for path in stored if path.is_file() and job.id in str(path)]
    assert len(stored) == len(manifest.parts)
    whole = place.directory / "whole.csv"
    job.download(whole)
    return {
        "columns": [
            {"name": c.name, "kind": c.kind, "type": c.type, "nullable": c.nullable}
            for c in manifest.columns
        ],
        "parts": [
            {
                "path": str(path),
                "file_name": part.file_name,
                "rows": part.rows,
                "bytes": part.size,
                "prefix_bytes": part.prefix_bytes,
                "crc32c": part.crc32c,
                "sha256": part.sha256.hex(),
            }
            for path, part in zip(stored, manifest.parts, strict=True)
        ],
    }


def _sinks_alone(place: _Place, told: dict[str, Any]) -> Iterator[Result]:
    whole = place.directory / "whole.csv"
    lite = f"sqlite:///{place.sqlite}"
    for url, table, like in (
        (place.url, "ours", 'CREATE TABLE "theirs" (LIKE "ours")'),
        (lite, "ours", None),
    ):
        _sink(told, url, table, create=True)
        if like:
            place.postgres.sql(like, database=place.database)
            place.empty_postgres("ours")
    with closing(sqlite3.connect(place.sqlite)) as database:
        ((made,),) = database.execute("SELECT sql FROM sqlite_master WHERE name = 'ours'")
        database.execute(made.replace("ours", "theirs", 1))
        database.commit()
    place.empty_sqlite("ours")

    def counted(
        run: Callable[[], Run], rows: Callable[[str], int], empty: Callable[[str], None]
    ) -> Callable[[str], Contestant]:
        def of(table: str) -> Contestant:
            def once() -> Run:
                taken = run()
                assert rows(table) == ROWS
                empty(table)
                return taken

            return once

        return of

    in_postgres = (place.postgres_rows, place.empty_postgres)
    contestants = {
        "sink": counted(lambda: _sink(told, place.url, "ours"), *in_postgres)("ours"),
        "psycopg": counted(lambda: _copy("postgresql", place.url, whole), *in_postgres)(
            "theirs"
        ),
    }
    missing = psql.missing()
    if missing is None:
        contestants["psql"] = counted(
            lambda: copy.psql_copy(place.url, "theirs", whole), *in_postgres
        )("theirs")
    runs = contest(contestants)
    title = f"database sink, {ROWS:,} rows into PostgreSQL"
    for peer, name in (("psycopg", "COPY by psycopg"), ("psql", "psql \\copy")):
        if peer in runs:
            yield from beside(
                f"{title}, beside {peer}",
                runs["sink"],
                name,
                runs[peer],
                amount=ROWS / 1e6,
                unit="Mrow/s",
                goal=GOAL_COPY,
            )
    if isinstance(missing, Missing):
        yield Result(f"{title}, beside psql: left out, {missing.reason}", 0, "")
    in_sqlite = (place.sqlite_rows, place.empty_sqlite)
    runs = contest(
        {
            "sink": counted(lambda: _sink(told, lite, "ours"), *in_sqlite)("ours"),
            "sqlite3": counted(
                lambda: _copy("sqlite", str(place.sqlite), whole), *in_sqlite
            )("theirs"),
        }
    )
    yield from beside(
        f"database sink, {ROWS:,} rows into SQLite",
        runs["sink"],
        "csv and sqlite3",
        runs["sqlite3"],
        amount=ROWS / 1e6,
        unit="Mrow/s",
    )


def _sink(told: dict[str, Any], url: str, table: str, *, create: bool = False) -> Run:
    done = subprocess.run(
        [sys.executable, "-m", "bench.delivery_run"],
        check=True,
        input=json.dumps(told | {"url": url, "table": table, "create_table": create}),
        stdout=subprocess.PIPE,
        text=True,
    )
    return Run(**json.loads(done.stdout))


def _copy(what: str, place: str, path: Path) -> Run:
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers.copy", what, place, "theirs", str(path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Run(**json.loads(done.stdout))


class _Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    got = 0
    """Bytes of bodies so far."""

    def do_POST(self) -> None:
        left = int(self.headers["Content-Length"])
        buffer = memoryview(bytearray(2**18))
        while left:
            count = self.rfile.readinto(buffer[: min(left, len(buffer))])
            if not count:
                return
            left -= count
            _Receiver.got += count
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""
