"""Leaves a record of every request for a download by URL."""

from __future__ import annotations

from http import HTTPStatus
from types import MappingProxyType

from aiohttp import web
from aiohttp.typedefs import Handler

from exportd_server.api.http import Refusal
from exportd_server.api.urls import DOWNLOAD_PATH
from exportd_server.errors import TABLE, Code, ErrorReason
from exportd_server.jobs import audit
from exportd_server.jobs.audit import AuditMethod, Ending
from exportd_server.jobs.audit_log import AuditLog

_CODES = MappingProxyType(
    {
        HTTPStatus.FORBIDDEN: Code.PERMISSION_DENIED,
        HTTPStatus.NOT_FOUND: Code.NOT_FOUND,
        HTTPStatus.GONE: Code.NOT_FOUND,
        HTTPStatus.PRECONDITION_FAILED: Code.FAILED_PRECONDITION,
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: Code.OUT_OF_RANGE,
    }
)
"""Of refusals whose reason is none of the contract's; all others: INTERNAL."""


class HttpAudit:
    """Audits the requests below the path of download URLs. Belongs inside what turns
    errors into answers."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    def add_to(self, app: web.Application) -> None:
        """Audit what the application serves."""
        app.middlewares.append(self._handle)

    @web.middleware
    async def _handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if resource is None or not resource.canonical.startswith(f"{DOWNLOAD_PATH}/"):
            return await handler(request)
        with self._log.auditing(AuditMethod.DOWNLOAD_BY_URL, peer_of(request), ending_of):
            return await handler(request)


def ending_of(error: BaseException) -> Ending:
    """How a request ended that ended so."""
    if isinstance(error, Refusal):
        if error.reason in ErrorReason.__members__:
            return Ending(TABLE[ErrorReason(error.reason)].code.name, str(error.reason))
        return Ending(_CODES.get(error.status, Code.INTERNAL).name, str(error.reason))
    if isinstance(error, ConnectionError):
        # The client has gone, or its connection had to be cut: it took nothing, say.
        return Ending(Code.CANCELLED.name, str(getattr(error, "reason", "CLIENT_GONE")))
    return audit.ending_of(error)


def peer_of(request: web.Request) -> str:
    """The address that a request came from; empty when it is not known."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if not isinstance(peer, tuple):
        return ""
    host, port = peer[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
