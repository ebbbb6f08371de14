"""How the client reaches a server: address, security, time limits, retries."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import resources
from pathlib import Path

import grpc
import grpc.aio

from exportd._tracing import Metadata, current_trace
from exportd.errors import ExportdError, InvalidRequest, QuotaExceeded, Unavailable

DEFAULT_ADDRESS = "localhost:50051"

SERVICE_CONFIG = resources.files("exportd").joinpath("service_config.json").read_text()
"""Retries of the methods that are safe to repeat, for those who use the stubs alone: give
it as the channel option `grpc.service_config`. `Client` has retries of its own, which
know of `CreateExport`'s `request_id` and of what the server asks for."""

OptionValue = int | str | bool

_OPTIONS: Mapping[str, OptionValue] = {
    # A download carries up to 2 MiB a message, a page of 1 000 jobs can be larger.
    "grpc.max_receive_message_length": 16 * 1024 * 1024,
    # Each channel gets connections of its own: parallel ranges would otherwise all
    # share one TCP connection.
    "grpc.use_local_subchannel_pool": 1,
    # Notice a peer that vanished without a word. Pings go out only while a call is
    # open, and rarely enough for a server with gRPC's default ping policy.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 0,
    # gRPC would wait a second before it dials again; the client's own retries are
    # sooner than that and would only hear the old failure repeated.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2_000,
}

_PRINTABLE = re.compile(r"[!-~]+")

_LOOPBACK = re.compile(
    r"(dns:///|ipv4:|ipv6:)?(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?|unix:.*"
)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently a call is tried again.

    Only calls that are safe to repeat are: reads, cancel, delete, and CreateExport,
    which carries a `request_id`. Attempt n waits `initial * 2**(n-1)` seconds, at most
    `maximum`, of which up to half is left to chance so that clients do not march in step.
    """

    attempts: int = 9
    initial: float = 0.1
    maximum: float = 5.0

    def delay(self, failures: int, retry_after: timedelta | None = None) -> float:
        """Seconds to wait after this many failures in a row. What the server asked for
        counts, as far as `maximum` goes."""
        exponent = min(max(failures - 1, 0), 30)
        delay = min(self.maximum, self.initial * float(2**exponent))
        delay *= 1 - random.random() / 2  # noqa: S311 - spreads load, guards nothing
        if retry_after is not None:
            delay = max(delay, min(self.maximum, retry_after.total_seconds()))
        return delay


@dataclass(frozen=True, slots=True)
class Connection:
    """Everything needed to open a channel; shared by both clients.

    Attributes:
        address: `host:port`, or any gRPC target.
        tls: False for plain text, True for TLS with the system's roots, or credentials.
        token: Sent as `authorization: Bearer <token>` with every call.
        timeout: Seconds that a call may take, its retries included.
        retry: For single calls. The default rides out a restart of 5 seconds, and tells
            of a server that is down after 8 to 16.
        stream_retry: For watching and downloading: attempts in a row that bring nothing
            new. The default rides out a restart of some 20 seconds.
        stall_timeout: Seconds without a message after which a download is resumed on a
            new stream.
        options: gRPC channel options that are added to the client's own, or replace
            them.
        allow_plaintext_token: Send the token without TLS to other machines, too, where
            everybody on the way can read it.
        own_metadata: Asked at each call for metadata that goes with it.
    """

    address: str = DEFAULT_ADDRESS
    tls: bool | grpc.ChannelCredentials = False
    token: str | None = field(default=None, repr=False)
    timeout: float = 30.0
    retry: Retry = field(default_factory=Retry)
    stream_retry: Retry = field(default_factory=lambda: Retry(attempts=10))
    stall_timeout: float = 60.0
    options: Sequence[tuple[str, OptionValue]] = ()
    allow_plaintext_token: bool = False
    own_metadata: Callable[[], Sequence[tuple[str, str]]] | None = None

    def __post_init__(self) -> None:
        """Refuse what would only fail later, and less clearly."""
        if not self.address.strip():
            raise InvalidRequest.of("address", "is empty; give the server's host:port")
        if self.token is not None and not _PRINTABLE.fullmatch(self.token):
            raise InvalidRequest.of(
                "token",
                "is empty or has a blank in it; give it as it was issued, on one line",
            )
        exposed = self.token and self.tls is False and not self._is_loopback
        if exposed and not self.allow_plaintext_token:
            raise InvalidRequest.of(
                "tls",
                f"is off, so everybody on the way to {self.address} could read the token; "
                "turn TLS on, or say allow_plaintext_token if the way is safe",
            )

    @property
    def metadata(self) -> Metadata:
        """Metadata that goes with a call that is made now."""
        token = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        own = self.own_metadata() if self.own_metadata else current_trace()
        return (*token, *own)

    def channel(self, **own: OptionValue) -> grpc.Channel:
        """Open a blocking channel, with options of its own; nothing is dialled yet."""
        credentials = self._credentials()
        options = [*own.items(), *self._channel_options()]
        if credentials is None:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, credentials, options=options)

    def aio_channel(self) -> grpc.aio.Channel:
        """Open an asyncio channel on the running loop; nothing is dialled yet."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, options=self._channel_options())
        return grpc.aio.secure_channel(
            self.address, credentials, options=self._channel_options()
        )

    @property
    def _is_loopback(self) -> bool:
        return _LOOPBACK.fullmatch(self.address) is not None

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls is False:
            return None
        return grpc.ssl_channel_credentials() if self.tls is True else self.tls

    def _channel_options(self) -> list[tuple[str, OptionValue]]:
        merged = dict(_OPTIONS)
        if self._is_loopback:
            # A proxy from the environment cannot know this machine's own ports.
            merged["grpc.enable_http_proxy"] = 0
        merged.update(self.options)
        return list(merged.items())


