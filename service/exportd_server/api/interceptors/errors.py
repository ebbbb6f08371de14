"""Turns every error of a call into a status that says no more than it should, and logs
the call."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_status import rpc_status

from exportd_server.api.interceptors.handlers import (
    Behaviour,
    Continuation,
    split,
    wrapped,
)
from exportd_server.api.status import error_status
from exportd_server.errors import Code, ErrorReason, ExportdError

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

log = structlog.get_logger(__name__)
_LEVEL = logging.getLogger(__name__)


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
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler with its behaviour wrapped."""
        handler = await continuation(handler_call_details)
        service, method = split(handler_call_details)
        if handler is None or service not in self._services:
            return handler

        def wrap(own: Behaviour) -> Behaviour:
            return _told(own, method, self.active)

        return wrapped(handler, unary=wrap, stream=wrap)


def _told(behaviour: Behaviour, method: str, active: ActiveCalls) -> Behaviour:
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
    fault = code == Code.INTERNAL.name
    # To have the log throw a line away costs more than the rest of this.
    if not fault and not _LEVEL.isEnabledFor(logging.DEBUG):
        return
    level = log.warning if fault else log.debug
    level(
        "call",
        method=method,
        code=code,
        reason=reason,
        milliseconds=round(1000 * (time.monotonic() - started), 1),
    )
