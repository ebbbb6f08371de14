"""Bounds what callers without identity may hold of the streams that anybody may open."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc
from grpc_status import rpc_status

from exportd_server.api.interceptors.handlers import Continuation, split
from exportd_server.api.sending import begin
from exportd_server.api.status import error_status
from exportd_server.errors import QuotaExceeded

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

_LEAST = 4
"""Streams that a connection may have in any case: a watch of health, and a tool at work."""
_RETRY_AFTER = timedelta(seconds=1)


class OpenStreamsInterceptor(grpc.aio.ServerInterceptor):
    """Ends the calls of all but the services named after `seconds`, counted from their
    first byte, and lets one connection have a tenth of `most` streams of them.

    So nobody keeps such a stream for ever, and it takes many connections to take them all.
    """

    def __init__(self, services: frozenset[str], most: int, seconds: float) -> None:
        self._services = services
        self._seconds = seconds
        self._share = max(_LEAST, most // 10)
        self._taken: Counter[str] = Counter()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler, with an end."""
        handler = await continuation(handler_call_details)
        if handler is None or split(handler_call_details)[0] in self._services:
            return handler
        # Of this kind, so that it is called before a request is there.
        return grpc.stream_stream_rpc_method_handler(
            self._bounded(handler),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _bounded(self, handler: Handler) -> Any:
        async def call(requests: Any, context: Any) -> None:
            peer = context.peer()
            if handler.unary_unary is None and self._taken[peer] >= self._share:
                error = QuotaExceeded(
                    "connection/open_calls",
                    f"this connection has {self._share} such calls under way already; end "
                    "one, or wait for one to end",
                    _RETRY_AFTER,
                )
                await context.abort_with_status(rpc_status.to_status(error_status(error)))
            self._taken[peer] += 1
            try:
                # The library's own services write to the context themselves.
                await begin(context)
                async with asyncio.timeout(self._seconds):
                    await _run(handler, requests, context)
            except TimeoutError:
                await context.abort(
                    grpc.StatusCode.UNAVAILABLE,
                    f"the call was open for {self._seconds:g} s; call again",
                )
            except grpc.aio.InternalError as gone:
                # Nothing more can be sent, and there is nobody to tell.
                raise asyncio.CancelledError from gone
            finally:
                self._taken[peer] -= 1
                if not self._taken[peer]:
                    del self._taken[peer]

        return call


async def _run(handler: Handler, requests: Any, context: Any) -> None:
    request = requests
    if not handler.request_streaming:
        try:
            request = await anext(requests)
        except StopAsyncIteration:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the call has no request; send one"
            )
    behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream
    answer: AsyncIterator[Any] | Awaitable[Any] = behaviour(request, context)
    if isinstance(answer, AsyncIterator):
        async for response in answer:
            await context.write(response)
    elif handler.response_streaming:
        await answer
    else:
        await context.write(await answer)
