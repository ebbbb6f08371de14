"""Connections of several tenants: none reaches what another one has put there, unless the
operator says by name that they share it, and even then none takes it away."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import duckdb
import psycopg
import pyarrow as pa
import pytest
from pydantic import BaseModel, ConfigDict

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2, sink_pb2
from exportd_server.delivery.sinks import AskedSink, Sinks
from exportd_server.errors import ConfigurationError, DeliveryFailed
from exportd_server.sinks.base import (
    PLACE,
    BadSinkRequest,
    Delivery,
    Export,
    SinkDefaults,
    SinkPlan,
    Takes,
)
from exportd_server.sinks.connections import Connections, load_connections
from exportd_server.sinks.registry import SinkTypes
from exportd_server.store.s3_client import S3Options
from tests.support import rpc
from tests.support.database_sink import delivery_of
from tests.support.gate import GateSource
from tests.support.identity import api_key, bearer
from tests.support.rpc import refusal
from tests.support.samples import catalogue_of
from tests.support.seaweed import RawS3, SeaweedServer
from tests.support.server import Server, serve, settings, until

TYPES = SinkTypes.installed()
WHERE = {
    "local_file": 'root = "/srv/exports"\n',
    "object_storage": 'bucket = "lake"\nregion = "us-east-1"\n',
    "webhook": 'url = "https://example.com/hook"\n',
    "database": 'url = "sqlite:////srv/warehouse.db"\n',
}
"""A connection of each type, without its tenants."""
APART = {
    "root": 'type = "local_file"\nroot = "/srv/{tenant}"\n',
    "prefix": 'type = "local_file"\nroot = "/srv"\nprefix = "of/{tenant}"\n',
    "bucket": 'type = "object_storage"\nbucket = "x-{tenant}"\nregion = "us-east-1"\n',
    "key prefix": 'type = "object_storage"\nbucket = "lake"\nprefix = "{tenant}"\n',
    "hook": 'type = "webhook"\nurl = "https://example.com/{tenant}"\n',
    "file": 'type = "database"\nurl = "sqlite:////srv/{tenant}.db"\n',
    "database": 'type = "database"\nurl = "postgresql://u:p@h/{tenant}"\n',
    "schema": 'type = "database"\nurl = "postgresql://u@h/d"\nschemas = ["{tenant}"]\n',
    "option": 'type = "database"\ndriver = "d"\noptions = { path = "/srv/{tenant}" }\n',
}
BOTH = 'tenants = ["acme", "globex"]\n'
each_type = pytest.mark.parametrize("type_", list(WHERE))


def loaded(
    tmp_path: Path, text: str, types: SinkTypes = TYPES, *, identified: bool = True
) -> Connections:
    file = tmp_path / "sinks.toml"
    file.write_text(text)
    return load_connections(file, types, identified=identified)


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as told:
        loaded(tmp_path, text)
    return str(told.value)


# --- what the operator must say


@each_type
def test_with_identity_a_connection_says_whom_it_is_for(tmp_path: Path, type_: str) -> None:
    text = f'[connections.lake]\ntype = "{type_}"\n{WHERE[type_]}'
    told = refused(tmp_path, text)
    assert "connections.lake.tenants: is required" in told
    assert 'tenants = ["acme"]' in told
    assert 'tenants = "*"' in told
    one = loaded(tmp_path, text + 'tenants = ["acme"]\n').get("lake")
    assert one is not None
    assert not one.shared
    free = loaded(tmp_path, text, identified=False)
    assert free.names_for("default", type_) == ["lake"]


@each_type
@pytest.mark.parametrize("tenants", ['tenants = "*"\n', BOTH], ids=["all", "two"])
def test_several_tenants_of_one_place_share_it_by_name_alone(
    tmp_path: Path, type_: str, tenants: str
) -> None:
    text = f'[connections.lake]\ntype = "{type_}"\n{WHERE[type_]}{tenants}'
    told = refused(tmp_path, text)
    assert "connections.lake.shared: several tenants" in told
    assert "put {tenant} into " in told
    assert "shared = true" in told
    connections = loaded(tmp_path, text + "shared = true\n")
    found = connections.get("lake")
    assert found is not None
    assert found.shared
    for tenant in ("acme", "globex"):
        assert connections.names_for(tenant, type_) == ["lake"]
    assert bool(connections.names_for("initech", type_)) == ("*" in tenants)


@pytest.mark.parametrize("place", list(APART))
@pytest.mark.parametrize("tenants", ['tenants = "*"\n', BOTH], ids=["all", "two"])
def test_a_place_with_the_tenants_name_in_it_is_not_shared(
    tmp_path: Path, place: str, tenants: str
) -> None:
    found = loaded(tmp_path, f"[connections.lake]\n{tenants}{APART[place]}").get("lake")
    assert found is not None
    assert not found.shared
    mine, theirs = map(found.settings_for, ("acme", "globex"))
    assert mine != theirs
    assert mine == found.settings_for("acme")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('tenants = "acme"\n', "tenants: .*must name tenants"),
        ("tenants = []\n", "tenants: .*must name tenants"),
        ('tenants = ["*", "acme"]\n', "tenants: .*must name tenants"),
        ('tenants = ["Acme"]\n', "tenants: .*must name tenants"),
        ("tenants = [1]\n", "tenants: .*must name tenants"),
        ('tenants = "*"\nprefix = "{tenant}"\nshared = true\n', "shared: .*leave it out"),
        ('tenants = "*"\nprefix = "../{tenant}"\n', "prefix: .*no path"),
        ('tenants = "*"\naccess = "{tenant}"\n', "access: .*only root, prefix can"),
        ('tenants = "*"\nprefix = "{Tenant}"\nshared = true\n', "prefix: .*no path"),
    ],
)
def test_what_is_wrong_with_the_tenants_of_a_connection_is_told(
    tmp_path: Path, text: str, told: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"connections\.lake\.{told}"):
        loaded(tmp_path, f'[connections.lake]\ntype = "local_file"\nroot = "/srv"\n{text}')


def test_one_schema_that_all_may_use_makes_a_database_shared(tmp_path: Path) -> None:
    url = 'url = "postgresql://u@h/d"\nschemas = ["{tenant}", "common"]\n'
    text = f'[connections.db]\ntype = "database"\n{url}{BOTH}'
    assert "connections.db.shared: several tenants" in refused(tmp_path, text)


def test_the_beginning_of_a_tables_name_is_no_place_of_a_tenants(tmp_path: Path) -> None:
    """`acme_*` are also tables of the tenant `acme_x`."""
    url = 'url = "postgresql://u@h/d"\ntables = ["{tenant}_*"]\n'
    told = refused(tmp_path, f'[connections.db]\ntype = "database"\n{url}{BOTH}')
    assert "connections.db.tables: cannot have {tenant} in it" in told
    assert "only url, options, schemas can" in told


# --- where things go


def asked(
    tenant: str, type_: str, connection: str, **config: Any
) -> tuple[AskedSink, Export]:
    export = delivery_of(pa.table({"id": [1], "name": [tenant]})).export
    return AskedSink(type_, connection, config), replace(export, tenant=tenant)


async def delivered(
    sinks: Sinks, tenant: str, type_: str, connection: str, **config: Any
) -> str:
    """As the service does: checked, probed, delivered; one row with the tenant's name."""
    sink, export = asked(tenant, type_, connection, **config)
    kept = sinks.check(tenant, sink, export).kept
    await sinks.probe(tenant, sink, export)
    delivery = delivery_of(pa.table({"id": [1], "name": [tenant]}))
    (receipt,) = await sinks.deliver_batch(kept, [replace(delivery, export=export)])
    assert isinstance(receipt, str)
    return receipt


