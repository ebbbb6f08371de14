"""The service's HTTP port: limits, errors, the log and the end. What it serves is added by
functions that take the application."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler

from exportd_server.api.interceptors.errors import ActiveCalls
from exportd_server.errors import Code, ErrorReason, ExportdError, QuotaExceeded

log = structlog.get_logger(__name__)

AddRoutes = Callable[[web.Application], None]

_FIRST_REQUEST = 10.0
"""Seconds in which a new connection must have sent a request."""
_KEEP_ALIVE = 75.0
_RETRY_AFTER = 2
"""Seconds until a connection too many is to come back."""
_LAST_WORDS = 1.0
"""Seconds in which connections close once nothing is under way."""
_LIMITS: Mapping[str, Any] = {
    # Its lines would tell paths, which hold tokens.
    "access_log": None,
    "max_line_size": 4096,
    "max_field_size": 4096,
    "max_headers": 64,
    "keepalive_timeout": _KEEP_ALIVE,
    # Nothing here takes a body, so none is waited for.
    "lingering_time": 0.0,
    "read_bufsize": 16 * 1024,
}
_WITH_COOKIES: Mapping[str, Any] = {
    # A browser sends those of every port of a host, such as localhost, in one line.
    "max_field_size": 16 * 1024
}
_MOST_BODY = 1024
_HEADERS: Mapping[str, str] = {
    "Server": "exportd",
    "X-Content-Type-Options": "nosniff",
    # URLs are secrets here, and must not go to whoever is linked to.
    "Referrer-Policy": "no-referrer",
}
_STATUS = {
    Code.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.FAILED_PRECONDITION: HTTPStatus.CONFLICT,
    Code.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    Code.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
}
"""All others: 500."""

ABOUT: web.RequestKey[dict[str, object]] = web.RequestKey("about", dict)
"""What a handler wants to have logged with its request."""


class Refusal(Exception):
    """Answers a request with an error that the caller may read."""

    def __init__(
        self,
        status: HTTPStatus,
        reason: str,
        message: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: ExportdError, status: HTTPStatus | None = None) -> Refusal:
        """The same in HTTP."""
        status = status or _STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
        again = None
        if isinstance(error, QuotaExceeded):
            again = {"Retry-After": str(math.ceil(error.retry_after.total_seconds()))}
        elif status is HTTPStatus.SERVICE_UNAVAILABLE:
            again = {"Retry-After": "1"}
        return cls(status, error.reason, error.message, again)


class BrokenOff(ConnectionError):
    """An answer that has begun cannot be completed. The connection is cut, from which the
    client knows; `reason` goes to the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class HttpServer:
    """A server that can be started and stopped once."""

    def __init__(
        self, *add_routes: AddRoutes, max_connections: int = 1000, max_form: int = 0
    ) -> None:
        """`max_form`: bytes of the forms that are taken, and with them cookies."""
        guard = _Guard()
        self._open: set[RequestHandler] = set()
        self._max_connections = max_connections
        self._limits = {**_LIMITS, **(_WITH_COOKIES if max_form else {})}
        self._active = guard.active
        self._answering = guard.answering
        self._silent = guard.silent
        app = web.Application(
            middlewares=[guard.handle], client_max_size=max(max_form, _MOST_BODY)
        )
        app.on_response_prepare.append(_add_headers)
        for add in add_routes:
            add(app)
        self._runner = web.AppRunner(app, shutdown_timeout=_LAST_WORDS)
        self._logger = _library_logger()
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises `OSError` when it is taken."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            if host == "::":
                # By itself the loop would leave IPv4 out.
                both = socket.create_server(
                    (host, port),
                    family=socket.AF_INET6,
                    dualstack_ipv6=socket.has_dualstack_ipv6(),
                )
                self._listener = await loop.create_server(self._connection, sock=both)
            else:
                self._listener = await loop.create_server(self._connection, host, port)
        except OSError:
            await self._runner.cleanup()
            raise
        return int(self._listener.sockets[0].getsockname()[1])

    async def stop(self, grace: float) -> None:
        """Take no more requests; those under way have `grace` seconds. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.close()
        try:
            async with asyncio.timeout(grace):
                await self._active.none()
        except TimeoutError:
            for task in tuple(self._answering):
                task.cancel()
            await self._active.none()
        await self._runner.cleanup()

    def _connection(self) -> asyncio.Protocol:
        assert self._runner.server is not None  # noqa: S101 - set up before it listens
        loop = asyncio.get_running_loop()
        if len(self._open) >= self._max_connections:
            return _Refused()
        protocol = _Connection(
            self._runner.server,
            loop=loop,
            logger=self._logger,
            opened=self._open,
            **self._limits,
        )
        self._silent.add(protocol)
        loop.call_later(_FIRST_REQUEST, self._drop_silent, protocol)
        return protocol

    def _drop_silent(self, protocol: RequestHandler) -> None:
        # The library waits for a first request for ever.
        if protocol in self._silent:
            self._silent.discard(protocol)
            protocol.force_close()


class _Connection(RequestHandler):
    """One connection, whose requests that are none get the same kind of answer. It is
    in `opened` for as long as it is there."""

    __slots__ = ("_opened",)

    def __init__(self, *args: Any, opened: set[RequestHandler], **options: Any) -> None:
        super().__init__(*args, **options)
        self._opened = opened
        opened.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is there no more."""
        self._opened.discard(self)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - it would echo the request
    ) -> web.StreamResponse:
        """Answer what did not come as far as `_Guard`."""
        if isinstance(exc, ConnectionError) or request.writer.output_size:
            raise BrokenOff(ErrorReason.INTERNAL)
        self.log_exception("", exc_info=exc)
        response = _answer(_plain(HTTPStatus(status)))
        response.headers.update(_HEADERS)
        response.force_close()
        return response


