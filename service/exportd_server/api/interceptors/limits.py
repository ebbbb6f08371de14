"""Refuses calls of which there are too many: of all callers together, before anything is
read of them, and of one tenant, once it is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_status import rpc_status

from exportd_server.api.interceptors.errors import Behaviour
from exportd_server.api.interceptors.identity import caller
from exportd_server.api.limits import CallerLimits
from exportd_server.api.status import error_status
from exportd_server.errors import QuotaExceeded

_Continuation = Callable[
    [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
]

_ALWAYS = f"/{health.SERVICE_NAME}/Check"
"""Answered however many calls there are: a server that is merely busy must not be taken
for a dead one."""
_RETRY_AFTER = timedelta(seconds=1)


class CapacityInterceptor(grpc.aio.ServerInterceptor):
    """Lets so many calls of all services be under way at a time. Belongs outside all
    others: a call counts from its first byte, also one whose request never comes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: _Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Give the method's handler, or one that refuses."""
        if handler_call_details.method == _ALWAYS:
            return await continuation(handler_call_details)
        if len(self._calls) >= self._most:
            # Of this kind, so that it answers at once and does not wait for a request.
            return grpc.stream_stream_rpc_method_handler(self._refuse)
        # The library runs a call in one task from here to its end.
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call without a task")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await continuation(handler_call_details)

    async def _refuse(self, _requests: object, context: Any) -> None:
        error = QuotaExceeded(
            "server/calls",
            f"this server has {self._most} calls under way already; try again, perhaps "
            "at another one",
            _RETRY_AFTER,
        )
        await context.abort_with_status(rpc_status.to_status(error_status(error)))


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
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Give the method's handler with its behaviour limited."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method[1:].partition("/")
        if handler is None or service not in self._services:
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        raise RuntimeError(f"{method} streams requests, which nothing here wraps")

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
                        await context.write(response)
                else:
                    await answer

        return call

    def _count(self) -> None:
        if self._limits.rates is not None:
            self._limits.rates.take(caller().tenant)

    def _slot(self, method: str) -> AbstractContextManager[None]:
        if method == "WatchJob":
            return self._limits.watches.hold(caller().tenant)
        if method == "StreamDownload":
            return self._limits.downloads.hold(caller().tenant)
        return nullcontext()
