"""The sinks of this server: what a caller asked for is checked here when a job is made,
and delivered to later."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import to_jsonable_python

from exportd_server.errors import (
    ConfigurationError,
    DeliveryFailed,
    ErrorReason,
    ExportdError,
)
from exportd_server.platform.sealing import Sealer, Unreadable
from exportd_server.sinks.base import (
    BadSinkRequest,
    Delivery,
    Export,
    RetryPolicy,
    Sink,
    SinkPlan,
    Takes,
)
from exportd_server.sinks.connections import (
    Connection,
    Connections,
    SinkLimits,
    default_limits,
)
from exportd_server.sinks.registry import AnySinkType, SinkTypes

log = structlog.get_logger(__name__)

_CLOSING_SECONDS = 5.0
_MOST_IDLE = 16
"""How many sinks of single tenants stay open that nothing is delivered to."""

_UNKNOWN = SinkLimits(
    concurrency=4,
    queue_depth=1000,
    on_full="BLOCK",
    timeout=60.0,
    # Another process may have what this one lacks, or the operator may bring it back.
    retry=RetryPolicy(max_attempts=10, base=30.0, cap=600.0),
    disable_after=None,
)


@dataclass(frozen=True, slots=True)
class AskedSink:
    """A sink as a caller asks for it; `config` is the request of its type, with secrets
    in clear."""

    type: str
    connection: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class KeptSink:
    """A sink as a job keeps it: `config` without secrets, which are in `sealed`,
    encrypted; empty without any."""

    type: str
    connection: str
    config: Mapping[str, Any]
    sealed: str = ""


@dataclass(frozen=True, slots=True)
class CheckedSink:
    """A sink that may be delivered to: `queue` names what its deliveries stand in,
    `owner` the tenant whose endpoint that is, or nobody in particular."""

    kept: KeptSink
    takes: Takes
    queue: str
    owner: str
    limits: SinkLimits


@dataclass(slots=True, eq=False)
class _Opened:
    """A sink that is open, or is being opened, and how many are at it."""

    sink: asyncio.Future[Sink[Any]]
    users: int = 0


class Sinks:
    """Checks and reaches sinks. Open ones are kept, one for each connection, and shared
    by all deliveries; where each tenant has a place of its own, one for each of them that
    were used lately."""

    def __init__(
        self, types: SinkTypes, connections: Connections, sealer: Sealer | None = None
    ) -> None:
        self._types = types
        self._connections = connections
        self._sealer = sealer
        # By type, connection and, where it matters, tenant; the one used last at the end.
        self._open: OrderedDict[tuple[str, str, str], _Opened] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def known(self) -> list[tuple[str, str]]:
        """Pairs of type and connection that deliveries may go by."""
        pairs = [(each.type, each.name) for each in self._connections.all()]
        return pairs + [(name, "") for name in self._types.without_connection()]

    # --- when a job is made

    def check(self, tenant: str, asked: AskedSink, export: Export) -> CheckedSink:
        """See whether a request can work, without asking anybody. Raises
        `BadSinkRequest`."""
        type_, connection = self._find(tenant, asked.type, asked.connection)
        request = _parsed(type_, asked.config)
        plan = _planned(type_, connection, request, tenant, export)
        endpoint = (tenant, plan.endpoint) if plan.endpoint else ()
        return CheckedSink(
            kept=self._kept(asked, request),
            takes=plan.takes,
            queue="/".join(filter(None, (asked.type, asked.connection, *endpoint))),
            owner=tenant if endpoint else "",
            limits=_limits(type_, connection),
        )

    async def probe(self, tenant: str, asked: AskedSink, export: Export) -> None:
        """See whether a delivery would arrive. Raises `BadSinkRequest` for what the caller
        must mend, `DeliveryFailed` for what the sink itself fails at."""
        type_, connection = self._find(tenant, asked.type, asked.connection)
        request = _parsed(type_, asked.config)
        async with asyncio.timeout(min(_limits(type_, connection).timeout, 30.0)):
            async with self._sink(type_, connection, tenant) as sink:
                await sink.probe(request, export)

    def _find(
        self, tenant: str, type_name: str, connection_name: str
    ) -> tuple[AnySinkType, Connection | None]:
        type_ = self._types.get(type_name)
        if type_ is None:
            known = ", ".join(self._types.names())
            raise BadSinkRequest(
                "type", f"this server has no sink type {type_name[:64]!r}; it has {known}"
            )
        names = self._connections.names_for(tenant, type_name)
        if not connection_name and not type_.needs_connection:
            return type_, None
        if connection_name not in names:
            # The same answer for what is there for others.
            hint = f"one of {', '.join(names)}" if names else "the operator has set up none"
            what = (
                f"there is no connection {connection_name[:64]!r} for this sink"
                if connection_name
                else "is required"
            )
            raise BadSinkRequest("connection", f"{what}: {hint}")
        return type_, self._connections.get(connection_name)

    def _kept(self, asked: AskedSink, request: BaseModel) -> KeptSink:
        values = request.model_dump()
        if not _has_secret(values):
            return KeptSink(asked.type, asked.connection, request.model_dump(mode="json"))
        if self._sealer is None:
            raise BadSinkRequest(
                "",
                "this server keeps no secrets of callers; use a connection that has them, "
                "or have the operator set delivery.secret_keys",
            )
        plain = to_jsonable_python(_mapped(values, reveal=True))
        public = to_jsonable_python(_mapped(values, reveal=False))
        return KeptSink(
            asked.type, asked.connection, public, self._sealer.seal(json.dumps(plain))
        )

    # --- when it is delivered

    def limits(self, type_name: str, connection_name: str) -> SinkLimits:
        """What holds for a sink now."""
        type_ = self._types.get(type_name)
        missing = connection_name and self._connections.get(connection_name) is None
        if type_ is None or missing:
            return _UNKNOWN
        return _limits(type_, self._connections.get(connection_name))

    async def deliver_batch(
        self, kept: KeptSink, deliveries: Sequence[Delivery]
    ) -> Sequence[str | DeliveryFailed]:
        """Deliver what one sink of one job takes together, which is one thing alone unless
        it has `batching`, within the sink's time limit; for each its receipt or why it did
        not arrive. What holds for all is raised: `DeliveryFailed`, another `ExportdError`
        for what the service itself fails at, and `KeyError` of the content."""
        type_ = self._types.get(kept.type)
        connection = self._connections.get(kept.connection)
        tenant = deliveries[0].export.tenant
        if type_ is None or (kept.connection and not _fits(connection, kept, tenant)):
            raise ExportdError(
                ErrorReason.SINK_UNAVAILABLE,
                f"this server has no connection {kept.connection!r} of type {kept.type}"
                if type_ is not None
                else f"this server has no sink type {kept.type!r}",
            )
        request = self._opened(type_, kept)
        limit = _limits(type_, connection).timeout
        try:
            if connection is not None and connection.shared:
                # It may not have been when the job was made.
                _planned(type_, connection, request, tenant, deliveries[0].export)
            async with (
                asyncio.timeout(limit) as deadline,
                self._sink(type_, connection, tenant) as sink,
            ):
                if len(deliveries) == 1:
                    return [await sink.deliver(request, deliveries[0])]
                return await _together(sink, request, deliveries)
        except TimeoutError as error:
            if not deadline.expired():
                raise DeliveryFailed(
                    "the sink did not answer in time", retryable=True
                ) from error
            raise DeliveryFailed(
                f"the delivery took longer than {limit:g} s", retryable=True
            ) from error
        except (ExportdError, KeyError):
            # Of the delivery, of the store, or of what else the service itself lacks.
            raise
        except BadSinkRequest as error:
            raise DeliveryFailed(str(error), retryable=False) from error
        except ConfigurationError as error:
            # The operator's to mend, and to read.
            raise DeliveryFailed(
                "the sink's connection is not configured right on this server",
                retryable=True,
            ) from error
        except Exception as error:
            log.exception("sink broke", sink=kept.type, connection=kept.connection)
            raise DeliveryFailed("the sink failed unexpectedly", retryable=True) from error

    def _opened(self, type_: AnySinkType, kept: KeptSink) -> BaseModel:
        try:
            return _parsed(type_, self._config(kept))
        except Unreadable as error:
            raise ExportdError(
                ErrorReason.SINK_UNAVAILABLE,
                "the sink's secrets cannot be read on this server: the key that they were "
                "kept under is missing",
            ) from error
        except BadSinkRequest as error:
            raise DeliveryFailed(
                f"this release does not take the sink's request: {error}", retryable=False
            ) from error

    def _config(self, kept: KeptSink) -> Mapping[str, Any]:
        if not kept.sealed:
            return kept.config
        if self._sealer is None:
            raise Unreadable("there are no keys")
        config: Mapping[str, Any] = json.loads(self._sealer.open(kept.sealed))
        return config

    @asynccontextmanager
    async def _sink(
        self, type_: AnySinkType, connection: Connection | None, tenant: str
    ) -> AsyncIterator[Sink[Any]]:
        """The open sink of a connection; who comes while it is being opened waits."""
        apart = connection is not None and connection.of_tenant is not None
        name = "" if connection is None else connection.name
        key = (type_.name, name, tenant if apart else "")
        opened = self._open.get(key)
        if opened is None or (opened.sink.done() and _failed(opened.sink)):
            settings = _settings(connection, tenant)
            opened = _Opened(asyncio.ensure_future(type_.open(settings)))
            self._open[key] = opened
        self._open.move_to_end(key)
        opened.users += 1
        try:
            # One who gives up does not take it from the others.
            yield await asyncio.shield(opened.sink)
        finally:
            opened.users -= 1
            self._close_idle()

    def _close_idle(self) -> None:
        idle = [key for key, one in self._open.items() if key[2] and not one.users]
        for key in idle[: max(0, len(idle) - _MOST_IDLE)]:
            self._close(key)

    def _close(self, key: tuple[str, str, str]) -> None:
        task = asyncio.create_task(_close(key[0], self._open.pop(key).sink))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close what is open."""
        for key in list(self._open):
            self._close(key)
        if self._closing:
            # One that hangs does not keep the process.
            await asyncio.wait(self._closing, timeout=_CLOSING_SECONDS)


