"""CRC32C values combine and come apart as their bytes do."""

from __future__ import annotations

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from exportd_server.platform import checksum
from exportd_server.platform.checksum import (
    crc32c_combine,
    crc32c_without_prefix,
    crc32c_without_suffix,
)


def test_the_check_value_of_the_published_catalogue_comes_out() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c_combine(crc32c(b"12345"), crc32c(b"6789"), 4) == 0xE3069283


@settings(deadline=None)
@given(st.binary(), st.binary())
def test_combining_equals_hashing_the_joined_bytes(first: bytes, second: bytes) -> None:
    combined = crc32c_combine(crc32c(first), crc32c(second), len(second))
    assert combined == crc32c(first + second)


@settings(deadline=None)
@given(st.binary(), st.binary())
def test_a_prefix_and_a_suffix_can_be_taken_away(first: bytes, second: bytes) -> None:
    whole = crc32c(first + second)
    assert crc32c_without_prefix(whole, crc32c(first), len(second)) == crc32c(second)
    assert crc32c_without_suffix(whole, crc32c(second), len(second)) == crc32c(first)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_combining_many_pieces_in_turn_equals_hashing_them_all(pieces: list[bytes]) -> None:
    crc = 0
    for piece in pieces:
        crc = crc32c_combine(crc, crc32c(piece), len(piece))
    assert crc == crc32c(b"".join(pieces))


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**63),
    st.integers(0, 2**63),
)
def test_lengths_no_memory_could_hold_add_up(
    crc1: int, crc2: int, one: int, two: int
) -> None:
    """Appending n zero bytes and then m is the same as appending n + m."""
    zeros = crc32c_combine(crc32c_combine(crc1, 0, one), 0, two)
    assert zeros == crc32c_combine(crc1, 0, one + two)
    whole = crc32c_combine(crc1, crc2, one)
    assert crc32c_without_suffix(whole, crc2, one) == crc1
    assert crc32c_without_prefix(whole, crc1, one) == crc2


def test_a_long_run_of_zeros_is_combined_as_it_is_hashed() -> None:
    zeros = bytes(3_000_001)
    assert crc32c_combine(crc32c(b"a"), crc32c(zeros), len(zeros)) == crc32c(b"a" + zeros)


def test_x_has_the_order_that_the_inverse_relies_on() -> None:
    """x**(2**31 - 1) is 1, and as 2**31 - 1 is a prime, no smaller power but x**0 is."""
    last = checksum._POWERS[-1]
    square = checksum._multiply(last, last)
    assert square == checksum._POWERS[0]
    assert checksum._POWERS[0] != checksum._ONE


@pytest.mark.parametrize("length", [-1, -(2**40)])
def test_a_negative_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="not negative"):
        crc32c_combine(1, 2, length)
    with pytest.raises(ValueError, match="not negative"):
        crc32c_without_prefix(1, 2, length)
    with pytest.raises(ValueError, match="not negative"):
        crc32c_without_suffix(1, 2, length)
