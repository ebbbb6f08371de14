"""Tokens of download URLs: whoever has no key can neither make nor change one."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exportd_server.api.link import BadLink, Link, LinkKeys

ONE, OTHER = b"1" * 32, b"2" * 40
LINK = Link(
    tenant="acme",
    job_id="01a20223-99c7-7474-b050-c24fb23966b0",
    generation=3,
    part=7,
    expire_time=datetime(2026, 11, 22, 7, 23, 37, 123456, tzinfo=UTC),
)

links = st.builds(
    Link,
    tenant=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True),
    job_id=st.uuids().map(str),
    generation=st.integers(0, 2**63 - 1),
    part=st.none() | st.integers(0, 2**31 - 1),
    expire_time=st.integers(0, 250_000_000_000_000_000).map(
        lambda micros: datetime.fromtimestamp(0, UTC) + timedelta(microseconds=micros)
    ),
)


@given(links)
def test_a_link_comes_back_as_it_was_signed(link: Link) -> None:
    token = LinkKeys([ONE]).sign(link)
    assert LinkKeys([ONE]).read(token) == link
    assert token.isascii()
    assert set(token) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    )
    assert len(token) <= 400


@given(links, st.data())
def test_no_change_of_one_character_is_accepted(link: Link, data: st.DataObject) -> None:
    token = LinkKeys([ONE]).sign(link)
    at = data.draw(st.integers(0, len(token) - 1))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    changed = data.draw(st.sampled_from(alphabet).filter(lambda c: c != token[at]))
    with pytest.raises(BadLink):
        LinkKeys([ONE]).read(token[:at] + changed + token[at + 1 :])


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.hex()))
def test_what_is_no_token_is_refused_and_nothing_else(text: str) -> None:
    with pytest.raises(BadLink):
        LinkKeys([ONE]).read(text)


def test_cutting_or_extending_a_token_breaks_it() -> None:
    token = LinkKeys([ONE]).sign(LINK)
    for other in (token[:-1], token[:-4], token + "A", token + "AAAA", token + "=", ""):
        with pytest.raises(BadLink):
            LinkKeys([ONE]).read(other)


def test_fields_cannot_trade_bytes_with_each_other() -> None:
    # The tenant comes last and has no length of its own; all before it are of fixed size.
    keys = LinkKeys([ONE])
    data = base64.urlsafe_b64decode(keys.sign(LINK) + "==")
    moved = data[:-32].replace(b"acme", b"acm") + data[-32:]
    with pytest.raises(BadLink):
        keys.read(base64.urlsafe_b64encode(moved).rstrip(b"=").decode())


def test_the_first_key_signs_and_all_are_accepted() -> None:
    old, new = LinkKeys([ONE]), LinkKeys([OTHER, ONE])
    assert new.read(old.sign(LINK)) == LINK
    assert LinkKeys([OTHER]).read(new.sign(LINK)) == LINK
    with pytest.raises(BadLink):
        old.read(new.sign(LINK))
    with pytest.raises(BadLink):
        LinkKeys([OTHER]).read(old.sign(LINK))


@pytest.mark.parametrize("keys", [[], [b"1" * 31], [ONE, b""]])
def test_keys_that_could_be_guessed_are_refused(keys: list[bytes]) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        LinkKeys(keys)


def test_expiry_is_kept_to_the_microsecond() -> None:
    keys = LinkKeys([ONE])
    later = Link("a", LINK.job_id, 1, None, LINK.expire_time + timedelta(microseconds=1))
    assert keys.read(keys.sign(later)).expire_time == later.expire_time