class Channels:
    """Blocking channels for downloads, lent to one user at a time. Some are kept for the
    next one: to dial takes longer than a small output. Threads may share it."""

    KEPT = 4
    IDLE_MS = 60_000
    """After so long a channel that nobody uses hangs up, and would dial again: on the way
    a connection may be forgotten that carries nothing."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._kept: list[grpc.Channel] = []
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def lend(self) -> Iterator[grpc.Channel]:
        """A channel that nobody else uses meanwhile. It is closed when the user fails."""
        with self._lock:
            kept = self._kept.pop() if self._kept else None
        idle = {"grpc.client_idle_timeout_ms": self.IDLE_MS}
        channel = kept or self._connection.channel(**idle)
        try:
            yield channel
        except BaseException:
            channel.close()
            raise
        with self._lock:
            keep = not self._closed and len(self._kept) < self.KEPT
            if keep:
                self._kept.append(channel)
        if not keep:
            channel.close()

    def close(self) -> None:
        """Close those that are kept, and from now on each when its user is done."""
        with self._lock:
            self._closed = True
            kept, self._kept = self._kept, []
        for channel in kept:
            channel.close()


def tls_from_files(
    ca_cert: Path | None = None,
    client_cert: Path | None = None,
    client_key: Path | None = None,
) -> grpc.ChannelCredentials:
    """TLS with the roots of one PEM file instead of the system's, and with a certificate
    of the client's own, for servers that ask for one.

    Raises:
        InvalidRequest: A file cannot be read, or one of certificate and key is missing.
    """
    if (client_cert is None) != (client_key is None):
        raise InvalidRequest.of(
            "client_key" if client_key is None else "client_cert",
            "is missing; a certificate and its key go together",
        )
    named = {"ca_cert": ca_cert, "client_key": client_key, "client_cert": client_cert}
    content: dict[str, bytes | None] = {}
    for name, path in named.items():
        try:
            content[name] = None if path is None else path.read_bytes()
        except OSError as error:
            raise InvalidRequest.of(
                name, f"{path} cannot be read ({error.strerror}); give a PEM file"
            ) from None
    return grpc.ssl_channel_credentials(
        content["ca_cert"], content["client_key"], content["client_cert"]
    )


def is_passing(error: ExportdError) -> bool:
    """Whether a stream that broke off with it is worth opening again: the server is away,
    or says when the caller may ask again."""
    if isinstance(error, QuotaExceeded):
        return error.retry_after is not None
    return isinstance(error, Unavailable)


class Attempts:
    """The retries of one call: `next_delay` says how long to wait, or raises."""

    def __init__(self, retry: Retry, timeout: float | None) -> None:
        self._retry = retry
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self.failures = 0

    def remaining(self) -> float | None:
        """Seconds left for the next attempt; None: no limit."""
        if self._deadline is None:
            return None
        return max(0.001, self._deadline - time.monotonic())

    def progress(self) -> None:
        """Something new came: failures before it no longer count."""
        self.failures = 0

    def next_delay(self, error: ExportdError, *, retryable: bool | None = None) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            ExportdError: `error` itself, when another attempt is no use or not allowed.
        """
        if not (isinstance(error, Unavailable) if retryable is None else retryable):
            raise error
        self.failures += 1
        delay = self._retry.delay(self.failures, error.retry_after)
        left = self.remaining()
        if self.failures >= self._retry.attempts or (left is not None and delay >= left):
            raise error
        return delay


class WatchProgress:
    """What counts as progress of a watch: news of the job, or a stream that lasted. That
    every new stream begins with the job as it stands does not: against a server that
    breaks each one off, a watch would go on for ever."""

    LASTED = 10.0
    """Seconds from its first message after which a stream was a good one. Not from its
    opening: a host that swallows packets takes long to dial."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts
        self._revision = -1
        self._first: float | None = None

    def opened(self) -> None:
        """A stream begins."""
        self._first = None

    def came(self, revision: int) -> None:
        """The job came, as it is at this revision."""
        if self._first is None:
            self._first = time.monotonic()
        if revision != self._revision:
            self._revision = revision
            self._attempts.progress()

    def broken(self) -> None:
        """The stream ended too early."""
        if self._first is not None and time.monotonic() - self._first >= self.LASTED:
            self._attempts.progress()
