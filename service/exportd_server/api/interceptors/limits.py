"""Refuses calls of which there are too many at a time: of all callers together, before
anything is read of them, and streams of one tenant, once it is known."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health
from grpc_status import rpc_status

from exportd_server.api.interceptors.handlers import (
    Behaviour,
    Continuation,
    split,
    wrapped,
)
from exportd_server.api.interceptors.identity import caller
from exportd_server.api.limits import CallerLimits
from exportd_server.api.status import error_status
from exportd_server.errors import ErrorReason, ExportdError, QuotaExceeded

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

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
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler, or one that refuses."""
        if handler_call_details.method == _ALWAYS:
            return await continuation(handler_call_details)
        service, _ = split(handler_call_details)
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

    def _patient(self, handler: Handler) -> Handler:
        """The same method as one that streams requests and takes the first of them, for
        only such ones are called before a request is there."""
        unary: Behaviour | None = handler.unary_unary
        stream: Any = handler.unary_stream
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


def _refusal(what: str, most: int) -> Handler:
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


class StreamsInterceptor(grpc.aio.ServerInterceptor):
    """Holds the streams of the services named to their limits: so many at a time, and
    readers that take what is sent. Belongs inside the interceptors that say who calls and
    that turn errors into statuses, and next to the handlers."""

    def __init__(self, services: frozenset[str], limits: CallerLimits) -> None:
        self._services = services
        self._limits = limits

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler with its behaviour limited."""
        handler = await continuation(handler_call_details)
        service, method = split(handler_call_details)
        if handler is None or service not in self._services:
            return handler
        return wrapped(
            handler,
            unary=lambda own: own,
            stream=lambda own: self._limited(own, method),
            write=self._write,
        )

    def _limited(self, behaviour: Behaviour, method: str) -> Behaviour:
        async def call(request: Any, context: Any) -> None:
            with self._slot(method):
                await behaviour(request, context)

        return call

    async def _write(self, context: Any, response: Any) -> None:
        try:
            async with asyncio.timeout(self._limits.stall_timeout):
                await context.write(response)
        except TimeoutError:
            raise ExportdError(
                ErrorReason.READER_STALLED, "nothing was taken for too long; watch again"
            ) from None

    def _slot(self, method: str) -> AbstractContextManager[None]:
        if method == "WatchJob":
            return self._limits.watches.hold(caller().tenant)
        if method == "StreamDownload":
            return self._limits.downloads.hold(caller().tenant)
        return nullcontext()
