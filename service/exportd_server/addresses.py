"""Where a process listens, and who is asked what there: nothing is open to others that was
not meant to be."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from exportd_server.errors import ConfigurationError

if TYPE_CHECKING:
    from exportd_server.settings import Settings


def host_and_port(key: str, address: str) -> tuple[str, int]:
    """The two halves of a `host:port`; raises `ConfigurationError` naming the key."""
    host, colon, port = address.rpartition(":")
    number = port.isascii() and port.isdigit() and int(port) <= 65_535
    if not (colon and number and (_is_name(host) or _is_bracketed(host))):
        raise ConfigurationError(
            f"{key}: {address!r} is not host:port, such as 127.0.0.1:50051 or [::1]:50051"
        )
    return host.strip("[]"), int(port)


def _is_name(host: str) -> bool:
    return bool(host) and not set(host) & set("[]:/ ")


def _is_bracketed(host: str) -> bool:
    """Whether it is an IPv6 address as RFC 3986 (3.2.2) writes it."""
    try:
        ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return host[:1] == "[" and host[-1:] == "]"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host by that name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_keys(*, serves: bool) -> tuple[str, ...]:
    """The fields that say where a process listens."""
    served = ("listen", "tls.client_cert_listen", "http.listen") if serves else ()
    return (*served, "metrics.listen")


def check_address(settings: Settings, key: str) -> None:
    """Raises `ConfigurationError` where a field of `address_keys` holds no address. All
    but `listen` may be empty."""
    address: str = attrgetter(key)(settings)
    if address or key == "listen":
        host_and_port(key, address)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a field must be, given `others`, where each is right for itself. Nothing is
    asked of one that is empty or off. `check` gives what is wrong and how to mend it."""

    key: str
    others: tuple[str, ...]
    check: Callable[[Settings], str | None]
    serving: bool = True
    """Whether it holds for processes that serve only."""

    def applies(self, settings: Settings) -> bool:
        """Whether anything is asked of the field."""
        return bool(attrgetter(self.key)(settings))

    def problem_in(self, settings: Settings) -> str | None:
        """What is wrong with settings whose addresses are right."""
        return self.check(settings) if self.applies(settings) else None


def rules(*, serves: bool) -> Iterator[Rule]:
    """Those that a process is held to."""
    return (rule for rule in _RULES if serves or not rule.serving)


def _host(key: str, settings: Settings) -> str:
    return host_and_port(key, attrgetter(key)(settings))[0]


def _let_in(settings: Settings, host: str) -> bool:
    """Whether everybody who can reach the host may call, or is asked who they are."""
    anybody = settings.allow_unauthenticated or is_loopback(host)
    return settings.identity.required or anybody


def _contradiction(settings: Settings) -> str | None:
    if not settings.identity.required:
        return None
    return (
        "allow_unauthenticated: contradicts the settings of identity, by which nobody "
        "is let in unauthenticated; remove one of them"
    )


def _open_listen(settings: Settings) -> str | None:
    host = _host("listen", settings)
    if _let_in(settings, host):
        return None
    return (
        f"listen: {host} is reachable from elsewhere and nobody has to identify "
        "themselves; listen on 127.0.0.1, set up identity, or set "
        "allow_unauthenticated"
    )


def _clear_listen(settings: Settings) -> str | None:
    host, tls = _host("listen", settings), settings.tls
    encrypted = tls.cert_file is not None or tls.allow_plaintext
    if encrypted or not settings.identity.required or is_loopback(host):
        return None
    return (
        f"listen: {host} is reachable from elsewhere and credentials could be read on "
        "the way; set tls.cert_file and tls.key_file, or, if something in front "
        "encrypts, tls.allow_plaintext"
    )


def _unasked_certificates(settings: Settings) -> str | None:
    if settings.tls.client_ca_file is not None:
        return None
    return (
        "identity.mtls: nobody is asked for a certificate; set tls.client_ca_file, "
        "and tls.require_client_cert or tls.client_cert_listen"
    )


def _open_certificate_port(settings: Settings) -> str | None:
    host = _host("tls.client_cert_listen", settings)
    if _let_in(settings, host):
        return None
    return (
        f"tls.client_cert_listen: {host} is reachable from elsewhere and nobody "
        "has to identify themselves; set up identity.mtls"
    )


# Download URLs are credentials, and what they lead to is as secret as all else: held to
# the same rules as `listen`.


def _clear_url(settings: Settings) -> str | None:
    public = urlsplit(settings.http.public_url)
    local = is_loopback(public.hostname or "")
    if public.scheme != "http" or local or settings.tls.allow_plaintext:
        return None
    return (
        "http.public_url: download URLs and data could be read on the way; give "
        "https://HOST of what encrypts in front of http.listen, or set "
        "tls.allow_plaintext"
    )


