"""What every interceptor of ours does with a method: put behaviour around its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

Behaviour = Callable[[Any, Any], Any]
Wrap = Callable[[Behaviour], Behaviour]


def wrapped(handler: Handler, *, unary: Wrap, stream: Wrap, wire: bool = False) -> Handler:
    """The handler with its behaviour wrapped, by `stream` if it answers with one. With
    `wire` the behaviour gets the request's bytes, and reads them itself."""
    read = None if wire else handler.request_deserializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(
            unary(handler.unary_unary), read, handler.response_serializer
        )
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(
            stream(handler.unary_stream), read, handler.response_serializer
        )
    raise RuntimeError("a method streams requests, which nothing here wraps")
