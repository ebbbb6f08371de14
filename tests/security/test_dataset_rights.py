"""Who sees which dataset, which of its rows, and which of its values."""

from __future__ import annotations

import base64
import io
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd.v1 import dataset_pb2, job_pb2
from exportd.v1 import export_service_pb2 as pb
from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.errors import ConfigurationError, ExportdError, InvalidRequest
from exportd_server.jobs.lower import to_query
from exportd_server.jobs.model import ExportSpec, FilterLiteral, FilterSpec
from exportd_server.sources.base import Filter, FilterOperator, Query, SourceChanged
from exportd_server.sources.catalogue import Dataset, load_catalogue
from exportd_server.sources.masks import Mask, Masks
from tests.support import rights, rpc
from tests.support.identity import api_key, bearer
from tests.support.loose import lines
from tests.support.postgres import PostgresServer
from tests.support.rights import KEY, KEY_VARIABLE, KINDS, NUMBERED, RIGHTS, ROWS, Held
from tests.support.server import Server, serve, settings, until
from tests.support.waits import ENOUGH

O = dataset_pb2.FilterOperator  # noqa: E741 - reads well in a list
PARQUET = dataset_pb2.FORMAT_PARQUET
MASKED = ("email", "account", "phone", "score", "born")
HIDDEN = ("owner", "owner_no", "secret")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the hashes, where the catalogue looks for it."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def hold(kind: str, directory: Path, request: pytest.FixtureRequest) -> Held:
    directory.mkdir(exist_ok=True)
    if not kind.startswith("postgres"):
        return rights.hold(kind, directory)
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return rights.hold(
        kind, directory, postgres, request.getfixturevalue("postgres_database")
    )


