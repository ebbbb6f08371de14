"""The URL of a receiver: one strict reading of it, so that what was judged is what is
dialled and what is sent.

Lenient parsers disagree with each other, and that is how a URL is checked as one host and
sent to another. So everything is refused here that RFC 3986 does not plainly allow.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from urllib.parse import unquote

MOST_CHARACTERS = 2048
_DEFAULT_PORTS = {"https": 443, "http": 80}

_SHAPE = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)"
    r"(?P<path>[^?#]*)(?P<query>\?[^#]*)?(?P<fragment>#.*)?\Z"
)
_HOST_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>.*))?\Z")
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")
_NUMBER = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")
_REST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*\Z")


class BadUrl(ValueError):
    """Says what is wrong with a URL and the mend; never repeats any of it."""


@dataclass(frozen=True, slots=True)
class Url:
    """A URL, taken apart. `host` is in lower case, without brackets; `path` is at least
    `/`; `query` begins with `?` or is empty."""

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @property
    def address(self) -> IPv4Address | IPv6Address | None:
        """The host as an IP address, when it is one."""
        if ":" in self.host:
            return IPv6Address(self.host)
        try:
            return IPv4Address(self.host)
        except AddressValueError:
            return None

    @property
    def authority(self) -> str:
        """Host and port as the `Host` header has them: the scheme's own port left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == _DEFAULT_PORTS[self.scheme]
        return host if usual else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        """What the request line asks for."""
        return self.path + self.query

    @property
    def public(self) -> str:
        """What tells the URL from others without telling it: some receivers have their
        secret in the path, so of that, and of the query, there is only a digest."""
        origin = f"{self.scheme}://{self.authority}/"
        if self.target == "/":
            return origin
        return f"{origin}#{hashlib.sha256(self.target.encode()).hexdigest()[:12]}"

    def covers(self, other: Url) -> bool:
        """Whether the other one is this one, or lies below its path."""
        mine = (self.scheme, self.host, self.port)
        if mine != (other.scheme, other.host, other.port):
            return False
        if self.query:
            return self.target == other.target
        return self.path == other.path or other.path.startswith(self.path.rstrip("/") + "/")


def parse_url(text: str) -> Url:
    """Take a URL apart. Raises `BadUrl`."""
    if len(text) > MOST_CHARACTERS:
        raise BadUrl(f"is too long; use at most {MOST_CHARACTERS} characters")
    if any(not "!" <= character <= "~" for character in text):
        raise BadUrl(
            "has a space, a control character or one beyond ASCII; percent-encode those "
            "in the path, and write an international host name as xn--..."
        )
    shape = _SHAPE.match(text)
    scheme = shape["scheme"].lower() if shape else ""
    if shape is None or scheme not in _DEFAULT_PORTS:
        raise BadUrl("is no web address; begin it with https://")
    if "@" in shape["authority"]:
        raise BadUrl("has a user name; send credentials in headers")
    if shape["fragment"] is not None:
        raise BadUrl("has a fragment, which is never sent; leave out # and what follows")
    host_port = _HOST_PORT.match(shape["authority"])
    if host_port is None:
        raise BadUrl("has a host that is none; write HOST or HOST:PORT")
    host = _host(host_port["host"].lower())
    port = _port(host_port["port"], _DEFAULT_PORTS[scheme])
    path, query = shape["path"] or "/", shape["query"] or ""
    if not _REST.match(path + query):
        raise BadUrl("has characters in its path or query that must be percent-encoded")
    # Some receivers resolve these after they have compared the path with what is
    # protected; so does `covers`.
    if any(name in {".", ".."} for name in re.split(r"[/\\]", unquote(path))):
        raise BadUrl("has . or .. in its path; write the path it comes to")
    return Url(scheme, host, port, path, query)


def _host(text: str) -> str:
    if not text:
        raise BadUrl("has no host; write https://HOST/PATH")
    if text.startswith("["):
        try:
            ip = IPv6Address(text[1:-1])
        except AddressValueError:
            raise BadUrl("has brackets without an IPv6 address in them") from None
        if ip.scope_id is not None:
            raise BadUrl("has an IPv6 address with a zone; leave the zone out")
        return str(ip)
    labels = text.split(".")
    # By the rule of WHATWG's URL standard a host that ends in a number is an IPv4 address
    # in one of many old notations. Only the plain one is read.
    if _NUMBER.match(labels[-1]):
        try:
            return str(IPv4Address(text))
        except AddressValueError:
            raise BadUrl(
                "has a host that ends in a number and is no IPv4 address of four decimal "
                "numbers"
            ) from None
    if len(text) > 253 or not all(_LABEL.match(label) for label in labels):
        raise BadUrl(
            "has a host that is no name; use letters, digits and hyphens between single "
            "dots, and no dot at the end"
        )
    return text


def _port(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not _PORT.match(text) or int(text) > 65535:
        raise BadUrl("has a port that is none; use 1 to 65535, or leave out the colon")
    return int(text)