def _open_http(settings: Settings) -> str | None:
    host = _host("http.listen", settings)
    if _let_in(settings, host):
        return None
    return (
        f"http.listen: {host} is reachable from elsewhere and nobody has to identify "
        "themselves; listen on 127.0.0.1, set up identity, or set "
        "allow_unauthenticated"
    )


def _nameless_http(settings: Settings) -> str | None:
    http = settings.http
    everywhere = _host("http.listen", settings) in {"0.0.0.0", "::", "*"}  # noqa: S104 - refused
    if not everywhere or http.public_url:
        return None
    return (
        f"http.public_url: is needed with http.listen = {http.listen!r}, "
        "an address that nobody can be sent to; give https://HOST of this server"
    )


def _clear_http(settings: Settings) -> str | None:
    host, public = _host("http.listen", settings), urlsplit(settings.http.public_url)
    encrypted = public.scheme == "https" or settings.tls.allow_plaintext
    if encrypted or is_loopback(host):
        return None
    return (
        f"http.listen: {host} is reachable from elsewhere and download URLs and data "
        "could be read on the way; listen on 127.0.0.1, give https://HOST of what "
        "encrypts in front of it as http.public_url, or set tls.allow_plaintext"
    )


# Whoever reaches the console must be known as over gRPC, and what they sign in with must
# not be read on the way.


def _console_without_port(settings: Settings) -> str | None:
    return None if settings.http.listen else "http.console: needs a port; set http.listen"


def _console_base(settings: Settings) -> SplitResult:
    return urlsplit(settings.http.public_url or f"http://{settings.http.listen}")


def _open_console(settings: Settings) -> str | None:
    host = _console_base(settings).hostname or ""
    if not settings.http.listen or _let_in(settings, host):
        return None
    return (
        f"http.console: {host} is reachable from elsewhere and nobody has to "
        "identify themselves; set up identity, or set allow_unauthenticated"
    )


def _no_sign_in(settings: Settings) -> str | None:
    identity = settings.identity
    if not identity.required or identity.api_keys or identity.jwt.issuer:
        return None
    return (
        "http.console: browsers sign in with an API key or a token; set "
        "identity.api_keys or identity.jwt"
    )


def _clear_console(settings: Settings) -> str | None:
    base = _console_base(settings)
    kept = base.scheme == "https" or is_loopback(base.hostname or "")
    if kept or not settings.identity.required or not settings.http.listen:
        return None
    return (
        "http.console: browsers keep a sign-in only where it cannot be read on the "
        "way; give https://HOST of what encrypts in front of http.listen as "
        "http.public_url"
    )


def _open_metrics(settings: Settings) -> str | None:
    host = _host("metrics.listen", settings)
    if is_loopback(host) or settings.metrics.allow_remote:
        return None
    return (
        f"metrics.listen: {host} is reachable from elsewhere and the metrics ask "
        "nobody who they are; listen on 127.0.0.1, or set metrics.allow_remote"
    )


IDENTITY_KEYS = ("identity.api_keys", "identity.jwt.issuer", "identity.mtls")
"""The fields that `IdentitySettings.required` reads."""
_CALLERS = ("allow_unauthenticated", *IDENTITY_KEYS)
_WAY = ("tls.cert_file", "tls.allow_plaintext")
_CONSOLE = ("http.listen", "http.public_url")

_RULES = (
    Rule("allow_unauthenticated", IDENTITY_KEYS, _contradiction),
    Rule("listen", _CALLERS, _open_listen),
    Rule("listen", (*IDENTITY_KEYS, *_WAY), _clear_listen),
    Rule("identity.mtls", ("tls.client_ca_file",), _unasked_certificates),
    Rule("tls.client_cert_listen", _CALLERS, _open_certificate_port),
    Rule("http.public_url", ("tls.allow_plaintext",), _clear_url, serving=False),
    Rule("http.listen", _CALLERS, _open_http),
    Rule("http.listen", ("http.public_url",), _nameless_http),
    Rule("http.listen", ("http.public_url", "tls.allow_plaintext"), _clear_http),
    Rule("http.console", ("http.listen",), _console_without_port),
    Rule("http.console", (*_CONSOLE, *_CALLERS), _open_console),
    Rule("http.console", IDENTITY_KEYS, _no_sign_in),
    Rule("http.console", (*_CONSOLE, *IDENTITY_KEYS), _clear_console),
    Rule("metrics.listen", ("metrics.allow_remote",), _open_metrics, serving=False),
)
