"""Leaves a record of every call that changes something or gives data away, refused ones
included."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.message import Message

from exportd_server.api.interceptors.handlers import (
    Behaviour,
    Continuation,
    split,
    wrapped,
)
from exportd_server.api.interceptors.identity import known_caller
from exportd_server.errors import Code
from exportd_server.jobs import audit
from exportd_server.jobs.audit import AuditMethod, Ending
from exportd_server.jobs.audit_log import AuditLog

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

M = TypeVar("M", bound=Message)

_METHODS = {method.value: method for method in AuditMethod}


class AuditInterceptor(grpc.aio.ServerInterceptor):
    """Audits the methods of the services named that `AuditMethod` has.

    Belongs inside the interceptor that turns errors into statuses, and outside those that
    refuse callers. `noting` has the record tell what was asked for.
    """

    def __init__(self, services: frozenset[str], log: AuditLog) -> None:
        self._services = services
        self._log = log

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler with its behaviour audited."""
        handler = await continuation(handler_call_details)
        service, name = split(handler_call_details)
        method = _METHODS.get(name)
        if handler is None or method is None or service not in self._services:
            return handler

        def wrap(own: Behaviour) -> Behaviour:
            return self._audited(own, method)

        return wrapped(handler, unary=wrap, stream=wrap)

    def _audited(self, behaviour: Behaviour, method: AuditMethod) -> Behaviour:
        async def call(request: Any, context: Any) -> Any:
            peer = peer_address(context.peer())
            with self._log.auditing(method, peer, ending_of) as entry:
                try:
                    return await behaviour(request, context)
                finally:
                    if (principal := known_caller()) is not None:
                        entry.by(principal)

        return call


def ending_of(error: BaseException) -> Ending:
    """How a call ended that ended so."""
    if isinstance(error, grpc.aio.InternalError):
        # Nothing more can be sent: the caller has gone.
        return Ending(Code.CANCELLED.name)
    return audit.ending_of(error)


def peer_address(peer: str) -> str:
    """The address of gRPC's `ipv4:127.0.0.1:5` or `ipv6:%5B::1%5D:5`."""
    kind, _, address = peer.partition(":")
    address = address.replace("%5B", "[").replace("%5D", "]")
    return address if kind in {"ipv4", "ipv6"} else peer


def noting(read: Callable[[bytes], M]) -> Callable[[bytes], M]:
    """Reads requests and notes what they ask for, as far as a record may tell it."""

    def note(wire: bytes) -> M:
        request = read(wire)
        if (entry := audit.current()) is not None:
            _note(entry, request)
        return request

    return note


def _note(entry: audit.Entry, request: Any) -> None:
    known = request.DESCRIPTOR.fields_by_name
    for name in ("job_id", "delivery_id"):
        if name in known:
            setattr(entry, name, audit.uuid_or_nothing(getattr(request, name)))
    for name in ("dataset", "queue", "validate_only"):
        if name in known:
            setattr(entry, name, getattr(request, name))
    if "part_index" in known and request.HasField("part_index"):
        entry.part = request.part_index
    if "error_part_index" in known and request.HasField("error_part_index"):
        entry.error_part = request.error_part_index
    if "sinks" in known:
        entry.sinks = tuple(
            sink.name or sink.WhichOneof("kind") or "?"
            for sink in request.sinks[: audit.MOST_NAMES + 1]
        )
    elif "sink" in known and request.sink:
        entry.sinks = (request.sink,)
