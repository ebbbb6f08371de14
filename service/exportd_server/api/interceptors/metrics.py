"""Counts and times every call, streams to their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from exportd_server.api.interceptors.handlers import (
    Behaviour,
    Continuation,
    code_number,
    wrapped,
)
from exportd_server.platform import metrics_service as metrics

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

_NAMES = MappingProxyType(
    {code.value[0]: code.name.title().replace("_", "") for code in grpc.StatusCode}
    # As Go spells them.
    | {grpc.StatusCode.OK.value[0]: "OK", grpc.StatusCode.CANCELLED.value[0]: "Canceled"}
)
"""Codes by their number, with the names that go-grpc-prometheus gives them."""
_UNKNOWN = "unknown"
_TYPES = MappingProxyType(
    {
        (False, False): "unary",
        (False, True): "server_stream",
        (True, False): "client_stream",
        (True, True): "bidi_stream",
    }
)


class MethodDescription(Protocol):
    """A method of a service's descriptor."""

    name: str
    client_streaming: bool
    server_streaming: bool


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts the calls of the methods given, by full service name. All others, which
    callers may name as they like, are one. Belongs outside all other interceptors, for
    what those refuse are calls as well."""

    def __init__(self, services: Iterable[tuple[str, Iterable[MethodDescription]]]) -> None:
        self._methods = {
            f"/{service}/{method.name}": _Method(
                _TYPES[method.client_streaming, method.server_streaming],
                service,
                method.name,
            )
            for service, methods in services
            for method in methods
        }
        self._unknown = _Method("unary", _UNKNOWN, _UNKNOWN)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler with its behaviour measured."""
        handler = await continuation(handler_call_details)
        method = self._methods.get(handler_call_details.method, self._unknown)
        if handler is None:
            method.unserved()
            return None
        return wrapped(handler, unary=method.measured, stream=method.measured)


class _Method:
    """The series of one method, made from the start."""

    def __init__(self, kind: str, service: str, name: str) -> None:
        labels = (kind, service, name)
        self._started = metrics.started.labels(*labels)
        self._seconds = metrics.handling_seconds.labels(*labels)
        self._handled = {
            code: metrics.handled.labels(*labels, code_name)
            for code, code_name in _NAMES.items()
        }

    def unserved(self) -> None:
        """A call that the library answers."""
        self._started.inc()
        self._handled[grpc.StatusCode.UNIMPLEMENTED.value[0]].inc()

    def measured(self, behaviour: Behaviour) -> Behaviour:
        """The behaviour, measured."""

        async def call(request: Any, context: Any) -> Any:
            self._started.inc()
            begun = time.perf_counter()
            code = grpc.StatusCode.UNKNOWN.value[0]
            try:
                answer = await behaviour(request, context)
            except (asyncio.CancelledError, grpc.aio.InternalError):
                # The caller has gone.
                code = grpc.StatusCode.CANCELLED.value[0]
                raise
            except grpc.aio.AbortError:
                code = code_number(context)
                raise
            else:
                code = code_number(context)
                return answer
            finally:
                self._seconds.observe(time.perf_counter() - begun)
                self._handled[code].inc()

        return call
