"""Lets a call through once it is known who calls, and that they may."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from exportd_server.api.interceptors.handlers import (
    Behaviour,
    Continuation,
    split,
    wrapped,
)
from exportd_server.api.limits import RequestRates
from exportd_server.api.reflection import V1_SERVICE
from exportd_server.errors import (
    ErrorReason,
    ExportdError,
    PermissionDenied,
    Unauthenticated,
)
from exportd_server.identity.authenticator import Authenticator
from exportd_server.identity.base import Principal, Scope

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

log = structlog.get_logger(__name__)

OPEN = frozenset({health.SERVICE_NAME, reflection.SERVICE_NAME, V1_SERVICE})
"""Services that anybody may call: load balancers and tools come without credentials, and
neither tells anything that is not in the published contract."""

SCOPES: Mapping[str, Scope] = MappingProxyType(
    {
        "ListDatasets": Scope.READ,
        "GetDataset": Scope.READ,
        "CreateExport": Scope.WRITE,
        "GetJob": Scope.READ,
        "ListJobs": Scope.READ,
        "WatchJob": Scope.READ,
        "CancelJob": Scope.WRITE,
        "DeleteJob": Scope.WRITE,
        "StreamDownload": Scope.READ,
        "GetDownloadUrls": Scope.READ,
        "ListDeliveries": Scope.READ,
        "RedriveDeliveries": Scope.WRITE,
        "ListSinkQueues": Scope.READ,
        "EnableSinkQueue": Scope.WRITE,
        "ListAuditRecords": Scope.ADMIN,
    }
)
"""What each method of the contract needs. One without a row nobody may call."""

_caller: ContextVar[Principal] = ContextVar("caller")


def caller() -> Principal:
    """Who makes the call that is under way."""
    return _caller.get()


def known_caller() -> Principal | None:
    """Who makes the call that is under way, even if it was refused; None for a caller that
    nobody knows."""
    return _caller.get(None)


class IdentityInterceptor(grpc.aio.ServerInterceptor):
    """Guards every method of the services named by the scope in the table. Services that
    are neither among them nor `OPEN` do not exist for callers. Whoever is known is held to
    the rate of its tenant's requests, whether or not it may make them.

    Belongs inside the interceptor that turns errors into statuses. The request is read
    only after the caller was let through.
    """

    def __init__(
        self,
        services: frozenset[str],
        authenticator: Authenticator,
        rates: RequestRates | None,
        scopes: Mapping[str, Scope] = SCOPES,
    ) -> None:
        self._services = services
        self._authenticator = authenticator
        self._rates = rates
        self._scopes = scopes

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler with its behaviour guarded."""
        handler = await continuation(handler_call_details)
        service, method = split(handler_call_details)
        if handler is None or service in OPEN:
            return handler
        if service not in self._services:
            return None
        read = handler.request_deserializer
        return wrapped(
            handler,
            unary=lambda own: self._unary(_reading(own, read), method),
            stream=lambda own: self._stream(_reading(own, read), method),
            wire=True,
        )

    def _unary(self, behaviour: Behaviour, method: str) -> Behaviour:
        async def call(wire: bytes, context: Any) -> Any:
            await self._admit(context, method)
            return await behaviour(wire, context)

        return call

    def _stream(self, behaviour: Behaviour, method: str) -> Behaviour:
        async def call(wire: bytes, context: Any) -> None:
            principal = await self._admit(context, method)
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(None) as limit:
                    with self._authenticator.while_valid(
                        principal, lambda: limit.reschedule(loop.time())
                    ):
                        await behaviour(wire, context)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise Unauthenticated(f"API key {principal.key_id} was revoked") from None

        return call

    async def _admit(self, context: Any, method: str) -> Principal:
        authorization = [
            value for key, value in context.invocation_metadata() if key == "authorization"
        ]
        try:
            principal = await self._authenticator.principal(
                authorization, self._certificate(context)
            )
        except Unauthenticated as refused:
            log.info(
                "caller refused", method=method, cause=refused.cause, peer=context.peer()
            )
            raise
        _caller.set(principal)
        if self._rates is not None:
            self._rates.take(principal.tenant)
        scope = self._scopes.get(method)
        if scope is None or not principal.may(scope):
            log.info(
                "call refused",
                method=method,
                scope=scope,
                subject=principal.subject,
                tenant=principal.tenant,
            )
            raise PermissionDenied(scope)
        # Of the task that serves this call alone.
        structlog.contextvars.bind_contextvars(
            tenant=principal.tenant, subject=principal.subject
        )
        return principal

    def _certificate(self, context: Any) -> bytes | None:
        if self._authenticator.certificates is None:
            return None
        shown = context.auth_context().get("x509_pem_cert")
        return shown[0] if shown else None


def _reading(behaviour: Behaviour, read: Callable[[bytes], Any] | None) -> Behaviour:
    """The behaviour for a request that is still bytes. The library would answer bytes
    that are no message with UNKNOWN and the parser's own words."""

    async def call(wire: bytes, context: Any) -> Any:
        try:
            request = wire if read is None else read(wire)
        except DecodeError:
            raise ExportdError(
                ErrorReason.INVALID_REQUEST, "the request is not a message of its type"
            ) from None
        return await behaviour(request, context)

    return call
