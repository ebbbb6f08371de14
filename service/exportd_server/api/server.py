"""The gRPC server: the service, health and reflection, with the limits they run under."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf import message_factory
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from exportd.v1 import export_service_pb2
from exportd_server.api.interceptors.errors import ErrorInterceptor
from exportd_server.api.reflection import add_reflection
from exportd_server.api.servicer import ExportService

SERVICE = export_service_pb2.DESCRIPTOR.services_by_name["ExportService"]
MAX_REQUEST_BYTES = 4 * 2**20
_LAST_WORDS = 0.5
"""Seconds in which answers that were given are sent, when nothing else is left."""

_RAW_RESPONSES = frozenset({"StreamDownload"})
"""Methods that send finished wire bytes."""

OPTIONS: tuple[tuple[str, int], ...] = (
    # Two servers on one port would each get some of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 1000),
    # A client that is gone without a word is noticed within a minute and a half.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A client may ping every 20 s, with or without a call under way.
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class GrpcServer:
    """A server that can be started and stopped once."""

    def __init__(self, service: ExportService) -> None:
        interceptor = ErrorInterceptor(frozenset({SERVICE.full_name}))
        self._active = interceptor.active
        self._server = grpc.aio.server(interceptors=(interceptor,), options=OPTIONS)
        self._server.add_generic_rpc_handlers((_handlers(service),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_reflection(self._server, (SERVICE.full_name, health.SERVICE_NAME))

    async def start(self, address: str) -> int:
        """Listen on `host:port`; returns the port. Raises `OSError` when it is taken."""
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error
        await self._server.start()
        for name in ("", SERVICE.full_name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def announce_shutdown(self) -> None:
        """Turn health to NOT_SERVING, for load balancers to look elsewhere."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Refuse new calls; those under way have `grace` seconds to end."""
        stopping = asyncio.create_task(self._server.stop(grace))
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._active.none()
                # Those who watch health would stay until the end of the grace.
                await self._server.stop(_LAST_WORDS)
        await stopping


def _handlers(service: ExportService) -> grpc.GenericRpcHandler:
    """A handler for each method of the contract, found by its name."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in SERVICE.methods:
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        serializer = (
            None if method.name in _RAW_RESPONSES else response_class.SerializeToString
        )
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            getattr(service, method.name), request_class.FromString, serializer
        )
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)
