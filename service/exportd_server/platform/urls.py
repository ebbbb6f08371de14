"""URLs that operators write, with passwords in them.

A password with an unencoded `@`, `:`, `/`, `?` or `#` makes another URL of the text, whose
host or port is a piece of the password. So a URL is read strictly here, before any driver
has it, and what is wrong with it is told without a word of it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, unquote_to_bytes

PERCENT = (
    "percent-encode what is special in user and password: @ as %40, : as %3A, / as %2F, "
    "? as %3F, # as %23, % as %25"
)
"""How to mend what a password does to a URL."""
_POSTGRES = ("postgresql", "postgres")
_SHAPE = re.compile(
    r"(?P<scheme>[a-z][a-z0-9]*)://"
    r"(?:(?P<user>[^@:/?#\[\]]*)(?::(?P<password>[^@/?#\[\]]*))?@)?"
    r"(?P<hosts>[^@/?#]*)"
    r"(?:/(?P<path>[^@?#]*))?"
    r"(?:\?(?P<query>[^@#]*))?"
)
"""RFC 3986 without fragments, and with one @ at the most."""
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_ODD_DATABASE = re.compile(r"[@:/?#%=\s]")
"""PostgreSQL's library would take some of them for another URL."""
_OPTION = re.compile(r"[a-z][a-z0-9_]*")
_CUT = re.compile(r"[@:/?#\[\]%&=,\s]+")
"""Where a password that is not encoded may be taken apart."""
_SECRET_OPTIONS = ("password", "sslpassword", "oauth_client_secret")
_LONG = 4
"""Fewest characters of a piece of a password that is looked for in other texts: shorter
ones stand in any."""


class BadUrl(ValueError):
    """What is wrong with a URL, and how to mend it; it repeats nothing of the URL."""


@dataclass(frozen=True, slots=True)
class Url:
    """A URL, read. Texts are decoded, but for `text`, which is all of it. `hosts` are
    pairs of a name, an address or a path, and a port, None where none is given."""

    text: str = field(repr=False)
    scheme: str
    user: str
    password: str = field(repr=False)
    hosts: tuple[tuple[str, int | None], ...]
    path: str
    options: Mapping[str, str] = field(repr=False)

    def shown(self, port: int) -> str:
        """Without user, password and options; `port` where none is given."""
        hosts = ",".join(f"{host or 'localhost'}:{p or port}" for host, p in self.hosts)
        return f"{self.scheme}://{hosts}/{self.path}"

    def said(self, error: BaseException | str) -> str:
        """The first line of what a driver says of this URL, unless a piece of a password
        stands in it, however it was cut."""
        text = str(error).strip().partition("\n")[0]
        if any(piece in text for piece in self._pieces()):
            return (
                "the driver's words repeat a part of the password and are left out; "
                f"{PERCENT}"
            )
        return text

    def _pieces(self) -> set[str]:
        secrets = [self.password, *(self.options.get(name, "") for name in _SECRET_OPTIONS)]
        whole = _SHAPE.fullmatch(self.text)
        if whole is not None:
            secrets.append(whole["password"] or "")
        pieces = {*secrets, *(piece for each in secrets for piece in _CUT.split(each))}
        # Who has the user's name for a password has it told as the user's name.
        told = {self.user, self.path, *(host for host, _ in self.hosts)}
        return {piece for piece in pieces - told if len(piece) >= _LONG}


def parse_url(text: str, schemes: Collection[str]) -> Url:
    """Read `SCHEME://USER:PASSWORD@HOST:PORT/PATH?QUERY`, where all but scheme and host may
    be missing; the query is not looked at. Raises `BadUrl`."""
    parts = _parts(text, schemes)
    host, port = _host_and_port(parts["hosts"])
    if not host or host.startswith(("/", "@")):
        raise BadUrl("has no host, or one that cannot be one; " + PERCENT)
    return _url(text, parts, ((host, port),), {})


def parse_postgres_url(text: str) -> Url:
    """Read a URL of PostgreSQL: several hosts with commas between, hosts that are
    directories of sockets, and hosts, ports and passwords among the options are fine.
    Raises `BadUrl`."""
    parts = _parts(text, _POSTGRES)
    if "/" in (parts["path"] or ""):
        raise BadUrl("has a second / after the host; " + PERCENT)
    given = _options(parts["query"] or "")
    hosts = [_host_and_port(each) for each in parts["hosts"].split(",")]
    names, ports = [host for host, _ in hosts], [port for _, port in hosts]
    if "host" in given:
        names = [_host(each) for each in given["host"].split(",")]
    if "port" in given:
        ports = [_port(each) for each in given["port"].split(",")]
    if len(ports) == 1:
        ports *= len(names)
    database = given.get("dbname", unquote(parts["path"] or ""))
    if _ODD_DATABASE.search(database):
        raise BadUrl("names a database with one of @ : / ? # % = in it; " + PERCENT)
    if len(ports) != len(names):
        raise BadUrl("has another number of ports than of hosts")
    return _url(text, parts, tuple(zip(names, ports, strict=True)), given)


def _url(
    text: str,
    parts: re.Match[str],
    hosts: tuple[tuple[str, int | None], ...],
    options: Mapping[str, str],
) -> Url:
    return Url(
        text=text,
        scheme=parts["scheme"],
        user=options.get("user", unquote(parts["user"] or "")),
        password=unquote(parts["password"] or ""),
        hosts=hosts,
        path=options.get("dbname", unquote(parts["path"] or "")),
        options=options,
    )


def _parts(text: str, schemes: Collection[str]) -> re.Match[str]:
    scheme, mark, _ = text.partition("://")
    if not mark or scheme not in schemes:
        raise BadUrl(
            f"must begin with {' or '.join(f'{each}://' for each in sorted(schemes))}"
        )
    # What is printable, without the space.
    if not re.fullmatch(r"[\x21-\x7e]*", text):
        raise BadUrl("has a space, or a character that is not ASCII; " + PERCENT)
    if _BAD_ESCAPE.search(text):
        raise BadUrl("has a % without two hexadecimal digits after it; " + PERCENT)
    try:
        unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise BadUrl("is not UTF-8 where it is percent-encoded; " + PERCENT) from None
    parts = _SHAPE.fullmatch(text)
    if parts is None:
        raise BadUrl("cannot be taken apart into user, password, host and port; " + PERCENT)
    return parts


def _host_and_port(text: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(.*))?", text)
    if found is None:
        raise BadUrl("has a port that is no number from 1 to 65535; " + PERCENT)
    host, port = found.groups()
    return _host(unquote(host)), _port(port or "")


def _host(text: str) -> str:
    """A name, an address, a directory or an abstract name of a socket, or nothing."""
    if not text or text.startswith(("/", "@")) or _NAME.fullmatch(text):
        return text
    bare = text[1:-1] if text[0] == "[" and text[-1] == "]" else text
    try:
        ipaddress.IPv6Address(bare)
    except ValueError:
        raise BadUrl("has a host that cannot be one; " + PERCENT) from None
    return f"[{bare}]"


def _port(text: str) -> int | None:
    if not text:
        return None
    # Ten digits are past any port, and few enough to be read.
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= 65_535:
        raise BadUrl("has a port that is no number from 1 to 65535; " + PERCENT)
    return int(text)


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for each in query.split("&") if query else ():
        name, equals, value = each.partition("=")
        if not equals or not _OPTION.fullmatch(name) or name in options:
            raise BadUrl("has options that are not NAME=VALUE, each once; " + PERCENT)
        options[name] = unquote(value)
    return options
