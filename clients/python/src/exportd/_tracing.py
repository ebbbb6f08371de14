"""The trace that calls belong to, where the caller's program has OpenTelemetry."""

from __future__ import annotations

import sys
from contextlib import suppress

Metadata = tuple[tuple[str, str], ...]


def current_trace() -> Metadata:
    """`traceparent` and `tracestate` of the span that is current; nothing without one.

    A program that has a span has loaded the library by itself, so that others neither need
    it nor wait for it.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    headers: dict[str, str] = {}
    # A library that is half there, of another version or itself broken fails no call.
    with suppress(Exception):
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - see above
            TraceContextTextMapPropagator,
        )

        TraceContextTextMapPropagator().inject(headers)
    return tuple(headers.items())
