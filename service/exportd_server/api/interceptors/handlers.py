"""What every interceptor of ours does with a method: put behaviour around its own, once
for all calls of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]
Behaviour = Callable[[Any, Any], Awaitable[Any]]
Wrap = Callable[[Behaviour], Behaviour]
Send = Callable[[Any], Awaitable[None]]


_CODES = frozenset(code.value[0] for code in grpc.StatusCode)


def code_number(context: Any) -> int:
    """The number of the status that a call has come to, whichever way the library tells
    it; None is that nobody set one."""
    code = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code or 0
    return number if number in _CODES else int(grpc.StatusCode.UNKNOWN.value[0])


def split(details: grpc.HandlerCallDetails) -> tuple[str, str]:
    """The service and the method that a call names."""
    service, _, method = details.method[1:].partition("/")
    return service, method


def _sending(context: Any) -> Send:
    write: Send = context.write
    return write


def wrapped(
    handler: Handler,
    *,
    unary: Wrap,
    stream: Wrap,
    wire: bool = False,
    sending: Callable[[Any], Send] = _sending,
) -> Handler:
    """The handler with its behaviour wrapped, by `stream` if it answers with one. With
    `wire` the behaviour gets the request's bytes, and reads them itself.

    What `stream` wraps writes its messages to the context, by what `sending` makes of it
    if it did not do so before, and gives nothing.
    """
    read = None if wire else handler.request_deserializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(
            unary(handler.unary_unary), read, handler.response_serializer
        )
    if handler.stream_unary is not None:
        return grpc.stream_unary_rpc_method_handler(
            unary(handler.stream_unary), read, handler.response_serializer
        )
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(
            stream(_writing(handler.unary_stream, sending)),
            read,
            handler.response_serializer,
        )
    own: Any = handler.stream_stream
    return grpc.stream_stream_rpc_method_handler(
        stream(_writing(own, sending)), read, handler.response_serializer
    )


class OncePerMethod(grpc.aio.ServerInterceptor):
    """Runs interceptors, the first of them the outermost, when a method is called for the
    first time, and gives later calls the handler that came of it. What they decide call by
    call they leave to the behaviour.

    Methods that nobody serves are not kept: callers may name them as they like.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> None:
        self._interceptors = tuple(interceptors)
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler with the behaviour of all of them around it."""
        method = handler_call_details.method
        kept = self._handlers.get(method)
        if kept is not None:
            return kept
        served = await continuation(handler_call_details)
        handler = await self._through(0, served, handler_call_details)
        if served is not None and handler is not None:
            self._handlers[method] = handler
        return handler

    async def _through(
        self, index: int, served: Handler | None, details: grpc.HandlerCallDetails
    ) -> Handler | None:
        if index == len(self._interceptors):
            return served

        async def inner(details: grpc.HandlerCallDetails) -> Handler | None:
            return await self._through(index + 1, served, details)

        return await self._interceptors[index].intercept_service(inner, details)


def _writing(
    behaviour: Callable[[Any, Any], Any], sending: Callable[[Any], Send]
) -> Behaviour:
    async def call(request: Any, context: Any) -> None:
        answer = behaviour(request, context)
        if isinstance(answer, AsyncIterator):
            send = sending(context)
            async for response in answer:
                await send(response)
        else:
            await answer

    return call
