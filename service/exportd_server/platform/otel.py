"""Traces by OpenTelemetry, sent by OTLP over gRPC. The only module that knows it; it needs
the extra `tracing`, and raises `ModuleNotFoundError` without."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from types import MappingProxyType
from uuid import uuid4

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from exportd_server.errors import ExportdError
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.platform.tracing import (
    Attributes,
    Kind,
    Span,
    TraceContext,
    current,
    within,
)

_NONE: Attributes = MappingProxyType({})
_KINDS = MappingProxyType(
    {
        Kind.INTERNAL: SpanKind.INTERNAL,
        Kind.SERVER: SpanKind.SERVER,
        Kind.CLIENT: SpanKind.CLIENT,
    }
)
_QUEUE = 2048
"""Spans that wait to be sent; of more the oldest are dropped."""
_CALL_SECONDS = 10.0
"""Longest that sending some of them may take, tries included."""
_LAST_SECONDS = 0.5
"""In which the thread that sends comes to its end once it was cut off."""


class OtelTracer:
    """See `Tracer`. `endpoint` is a URL of http or https; of spans without a parent
    `sample_ratio` (0 to 1) are recorded, of others those whose parent is."""

    enabled = True

    def __init__(
        self, endpoint: str, sample_ratio: float, headers: Mapping[str, str]
    ) -> None:
        self._exporter = _exporter(endpoint, headers)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create(
                {
                    "service.name": "exportd",
                    "service.version": version("exportd-server"),
                    "service.instance.id": str(uuid4()),
                    "host.name": socket.gethostname(),
                    "process.pid": os.getpid(),
                }
            ),
            # `close` does that, and within its time.
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, max_queue_size=_QUEUE)
        )
        self._tracer = self._provider.get_tracer("exportd")

    @contextmanager
    def span(
        self,
        name: str,
        *,
        parent: TraceContext | None = None,
        kind: Kind = Kind.INTERNAL,
        attributes: Attributes = _NONE,
        expected: tuple[type[BaseException], ...] = (),
    ) -> Iterator[Span]:
        """See `Tracer`."""
        span = self._tracer.start_span(
            name,
            context=_parent(parent or current().context),
            kind=_KINDS[kind],
            attributes=attributes,
        )
        own = _Recorded(span)
        try:
            with within(own):
                yield own
        except BaseException as error:
            if not isinstance(error, (*expected, asyncio.CancelledError)):
                own.fail(_reason(error))
            raise
        finally:
            span.end()

    async def close(self, seconds: float) -> None:
        """See `Tracer`."""
        closing = in_daemon_thread(self._provider.shutdown, "traces")
        await asyncio.wait({closing}, timeout=seconds)
        if not closing.done():
            self._exporter.shutdown()
            await asyncio.wait({closing}, timeout=_LAST_SECONDS)


class _Recorded:
    """See `Span`."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        found = span.get_span_context()
        self._context = TraceContext(
            trace.format_trace_id(found.trace_id),
            trace.format_span_id(found.span_id),
            int(found.trace_flags),
            found.trace_state.to_header(),
        )

    @property
    def context(self) -> TraceContext:
        """See `Span`."""
        return self._context

    def set(self, attributes: Attributes) -> None:
        """See `Span`."""
        self._span.set_attributes(attributes)

    def fail(self, reason: str) -> None:
        """See `Span`."""
        self._span.set_attribute("error.type", reason)
        self._span.set_status(Status(StatusCode.ERROR, reason))


def takes_traces(endpoint: str, headers: Mapping[str, str]) -> bool:
    """Whether there is somebody who takes traces; blocks."""
    exporter = _exporter(endpoint, headers)
    try:
        return exporter.export(()) is SpanExportResult.SUCCESS
    finally:
        exporter.shutdown()


def _exporter(endpoint: str, headers: Mapping[str, str]) -> OTLPSpanExporter:
    return OTLPSpanExporter(
        endpoint=endpoint,
        insecure=endpoint.startswith("http://"),
        headers=dict(headers),
        timeout=_CALL_SECONDS,
    )


def _parent(context: TraceContext | None) -> Context:
    # Never the library's own current span, which is another one's.
    if context is None:
        return Context()
    remote = SpanContext(
        trace_id=int(context.trace_id, 16),
        span_id=int(context.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(context.flags),
        trace_state=TraceState.from_header([context.state] if context.state else []),
    )
    return trace.set_span_in_context(NonRecordingSpan(remote), Context())


def _reason(error: BaseException) -> str:
    """What may be told of it: texts may hold values of rows."""
    if isinstance(error, ExportdError):
        return error.reason.value
    return type(error).__name__