@pytest.fixture(params=KINDS)
def catalogue(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A catalogue over each kind of source."""
    held = hold(request.param, tmp_path / "rows", request)
    path = tmp_path / "rows" / "datasets.toml"
    path.write_text(
        held.catalogue(rows=RIGHTS, numbered=NUMBERED, payroll='tenants = ["beta"]')
    )
    return path


class Caller:
    """A stub that makes its calls as somebody."""

    def __init__(self, stub: Any, key: str) -> None:
        self._stub, self._key = stub, key

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._stub, name), metadata=bearer(self._key))


class Service:
    """A server, and its callers by the names of their tenants."""

    def __init__(self, server: Server, keys: dict[str, str]) -> None:
        self._server, self._keys = server, keys

    def __getitem__(self, tenant: str) -> Any:
        return Caller(self._server.stub, self._keys[tenant])


TENANTS = ("acme", "beta", "ghost", "other", "7", "07", "42", "1")


@asynccontextmanager
async def served(catalogue: Path, data: Path, **more: Any) -> AsyncIterator[Service]:
    keys = {tenant: (await api_key(data, tenant))[0] for tenant in TENANTS}
    options = settings(data, catalogue=catalogue, identity={"api_keys": True}, **more)
    async with serve(options) as server:
        yield Service(server, keys)


@pytest.fixture
async def service(catalogue: Path, tmp_path: Path) -> AsyncIterator[Service]:
    async with served(catalogue, tmp_path / "data") as running:
        yield running


async def exported(stub: Any, dataset: str, **fields: Any) -> list[dict[str, Any]]:
    job = await rpc.export(stub, dataset, format=PARQUET, **fields)
    table = pq.read_table(io.BytesIO(await rpc.download(stub, job.job_id)))
    told = [(column.name, column.type) for column in job.manifest.columns]
    assert told == [(field.name, str(field.type)) for field in table.schema]
    return sorted(table.to_pylist(), key=lambda row: str(sorted(row.items())))


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: str(sorted(row.items())))


def where(column: str, operator: Any, **value: Any) -> job_pb2.Filter:
    values = [job_pb2.FilterValue(**value)] if value else []
    return job_pb2.Filter(column=column, operator=operator, values=values)


# --- over a socket


async def test_each_tenant_exports_its_own_rows_with_masked_values(
    service: Service,
) -> None:
    for tenant in ("acme", "beta"):
        expected = rights.seen(tenant)
        assert len(expected) >= 10
        assert await exported(service[tenant], "rows") == in_order(expected)
    assert await exported(service["ghost"], "rows") == []
    narrowed = await exported(
        service["acme"],
        "rows",
        columns=["phone", "id"],
        filters=[where("id", O.FILTER_OPERATOR_LESS, int_value=30)],
    )
    assert narrowed == in_order(
        [
            {"phone": row["phone"], "id": row["id"]}
            for row in rights.seen("acme")
            if row["id"] < 30
        ]
    )
    for tenant in ("7", "42"):
        expected = rights.seen_by_number(int(tenant))
        assert await exported(service[tenant], "numbered") == in_order(expected)
    assert await exported(service["1"], "numbered") == []


async def test_callers_filters_only_narrow_and_find_nothing_of_others(
    service: Service,
) -> None:
    stub = service["7"]
    others = where("owner_no", O.FILTER_OPERATOR_NOT_EQUAL, int_value=7)
    refused = await rpc.refusal(
        stub.CreateExport(rpc.request("numbered", filters=[others]))
    )
    assert refused.fields == ["filters[0].column"]
    everything = where("id", O.FILTER_OPERATOR_GREATER_OR_EQUAL, int_value=0)
    mine = in_order(rights.seen_by_number(7))
    assert await exported(stub, "numbered", filters=[everything]) == mine
    foreign = next(row["id"] for row in ROWS if row["owner_no"] == 42)
    one = where("id", O.FILTER_OPERATOR_EQUAL, int_value=foreign)
    assert await exported(stub, "numbered", filters=[one]) == []


async def test_a_dataset_of_another_tenant_is_like_none_at_all(service: Service) -> None:
    def listed(response: Any) -> list[str]:
        return [dataset.name for dataset in response.datasets]

    for tenant, names in {
        "acme": ["rows"],
        "beta": ["payroll", "rows"],
        "other": [],
        "7": ["numbered"],
        "07": [],
    }.items():
        stub = service[tenant]
        assert listed(await stub.ListDatasets(pb.ListDatasetsRequest())) == names
        first = await stub.ListDatasets(pb.ListDatasetsRequest(page_size=1))
        assert listed(first) == names[:1]
        assert bool(first.next_page_token) == (len(names) > 1)

    async def answers(stub: Any, name: str) -> list[tuple[Any, str, dict[str, str]]]:
        calls = (
            stub.GetDataset(pb.GetDatasetRequest(name=name)),
            stub.CreateExport(rpc.request(name)),
            stub.CreateExport(rpc.request(name, validate_only=True)),
            stub.CreateExport(rpc.request(name, limit=-1, columns=["nope"])),
        )
        refused = [await rpc.refusal(call) for call in calls]
        return [
            (each.code, each.message.replace(name, "NAME"), each.metadata)
            for each in refused
        ]

    for tenant, closed in (("acme", "payroll"), ("other", "rows"), ("07", "numbered")):
        stub = service[tenant]
        missing = "qqqqqqqqqq"
        there = await answers(stub, closed)
        none = await answers(stub, missing)
        assert [each[:2] for each in there] == [each[:2] for each in none]
        assert {each[0] for each in there} == {grpc.StatusCode.NOT_FOUND}
        assert all("[DATASET_NOT_FOUND]" in each[1] for each in there)
        assert all(each[2]["dataset"] == closed for each in there)
        # Nor does a slip of the pen tell of it.
        (slip, *_) = await answers(stub, f"{closed}s")
        assert closed not in slip[1].replace("NAME", "")
    (slip, *_) = await answers(service["beta"], "payrol")
    assert "did you mean payroll?" in slip[1].replace("NAMEl", "payroll")


async def test_what_is_masked_is_told_and_nothing_asks_about_it(service: Service) -> None:
    stub = service["acme"]
    response = await stub.GetDataset(pb.GetDatasetRequest(name="rows"))
    dataset = response.dataset
    columns = {column.name: column for column in dataset.columns}
    assert set(columns) == set(rights.SHOWN)
    assert {name: columns[name].type for name in MASKED} == {
        "email": "string",
        "account": "string",
        "phone": "string",
        "score": "double",
        "born": "timestamp[us, tz=UTC]",
    }
    assert all(columns[name].nullable for name in ("score", "born"))
    assert not dataset.HasField("estimated_rows")
    for name in MASKED:
        assert not columns[name].operators
        filters = [
            where(name, operator, string_value="x")
            for operator in O.values()
            if operator != O.FILTER_OPERATOR_UNSPECIFIED
        ]
        refused = await rpc.refusal(stub.CreateExport(rpc.request("rows", filters=filters)))
        assert refused.fields == [f"filters[{i}].column" for i in range(len(filters))]
        assert f"column {name} is masked; it cannot be filtered" in refused.message
    for name in HIDDEN:
        refused = await rpc.refusal(
            stub.CreateExport(
                rpc.request(
                    "rows",
                    columns=[name],
                    filters=[where(name, O.FILTER_OPERATOR_IS_NULL)],
                )
            )
        )
        unknown = await rpc.refusal(
            stub.CreateExport(
                rpc.request(
                    "rows",
                    columns=["nope"],
                    filters=[where("nope", O.FILTER_OPERATOR_IS_NULL)],
                )
            )
        )
        assert refused.message.replace(name, "nope") == unknown.message
    for fields in ({"target_id": "x"}, {"network": "x"}):
        refused = await rpc.refusal(stub.CreateExport(rpc.request("rows", **fields)))
        assert refused.fields == list(fields)


async def test_no_estimate_tells_of_the_rows_of_others(service: Service) -> None:
    stub = service["acme"]
    some = where("id", O.FILTER_OPERATOR_LESS, int_value=50)
    for fields in ({}, {"filters": [some]}):
        preview = await rpc.create(stub, "rows", validate_only=True, **fields)
        assert not preview.progress.HasField("estimated_rows")
        job = await rpc.export(stub, "rows", **fields)
        assert job.progress.estimated_rows in (0, job.manifest.rows)
        assert job.manifest.rows < len(ROWS) // 2


# --- row errors


LEAKS = ("hunter2", "4711471147", "deadbeef", "s3cr3t")
MESSY = """
[connections.lite]
url = "sqlite:///messy.db"
[datasets.lite]
connection = "lite"
table = "messy"
tenant_column = "owner"
hidden = ["owner", "hidden"]
mask_key = "${%s}"
[datasets.lite.mask]
email = "hash"
phone = "last4"
account = "hash"
born = "null"
[datasets.lite.column.born]
type = "timestamp"
[datasets.files]
csv = "messy.csv"
tenant_column = "owner"
hidden = ["owner", "hidden"]
mask_key = "${%s}"
[datasets.files.mask]
account = "hash"
phone = "last4"
[datasets.files.column.account]
type = "int64"
[datasets.files.column.phone]
type = "int64"
[datasets.files.column.hidden]
type = "int64"
"""


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Values that are not of their columns' types, in columns that are masked or hidden,
    or beside them, and in the rows of others."""
    with closing(sqlite3.connect(tmp_path / "messy.db")) as database:
        database.execute(
            "CREATE TABLE messy (id INTEGER, owner TEXT, email TEXT, phone TEXT, "
            "account INTEGER, born TEXT, hidden INTEGER, n INTEGER)"
        )
        blob = bytes.fromhex("deadbeef")
        good = ("acme", "hunter2@x", "4711471147", 4711471147, "2001", 5, 1)
        rows = [
            good,
            ("acme", blob, "4711471147", 4711471147, "hunter2", "s3cr3t", 1),
            ("acme", "hunter2@x", blob, 4711471147, "2001", "s3cr3t", 1),
            ("acme", "hunter2@x", "4711471147", "s3cr3t", "2001", 5, 1),
            ("acme", "hunter2@x", "4711471147", 4711471147, "2001", 5, "odd"),
            ("beta", "hunter2@x", "4711471147", "s3cr3t", "2001", 5, "s3cr3t"),
            good,
        ]
        database.executemany(
            "INSERT INTO messy VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(number, *row) for number, row in enumerate(rows)],
        )
        database.execute(
            "UPDATE messy SET phone = CAST(x'68756e74657232ff' AS TEXT) WHERE id = 6"
        )
        database.commit()
    (tmp_path / "messy.csv").write_text(
        "id,owner,account,phone,hidden,n\n"
        "0,acme,4711471147,4711471147,1,1\n"
        "1,acme,s3cr3t,4711471147,1,1\n"
        "2,acme,4711471147,hunter2,s3cr3t,1\n"
        "3,beta,s3cr3t,s3cr3t,1,1\n"
        "4,acme,4711471147,4711471147,s3cr3t,1\n"
    )
    path = tmp_path / "datasets.toml"
    path.write_text(MESSY % (KEY_VARIABLE, KEY_VARIABLE))
    return path


@pytest.mark.parametrize(
    ("dataset", "good", "bad"), [("lite", [0], [1, 2, 3, 4, 6]), ("files", [0, 4], [1, 2])]
)
async def test_rows_that_are_told_of_tell_nothing_that_is_masked(
    messy: Path, tmp_path: Path, dataset: str, good: list[int], bad: list[int]
) -> None:
    async with served(messy, tmp_path / "data") as service:
        stub = service["acme"]
        policy = job_pb2.ROW_ERROR_POLICY_SKIP_AND_REPORT
        job = await rpc.export(stub, dataset, on_row_error=policy, format=PARQUET)
        output = pq.read_table(io.BytesIO(await rpc.download(stub, job.job_id)))
        assert output["id"].to_pylist() == good
        assert set(output["account"].to_pylist()) == {rights.hashed(4711471147)}
        assert set(output["phone"].to_pylist()) == {"******1147"}
        told = b""
        for part in job.manifest.error_parts:
            told += await rpc.download(stub, job.job_id, error_part_index=part.index)
        assert [int(each["values"]["id"]) for each in lines(told)] == bad
        for row in lines(told):
            assert not {"owner", "hidden"} & set(row["values"])
            for name in row["base64"]:
                data = base64.b64decode(row["values"][name])
                assert not any(leak.encode() in data for leak in LEAKS)
        assert b"(masked)" in told
        for leak in LEAKS:
            assert leak.encode() not in told.lower()
        failed = await rpc.finish(stub, (await rpc.create(stub, dataset)).job_id)
        assert failed.state == job_pb2.JOB_STATE_FAILED
        assert "VALUE_NOT_ENCODABLE" in failed.error.message
        for leak in (*LEAKS, "hidden", "owner"):
            assert leak not in str(failed.error)


async def test_a_hidden_column_is_not_even_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,owner_no\n1,7\n2,s3cr3t\n")
    path = tmp_path / "datasets.toml"
    path.write_text(
        '[datasets.files]\ncsv = "t.csv"\ntenant_column = "owner_no"\n'
        'hidden = ["owner_no"]\n[datasets.files.column.owner_no]\ntype = "int64"\n'
    )
    async with served(path, tmp_path / "data") as service:
        job = await rpc.create(service["7"], "files")
        failed = await rpc.finish(service["7"], job.job_id)
    assert "a column holds a value that its type cannot carry" in failed.error.message
    for leak in ("s3cr3t", "owner_no"):
        assert leak not in str(failed.error)


# --- shards, and what is pushed down


def spec(*columns: str, filters: tuple[FilterSpec, ...] = ()) -> ExportSpec:
    return ExportSpec(
        dataset="rows",
        output=OutputFormat(Format.PARQUET),
        columns=columns,
        filters=filters,
    )


def get(catalogue: Path, name: str, tenant: str) -> Dataset:
    dataset = load_catalogue(catalogue).find(name, tenant)
    assert dataset is not None
    return dataset


def pieces(dataset: Dataset, query: Query, rows: int = 10) -> list[list[dict[str, Any]]]:
    plan = dataset.source.plan(query, shard_rows=rows)
    try:
        found = []
        for shard in plan.shards:
            with dataset.source.open(query, shard) as stream:
                batches = list(stream)
            with dataset.source.open(query, shard) as stream:
                again = [batch.fit() for batch in stream.loose()]
            table = pa.Table.from_batches(batches, stream.schema)
            assert pa.Table.from_batches(again, stream.schema).equals(table)
            found.append(table.to_pylist())
        return found
    finally:
        if plan.anchor is not None:
            plan.anchor.close()


@pytest.mark.minutes
def test_each_shard_has_the_tenants_rows_and_the_masks(catalogue: Path) -> None:
    for tenant in ("acme", "beta", "ghost"):
        dataset = get(catalogue, "rows", tenant)
        query = to_query(dataset, spec(), tenant)
        found = pieces(dataset, query, 4)
        if "sqlite" not in catalogue.read_text() and tenant != "ghost":
            assert len(found) > 1
        rows = [row for piece in found for row in piece]
        assert in_order(rows) == in_order(rights.seen(tenant))


def test_what_has_been_read_is_skipped_among_the_tenants_own_rows(catalogue: Path) -> None:
    if "postgresql" in catalogue.read_text():
        pytest.skip("a snapshot is not taken up again")
    dataset = get(catalogue, "rows", "acme")
    query = to_query(dataset, spec("id", "email"), "acme")
    for file in catalogue.parent.iterdir():
        rights.settle(file)
    (shard,) = dataset.source.plan(query).shards
    with dataset.source.open(query, shard, skip_rows=4) as stream:
        rows = [row for batch in stream for row in batch.to_pylist()]
    assert rows == [
        {"id": row["id"], "email": row["email"]} for row in rights.seen("acme")[4:]
    ]


@pytest.mark.minutes
@pytest.mark.parametrize("change", ["key", "kind", "none"])
def test_output_begins_anew_when_the_masks_have_changed(
    catalogue: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Or a part of it would show what the others hide, or be hashed by another key."""
    dataset = get(catalogue, "rows", "acme")
    query = to_query(dataset, spec("id", "phone"), "acme")
    plan = dataset.source.plan(query, shard_rows=4)
    text = catalogue.read_text()
    match change:
        case "key":
            monkeypatch.setenv(KEY_VARIABLE, KEY[::-1])
        case "kind":
            catalogue.write_text(text.replace('phone = "last4"', 'phone = "null"'))
        case _:
            catalogue.write_text(text.replace('phone = "last4"', ""))
    changed = get(catalogue, "rows", "acme").source
    try:
        for shard in plan.shards:
            with pytest.raises(SourceChanged):
                changed.open(query, shard)
            dataset.source.open(query, shard)
    finally:
        if plan.anchor is not None:
            plan.anchor.close()


def test_a_source_itself_refuses_to_compare_what_is_masked(catalogue: Path) -> None:
    dataset = get(catalogue, "rows", "acme")
    for name in MASKED:
        query = Query(("id",), (Filter(name, FilterOperator.IS_NULL),))
        with pytest.raises(ValueError, match="is masked"):
            pieces(dataset, query)


def test_nobody_else_gets_a_query(catalogue: Path) -> None:
    dataset = get(catalogue, "rows", "acme")
    with pytest.raises(ValueError, match="does not serve other"):
        to_query(dataset, spec(), "other")
    condition = FilterSpec("email", FilterOperator.EQUAL, (FilterLiteral("string", "x"),))
    with pytest.raises(InvalidRequest, match="is masked"):
        to_query(dataset, spec(filters=(condition,)), "acme")


def test_others_row_groups_and_emptied_columns_are_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = 500
    columns = {
        "owner": pa.array(["acme"] * rows + ["beta"] * rows),
        "value": pa.array([f"{number:0200}" for number in range(2 * rows)]),
        "gone": pa.array([f"{number:0200}" for number in range(2 * rows)]),
    }
    pq.write_table(
        pa.table(columns),
        path,
        row_group_size=rows,
        compression="snappy",
        use_dictionary=False,
    )
    footer = pq.read_metadata(path)

    def break_(group: int, column: int) -> None:
        chunk = footer.row_group(group).column(column)
        data = bytearray(path.read_bytes())
        start = chunk.data_page_offset + chunk.total_compressed_size // 2
        data[start : start + 64] = b"\xff" * 64
        path.write_bytes(data)

    break_(1, 1)
    break_(0, 2)
    toml = tmp_path / "datasets.toml"
    toml.write_text(
        '[datasets.rows]\nparquet = "t.parquet"\ntenant_column = "owner"\n'
        '[datasets.rows.mask]\ngone = "null"\n'
    )
    dataset = get(toml, "rows", "acme")
    (found,) = pieces(dataset, to_query(dataset, spec(), "acme"), 2 * rows)
    assert found == [
        {"owner": "acme", "value": columns["value"][number].as_py(), "gone": None}
        for number in range(rows)
    ]
    with pytest.raises(ExportdError):
        pieces(dataset, to_query(dataset, spec(), "beta"), 2 * rows)


async def test_a_database_finds_a_tenants_rows_by_its_index(
    tmp_path: Path, postgres: PostgresServer, postgres_database: str
) -> None:
    postgres.sql(
        "CREATE TABLE t (owner text, email text);"
        "INSERT INTO t SELECT 'beta', repeat('x', 100) FROM generate_series(1, 20000);"
        "INSERT INTO t SELECT 'acme', 'a' || i FROM generate_series(1, 5) i;"
        "CREATE INDEX by_owner ON t (owner); ANALYZE t;",
        database=postgres_database,
    )
    path = tmp_path / "datasets.toml"
    path.write_text(
        f'[connections.c]\nurl = "{postgres.url(postgres_database)}"\n'
        '[datasets.rows]\nconnection = "c"\ntable = "t"\n'
        f'tenant_column = "owner"\nmask_key = "${{{KEY_VARIABLE}}}"\n'
        '[datasets.rows.mask]\nemail = "hash"\n'
    )
    async with served(path, tmp_path / "data") as service:
        rows = await exported(service["acme"], "rows")
    assert in_order(rows) == in_order(
        [{"owner": "acme", "email": rights.hashed(f"a{i}")} for i in range(1, 6)]
    )
    scans = postgres.sql(
        "SELECT idx_scan > 0, seq_tup_read <= 20005 * 2 FROM pg_stat_user_tables",
        database=postgres_database,
    )
    assert scans.strip() == "t|t"


def test_a_hash_is_hmac_sha256_whatever_the_length_of_the_key() -> None:
    values = ["", "a", None, "näme", "a", "x" * 1000]
    for key in ("k" * 32, "k" * 64, "k" * 65, "schlüssel" * 20):
        masks = Masks({"a": Mask.HASH}, key)
        (found,) = masks.hashed(["a"], [pa.array(values)])
        assert found.to_pylist() == [
            None if value is None else rights.hashed(value, key) for value in values
        ]
        (sliced,) = masks.hashed(["a"], [pa.array(values).slice(2, 2)])
        assert sliced.to_pylist() == found.to_pylist()[2:4]
        (other,) = masks.hashed(["b"], [pa.array(values)])
        assert other.to_pylist() == values


def test_infinities_behind_a_mask_are_no_obstacle(
    tmp_path: Path, postgres: PostgresServer, postgres_database: str
) -> None:
    postgres.sql(
        "CREATE TABLE t (id int, at timestamptz, n numeric(10, 2), big numeric, "
        "c char(12), u uuid, day date NOT NULL);"
        "INSERT INTO t VALUES (1, 'infinity', 1.5, 'NaN', 'abcdefghij', "
        "'11111111-2222-3333-4444-555555555555', 'infinity');",
        database=postgres_database,
    )
    path = tmp_path / "datasets.toml"
    path.write_text(
        f'[connections.c]\nurl = "{postgres.url(postgres_database)}"\n'
        '[datasets.rows]\nconnection = "c"\ntable = "t"\n[datasets.rows.mask]\n'
        'at = "null"\nn = "null"\nbig = "last4"\nc = "last4"\nu = "last4"\nday = "null"\n'
    )
    dataset = get(path, "rows", "acme")
    assert {c.name: (str(c.type), c.nullable) for c in dataset.columns[1:]} == {
        "at": ("timestamp[us, tz=UTC]", True),
        "n": ("decimal128(10, 2)", True),
        "big": ("string", True),
        "c": ("string", True),
        "u": ("string", True),
        "day": ("date32[day]", True),
    }
    (found,) = pieces(dataset, to_query(dataset, spec(), "acme"))
    assert found == [
        {
            "id": 1,
            "at": None,
            "n": None,
            "big": "***",
            "c": "******ghij",
            "u": "*" * 32 + "5555",
            "day": None,
        }
    ]


def revoke(catalogue: Path) -> None:
    text = catalogue.read_text()
    catalogue.write_text(text.replace('tenants = ["beta"]', 'tenants = ["acme"]'))


async def test_a_tenant_that_lost_a_dataset_gets_no_more_of_it(
    catalogue: Path, tmp_path: Path
) -> None:
    """The rights count when the rows are read, not when they are asked for."""
    async with served(catalogue, tmp_path / "data") as service:
        assert await exported(service["beta"], "payroll")
    revoke(catalogue)
    async with served(catalogue, tmp_path / "data") as service:
        refused = await rpc.refusal(service["beta"].CreateExport(rpc.request("payroll")))
        assert refused.reason == "DATASET_NOT_FOUND"
        assert await exported(service["acme"], "payroll", columns=["id"])


async def test_an_export_that_is_under_way_fails_without_the_right_to_it(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    path = tmp_path / "datasets.toml"
    path.write_text(
        f'[connections.c]\nurl = "{postgres.url()}"\n[datasets.payroll]\n'
        'connection = "c"\nquery = "SELECT 1 AS one, pg_sleep(600)::text AS pause"\n'
        'tenants = ["beta"]\n'
    )

    def running() -> bool:
        found = postgres.sql(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' "
            "AND query LIKE 'COPY%pg_sleep%' AND pid <> pg_backend_pid()"
        )
        return found.strip() == "1"

    async with served(path, tmp_path / "data", drain_timeout=0.1) as service:
        job = await rpc.create(service["beta"], "payroll")
        await until(running, ENOUGH)
    revoke(path)
    async with served(path, tmp_path / "data") as service:
        failed = await rpc.finish(service["beta"], job.job_id)
    assert failed.state == job_pb2.JOB_STATE_FAILED
    assert "[DATASET_NOT_EXPORTABLE]" in failed.error.message


# --- mistakes

BASE = '[datasets.t]\nparquet = "t.parquet"\n'
MISTAKES = [
    ("tenants = []", "datasets.t.tenants: names nobody; name a tenant, or leave it out"),
    ('tenants = ["a", "a"]', "datasets.t.tenants: 'a' is named twice"),
    ('tenants = ["A B"]', "datasets.t.tenants: no tenant is called 'A B'"),
    ('tenants = "acme"', "datasets.t.tenants: "),
    ('tenants = [""]', "datasets.t.tenants.0: "),
    ('tenant_column = "ownr"', "datasets.t.tenant_column: there is no column 'ownr'; did"),
    (
        'tenant_column = "born"',
        "datasets.t.tenant_column: 'born' is timestamp[us, tz=UTC], and must be STRING or",
        "INTEGER; set its type in [datasets.t.column.born] or choose another column",
    ),
    ('tenant_column = "score"', "'score' is double, and must be STRING or INTEGER"),
    ('mask.emial = "null"', "datasets.t.mask.emial: there is no column 'emial'; did you"),
    ('mask.email = "md5"', "datasets.t.mask.email: must be 'null', 'hash' or 'last4'"),
    ('mask = "null"', "datasets.t.mask: "),
    (
        'tenant_column = "owner"\nmask.owner = "null"',
        "datasets.t.mask.owner: 'owner' is the tenant_column, which cannot be masked",
    ),
    (
        'tenant_column = "owner"\nhidden = ["owner"]\nmask.owner = "null"',
        "datasets.t.mask.owner: 'owner' is the tenant_column",
    ),
    ('target_column = "email"\nmask.email = "null"', "'email' is the target_column"),
    ('network_column = "email"\nmask.email = "null"', "'email' is the network_column"),
    ('time_column = "born"\nmask.born = "null"', "'born' is the time_column"),
    ('hidden = ["email"]\nmask.email = "null"', "'email' is not shown at all; leave out"),
    (
        'columns = ["id"]\nmask.email = "null"',
        "datasets.t.mask.email: 'email' is not shown",
    ),
    (
        'mask.born = "last4"',
        "datasets.t.mask.born: 'born' is timestamp",
        "STRING or INTEGER",
    ),
    (
        f'mask_key = "{KEY}"\nmask.score = "hash"',
        "datasets.t.mask.score: 'score' is double",
    ),
    ('mask.email = "hash"', "datasets.t.mask.email: hash needs a secret key", "mask_key"),
    (
        'mask_key = "short"\nmask.email = "hash"',
        "datasets.t.mask_key: must have at least 32 characters; ",
    ),
    (
        'mask_key = "${NO_SUCH_VARIABLE}"\nmask.email = "hash"',
        "datasets.t.mask_key: environment variable NO_SUCH_VARIABLE is not set",
    ),
    (f'mask_key = "{KEY}"', 'datasets.t.mask_key: goes with the mask "hash" only; leave'),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m[0][:48] for m in MISTAKES])
def test_a_mistake_stops_the_start_with_one_line(
    tmp_path: Path, mistake: tuple[str, ...]
) -> None:
    rights.hold("parquet", tmp_path)
    path = tmp_path / "datasets.toml"
    text, *expected = mistake
    path.write_text(BASE.replace("t.parquet", "0.parquet") + text)
    with pytest.raises(ConfigurationError) as refused:
        load_catalogue(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    for piece in expected:
        assert piece in line
    assert KEY not in line


def test_a_partition_key_is_not_masked(
    tmp_path: Path, postgres: PostgresServer, postgres_database: str
) -> None:
    held = rights.hold("postgres_query", tmp_path, postgres, postgres_database)
    path = tmp_path / "datasets.toml"
    path.write_text(held.catalogue(t='mask.id = "last4"'))
    with pytest.raises(ConfigurationError, match="'id' is the partition_key, which cannot"):
        load_catalogue(path)


async def test_one_key_serves_all_datasets_that_have_none_of_their_own(
    tmp_path: Path,
) -> None:
    rights.hold("parquet", tmp_path)
    path = tmp_path / "datasets.toml"
    path.write_text(
        f'mask_key = "{KEY}"\n'
        '[datasets.rows]\nparquet = "0.parquet"\nmask.email = "hash"\n'
        f'[datasets.own]\nparquet = "0.parquet"\nmask_key = "{KEY[::-1]}"\n'
        'mask.email = "hash"\n'
    )
    email = ROWS[0]["email"]
    for name, key in (("rows", KEY), ("own", KEY[::-1])):
        dataset = get(path, name, "acme")
        ((first, *_),) = pieces(dataset, to_query(dataset, spec("email"), "acme"), 1000)
        assert first["email"] == rights.hashed(email, key)


def test_a_dataset_that_is_not_exportable_has_tenants_too(tmp_path: Path) -> None:
    rights.hold("parquet", tmp_path)
    path = tmp_path / "datasets.toml"
    path.write_text(
        '[datasets.t]\nparquet = "0.parquet"\nexportable = false\ntenants = ["acme"]\n'
    )
    catalogue = load_catalogue(path)
    assert catalogue.names_for("acme") == ["t"]
    assert catalogue.names_for("beta") == []
    assert catalogue.find("t", "beta") is None


@pytest.mark.parametrize("name", ["0", "7", "9" * 18])
def test_a_number_is_one_tenants_name(tmp_path: Path, name: str) -> None:
    rights.hold("parquet", tmp_path)
    path = tmp_path / "datasets.toml"
    path.write_text('[datasets.t]\nparquet = "0.parquet"\ntenant_column = "owner_no"\n')
    catalogue = load_catalogue(path)
    assert catalogue.find("t", name) is not None
    for alias in (f"0{name}", f"{name}_", f"+{name}", f" {name}", f"{name}.0", "9" * 19):
        assert catalogue.find("t", alias) is None
