"""Checks of how callers come in, and traces go out: certificates, identity, ports."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import attrgetter
from pathlib import Path

from cryptography import x509

from exportd_server.addresses import address_keys, host_and_port, is_loopback
from exportd_server.api.tls import TlsFiles
from exportd_server.app import NO_TRACING, certificate_callers
from exportd_server.errors import ConfigurationError
from exportd_server.identity.base import KeysUnreadable
from exportd_server.identity.file import FileKeyStore
from exportd_server.jobs.ledger.statements import standing
from exportd_server.operations.checking import (
    Check,
    Outcome,
    blocking,
    failed,
    ok,
    told,
    warning,
)
from exportd_server.operations.standing import look
from exportd_server.places import is_embedded
from exportd_server.settings import JwtSettings, Settings, read_headers

_SOON = timedelta(days=14)
"""Before that a certificate that is renewed by itself has been."""
_CONNECT_SECONDS = 5.0
"""In which what takes traces must accept a connection."""


# --- TLS


def tls_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """The files of the gRPC port."""
    del serves
    tls = settings.tls
    if tls.cert_file is None or tls.key_file is None:
        yield Check("tls", "none", told(ok("calls are not encrypted here")))
        return
    cert, key, authority = tls.cert_file, tls.key_file, tls.client_ca_file

    def pair() -> Outcome:
        TlsFiles(cert, key).read()
        # The first is the server's own.
        return _valid(x509.load_pem_x509_certificates(cert.read_bytes())[:1])

    yield Check("tls", str(cert), lambda: blocking(pair))
    if authority is not None:
        yield Check("tls", str(authority), lambda: blocking(partial(_authority, authority)))


def _authority(path: Path) -> Outcome:
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        return failed(
            f"cannot be read ({error.strerror}); make tls.client_ca_file readable"
        )
    except ValueError:
        return failed("holds no certificate in PEM; mend tls.client_ca_file")
    return _valid(found)


def _valid(certificates: list[x509.Certificate]) -> Outcome:
    """Whether all are in their time, and until when."""
    now = datetime.now(UTC)
    for each in certificates:
        who = each.subject.rfc4514_string()
        if each.not_valid_before_utc > now:
            since = each.not_valid_before_utc.isoformat()
            return failed(f"{who} is valid from {since} only; wait, or set the clock")
        if each.not_valid_after_utc <= now:
            until = each.not_valid_after_utc.isoformat()
            return failed(f"{who} expired at {until}; renew it")
    first = min(certificates, key=lambda each: each.not_valid_after_utc)
    end = first.not_valid_after_utc
    text = f"{first.subject.rfc4514_string()} is valid until {end.isoformat()}"
    return warning(f"{text}; renew it") if end - now < _SOON else ok(text)


# --- identity


def nobody_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """Whether callers are asked who they are."""
    del serves
    if settings.identity.required:
        return
    host, _ = host_and_port("listen", settings.listen)
    text = "nobody has to identify themselves: every caller may do everything"
    yield Check("identity", "none", told(ok(text) if is_loopback(host) else warning(text)))


def api_key_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """Whether a key works."""
    del serves
    if not settings.identity.api_keys:
        return
    if is_embedded(settings):
        directory = settings.data_dir
        yield Check(
            "identity", "api_keys", lambda: _keys_in_file(directory), needs=("data_dir",)
        )
        return
    yield Check(
        "identity", "api_keys", lambda: blocking(partial(_keys_in_ledger, settings))
    )


async def _keys_in_file(directory: Path) -> Outcome:
    try:
        keys = await FileKeyStore(directory).keys()
    except KeysUnreadable as error:
        return failed(str(error))
    except OSError as error:
        return failed(
            f"the file of keys cannot be read ({error.strerror}); make it this user's"
        )
    now = datetime.now(UTC)
    return _working(
        sum(
            key.revoke_time is None and (key.expire_time is None or key.expire_time > now)
            for key in keys
        )
    )


def _keys_in_ledger(settings: Settings) -> Outcome:
    try:
        with look(settings) as ledger:
            ((count,),) = ledger.ask(standing.working_keys(ledger.now))
    except ConfigurationError:
        # What is wrong with it is told where it is tried for itself.
        return warning("cannot be counted without the ledger")
    return _working(int(count))


def _working(count: int) -> Outcome:
    if not count:
        return warning("no key works; make one by `exportd-server keys create`")
    return ok(f"{count} keys work")


def token_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """Whether the keys of tokens can be had."""
    del serves
    if settings.identity.jwt.issuer:
        yield Check("identity", "jwt", lambda: _key_set(settings.identity.jwt))


def certificate_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """Whom names in certificates stand for."""
    del serves
    if settings.identity.mtls:
        callers = certificate_callers(settings.identity)
        yield Check("identity", "mtls", told(ok(f"{len(callers)} callers")))


async def _key_set(jwt: JwtSettings) -> Outcome:
    # Its libraries take a while to load, and most do without.
    from exportd_server.identity.jwks import (  # noqa: PLC0415 - see above
        FileSource,
        KeySetUnusable,
        UrlSource,
        parse,
    )

    url = jwt.jwks_url.get_secret_value()
    source = FileSource(jwt.jwks_file) if jwt.jwks_file else UrlSource(url)
    where = "jwks_file" if jwt.jwks_file else "jwks_url"
    try:
        keys = parse(await source.read(), jwt.algorithms)
    except KeySetUnusable as error:
        return failed(f"the key set {error}; mend identity.jwt.{where}, or what is there")
    finally:
        await source.close()
    return ok(f"{len(keys)} keys of {jwt.issuer}")


# --- ports


def port_checks(key: str, settings: Settings, serves: bool) -> Iterator[Check]:
    """Whether the port of an address can be had."""
    found = {key: attrgetter(key)(settings) for key in address_keys(serves=serves)}
    address = found.pop(key)
    if not address:
        return
    others = [other for other, its in found.items() if its == address]
    if others and not address.endswith(":0"):
        text = f"{address} is {' and '.join(others)} as well; give each its own port"
        yield Check("ports", key, told(failed(text)))
        return
    yield Check("ports", key, partial(_port, key, address))


async def _port(key: str, address: str) -> Outcome:
    host, port = host_and_port(key, address)
    await blocking(lambda: _take(host, port))
    return ok(f"{address} is free" if port else f"{address}: any port that is free")


def _take(host: str, port: int) -> None:
    """Take a port and give it back. Raises `ConfigurationError`."""
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigurationError(
            f"{host}:{port}: there is no such host ({error.strerror}); name an address of "
            "this machine"
        ) from error
    failures: list[OSError] = []
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(place)
        except OSError as error:
            failures.append(error)
    # A name may stand for an address that this machine lacks, if it has another one.
    lacking = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
    serious = [error for error in failures if error.errno not in lacking]
    if serious or len(failures) == len(found):
        first = (serious or failures)[0]
        raise ConfigurationError(f"{host}:{port}: {first.strerror}; {_mend(first)}")


def _mend(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "stop the process that has it, or name another port"
    if error.errno == errno.EACCES:
        return "name a port above 1023, or let this user take it (CAP_NET_BIND_SERVICE)"
    return "name an address of this machine"


# --- tracing


def tracing_checks(settings: Settings, _serves: bool) -> Iterator[Check]:
    """Whether somebody takes traces."""
    endpoint = settings.tracing.endpoint
    if endpoint:
        headers = read_headers(settings.tracing.headers)
        yield Check(
            "tracing", endpoint, lambda: blocking(partial(_sent, endpoint, headers))
        )


def _sent(endpoint: str, headers: Mapping[str, str]) -> Outcome:
    """A server starts, and works, without."""
    try:
        from exportd_server.platform.otel import takes_traces  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise ConfigurationError(NO_TRACING) from None
    host, port = host_and_port("tracing.endpoint", endpoint.partition("://")[2].strip("/"))
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except OSError as error:
        return warning(
            f"cannot be reached ({error.strerror or error}), and traces are dropped; start "
            "the receiver, or mend tracing.endpoint"
        )
    if not takes_traces(endpoint, headers):
        return warning(
            "takes no traces, and they are dropped; tracing.endpoint must be a port for "
            "OTLP over gRPC, usually 4317, and tracing.headers what it asks for"
        )
    return ok("takes traces")
