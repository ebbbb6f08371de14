"""Refuses calls of which there are too many at a time: of all callers together, before
anything is read of them, and of one tenant, once it is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health
from grpc_status import rpc_status

from exportd_server.api.interceptors.handlers import (
    Behaviour,
    Continuation,
    Send,
    split,
    wrapped,
)
from exportd_server.api.interceptors.identity import caller
from exportd_server.api.limits import CallerLimits
from exportd_server.api.sending import Messages
from exportd_server.api.status import error_status
from exportd_server.errors import ErrorReason, ExportdError, QuotaExceeded
from exportd_server.platform.waits import Patience

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

_ALWAYS = f"/{health.SERVICE_NAME}/Check"
"""Answered however many calls there are: a server that is merely busy must not be taken
for a dead one."""
_RETRY_AFTER = timedelta(seconds=1)


class _Room:
    """Room for `most` calls at a time."""

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._most = most
        self._calls: set[asyncio.Task[Any]] = set()

    def refused(self) -> bool:
        """Take a place for the call that is under way, until all of it has ended. True
        when there is none."""
        if len(self._calls) >= self._most:
            return True
        task = _task()
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return False

    def guarded(self, behaviour: Behaviour) -> Behaviour:
        """The behaviour for calls that find a place."""

        async def call(requests: Any, context: Any) -> Any:
            if self.refused():
                await self.refuse(requests, context)
            return await behaviour(requests, context)

        return call

    async def refuse(self, _requests: object, context: Any) -> None:
        """Tell that there is no room."""
        error = QuotaExceeded(
            f"server/{self._what}",
            f"this server has {self._most} calls under way already; try again, perhaps at "
            "another one",
            _RETRY_AFTER,
        )
        await context.abort_with_status(rpc_status.to_status(error_status(error)))


class CapacityInterceptor(grpc.aio.ServerInterceptor):
    """Lets `most` calls of the services named be under way at a time, and a tenth of that
    of other services, whose callers nobody knows. Belongs outside all others: a call
    counts from its first byte.

    The request of a call has to come within `patience` seconds. The library would wait for
    it for ever, and it takes no credentials to begin a call and say nothing.
    """

    def __init__(self, services: frozenset[str], most: int, patience: float) -> None:
        self._services = services
        self._patience = Patience(patience)
        self._calls = _Room("calls", most)
        self._open_calls = _Room("open_calls", max(1, most // 10))

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler, which refuses when there are too many."""
        handler = await continuation(handler_call_details)
        if handler_call_details.method == _ALWAYS:
            return handler
        known = split(handler_call_details)[0] in self._services
        room = self._calls if known else self._open_calls
        if handler is None:
            # The library answers that one, which makes it a call as well.
            return (
                grpc.stream_stream_rpc_method_handler(room.refuse)
                if room.refused()
                else None
            )
        if known:
            handler = self._patient(handler)
        return wrapped(handler, unary=room.guarded, stream=room.guarded)

    def _patient(self, handler: Handler) -> Handler:
        """The same method as one that streams requests and takes the first of them, for
        only such ones are called before a request is there."""
        # One answer stays one: the library sends it together with the status.
        make: Callable[..., Handler] = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        behaviour: Any = handler.unary_unary or handler.unary_stream
        if behaviour is None:
            return handler

        async def call(_requests: object, context: Any) -> Any:
            try:
                # Not from the iterator, which is one more task to end when it is left.
                request = await self._patience.wait(context.read())
            except TimeoutError:
                request = grpc.aio.EOF
            if request is grpc.aio.EOF:
                error = ExportdError(
                    ErrorReason.INVALID_REQUEST,
                    "the call has no request, or none came within "
                    f"{self._patience.seconds:g} s",
                )
                await context.abort_with_status(rpc_status.to_status(error_status(error)))
            return await behaviour(request, context)

        return make(call, handler.request_deserializer, handler.response_serializer)


def _task() -> asyncio.Task[Any]:
    """What the library runs a call in from its first byte to its end: until its answer,
    or its status, has been taken."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a call without a task")
    return task


class TenantsInterceptor(grpc.aio.ServerInterceptor):
    """Holds the tenants' calls of the services named to their limits: so many at a time, so
    many streams of a kind, and readers that take what is sent. Belongs inside the
    interceptors that say who calls and that turn errors into statuses, and next to the
    handlers.

    A call whose reader has no room for the answer stays under way for as long as the
    connection lives. So a tenant has a part of all places and not all of them.
    """

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
            unary=self._limited,
            stream=lambda own: self._limited(self._streaming(own, method)),
            sending=self._sending,
        )

    def _limited(self, behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: Any) -> Any:
            self._limits.calls.hold_for(caller().tenant, _task())
            return await behaviour(request, context)

        return call

    def _streaming(self, behaviour: Behaviour, method: str) -> Behaviour:
        async def call(request: Any, context: Any) -> None:
            with self._slot(method):
                await behaviour(request, context)

        return call

    def _sending(self, context: Any) -> Send:
        stalled = "nothing was taken for too long; watch again"
        return Messages(context, self._limits.stall_timeout, stalled).send

    def _slot(self, method: str) -> AbstractContextManager[None]:
        if method == "WatchJob":
            return self._limits.watches.hold(caller().tenant)
        if method == "StreamDownload":
            return self._limits.downloads.hold(caller().tenant)
        return nullcontext()