@asynccontextmanager
async def opened(
    connections: Connections, types: SinkTypes = TYPES
) -> AsyncIterator[Sinks]:
    sinks = Sinks(types, connections)
    try:
        yield sinks
    finally:
        await sinks.close()


TENANTS = ("acme", "globex")


@pytest.mark.parametrize("by", ["root", "prefix"])
async def test_files_of_two_tenants_lie_apart(tmp_path: Path, by: str) -> None:
    (root := tmp_path / "out").mkdir()
    place = f'root = "{root}"\nprefix = "{{tenant}}"\n'
    if by == "root":
        place = f'root = "{root}/{{tenant}}"\n'
        for tenant in TENANTS:
            (root / tenant).mkdir()
    text = f'[connections.disk]\ntype = "local_file"\ntenants = "*"\n{place}'
    async with opened(loaded(tmp_path, text)) as sinks:
        for tenant in TENANTS:
            await delivered(sinks, tenant, "local_file", "disk", path="acme/x")
        for tenant in TENANTS:
            (manifest,) = (root / tenant).rglob("*.manifest.json")
            assert manifest.parent == root / tenant / "acme" / "x"
        assert len(list(root.rglob("*.json"))) == len(TENANTS)
        for path in ("../globex", "/globex", "acme/../../globex", ".."):
            with pytest.raises(BadSinkRequest):
                sinks.check("acme", *asked("acme", "local_file", "disk", path=path))