async def _close(name: str, opening: asyncio.Future[Sink[Any]]) -> None:
    opening.cancel()
    await asyncio.wait({opening})
    if not _failed(opening):
        try:
            await opening.result().close()
        except Exception:
            # Whatever a sink does at its end, the others are to have theirs.
            log.exception("sink was not closed", sink=name)


def _failed(opening: asyncio.Future[Any]) -> bool:
    return opening.cancelled() or opening.exception() is not None


def _settings(connection: Connection | None, tenant: str) -> BaseModel | None:
    """What a sink of the connection is opened with for a tenant. Raises
    `BadSinkRequest`."""
    try:
        return None if connection is None else connection.settings_for(tenant)
    except ValidationError as error:
        log.error(  # noqa: TRY400 - what it was given may be a secret
            "a connection takes no such tenant",
            connection="" if connection is None else connection.name,
            tenant=tenant,
            wrong=[one["loc"] for one in error.errors(include_input=False)],
        )
        raise BadSinkRequest(
            "connection", "has no place for this tenant; ask the operator to mend it"
        ) from None


def _planned(
    type_: AnySinkType,
    connection: Connection | None,
    request: BaseModel,
    tenant: str,
    export: Export,
) -> SinkPlan:
    """What a request comes to. Raises `BadSinkRequest`, also where it would change what
    other tenants have put there."""
    plan = type_.check(request, _settings(connection, tenant), export)
    if plan.overwrites and connection is not None and connection.shared:
        raise BadSinkRequest(
            plan.overwrites,
            "would change what is there, and several tenants share this connection; only "
            "add to it, or have the operator give each tenant a place by {tenant}",
        )
    return plan


