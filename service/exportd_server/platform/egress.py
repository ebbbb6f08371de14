"""Where the service may connect to when a caller chose the address.

One rule for all of exportd: only globally reachable unicast addresses, as IANA's registries
of special-purpose addresses have them (RFC 6890), and the IPv6 space that is given out as
global unicast (RFC 4291). The standard library's `is_global` is not asked: what it says
changes with the version of Python.

A name says nothing about where it leads, and can lead elsewhere a moment later. So
`GuardedBackend` looks a name up once, judges every address, and connects to the addresses
it judged and to nothing else.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)

import httpcore

from exportd_server.platform.threads import in_daemon_thread

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Looks a host name up: its addresses as text, best first. Raises `OSError`."""

MOST_ADDRESSES = 4
"""How many addresses of one name are tried in turn."""

_METADATA: dict[IPAddress, str] = {
    ip_address(text): f"the metadata service of {cloud}"
    for cloud, texts in {
        "AWS and others": ("169.254.169.254", "fd00:ec2::254"),
        "AWS containers": (
            "169.254.170.2",
            "169.254.170.23",
            "fd00:ec2::23",
        ),
        # A public address by the registries, and yet inside each virtual machine.
        "Azure": ("168.63.129.16",),
        "Google Cloud": ("fd20:ce::254",),
        "Alibaba Cloud": ("100.100.100.200",),
        "Oracle Cloud": ("192.0.0.192", "fd00:c1::a9fe:a9fe"),
    }.items()
    for text in texts
}

# IANA IPv4 Special-Purpose Address Registry, and the multicast space (RFC 5771). Blocks
# that are reachable but serve something else (AS112, AMT, anycast of PCP and TURN) are
# refused too: no receiver lives there.
_V4: tuple[tuple[IPv4Network, str], ...] = tuple(
    (IPv4Network(network), what)
    for network, what in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by carrier-grade NAT"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved for protocols"),
        ("192.0.2.0/24", "for documentation"),
        ("192.31.196.0/24", "reserved for AS112"),
        ("192.52.193.0/24", "reserved for AMT"),
        ("192.88.99.0/24", "a 6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "reserved for AS112"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "broadcast"),
        ("240.0.0.0/4", "reserved"),
    )
)

# IANA IPv6 Special-Purpose Address Registry, and the blocks outside it that older
# software still gives a meaning.
_V6: tuple[tuple[IPv6Network, str], ...] = tuple(
    (IPv6Network(network), what)
    for network, what in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "an IPv4-mapped address"),
        ("::ffff:0:0:0/96", "an IPv4-translated address"),
        ("::/96", "an IPv4-compatible address"),
        ("64:ff9b::/96", "a NAT64 address"),
        ("64:ff9b:1::/48", "a NAT64 address"),
        ("100::/64", "discarded"),
        ("100:0:0:1::/64", "a dummy"),
        ("2001::/32", "a Teredo address"),
        ("2001::/23", "reserved for protocols"),
        ("2001:db8::/32", "for documentation"),
        ("2002::/16", "a 6to4 address"),
        ("2620:4f:8000::/48", "reserved for AS112"),
        ("3fff::/20", "for documentation"),
        ("5f00::/16", "a segment routing identifier"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)
# IANA IPv6 Address Space: all that is given out as global unicast so far.
_V6_GLOBAL = IPv6Network("2000::/3")


def refusal(ip: IPAddress, allowed: Iterable[IPNetwork] = ()) -> str | None:
    """Why an address must not be connected to, as what would follow "the address is";
    None when it may be.

    `allowed` lists networks that the operator opens although they are not public. It
    never opens a cloud's metadata service, and an IPv4 network in it does not open IPv6
    forms that embed its addresses.
    """
    # An IPv6 address with a zone equals none without, so compare by number.
    bare = IPv6Address(int(ip)) if isinstance(ip, IPv6Address) else ip
    if bare in _METADATA:
        return _METADATA[bare]
    if any(bare.version == network.version and bare in network for network in allowed):
        return None
    if isinstance(bare, IPv4Address):
        return next((what for network, what in _V4 if bare in network), None)
    what = next((what for network, what in _V6 if bare in network), None)
    return what or (None if bare in _V6_GLOBAL else "not global unicast")


class EgressRefused(Exception):
    """The host leads to no address that may be connected to. `reason` names what one of
    them is: for the operator's log, as it tells what a name means inside."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the address is {reason}")


async def system_resolver(host: str, port: int) -> Sequence[str]:
    """What the machine says, in the order of RFC 6724. Raises `OSError`."""
    # The lookup cannot be cut short, and no exit shall wait for it.
    found = await in_daemon_thread(
        lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), "resolve"
    )
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def judged(
    addresses: Iterable[str], allowed: Iterable[IPNetwork] = ()
) -> tuple[IPAddress, ...]:
    """Those of a name's addresses that may be connected to. Raises `EgressRefused` when
    there is none.

    One that is refused does not spoil the others: where DNS64 is in use each name has a
    NAT64 address beside its own.
    """
    networks = tuple(allowed)
    good: list[IPAddress] = []
    reason = "missing"
    for text in addresses:
        try:
            ip = ip_address(text)
        except ValueError:
            reason = "not an IP address"
            continue
        refused = refusal(ip, networks)
        if isinstance(ip, IPv6Address) and ip.scope_id is not None:
            refused = refused or "bound to a network interface"
        if refused is None:
            good.append(ip)
        else:
            reason = refused
    if not good:
        raise EgressRefused(reason)
    return tuple(good)


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Makes the connections of an httpcore pool.

    Raises `EgressRefused` where the rule forbids to connect; nothing has been sent to
    that address then, not even the beginning of a handshake.
    """

    def __init__(
        self, allowed: Iterable[IPNetwork] = (), resolve: Resolver = system_resolver
    ) -> None:
        self._allowed = tuple(allowed)
        self._resolve = resolve
        self._inner: httpcore.AsyncNetworkBackend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a name or an address. The time limit, in seconds, is for the lookup
        and all attempts together."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                addresses = await self._addresses(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from error
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(error) from error
        failure: httpcore.ConnectError | httpcore.ConnectTimeout | None = None
        for left, ip in zip(range(len(addresses), 0, -1), addresses, strict=True):
            # An address that swallows everything leaves time for those after it.
            share = None if deadline is None else (deadline - loop.time()) / left
            if share is not None and share <= 0:
                break
            try:
                stream = await self._inner.connect_tcp(
                    str(ip), port, share, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            if not _is_peer(stream, ip):
                await stream.aclose()
                raise EgressRefused("not the one that was judged")
            return stream
        raise failure or httpcore.ConnectTimeout("no address answered in time")

    async def _addresses(self, host: str, port: int) -> tuple[IPAddress, ...]:
        try:
            found: Sequence[str] = (str(ip_address(host)),)
        except ValueError:
            found = await self._resolve(host, port)
        return judged(found, self._allowed)[:MOST_ADDRESSES]


def _is_peer(stream: httpcore.AsyncNetworkStream, ip: IPAddress) -> bool:
    """The kernel's word on who is at the other end, whatever led there."""
    peer = stream.get_extra_info("server_addr")
    return peer is not None and ip_address(peer[0]) == ip
