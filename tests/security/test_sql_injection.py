"""What callers send never becomes SQL: every payload is a value like any other, in each
place that takes one and over each engine."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd.v1 import dataset_pb2, job_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.jobs.lower import to_query
from exportd_server.jobs.model import ExportSpec, FilterLiteral, FilterSpec
from exportd_server.sources.base import FilterOperator, Query, Shard
from exportd_server.sources.catalogue import Dataset, load_catalogue
from tests.support import rpc
from tests.support.holders import to_csv
from tests.support.postgres import PostgresServer
from tests.support.server import Server, serve, settings

O = FilterOperator  # noqa: E741 - reads well in a long table
KINDS = ("parquet", "csv", "sqlite", "postgres")

PAYLOADS = (
    "'",
    "''",
    "' OR '1'='1",
    "' OR 1=1 --",
    "') OR ('1'='1",
    "\\' OR 1=1 --",
    "\\",
    "'; DROP TABLE people; --",
    "'; DELETE FROM people; COMMIT; --",
    "' UNION SELECT owner, owner, owner, 1 FROM people --",
    "' AND 1=(SELECT count(*) FROM people) --",
    "'||(SELECT owner FROM people LIMIT 1)||'",
    "'||pg_sleep(5)||'",
    "1; SELECT pg_sleep(5)",
    "' AND (SELECT randomblob(500000000)) IS NOT NULL --",
    "'; ATTACH DATABASE 'stolen.db' AS x; --",
    "'; COPY people TO 'stolen.csv'; --",
    "'; COPY people TO PROGRAM 'id'; --",
    "' OR owner IN (SELECT * FROM read_csv('/etc/passwd')) --",
    "$$ OR 1=1 $$",
    "$1",
    "?",
    ":p0",
    "@p0",
    "%s%(x)s{0}",
    '"',
    '" OR "1"="1',
    "`id`",
    "/* */ OR 1=1",
    "E'\\047' OR 1=1",
    "U&'\\0027' OR 1=1",
    "\u02bc OR 1=1",
    "\uff07 OR 1=1 --",
    "%",
    "_",
    "a%' ESCAPE '!",
    "x'\nOR 1=1 --",
    "NULL",
    "exportd:6964:",
)
"""None has U+0000, which no text of these databases can hold: that one is refused."""

PEOPLE: list[dict[str, Any]] = [
    {"id": number, "owner": text, "network": PAYLOADS[-1 - number], "n": number % 5}
    for number, text in enumerate(PAYLOADS)
] + [
    {"id": len(PAYLOADS), "owner": "plain", "network": "plain", "n": 1},
    {"id": len(PAYLOADS) + 1, "owner": None, "network": None, "n": None},
]
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("owner", pa.string()),
        ("network", pa.string()),
        ("n", pa.int64()),
    ]
)
_TEXTS = """
[datasets.people.column.owner]
type = "string"
[datasets.people.column.network]
type = "string"
"""


def _hold(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """Put the people where a source of that kind finds them; returns their origin."""
    names = tuple(SCHEMA.names)
    match kind:
        case "parquet":
            pq.write_table(pa.Table.from_pylist(PEOPLE, SCHEMA), folder / "p.parquet")
            return '[datasets.people]\nparquet = "p.parquet"\n'
        case "csv":
            text = to_csv(PEOPLE, names, header=True)
            (folder / "p.csv").write_text(text, newline="")
            return '[datasets.people]\ncsv = "p.csv"\n'
        case "sqlite":
            with closing(sqlite3.connect(folder / "p.db")) as database:
                database.execute(
                    "CREATE TABLE people (id INTEGER, owner TEXT, network TEXT, n INTEGER)"
                )
                database.executemany(
                    "INSERT INTO people VALUES (:id, :owner, :network, :n)", PEOPLE
                )
                database.commit()
            url = "sqlite:///p.db"
        case _:
            postgres: PostgresServer = request.getfixturevalue("postgres")
            name = request.getfixturevalue("postgres_database")
            body = to_csv(PEOPLE, names, header=False)
            postgres.sql(
                "CREATE TABLE people (id bigint, owner text, network text, n bigint);\n"
                f"COPY people FROM STDIN (FORMAT csv);\n{body}\\.\n",
                database=name,
            )
            url = postgres.url(name)
    return (
        f'[connections.c]\nurl = "{url}"\n'
        '[datasets.people]\nconnection = "c"\ntable = "people"\n'
    )


@pytest.fixture(params=KINDS)
def catalogue(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    origin = _hold(request.param, folder, request)
    path = folder / "datasets.toml"
    path.write_text(
        f'{origin}target_column = "owner"\nnetwork_column = "network"\n'
        + (_TEXTS if request.param == "csv" else "")
    )
    return path


def found(dataset: Dataset, shard: Shard, **fields: Any) -> list[int]:
    """The ids of the rows that a request gives."""
    spec = ExportSpec(
        dataset="people", output=OutputFormat(Format.JSONL), columns=("id",), **fields
    )
    query = to_query(dataset, spec, "default")
    with dataset.source.open(query, shard) as stream:
        return sorted(row for batch in stream for row in batch["id"].to_pylist())


def expected(column: str, holds: Callable[[str], bool]) -> list[int]:
    return [
        row["id"] for row in PEOPLE if isinstance(row[column], str) and holds(row[column])
    ]


def where(operator: FilterOperator, *texts: str, column: str = "owner") -> FilterSpec:
    return FilterSpec(
        column, operator, tuple(FilterLiteral("string", text) for text in texts)
    )


COMPARED: dict[FilterOperator, Callable[[str, str], bool]] = {
    O.EQUAL: lambda value, text: value == text,
    O.NOT_EQUAL: lambda value, text: value != text,
    O.LESS: lambda value, text: value < text,
    O.LESS_OR_EQUAL: lambda value, text: value <= text,
    O.GREATER: lambda value, text: value > text,
    O.GREATER_OR_EQUAL: lambda value, text: value >= text,
    O.IN: lambda value, text: value == text,
    O.NOT_IN: lambda value, text: value != text,
    O.STARTS_WITH: lambda value, text: value.startswith(text),
    O.CONTAINS: lambda value, text: text in value,
}


def holds_for(operator: FilterOperator, text: str, value: str) -> bool:
    return COMPARED[operator](value, text)


@pytest.mark.minutes
def test_every_operator_takes_a_payload_for_what_it_is(catalogue: Path) -> None:
    dataset = load_catalogue(catalogue).get("people")
    assert dataset is not None
    (shard,) = dataset.source.plan(Query(("id",))).shards
    steps = 2 if "postgresql" in catalogue.read_text() else 4
    operators = list(COMPARED)
    for number, text in enumerate(PAYLOADS):
        # Each operator meets a fifth of the payloads or more.
        for step in range(steps):
            operator = operators[(number + step * 3) % len(operators)]
            right = expected("owner", partial(holds_for, operator, text))
            assert found(dataset, shard, filters=(where(operator, text),)) == right, (
                operator,
                text,
            )
    half = PAYLOADS[::2]
    assert found(dataset, shard, filters=(where(O.IN, *half),)) == expected(
        "owner", lambda value: value in half
    )
    assert found(dataset, shard, filters=(where(O.NOT_IN, *half),)) == expected(
        "owner", lambda value: value not in half
    )


def test_a_target_and_a_network_are_compared_and_nothing_else(catalogue: Path) -> None:
    dataset = load_catalogue(catalogue).get("people")
    assert dataset is not None
    (shard,) = dataset.source.plan(Query(("id",))).shards
    for text in PAYLOADS:
        (row,) = [row for row in PEOPLE if row["owner"] == text]
        network = str(row["network"])
        assert found(dataset, shard, target_id=text, network=network) == [row["id"]]
    assert found(dataset, shard, target_id="plain", network=PAYLOADS[2]) == []


# --- over a socket


@pytest.fixture
async def server(catalogue: Path, tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(settings(tmp_path / "data", catalogue=catalogue)) as running:
        yield running


NASTY = tuple(PAYLOADS[number] for number in (2, 5, 7, 11, 35))


async def exported(server: Server, **fields: Any) -> list[dict[str, Any]]:
    job = await rpc.export(server.stub, "people", format=dataset_pb2.FORMAT_JSONL, **fields)
    data = await rpc.download(server.stub, job.job_id)
    return [json.loads(line) for line in data.decode().splitlines()]


def walked(folder: Path, text: str) -> Iterator[Path]:
    """The files whose name has a text."""
    return (path for path in folder.rglob("*") if text in path.name)


async def test_a_callers_payload_is_a_value_all_the_way(
    server: Server, tmp_path: Path
) -> None:
    for text in NASTY:
        (row,) = [row for row in PEOPLE if row["owner"] == text]
        assert await exported(server, target_id=text) == [row]
        (row,) = [row for row in PEOPLE if row["network"] == text]
        assert await exported(server, network=text) == [row]
    value = [job_pb2.FilterValue(string_value=text) for text in NASTY]
    among = job_pb2.Filter(
        column="owner", operator=dataset_pb2.FILTER_OPERATOR_IN, values=value
    )
    rows = await exported(server, filters=[among])
    assert [row["owner"] for row in rows] == [t for t in PAYLOADS if t in NASTY]
    assert sorted(await exported(server), key=lambda row: int(row["id"])) == PEOPLE
    assert not list(walked(tmp_path, "stolen"))


async def test_a_payload_is_no_column_no_dataset_and_no_label_key(server: Server) -> None:
    for text in PAYLOADS:
        names = rpc.request(
            "people",
            columns=[text, f'id"{text}'],
            filters=[
                job_pb2.Filter(
                    column=f"owner{text}", operator=dataset_pb2.FILTER_OPERATOR_IS_NULL
                )
            ],
        )
        names.labels[text] = "x"
        refused = await rpc.refusal(server.stub.CreateExport(names))
        assert refused.reason == "INVALID_REQUEST"
        assert {"columns[0]", "columns[1]", "filters[0].column"} < set(refused.fields)
        assert len(refused.fields) == 4
        unknown = await rpc.refusal(server.stub.CreateExport(rpc.request(text)))
        assert unknown.reason == "DATASET_NOT_FOUND"
    for literal in (
        job_pb2.FilterValue(string_value="1 OR 1=1"),
        job_pb2.FilterValue(string_value="1"),
        job_pb2.FilterValue(double_value=float("inf")),
    ):
        number = job_pb2.Filter(
            column="n", operator=dataset_pb2.FILTER_OPERATOR_EQUAL, values=[literal]
        )
        refused = await rpc.refusal(
            server.stub.CreateExport(rpc.request("people", filters=[number]))
        )
        assert refused.fields == ["filters[0].values[0]"]
    for text in ("\0", "' OR 1=1\0 --"):
        refused = await rpc.refusal(
            server.stub.CreateExport(rpc.request("people", target_id=text))
        )
        assert refused.fields == ["target_id"]


async def test_a_payload_is_kept_as_a_label_and_found_by_it(server: Server) -> None:
    """Labels and request ids meet the SQL of the service's own ledger."""
    jobs = {}
    for text in NASTY:
        message = rpc.request("people", target_id=text, columns=["owner"])
        message.labels["why"] = text
        job = (await server.stub.CreateExport(message)).job
        assert dict(job.request.labels) == {"why": text}
        jobs[text] = job.job_id
    for text, job_id in jobs.items():
        job = await rpc.finish(server.stub, job_id)
        data = await rpc.download(server.stub, job.job_id)
        assert list(csv.reader(io.StringIO(data.decode()))) == [["owner"], [text]]
        listed = await server.stub.ListJobs(pb.ListJobsRequest(labels={"why": text}))
        assert [each.job_id for each in listed.jobs] == [job_id]
        listed = await server.stub.ListJobs(pb.ListJobsRequest(dataset=text))
        assert not listed.jobs
