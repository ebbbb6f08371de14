"""A receiver of traces on loopback, over gRPC, that keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


@dataclass(frozen=True)
class Seen:
    """A span as it stood on the wire; ids in hexadecimal, `process` and `instance` of who
    sent it."""

    name: str
    trace: str
    span: str
    parent: str
    kind: str
    error: str
    """Empty unless it failed."""
    attributes: dict[str, Any]
    process: int
    instance: str
    service: str


@dataclass
class TraceReceiver:
    """Takes traces. While `hangs` is set it takes calls, and answers none."""

    endpoint: str = ""
    spans: list[Seen] = field(default_factory=list)
    raw: bytes = b""
    metadata: list[dict[str, str]] = field(default_factory=list)
    hangs: bool = False
    held: threading.Event = field(default_factory=threading.Event)
    """A call was taken and not answered."""
    _released: threading.Event = field(default_factory=threading.Event)

    def Export(  # noqa: N802 - the contract's name
        self, request: service.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> service.ExportTraceServiceResponse:
        if self.hangs:
            self.held.set()
            self._released.wait(120)
            context.abort(grpc.StatusCode.UNAVAILABLE, "the test is over")
        self.metadata.append({k: str(v) for k, v in context.invocation_metadata()})
        self.raw += request.SerializeToString()
        for each in request.resource_spans:
            resource = _values(each.resource.attributes)
            for scope in each.scope_spans:
                self.spans += [_seen(span, resource) for span in scope.spans]
        return service.ExportTraceServiceResponse()

    def of_trace(self, trace: str = TRACE) -> list[Seen]:
        """All spans of one trace."""
        return [span for span in list(self.spans) if span.trace == trace]

    def named(self, name: str, trace: str = TRACE) -> list[Seen]:
        """Those of one name."""
        return [span for span in self.of_trace(trace) if span.name == name]

    def release(self) -> None:
        """Let go of the calls that hang."""
        self._released.set()


@contextmanager
def trace_receiver(*, hangs: bool = False) -> Iterator[TraceReceiver]:
    """Listen while the context is open."""
    receiver = TraceReceiver(hangs=hangs)
    server = grpc.server(ThreadPoolExecutor(8))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.release()
        server.stop(0).wait()


def _seen(span: trace_pb2.Span, resource: dict[str, Any]) -> Seen:
    failed = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    return Seen(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span.status.message or "?" if failed else "",
        _values(span.attributes),
        resource["process.pid"],
        resource["service.instance.id"],
        resource["service.name"],
    )


def _values(pairs: Any) -> dict[str, Any]:
    def value(of: common_pb2.AnyValue) -> Any:
        return getattr(of, of.WhichOneof("value") or "string_value")

    return {pair.key: value(pair.value) for pair in pairs}
