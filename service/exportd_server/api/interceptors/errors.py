"""Turns every error of a call into a status that says no more than it should, and logs
the call."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from exportd_server.api.interceptors.handlers import Behaviour, wrapped
from exportd_server.api.status import error_status
from exportd_server.errors import Code, ErrorReason, ExportdError

log = structlog.get_logger(__name__)


class ActiveCalls:
    """Calls under way."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._count += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def none(self) -> None:
        """Wait until there is none."""
        await self._none.wait()


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every unary and server-streaming method of the services named, and knows
    which calls of them are under way."""

    def __init__(self, services: frozenset[str]) -> None:
        self._services = services
        self.active = ActiveCalls()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Give the method's handler with its behaviour wrapped."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method[1:].partition("/")
        if handler is None or service not in self._services:
            return handler
        read = handler.request_deserializer
        return wrapped(
            handler,
            unary=lambda own: _unary(reading(own, read), method, self.active),
            stream=lambda own: _stream(reading(own, read), method, self.active),
            wire=True,
        )


def reading(behaviour: Behaviour, read: Callable[[bytes], Any] | None) -> Behaviour:
    """The behaviour for a request that is still bytes. The library would answer bytes
    that are no message with UNKNOWN and the parser's own words."""

    def call(wire: bytes, context: Any) -> Any:
        try:
            request = wire if read is None else read(wire)
        except DecodeError:
            raise ExportdError(
                ErrorReason.INVALID_REQUEST, "the request is not a message of its type"
            ) from None
        return behaviour(request, context)

    return call


def _unary(behaviour: Behaviour, method: str, active: ActiveCalls) -> Behaviour:
    async def call(request: Any, context: Any) -> Any:
        started = time.monotonic()
        try:
            with active:
                response = await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - every error becomes a status
            await _abort(context, error, method, started)
        else:
            _log_call(method, started, "OK")
            return response

    return call


def _stream(behaviour: Behaviour, method: str, active: ActiveCalls) -> Behaviour:
    async def call(request: Any, context: Any) -> None:
        started = time.monotonic()
        try:
            with active:
                answer = behaviour(request, context)
                if isinstance(answer, AsyncIterator):
                    async for response in answer:
                        await context.write(response)
                else:
                    await answer
        except Exception as error:  # noqa: BLE001 - every error becomes a status
            await _abort(context, error, method, started)
        else:
            _log_call(method, started, "OK")

    return call


async def _abort(context: Any, error: Exception, method: str, started: float) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, grpc.aio.InternalError):
        # Nothing more can be sent: the caller has gone, and there is nobody to tell.
        _log_call(method, started, Code.CANCELLED.name)
        raise asyncio.CancelledError from error
    if isinstance(error, ExportdError):
        public = error
    else:
        reference = secrets.token_hex(6)
        log.error("unforeseen error", method=method, reference=reference, exc_info=error)
        public = ExportdError(
            ErrorReason.INTERNAL,
            f"internal error; the operator finds it by reference {reference}",
            metadata={"reference": reference},
        )
    _log_call(method, started, public.code.name, public.reason)
    try:
        await context.abort_with_status(rpc_status.to_status(error_status(public)))
    except grpc.aio.InternalError as gone:
        raise asyncio.CancelledError from gone


def _log_call(method: str, started: float, code: str, reason: str | None = None) -> None:
    level = log.warning if code == Code.INTERNAL.name else log.debug
    level(
        "call",
        method=method,
        code=code,
        reason=reason,
        milliseconds=round(1000 * (time.monotonic() - started), 1),
    )