class _Refused(asyncio.Protocol):
    """A connection too many: it is told so and closed, whatever it sends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Tell it."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP's
        refusal = Refusal(
            HTTPStatus.SERVICE_UNAVAILABLE,
            ErrorReason.QUOTA_EXCEEDED,
            "this server has as many connections as it takes; try again",
        )
        body = json.dumps({"reason": refusal.reason, "message": refusal.message})
        head = (
            "HTTP/1.1 503 Service Unavailable",
            "Content-Type: application/json; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            f"Retry-After: {_RETRY_AFTER}",
            "Connection: close",
            *(f"{name}: {value}" for name, value in _HEADERS.items()),
        )
        transport.write("\r\n".join((*head, "", body)).encode())
        transport.close()


class _Guard:
    """Wraps every request."""

    def __init__(self) -> None:
        self.active = ActiveCalls()
        self.answering: set[asyncio.Task[object]] = set()
        self.silent: set[RequestHandler] = set()
        """New connections that have not sent a request."""

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request, whatever happens."""
        started = time.monotonic()
        self.silent.discard(request.protocol)
        request[ABOUT] = {}
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is a coroutine
        self.answering.add(task)
        try:
            with self.active:
                response = await handler(request)
        except asyncio.CancelledError:
            _cut(request)
            _log(request, started, "cut")
            raise
        except ConnectionError as error:
            # The client has gone, or is to believe that we have.
            _cut(request)
            _log(request, started, "cut", getattr(error, "reason", "CLIENT_GONE"))
            raise
        except Exception as error:  # noqa: BLE001 - every error becomes an answer
            refusal = refusal_of(error, request)
            if request.writer.output_size:
                _cut(request)
                _log(request, started, "cut", refusal.reason)
                raise BrokenOff(refusal.reason) from None
            _log(request, started, refusal.status, refusal.reason)
            return _answer(refusal)
        finally:
            self.answering.discard(task)
        _log(request, started, response.status)
        return response


def refusal_of(error: Exception, request: web.Request) -> Refusal:
    """What a caller may read of an error; one that nobody foresaw goes to the log."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ExportdError):
        return Refusal.of(error)
    if isinstance(error, web.HTTPException):
        # The router's own: no such path, no such method.
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return _plain(HTTPStatus(error.status), allow)
    reference = secrets.token_hex(6)
    log.error("unforeseen error", reference=reference, path=_path(request), exc_info=error)
    return Refusal(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        ErrorReason.INTERNAL,
        f"internal error; the operator finds it by reference {reference}",
    )


def _plain(status: HTTPStatus, headers: Mapping[str, str] | None = None) -> Refusal:
    return Refusal(status, status.name, status.phrase.lower(), headers)


def _answer(refusal: Refusal) -> web.Response:
    return web.json_response(
        {"reason": refusal.reason, "message": refusal.message},
        status=refusal.status,
        headers={"Cache-Control": "no-store", **refusal.headers},
    )


def _cut(request: web.Request) -> None:
    """Drop the connection and what waits to be sent on it."""
    if request.transport is not None:
        request.transport.abort()


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _path(request: web.Request) -> str:
    """The path without what stands for the variable pieces: tokens are secret."""
    resource = request.match_info.route.resource
    return "none" if resource is None else resource.canonical


def _log(
    request: web.Request, started: float, status: int | str, reason: str | None = None
) -> None:
    level = log.warning if status == HTTPStatus.INTERNAL_SERVER_ERROR else log.debug
    level(
        "request",
        method=request.method,
        path=_path(request),
        status=int(status) if isinstance(status, int) else status,
        reason=reason,
        milliseconds=round(1000 * (time.monotonic() - started), 1),
        **request[ABOUT],
    )


class _FromLibrary(logging.Handler):
    """Logs what the library could not make sense of: its bugs and ours, and requests that
    are none, but not their text."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log it our way."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | None):
            log.debug("no request", kind=type(error).__name__)
        else:
            log.error("a request went wrong", exc_info=error)


def _library_logger() -> logging.Logger:
    logger = logging.Logger("http")  # noqa: LOG001 - the library's, and nobody else's
    logger.addHandler(_FromLibrary())
    return logger
