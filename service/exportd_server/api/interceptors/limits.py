"""Refuses calls of which there are too many: of all callers together, before anything is
read of them, and of one tenant, once it is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health
from grpc_status import rpc_status

from exportd_server.api.interceptors.handlers import Behaviour, wrapped
from exportd_server.api.interceptors.identity import caller
from exportd_server.api.limits import CallerLimits
from exportd_server.api.status import error_status
from exportd_server.errors import ErrorReason, ExportdError, QuotaExceeded

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]

_ALWAYS = f"/{health.SERVICE_NAME}/Check"
"""Answered however many calls there are: a server that is merely busy must not be taken
for a dead one."""
_RETRY_AFTER = timedelta(seconds=1)


class CapacityInterceptor(grpc.aio.ServerInterceptor):
    """Lets `most` calls of the services named be under way at a time, and a tenth of that
    of other services, whose callers nobody knows. Belongs outside all others: a call
    counts from its first byte.

    The request of a call has to come within `patience` seconds. The library would wait for
    it for ever, and it takes no credentials to begin a call and say nothing.
    """

    def __init__(self, services: frozenset[str], most: int, patience: float) -> None:
        self._services = services
        self._patience = patience
        self._calls: set[asyncio.Task[Any]] = set()
        self._open_calls: set[asyncio.Task[Any]] = set()
        self._most = most
        self._most_open = max(1, most // 10)

    async def intercept_service(
        self,
        continuation: _Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Give the method's handler, or one that refuses."""
        if handler_call_details.method == _ALWAYS:
            return await continuation(handler_call_details)
        service, _, _ = handler_call_details.method[1:].partition("/")
        known = service in self._services
        calls, what, most = (
            (self._calls, "calls", self._most)
            if known
            else (self._open_calls, "open_calls", self._most_open)
        )
        if len(calls) >= most:
            return _refusal(what, most)
        # The library runs a call in one task from here to its end.
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call without a task")
        calls.add(task)
        task.add_done_callback(calls.discard)
        handler = await continuation(handler_call_details)
        return self._patient(handler) if handler is not None and known else handler

    def _patient(self, handler: _Handler) -> _Handler:
        """The same method as one that streams requests and takes the first of them, for
        only such ones are called before a request is there."""
        unary: Behaviour | None = handler.unary_unary
        stream: Behaviour | None = handler.unary_stream
        if unary is None and stream is None:
            return handler

        async def call(requests: Any, context: Any) -> None:
            try:
                async with asyncio.timeout(self._patience):
                    request = await anext(requests)
            except (TimeoutError, StopAsyncIteration):
                error = ExportdError(
                    ErrorReason.INVALID_REQUEST,
                    f"the call has no request, or none came within {self._patience:g} s",
                )
                await context.abort_with_status(rpc_status.to_status(error_status(error)))
            if unary is not None:
                await context.write(await unary(request, context))
            elif stream is not None:
                await stream(request, context)

        return grpc.stream_stream_rpc_method_handler(
            call, handler.request_deserializer, handler.response_serializer
        )


def _refusal(what: str, most: int) -> _Handler:
    async def refuse(_requests: object, context: Any) -> None:
        error = QuotaExceeded(
            f"server/{what}",
            f"this server has {most} calls under way already; try again, perhaps at "
            "another one",
            _RETRY_AFTER,
        )
        await context.abort_with_status(rpc_status.to_status(error_status(error)))

    # Of this kind, so that it answers at once and does not wait for a request.
    return grpc.stream_stream_rpc_method_handler(refuse)


class TenantLimitsInterceptor(grpc.aio.ServerInterceptor):
    """Holds the callers of the services named to their limits. Belongs inside the
    interceptors that say who calls and that turn errors into statuses."""

    def __init__(self, services: frozenset[str], limits: CallerLimits) -> None:
        self._services = services
        self._limits = limits

    async def intercept_service(
        self,
        continuation: _Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Give the method's handler with its behaviour limited."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method[1:].partition("/")
        if handler is None or service not in self._services:
            return handler
        return wrapped(
            handler, unary=self._unary, stream=lambda own: self._stream(own, method)
        )

    def _unary(self, behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: Any) -> Any:
            self._count()
            return await behaviour(request, context)

        return call

    def _stream(self, behaviour: Behaviour, method: str) -> Behaviour:
        async def call(request: Any, context: Any) -> None:
            self._count()
            with self._slot(method):
                answer = behaviour(request, context)
                if isinstance(answer, AsyncIterator):
                    async for response in answer:
                        await self._write(context, response)
                else:
                    await answer

        return call

    async def _write(self, context: Any, response: Any) -> None:
        try:
            async with asyncio.timeout(self._limits.stall_timeout):
                await context.write(response)
        except TimeoutError:
            raise ExportdError(
                ErrorReason.READER_STALLED, "nothing was taken for too long; watch again"
            ) from None

    def _count(self) -> None:
        if self._limits.rates is not None:
            self._limits.rates.take(caller().tenant)

    def _slot(self, method: str) -> AbstractContextManager[None]:
        if method == "WatchJob":
            return self._limits.watches.hold(caller().tenant)
        if method == "StreamDownload":
            return self._limits.downloads.hold(caller().tenant)
        return nullcontext()