def _limits(type_: AnySinkType, connection: Connection | None) -> SinkLimits:
    return default_limits(type_.defaults) if connection is None else connection.limits


async def _together(
    sink: Any, request: BaseModel, deliveries: Sequence[Delivery]
) -> Sequence[str | DeliveryFailed]:
    outcomes: Sequence[str | DeliveryFailed]
    outcomes = await sink.deliver_batch(request, deliveries)
    if len(outcomes) != len(deliveries):
        raise RuntimeError(f"{len(outcomes)} outcomes of {len(deliveries)} deliveries")
    return outcomes


def _fits(connection: Connection | None, kept: KeptSink, tenant: str) -> bool:
    """Whether the connection is the kind of sink the job knew, and still the tenant's."""
    if connection is None or connection.type != kept.type:
        return False
    tenants = connection.limits.tenants
    return tenants is None or tenant in tenants


def _parsed(type_: AnySinkType, config: Mapping[str, Any]) -> BaseModel:
    try:
        request: BaseModel = type_.request_model.model_validate(dict(config))
    except ValidationError as error:
        # Without the input, which may be a secret.
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        known = ", ".join(type_.request_model.model_fields)
        unknown = first["type"] == "extra_forbidden"
        raise BadSinkRequest(
            place, f"is not known; there are {known}" if unknown else first["msg"]
        ) from None
    return request


def _has_secret(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_secret, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_secret, value))
    return isinstance(value, SecretStr)


def _mapped(value: Any, *, reveal: bool) -> Any:
    """The value with secrets in clear, or emptied."""
    if isinstance(value, Mapping):
        return {key: _mapped(each, reveal=reveal) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, reveal=reveal) for each in value]
    if isinstance(value, SecretStr):
        return value.get_secret_value() if reveal else ""
    return value
