"""POST requests to receivers that nobody vouches for.

HTTP/1.1, straight on an httpcore pool: there are no redirects, no cookies and no proxies
to be switched off, and a URL is sent as it was read.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import httpcore

from exportd_server.errors import DeliveryFailed
from exportd_server.platform.egress import EgressRefused, GuardedBackend
from exportd_server.sinks.webhook.url import Url

MOST_IDLE = 16
IDLE_SECONDS = 4.0
"""Less than the 5 s after which common servers close: a request that meets the closing
fails."""
ANSWER_BYTES = 64 * 1024
ANSWER_SECONDS = 2.0
"""How much of an answer's body is read, and for how long, so that the connection can be
used again. Nothing depends on what it says."""


class NotReachable(DeliveryFailed):
    """The host leads to no address that may be connected to."""

    def __init__(self) -> None:
        super().__init__(
            "the host leads to no public address; use another host, or a connection that "
            "allows its addresses",
            retryable=False,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What of an answer matters."""

    status: int
    retry_after: str | None


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Whom to trust: the authorities of the machine and of certifi, or those in a PEM
    file. Blocks. Raises `OSError`, of which `ssl.SSLError` is one."""
    if ca_file is None:
        return _public_tls_context()
    return ssl.create_default_context(cafile=ca_file)


@cache
def _public_tls_context() -> ssl.SSLContext:
    # Reading some hundred certificates takes 30 ms; all sinks share them.
    return httpcore.default_ssl_context()


class Client:
    """Keeps connections for a while. How many are used at a time is the caller's to
    bound: a limit here would let a slow receiver hold up the others."""

    def __init__(
        self,
        backend: GuardedBackend,
        tls: ssl.SSLContext,
        *,
        connect_timeout: float,
        read_timeout: float,
    ) -> None:
        """Timeouts are in seconds."""
        self._backend = backend
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=None,
            max_keepalive_connections=MOST_IDLE,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=backend,
        )

    async def post(
        self, url: Url, headers: Mapping[str, str], body: bytes | AsyncIterable[bytes]
    ) -> Answer:
        """Send one request; `headers` are all it has but `host`. Raises `DeliveryFailed`,
        and what the body raises."""
        loop = asyncio.get_running_loop()
        read = self._read_timeout
        limit = asyncio.timeout(None)
        sent = False

        async def trace(event: str, _info: Mapping[str, object]) -> None:
            nonlocal sent
            if event == "http11.send_request_body.complete":
                sent = True
            # The time of each read is limited by httpcore; a receiver that sends a byte
            # now and then is not.
            elif event == "http11.receive_response_headers.started":
                limit.reschedule(loop.time() + read)

        request = httpcore.Request(
            "POST",
            httpcore.URL(
                scheme=url.scheme.encode(),
                host=url.host.encode(),
                port=url.port,
                target=url.target.encode(),
            ),
            headers=[
                (b"host", url.authority.encode()),
                *(
                    (name.encode(), text.encode("latin-1"))
                    for name, text in headers.items()
                ),
            ],
            content=body,
            extensions={
                "timeout": {"connect": self._connect_timeout, "read": read, "write": read},
                "trace": trace,
            },
        )
        try:
            async with limit:
                response = await self._pool.handle_async_request(request)
        except TimeoutError as error:
            if not limit.expired():  # then it is the body's own
                raise
            raise _failure("did not answer in time") from error
        except _FAILURES as error:
            raise _told(error) from error
        try:
            await _drain(response)
        finally:
            await response.aclose()
        # A connection that breaks while the body is sent may still bring an answer.
        if not sent and 200 <= response.status < 300:
            raise _failure("answered before it had the whole request")
        return Answer(response.status, _header(response, b"retry-after"))

    async def reach(self, url: Url) -> None:
        """Connect as for a request, and send none. Raises `DeliveryFailed`."""
        try:
            stream = await self._backend.connect_tcp(
                url.host, url.port, self._connect_timeout
            )
            try:
                if url.scheme == "https":
                    stream = await stream.start_tls(
                        self._tls, url.host, self._connect_timeout
                    )
            finally:
                await stream.aclose()
        except _FAILURES as error:
            raise _told(error) from error

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


# A TLS alert that comes after the handshake is raised as it is.
_FAILURES = (
    EgressRefused,
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.RemoteProtocolError,
    ssl.SSLError,
)


def _failure(text: str) -> DeliveryFailed:
    return DeliveryFailed(f"the receiver {text}", retryable=True)


def _told(error: Exception) -> DeliveryFailed:
    """What a caller is told of a failure: nothing of addresses, nothing of what libraries
    say. All may pass, but for a refusal: certificates get mended, too."""
    match error:
        case EgressRefused():
            return NotReachable()
        case httpcore.ConnectTimeout():
            return _failure("could not be connected to in time")
        case httpcore.WriteTimeout():
            return _failure("took nothing of the request for too long")
        case httpcore.TimeoutException():
            return _failure("did not answer in time")
        case httpcore.ConnectError(args=(ssl.SSLCertVerificationError(), *_)):
            return _failure("has a TLS certificate that is not trusted for its host")
        case httpcore.ConnectError(args=(ssl.SSLError(), *_)):
            return _failure("could not agree on TLS")
        case httpcore.ConnectError():
            return _failure("could not be connected to")
        case httpcore.RemoteProtocolError():
            return _failure("gave no valid HTTP answer")
        case _:
            return _failure("broke the connection off before it answered")


def _header(response: httpcore.Response, name: bytes) -> str | None:
    for key, value in response.headers:
        if key.lower() == name:
            return value.decode("latin-1")
    return None


async def _drain(response: httpcore.Response) -> None:
    """Read a short body to its end, and leave a long, slow or broken one: the status has
    said all."""
    left = ANSWER_BYTES
    with suppress(TimeoutError, *_FAILURES):
        async with asyncio.timeout(ANSWER_SECONDS):
            async for piece in response.aiter_stream():
                left -= len(piece)
                if left < 0:
                    return
