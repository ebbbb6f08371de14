"""Takes up the trace that a call comes with, and gives each call a span."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from exportd_server.api.interceptors.handlers import (
    Behaviour,
    Continuation,
    code_number,
    split,
    wrapped,
)
from exportd_server.platform.tracing import (
    Kind,
    Span,
    Tracer,
    read_metadata,
)

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

_FAULTS = {
    code.value[0]: code.name
    for code in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
}
"""Statuses that OpenTelemetry's conventions have for a server's own failures. Others say
that the caller was refused, as it should be."""


class TracingInterceptor(grpc.aio.ServerInterceptor):
    """Traces the calls of the services named. Belongs outside those that refuse calls, and
    outside the one that turns errors into statuses."""

    def __init__(self, services: frozenset[str], tracer: Tracer) -> None:
        self._services = services
        self._tracer = tracer

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler with its behaviour traced."""
        handler = await continuation(handler_call_details)
        service, method = split(handler_call_details)
        if handler is None or service not in self._services:
            return handler

        def traced(behaviour: Behaviour) -> Behaviour:
            return self._traced(behaviour, service, method)

        return wrapped(handler, unary=traced, stream=traced)

    def _traced(self, behaviour: Behaviour, service: str, method: str) -> Behaviour:
        async def call(request: Any, context: Any) -> Any:
            parent = read_metadata(context.invocation_metadata())
            if parent is None and not self._tracer.enabled:
                return await behaviour(request, context)
            with self._tracer.span(
                f"{service}/{method}",
                parent=parent,
                kind=Kind.SERVER,
                attributes={
                    "rpc.system": "grpc",
                    "rpc.service": service,
                    "rpc.method": method,
                },
                # The status tells.
                expected=(Exception,),
            ) as span:
                code = grpc.StatusCode.CANCELLED.value[0]
                try:
                    answer = await behaviour(request, context)
                except grpc.aio.AbortError:
                    code = code_number(context)
                    raise
                except grpc.aio.InternalError:
                    # The caller has gone.
                    raise
                except Exception:
                    code = grpc.StatusCode.UNKNOWN.value[0]
                    raise
                else:
                    code = code_number(context)
                    return answer
                finally:
                    _tell(span, code)

        return call


def _tell(span: Span, code: int) -> None:
    span.set({"rpc.grpc.status_code": code})
    if code in _FAULTS:
        span.fail(_FAULTS[code])
