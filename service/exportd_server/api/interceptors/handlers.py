"""What every interceptor of ours does with a method: put behaviour around its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]
Behaviour = Callable[[Any, Any], Awaitable[Any]]
Wrap = Callable[[Behaviour], Behaviour]
Write = Callable[[Any, Any], Awaitable[None]]


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


async def _write(context: Any, response: Any) -> None:
    await context.write(response)


def wrapped(
    handler: Handler,
    *,
    unary: Wrap,
    stream: Wrap,
    wire: bool = False,
    write: Write = _write,
) -> Handler:
    """The handler with its behaviour wrapped, by `stream` if it answers with one. With
    `wire` the behaviour gets the request's bytes, and reads them itself.

    What `stream` wraps writes its messages to the context, by `write` if it did not do so
    before, and gives nothing.
    """
    read = None if wire else handler.request_deserializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(
            unary(handler.unary_unary), read, handler.response_serializer
        )
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(
            stream(_writing(handler.unary_stream, write)), read, handler.response_serializer
        )
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(
            stream(_writing(handler.stream_stream, write)),
            read,
            handler.response_serializer,
        )
    raise RuntimeError("a method streams requests to one answer, which nothing here wraps")


def _writing(behaviour: Callable[[Any, Any], Any], write: Write) -> Behaviour:
    async def call(request: Any, context: Any) -> None:
        answer = behaviour(request, context)
        if isinstance(answer, AsyncIterator):
            async for response in answer:
                await write(context, response)
        else:
            await answer

    return call
