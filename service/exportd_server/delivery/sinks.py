"""The sinks of this server: what a caller asked for is checked here when a job is made,
and delivered to later."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
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


class Sinks:
    """Checks and reaches sinks. Open ones are kept, one for each connection, and shared
    by all deliveries."""

    def __init__(
        self, types: SinkTypes, connections: Connections, sealer: Sealer | None = None
    ) -> None:
        self._types = types
        self._connections = connections
        self._sealer = sealer
        self._open: dict[tuple[str, str], asyncio.Future[Sink[Any]]] = {}

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
        settings = None if connection is None else connection.settings
        plan = type_.check(request, settings, export)
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
            sink = await self._sink(type_, asked.connection, connection)
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
            async with asyncio.timeout(limit) as deadline:
                sink = await self._sink(type_, kept.connection, connection)
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

    async def _sink(
        self, type_: AnySinkType, name: str, connection: Connection | None
    ) -> Sink[Any]:
        """The open sink of a connection; who comes while it is being opened waits."""
        key = (type_.name, name)
        opening = self._open.get(key)
        if opening is None or (opening.done() and _failed(opening)):
            settings = None if connection is None else connection.settings
            opening = asyncio.ensure_future(type_.open(settings))
            self._open[key] = opening
        # One who gives up does not take it from the others.
        return await asyncio.shield(opening)

    async def close(self) -> None:
        """Close what is open."""
        closing = {
            asyncio.create_task(_close(key[0], opening))
            for key, opening in self._open.items()
        }
        self._open.clear()
        if closing:
            # One that hangs does not keep the process.
            await asyncio.wait(closing, timeout=_CLOSING_SECONDS)


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