async def test_objects_of_two_tenants_lie_apart(
    tmp_path: Path, seaweed: SeaweedServer, s3_options: S3Options
) -> None:
    text = (
        '[connections.lake]\ntype = "object_storage"\ntenants = "*"\n'
        f'bucket = "{s3_options.bucket}"\nprefix = "{s3_options.prefix}/{{tenant}}"\n'
        f'endpoint_url = "{s3_options.endpoint_url}"\nregion = "us-east-1"\n'
        f'path_style = true\naccess_key_id = "{s3_options.access_key_id}"\n'
        f'secret_access_key = "{s3_options.secret_access_key}"\n'
    )
    async with opened(loaded(tmp_path, text)) as sinks:
        for tenant in TENANTS:
            await delivered(sinks, tenant, "object_storage", "lake", prefix="acme/x")
    found = sorted(RawS3(seaweed.raw, s3_options).objects())
    assert [name.rpartition("/")[0] for name in found] == ["acme/acme/x", "globex/acme/x"]


Rows = Callable[[str], Sequence[tuple[Any, ...]]]
"""The names in a tenant's table `orders`."""


async def check_tables_apart(sinks: Sinks, rows: Rows, table: Callable[[str], str]) -> None:
    for mode in ("APPEND", "APPEND", "REPLACE"):
        for tenant in TENANTS:
            config = {"table": table(tenant), "mode": mode, "create_table": True}
            await delivered(sinks, tenant, "database", "db", **config)
            if mode == "REPLACE":
                assert rows(tenant) == [(tenant,)]
    assert rows("acme") == [("acme",)]


