"""Checks of where data comes from, and where it goes: the catalogue and the sinks."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

from exportd_server import samples
from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.errors import ConfigurationError, DeliveryFailed
from exportd_server.operations.checking import (
    Check,
    Outcome,
    blocking,
    failed,
    ok,
    told,
    warning,
)
from exportd_server.operations.keeping import try_to_write
from exportd_server.settings import Settings
from exportd_server.sinks.base import BadSinkRequest, Export, ExportColumn
from exportd_server.sinks.connections import Connection, survey_connections
from exportd_server.sinks.registry import AnySinkType, SinkTypes
from exportd_server.sources.catalogue import BadConnection, Dataset, catalogue_parts

_SOMEBODY = "tenant"
"""Whom a place is tried for that each tenant has for itself, where none is named."""


# --- the catalogue


def catalogue_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """Each dataset, opened as at the start."""
    del serves
    path = settings.catalogue
    if path is None:
        yield Check(
            "catalogue",
            "samples",
            lambda: blocking(partial(_samples, settings)),
            needs=("data_dir", "sample_rows"),
        )
        return
    parts = catalogue_parts(path)
    for text in parts.wrong:
        yield Check("catalogue", str(path), told(failed(text)))
    for name, open_ in parts.connections.items():
        yield Check("catalogue", f"connections.{name}", partial(_connection, open_))
    for name, open_dataset in parts.datasets.items():
        yield Check("catalogue", name, partial(_dataset, open_dataset))


def _samples(settings: Settings) -> Outcome:
    directory = settings.data_dir / "samples"
    if samples.are_there(directory, settings.sample_rows):
        return ok(f"sample data, in {directory}")
    try:
        samples.refuse_other_files(directory)
        try_to_write(settings.data_dir)
    except ConfigurationError as error:
        return failed(str(error))
    except OSError as error:
        return failed(
            f"sample data cannot be generated into {directory} ({error.strerror}); name "
            "your own datasets.toml as catalogue, or another data_dir"
        )
    return ok(f"sample data, generated into {directory} at the start")


async def _connection(open_: Callable[[], object]) -> Outcome:
    await blocking(open_)
    return ok("can be used; its datasets tell whether it answers")


async def _dataset(open_: Callable[[], Dataset]) -> Outcome:
    try:
        dataset = await blocking(open_)
    except BadConnection as error:
        return warning(f"not tried; first mend connections.{error.name}")
    if not dataset.exportable:
        return ok("not exportable; its rows are not read")
    roles = {
        "time": dataset.time_column,
        "target": dataset.target_column,
        "network": dataset.network_column,
        "tenant": dataset.tenant_column and dataset.tenant_column.name,
    }
    named = "".join(f", {role} {name!r}" for role, name in roles.items() if name)
    return ok(f"{len(dataset.columns)} columns{named}")


# --- sinks


def sink_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """Each connection, by the probe of its type."""
    del serves
    path = settings.sinks
    if path is None:
        yield Check("sinks", "none", told(ok("there are no connections")))
        return
    types = SinkTypes.installed()
    found, wrong = survey_connections(path, types, identified=settings.identity.required)
    for name, text in wrong:
        yield Check("sinks", name, told(failed(text)))
    for connection in found.all():
        type_ = types.get(connection.type)
        assert type_ is not None  # noqa: S101 - its connection was read
        mend = f"mend connections.{connection.name} in {path}"
        for tenant, name in _places(connection):
            yield Check(
                "sinks",
                name,
                partial(_probe, type_, connection, tenant, mend),
                left="what was tried may be left there",
            )


def _places(connection: Connection) -> Iterator[tuple[str | None, str]]:
    """For whom a connection is tried, and what that is called."""
    if connection.of_tenant is None:
        yield None, connection.name
        return
    for tenant in sorted(connection.limits.tenants or {_SOMEBODY}):
        yield tenant, f"{connection.name} ({tenant})"


async def _probe(
    type_: AnySinkType, connection: Connection, tenant: str | None, mend: str
) -> Outcome:
    try:
        outcome = await _try(type_, connection, tenant or _SOMEBODY, mend)
    except (ConfigurationError, DeliveryFailed) as error:
        outcome = failed(f"{error}; {mend}")
    if tenant == _SOMEBODY and connection.limits.tenants is None:
        # It need not be there for a tenant that was made up.
        return ok(outcome.text) if outcome == ok(outcome.text) else warning(outcome.text)
    return outcome


async def _try(
    type_: AnySinkType, connection: Connection, tenant: str, mend: str
) -> Outcome:
    settings = connection.settings_for(tenant)
    sink = await type_.open(settings)
    try:
        values = _TRIALS.get(type_.name, lambda _: {})(settings)
        if values is None:
            return ok("each request names its own place; nothing to try")
        request = _request(type_, values)
        if request is None:
            return warning("its type cannot be tried without a request")
        try:
            await sink.probe(request, _export(tenant))
        except BadSinkRequest as error:
            if error.field in values:
                # Of what was made up for the trial, after it had been reached.
                return warning(f"it answers; a new table would not do: {error}")
            return failed(f"{error.description}; {mend}")
    finally:
        await sink.close()
    return ok("it answers, and would take a delivery")


def _request(type_: AnySinkType, values: Mapping[str, Any]) -> BaseModel | None:
    """A request of the type, or None where it needs what nobody here can know."""
    try:
        request: BaseModel = type_.request_model.model_validate(values)
    except ValidationError:
        return None
    return request


def _database(connection: Any) -> dict[str, Any] | None:
    """A table that would be made; where only some may be written to, one of them."""
    named = [each for each in connection.tables if not set(each) & set("*?[")]
    table = named[0] if named else f"exportd_check_{secrets.token_hex(4)}"
    schema = f"{_quoted(connection.schemas[0])}." if connection.schemas else ""
    return {"table": f"{schema}{_quoted(table)}", "create_table": True}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _webhook(connection: Any) -> dict[str, Any] | None:
    """Nothing is sent, so any key will do where requests bring theirs."""
    if not connection.url:
        return None
    if connection.signing_keys:
        return {}
    return {"secret": "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()}


_TRIALS: Mapping[str, Callable[[Any], dict[str, Any] | None]] = {
    "database": _database,
    "webhook": _webhook,
}
"""What a request must say, by type; of other types as little as possible."""


def _export(tenant: str) -> Export:
    return Export(
        tenant=tenant,
        dataset="check",
        output=OutputFormat(Format.PARQUET),
        columns=(ExportColumn("id", "INTEGER", "int64", nullable=False),),
    )
