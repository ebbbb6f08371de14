"""The gRPC server: the service, health and reflection, with the limits they run under."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf import message_factory
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from exportd.v1 import export_service_pb2
from exportd_server.api.accepting import accept_any_path, start
from exportd_server.api.interceptors.audit import AuditInterceptor, noting
from exportd_server.api.interceptors.draining import DrainInterceptor
from exportd_server.api.interceptors.errors import ErrorInterceptor
from exportd_server.api.interceptors.handlers import OncePerMethod
from exportd_server.api.interceptors.identity import IdentityInterceptor
from exportd_server.api.interceptors.limits import (
    CapacityInterceptor,
    TenantsInterceptor,
)
from exportd_server.api.interceptors.metrics import MethodDescription, MetricsInterceptor
from exportd_server.api.interceptors.open_streams import OpenStreamsInterceptor
from exportd_server.api.interceptors.tracing import TracingInterceptor
from exportd_server.api.limits import CallerLimits
from exportd_server.api.reflection import V1_SERVICE, V1ALPHA_SERVICE, add_reflection
from exportd_server.api.servicer import ExportService
from exportd_server.identity.authenticator import Authenticator
from exportd_server.jobs.audit_log import AuditLog
from exportd_server.platform.tracing import NO_TRACER, Tracer

log = structlog.get_logger(__name__)

SERVICE = export_service_pb2.DESCRIPTOR.services_by_name["ExportService"]
_HANDSHAKE_MS = 10_000
"""In which a new connection must have made TLS and HTTP/2 ready."""
_LAST_CALLS = 2.0
"""Seconds in which new calls are refused one by one, while they come, before the
connections are closed."""
_LAST_WORDS = 0.5
"""Seconds in which answers that were given are sent, when nothing else is left."""
_LAST_CHANGES = 5.0
"""Seconds in which changes end whose callers were cut off, and which go on all the same."""

_RAW_RESPONSES = frozenset({"StreamDownload"})
"""Methods that send finished wire bytes."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What connections and calls are held to, of whoever they are. Sizes in bytes, times
    in seconds, None: no bound."""

    max_calls: int = 4000
    max_connections: int = 1000
    max_request_bytes: int = 2**20
    request_timeout: float = 10.0
    max_open_seconds: float = 300.0
    max_streams_per_connection: int = 250
    ping_interval: float = 60.0
    ping_timeout: float = 20.0
    min_ping_interval: float = 20.0
    max_ping_strikes: int = 2
    max_idle: float = 900.0
    max_age: float | None = None

    def options(self) -> list[tuple[str, int]]:
        """The same in the library's words."""
        options = [
            # Two servers on one port would each get some of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_request_bytes),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.max_concurrent_streams", self.max_streams_per_connection),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
            # A client that is gone without a word is noticed.
            ("grpc.keepalive_time_ms", _milliseconds(self.ping_interval)),
            ("grpc.keepalive_timeout_ms", _milliseconds(self.ping_timeout)),
            ("grpc.http2.ping_timeout_ms", _milliseconds(self.ping_timeout)),
            # A client may ping with or without a call under way.
            ("grpc.keepalive_permit_without_calls", 1),
            (
                "grpc.http2.min_ping_interval_without_data_ms",
                _milliseconds(self.min_ping_interval),
            ),
            ("grpc.http2.max_ping_strikes", self.max_ping_strikes),
            ("grpc.max_connection_idle_ms", _milliseconds(self.max_idle)),
        ]
        if self.max_age is not None:
            options.append(("grpc.max_connection_age_ms", _milliseconds(self.max_age)))
        return options


def _milliseconds(seconds: float) -> int:
    return min(2**31 - 1, max(1, round(1000 * seconds)))


class GrpcServer:
    """A server that can be started and stopped once."""

    def __init__(
        self,
        service: ExportService,
        authenticator: Authenticator,
        limits: ServerLimits,
        caller_limits: CallerLimits,
        audit: AuditLog,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        services = frozenset({SERVICE.full_name})
        errors = ErrorInterceptor(services)
        self._active = errors.active
        self._drain = DrainInterceptor(services)
        self.lost = False
        """Whether it has ended without being stopped."""
        self._stopping = False
        self._watching: asyncio.Task[None] | None = None
        accept_any_path()
        self._server = grpc.aio.server(
            interceptors=(
                OncePerMethod(
                    (
                        MetricsInterceptor(_measured()),
                        TracingInterceptor(services, tracer),
                        self._drain,
                        CapacityInterceptor(
                            services, limits.max_calls, limits.request_timeout
                        ),
                        OpenStreamsInterceptor(
                            services, limits.max_calls // 10, limits.max_open_seconds
                        ),
                        errors,
                        AuditInterceptor(services, audit),
                        IdentityInterceptor(services, authenticator, caller_limits.rates),
                        TenantsInterceptor(services, caller_limits),
                    )
                ),
            ),
            options=limits.options(),
        )
        self._server.add_generic_rpc_handlers((_handlers(service),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_reflection(self._server, (SERVICE.full_name, health.SERVICE_NAME))

    def listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Take `host:port`, for plain text without credentials; returns the port. Raises
        `OSError` when it is taken."""
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error

    async def start(self, on_lost: Callable[[], object]) -> None:
        """Answer calls. `on_lost` is called when there is an end to it before `stop`."""
        accepting = await start(self._server)
        if accepting is None:
            log.warning("an end of the gRPC server will not be noticed")
        else:
            self._watching = asyncio.create_task(self._watch(accepting, on_lost))
        for name in ("", SERVICE.full_name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def announce_shutdown(self) -> None:
        """Turn health to NOT_SERVING, for load balancers to look elsewhere."""
        await self._health.enter_graceful_shutdown()

    async def _watch(
        self, accepting: asyncio.Task[Any], on_lost: Callable[[], object]
    ) -> None:
        # The library tells of an end only when all calls have ended, too.
        await asyncio.wait({accepting})
        if not self._stopping:
            error = None if accepting.cancelled() else accepting.exception()
            log.critical("the gRPC server has ended by itself", exc_info=error)
            self.lost = True
            on_lost()

    async def stop(self, grace: float) -> None:
        """Refuse new calls; those under way have `grace` seconds to end. Of those that are
        cut then, changes that have begun are waited for."""
        self._stopping = True
        if self.lost:
            grace = 0.0  # no call can be answered
        end = asyncio.get_running_loop().time() + grace
        with suppress(TimeoutError):
            async with asyncio.timeout(min(grace, _LAST_CALLS)):
                await self._drain.refuse()
        left = max(0.0, end - asyncio.get_running_loop().time())
        stopping = asyncio.create_task(self._server.stop(left))
        with suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                await self._active.none()
                # Those who watch health would stay until the end of the grace.
                await self._server.stop(_LAST_WORDS)
        await stopping
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_CHANGES):
                await self._active.none()


def _measured() -> Iterator[tuple[str, Iterable[MethodDescription]]]:
    """The services that are served, by name, and their methods."""
    yield SERVICE.full_name, SERVICE.methods
    yield health.SERVICE_NAME, _methods(health_pb2, "Health")
    for name in (V1_SERVICE, V1ALPHA_SERVICE):
        yield name, _methods(reflection_pb2, "ServerReflection")


def _methods(module: Any, service: str) -> Iterable[MethodDescription]:
    methods: Iterable[MethodDescription] = module.DESCRIPTOR.services_by_name[
        service
    ].methods
    return methods


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
            getattr(service, method.name), noting(request_class.FromString), serializer
        )
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)