async def test_tables_of_two_tenants_lie_apart_in_sqlite(tmp_path: Path) -> None:
    for tenant in TENANTS:
        with sqlite3.connect(tmp_path / f"{tenant}.db") as link:
            link.execute("PRAGMA user_version = 1")
        link.close()

    def rows(tenant: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(tmp_path / f"{tenant}.db") as link:
            found = link.execute("SELECT name FROM orders").fetchall()
        link.close()
        return found

    url = f'url = "sqlite:///{tmp_path}/{{tenant}}.db"\n'
    text = f'[connections.db]\ntype = "database"\ntenants = "*"\n{url}'
    async with opened(loaded(tmp_path, text)) as sinks:
        await check_tables_apart(sinks, rows, lambda _: "orders")


async def test_tables_of_two_tenants_lie_apart_behind_a_driver(tmp_path: Path) -> None:
    def rows(tenant: str) -> list[tuple[Any, ...]]:
        with duckdb.connect(str(tmp_path / f"{tenant}.duckdb")) as link:
            return link.execute("SELECT name FROM orders").fetchall()

    text = (
        '[connections.db]\ntype = "database"\ntenants = "*"\n'
        'driver = "adbc_driver_duckdb"\n'
        f'options = {{ path = "{tmp_path}/{{tenant}}.duckdb" }}\n'
    )
    async with opened(loaded(tmp_path, text)) as sinks:
        await check_tables_apart(sinks, rows, lambda _: "orders")


async def test_tables_of_two_tenants_lie_apart_in_schemas_of_their_own(
    tmp_path: Path, postgres_url: str
) -> None:
    with psycopg.connect(postgres_url) as link:
        for tenant in TENANTS:
            link.execute(f"CREATE SCHEMA {tenant}")
        link.execute("CREATE TABLE public.salaries (id bigint, name text)")

    def rows(tenant: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(postgres_url) as link:
            statement = f"SELECT name FROM {tenant}.orders"
            return link.execute(statement).fetchall()

    text = (
        f'[connections.db]\ntype = "database"\ntenants = "*"\nurl = "{postgres_url}"\n'
        'schemas = ["{tenant}"]\n'
    )
    async with opened(loaded(tmp_path, text)) as sinks:
        await check_tables_apart(sinks, rows, lambda tenant: f"{tenant}.orders")

        async def told(table: str, *, create: bool) -> str:
            sink, export = asked("globex", "database", "db", table=table)
            sink = replace(sink, config={**sink.config, "create_table": create})
            try:
                sinks.check("globex", sink, export)
                await sinks.probe("globex", sink, export)
            except BadSinkRequest as error:
                return error.description.replace(table, "it")
            return "it may"

        for create in (False, True):
            for there, nowhere in (
                ("acme.orders", "acme.nothing"),
                ("salaries", "nothing"),
                ("public.salaries", "public.nothing"),
            ):
                answer = await told(there, create=create)
                assert answer != "it may"
                assert answer == await told(nowhere, create=create), there


# --- what is shared


def warehouse(tmp_path: Path, more: str) -> Connections:
    with sqlite3.connect(tmp_path / "shared.db") as link:
        link.execute("CREATE TABLE orders (id INTEGER, name TEXT)")
    link.close()
    url = f'url = "sqlite:///{tmp_path}/shared.db"\n'
    return loaded(tmp_path, f'[connections.db]\ntype = "database"\n{url}{more}')


def names(tmp_path: Path) -> list[str]:
    with sqlite3.connect(tmp_path / "shared.db") as link:
        found = [name for (name,) in link.execute("SELECT name FROM orders ORDER BY name")]
    link.close()
    return found


async def test_a_shared_table_is_added_to_and_never_replaced(tmp_path: Path) -> None:
    connections = warehouse(tmp_path, f"{BOTH}shared = true\n")
    async with opened(connections) as sinks:
        for tenant in TENANTS:
            await delivered(sinks, tenant, "database", "db", table="orders")
        with pytest.raises(
            BadSinkRequest, match=r"several tenants share .*\{tenant\}"
        ) as no:
            await delivered(
                sinks, "globex", "database", "db", table="orders", mode="REPLACE"
            )
        assert no.value.field == "mode"
    assert names(tmp_path) == ["acme", "globex"]


async def test_a_merge_into_a_shared_table_is_refused(
    tmp_path: Path, postgres_url: str
) -> None:
    text = f'[connections.db]\ntype = "database"\nurl = "{postgres_url}"\n'
    merge = {"table": "orders", "mode": "MERGE", "key_columns": ["id"]}
    for more, shared in ((f"{BOTH}shared = true\n", True), ('tenants = ["acme"]\n', False)):
        sinks = Sinks(TYPES, loaded(tmp_path, text + more))
        sink, export = asked("acme", "database", "db", **merge)
        if not shared:
            sinks.check("acme", sink, export)
            continue
        with pytest.raises(BadSinkRequest) as told:
            sinks.check("acme", sink, export)
        assert told.value.field == "mode"


async def test_what_was_asked_of_a_connection_before_it_was_shared_is_refused(
    tmp_path: Path,
) -> None:
    alone = warehouse(tmp_path, 'tenants = ["globex"]\n')
    sink, export = asked("globex", "database", "db", table="orders", mode="REPLACE")
    kept = Sinks(TYPES, alone).check("globex", sink, export).kept
    url = f'url = "sqlite:///{tmp_path}/shared.db"\n'
    shared = f'[connections.db]\ntype = "database"\n{url}{BOTH}shared = true\n'
    delivery = replace(delivery_of(pa.table({"id": [1], "name": ["x"]})), export=export)
    async with opened(loaded(tmp_path, shared)) as sinks:
        await delivered(sinks, "acme", "database", "db", table="orders")
        with pytest.raises(DeliveryFailed, match="several tenants") as failed:
            await sinks.deliver_batch(kept, [delivery])
        assert not failed.value.retryable
    assert names(tmp_path) == ["acme"]


# --- plug-ins


class BoxConnection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    box: Annotated[str, PLACE] = ""
    note: str = ""


class BoxRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    empties: bool = False


class Box:
    """A type of somebody else's, and its sink; what was delivered is in `got`."""

    name = "box"
    request_model = BoxRequest
    connection_model = BoxConnection
    needs_connection = True
    defaults = SinkDefaults()

    def __init__(self, box: str = "", got: dict[str, list[str]] | None = None) -> None:
        self.box = box
        self.got = {} if got is None else got
        self.closed: list[str] = []
        self.type: Box = self

    def check(
        self, request: BoxRequest, connection: BoxConnection | None, export: Export
    ) -> SinkPlan:
        return SinkPlan(Takes.WHOLE, overwrites="empties" if request.empties else "")

    async def open(self, connection: BoxConnection | None) -> Box:
        assert connection is not None
        made = Box(connection.box, self.got)
        made.type = self
        return made

    async def probe(self, request: BoxRequest, export: Export) -> None: ...

    async def deliver(self, request: BoxRequest, delivery: Delivery) -> str:
        self.got.setdefault(self.box, []).append(delivery.export.tenant)
        return self.box

    async def close(self) -> None:
        self.type.closed.append(self.box)


def boxes(tmp_path: Path, box: Box, more: str) -> Sinks:
    types = SinkTypes({}).with_type(box)
    text = f'[connections.b]\ntype = "box"\n{more}'
    return Sinks(types, loaded(tmp_path, text, types))


async def test_a_plug_in_marks_its_place_and_has_it_filled(tmp_path: Path) -> None:
    box = Box()
    sinks = boxes(tmp_path, box, 'tenants = "*"\nbox = "of {tenant}"\n')
    for tenant in TENANTS:
        receipt = await delivered(sinks, tenant, "box", "b", empties=True)
        assert receipt == f"of {tenant}"
    assert box.got == {"of acme": ["acme"], "of globex": ["globex"]}
    await sinks.close()
    assert sorted(box.closed) == ["of acme", "of globex"]


async def test_a_plug_in_that_overwrites_may_not_where_tenants_share(
    tmp_path: Path,
) -> None:
    sinks = boxes(tmp_path, Box(), 'tenants = "*"\nshared = true\nbox = "one"\n')
    await delivered(sinks, "acme", "box", "b")
    with pytest.raises(BadSinkRequest) as told:
        sinks.check("acme", *asked("acme", "box", "b", empties=True))
    assert told.value.field == "empties"
    await sinks.close()


async def test_sinks_of_tenants_that_went_away_are_closed(tmp_path: Path) -> None:
    box = Box()
    sinks = boxes(tmp_path, box, 'tenants = "*"\nbox = "{tenant}"\n')
    for number in range(40):
        await delivered(sinks, f"t{number}", "box", "b")
    await until(lambda: len(box.closed) == 24)
    assert sorted(box.closed) == sorted(f"t{number}" for number in range(24))
    await delivered(sinks, "t0", "box", "b")
    await sinks.close()
    assert len(box.closed) == 41


# --- through the whole service


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[tuple[Server, dict[str, str]]]:
    data = tmp_path / "data"
    keys = {tenant: (await api_key(data, tenant))[0] for tenant in TENANTS}
    (tmp_path / "out").mkdir()
    with sqlite3.connect(tmp_path / "shared.db") as link:
        link.execute("PRAGMA user_version = 1")
    link.close()
    file = tmp_path / "sinks.toml"
    file.write_text(
        f'[connections.db]\ntype = "database"\nurl = "sqlite:///{tmp_path}/shared.db"\n'
        f"{BOTH}shared = true\n"
        f'[connections.disk]\ntype = "local_file"\nroot = "{tmp_path}/out"\n'
        'prefix = "{tenant}"\ntenants = "*"\n'
    )
    options = settings(data, sinks=file, identity={"api_keys": True}, drain_timeout=1.0)
    async with serve(options, catalogue_of(rows=GateSource(2, wide=True))) as server:
        yield server, keys


def table(mode: str = "APPEND") -> sink_pb2.Sink:
    return sink_pb2.Sink(
        database=sink_pb2.DatabaseSink(
            connection="db",
            table="loot",
            mode=sink_pb2.WriteMode.Value(f"WRITE_MODE_{mode}"),
            create_table=True,
        )
    )


async def settled(server: Server, key: str, *sinks: sink_pb2.Sink) -> job_pb2.Job:
    request = rpc.request("rows", sinks=sinks)
    created = await server.stub.CreateExport(request, metadata=bearer(key))
    job = created.job
    watch = pb.WatchJobRequest(job_id=job.job_id, until_delivered=True)
    async for answer in server.stub.WatchJob(watch, metadata=bearer(key)):
        job = answer.job
    assert job.delivery_status == sink_pb2.DELIVERY_STATUS_DELIVERED
    return job


async def test_one_tenant_does_not_wipe_anothers_table(
    service: tuple[Server, dict[str, str]], tmp_path: Path
) -> None:
    server, keys = service
    await settled(server, keys["acme"], table())

    def count() -> int:
        with sqlite3.connect(tmp_path / "shared.db") as link:
            ((rows,),) = link.execute("SELECT count(*) FROM loot")
        link.close()
        return int(rows)

    had = count()
    assert had > 1
    for validate_only in (True, False):
        request = rpc.request(
            "rows", sinks=[table("REPLACE")], limit=1, validate_only=validate_only
        )
        no = await refusal(
            server.stub.CreateExport(request, metadata=bearer(keys["globex"]))
        )
        assert no.reason == "INVALID_REQUEST"
        assert no.fields == ["sinks[0].database.mode"]
    assert count() == had


async def test_one_tenant_does_not_write_among_anothers_files(
    service: tuple[Server, dict[str, str]], tmp_path: Path
) -> None:
    server, keys = service
    path = sink_pb2.LocalFileSink(connection="disk", path="acme/x")
    await settled(server, keys["globex"], sink_pb2.Sink(local_file=path))
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["globex"]
