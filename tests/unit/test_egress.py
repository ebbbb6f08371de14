"""Which addresses may be connected to when a caller chose them, and that a name leads to
nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from ipaddress import IPv6Address, ip_address, ip_network

import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exportd_server.platform.egress import (
    MOST_ADDRESSES,
    EgressRefused,
    GuardedBackend,
    judged,
    refusal,
)
from tests.support.receiver import Receiver
from tests.support.waits import ENOUGH

REFUSED = {
    "unspecified": ("0.0.0.0", "0.1.2.3", "::"),  # noqa: S104 - it must be refused
    "loopback": ("127.0.0.1", "127.255.255.254", "::1"),
    "private": (
        "10.0.0.1",
        "10.255.255.255",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "fc00::1",
        "fdff:ffff::1",
    ),
    "link-local": ("169.254.0.1", "169.254.255.255", "fe80::1", "febf::1"),
    "site-local": ("fec0::1", "feff::1"),
    "shared by carrier-grade NAT": ("100.64.0.1", "100.127.255.255"),
    "multicast": ("224.0.0.1", "239.255.255.255", "ff02::1"),
    "broadcast": ("255.255.255.255",),
    "reserved": ("240.0.0.1", "255.255.255.254"),
    "for documentation": (
        "192.0.2.1",
        "198.51.100.1",
        "203.0.113.1",
        "2001:db8::1",
        "3fff::1",
        "3fff:fff:ffff::1",
    ),
    "for benchmarks": ("198.18.0.1", "198.19.255.255"),
    "reserved for protocols": ("192.0.0.1", "192.0.0.9", "2001:2::1", "2001:1ff::1"),
    "reserved for AS112": ("192.31.196.1", "192.175.48.1", "2620:4f:8000::1"),
    "a 6to4 relay": ("192.88.99.1",),
    "an IPv4-mapped address": ("::ffff:8.8.8.8", "::ffff:127.0.0.1", "::ffff:7f00:1"),
    "an IPv4-translated address": ("::ffff:0:7f00:1", "::ffff:0:808:808"),
    "an IPv4-compatible address": ("::127.0.0.1", "::8.8.8.8"),
    "a NAT64 address": ("64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::a00:1"),
    "a 6to4 address": ("2002:7f00:1::", "2002:808:808::1"),
    "a Teredo address": ("2001::1", "2001:0:7f00:1::"),
    "discarded": ("100::1",),
    "a segment routing identifier": ("5f00::1",),
    "not global unicast": ("4000::1", "200::1", "8000::1", "1fff::1", "fbff::1"),
}
METADATA = (
    "169.254.169.254",
    "169.254.170.2",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
    "fd00:ec2::254",
    "fd20:ce::254",
)
PUBLIC = (
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "168.63.129.15",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2000::1",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2003::1",
    "2606:4700:4700::1111",
    "3ffe::1",
    "3fff:1000::1",
)


@pytest.mark.parametrize(
    ("text", "what"), [(text, what) for what, texts in REFUSED.items() for text in texts]
)
def test_an_address_that_is_not_public_is_refused_by_its_kind(text: str, what: str) -> None:
    assert refusal(ip_address(text)) == what


@pytest.mark.parametrize("text", PUBLIC)
def test_a_public_address_is_not_refused(text: str) -> None:
    assert refusal(ip_address(text)) is None


@pytest.mark.parametrize("text", METADATA)
def test_a_metadata_service_is_refused_whatever_is_allowed(text: str) -> None:
    everything = (ip_network("0.0.0.0/0"), ip_network("::/0"))
    assert re.match("the metadata service", refusal(ip_address(text), everything) or "")


def test_an_allowed_network_opens_itself_and_nothing_beside_it() -> None:
    allowed = (ip_network("10.1.0.0/16"), ip_network("fd00:1::/32"))
    assert refusal(ip_address("10.1.2.3"), allowed) is None
    assert refusal(ip_address("fd00:1::5"), allowed) is None
    assert refusal(ip_address("10.2.0.0"), allowed) == "private"
    assert refusal(ip_address("fd00:2::"), allowed) == "private"


def test_an_allowed_network_does_not_open_addresses_that_embed_it() -> None:
    allowed = (ip_network("127.0.0.0/8"),)
    for text in ("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"):
        assert refusal(ip_address(text), allowed) is not None


@given(st.integers(0, 2**32 - 1))
def test_no_form_that_embeds_an_ipv4_address_gets_through(number: int) -> None:
    for prefix, shift in (
        ("::", 0),
        ("::ffff:0:0", 0),
        ("::ffff:0:0:0", 0),
        ("64:ff9b::", 0),
        ("64:ff9b:1::", 0),
        ("2002::", 80),
        ("2001::", 0),
    ):
        assert refusal(IPv6Address(int(IPv6Address(prefix)) | number << shift)) is not None


@given(st.ip_addresses())
def test_what_gets_through_is_global_by_the_standard_library_too(ip: object) -> None:
    # Not the rule, but a second opinion on what the rule lets through.
    address = ip_address(str(ip))
    if refusal(address) is None:
        assert address.is_global
        assert not address.is_multicast


def test_a_zone_makes_an_address_no_other() -> None:
    assert refusal(ip_address("::1%eth0")) == "loopback"
    assert refusal(ip_address("fd00:ec2::254%1"), [ip_network("fc00::/7")]) is not None


def test_good_addresses_of_a_name_are_kept_and_bad_ones_left_out() -> None:
    found = judged(["127.0.0.1", "1.1.1.1", "64:ff9b::101:101", "2606:4700::1"])
    assert found == (ip_address("1.1.1.1"), ip_address("2606:4700::1"))


@pytest.mark.parametrize(
    "texts", [[], ["127.0.0.1"], ["10.0.0.1", "::1"], ["nonsense"], ["2606:4700::1%eth0"]]
)
def test_a_name_without_a_good_address_is_refused(texts: list[str]) -> None:
    with pytest.raises(EgressRefused):
        judged(texts)


class Names:
    """A resolver that gives another answer each time, the last one again and again."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().listen() as listening:
        yield listening


async def connected(backend: GuardedBackend, host: str, port: int) -> str:
    stream = await backend.connect_tcp(host, port, 5.0)
    peer = stream.get_extra_info("server_addr")
    await stream.aclose()
    return str(peer[0])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "localhost", "0x7f.1", "2130706433"]
)
async def test_the_systems_own_ways_to_loopback_are_refused_before_they_are_dialled(
    receiver: Receiver, host: str
) -> None:
    # As the system resolves them, old notations included.
    with pytest.raises((EgressRefused, httpcore.ConnectError)):
        await connected(GuardedBackend(), host, receiver.port)
    assert receiver.connections == 0


async def test_the_listener_would_have_been_reached(receiver: Receiver) -> None:
    backend = GuardedBackend([ip_network("127.0.0.0/8")])
    assert await connected(backend, "localhost", receiver.port) == "127.0.0.1"
    async with asyncio.timeout(ENOUGH):
        while not receiver.connections:
            await asyncio.sleep(0.01)


async def test_a_name_that_flips_to_a_refused_address_is_dialled_as_it_was_judged(
    receiver: Receiver,
) -> None:
    names = Names(["127.0.0.2"], ["127.0.0.1"])
    backend = GuardedBackend([ip_network("127.0.0.2/32")], names)
    async with Receiver().listen("127.0.0.2", port=receiver.port):
        assert await connected(backend, "rebind.test", receiver.port) == "127.0.0.2"
        assert names.asked == ["rebind.test"]
        with pytest.raises(EgressRefused):
            await connected(backend, "rebind.test", receiver.port)
    assert names.asked == ["rebind.test"] * 2
    assert receiver.connections == 0


async def test_a_name_with_a_good_and_a_bad_address_never_reaches_the_bad_one(
    receiver: Receiver,
) -> None:
    # Nobody listens at the good one.
    names = Names(["127.0.0.1", "127.0.0.2", "127.0.0.1"])
    backend = GuardedBackend([ip_network("127.0.0.2/32")], names)
    with pytest.raises(httpcore.ConnectError):
        await connected(backend, "mixed.test", receiver.port)
    assert receiver.connections == 0


async def test_the_next_address_is_tried_when_one_does_not_answer(
    receiver: Receiver,
) -> None:
    names = Names(["127.0.0.3", "127.0.0.1"])
    backend = GuardedBackend([ip_network("127.0.0.0/8")], names)
    assert await connected(backend, "two.test", receiver.port) == "127.0.0.1"


async def test_of_many_addresses_only_some_are_tried(receiver: Receiver) -> None:
    dead = [f"127.0.1.{n}" for n in range(MOST_ADDRESSES)]
    backend = GuardedBackend([ip_network("127.0.0.0/8")], Names([*dead, "127.0.0.1"]))
    with pytest.raises(httpcore.ConnectError):
        await connected(backend, "many.test", receiver.port)
    assert receiver.connections == 0


async def test_a_lookup_that_hangs_ends_with_the_time_limit() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    with pytest.raises(httpcore.ConnectTimeout):
        await GuardedBackend((), never).connect_tcp("slow.test", 80, 0.05)


async def test_a_lookup_that_fails_is_a_failure_to_connect() -> None:
    async def fails(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    with pytest.raises(httpcore.ConnectError):
        await GuardedBackend((), fails).connect_tcp("no.test", 80, 5.0)


class Elsewhere(httpcore.AsyncNetworkStream):
    """A connection that ended somewhere else."""

    closed = False

    def get_extra_info(self, info: str) -> object:
        return ("127.0.0.9", 80) if info == "server_addr" else None

    async def aclose(self) -> None:
        self.closed = True


class Diverted(httpcore.AsyncNetworkBackend):
    def __init__(self, stream: Elsewhere) -> None:
        self.stream = stream

    async def connect_tcp(self, *args: object, **kwargs: object) -> Elsewhere:
        return self.stream


async def test_a_connection_that_ended_elsewhere_is_closed_unused() -> None:
    stream = Elsewhere()
    backend = GuardedBackend()
    backend._inner = Diverted(stream)
    with pytest.raises(EgressRefused):
        await backend.connect_tcp("1.1.1.1", 80, 5.0)
    assert stream.closed


async def test_local_sockets_are_never_connected_to() -> None:
    with pytest.raises(NotImplementedError):
        await GuardedBackend().connect_unix_socket("/run/any.sock")
