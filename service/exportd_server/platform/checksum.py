"""Arithmetic on CRC32C values, without the bytes they were made from.

A CRC is the remainder of the message, read as a polynomial over GF(2), by a generator P.
Appending n bytes multiplies the message by x**(8n), so the CRC of a concatenation is
`crc1 * x**(8n) + crc2` modulo P. x**(8n) is found by squaring, in about log2(n) products.
The technique is the one of Mark Adler's `crc32_combine` in zlib 1.2.12 and later; P is
Castagnoli's, 0x1EDC6F41, as RFC 3720 (iSCSI) uses it, with the bits of every value
reflected: bit 31 is the coefficient of x**0.
"""

from __future__ import annotations

_GENERATOR = 0x82F63B78
_ONE = 1 << 31
# P is (x + 1) times a primitive polynomial of degree 31, so x**_ORDER is 1 modulo P and
# x has an inverse: what was appended can be taken away again.
_ORDER = 2**31 - 1


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo P."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_GENERATOR if b & 1 else 0)
    return product


def _squares() -> tuple[int, ...]:
    """x**(2**k) modulo P for k from 0 to 30, which is as many as _ORDER needs."""
    powers = [_ONE >> 1]
    while len(powers) < _ORDER.bit_length():
        powers.append(_multiply(powers[-1], powers[-1]))
    return tuple(powers)


_POWERS = _squares()


def _times_x(crc: int, exponent: int) -> int:
    """`crc * x**exponent` modulo P; the exponent may be negative."""
    exponent %= _ORDER
    for power in _POWERS[: exponent.bit_length()]:
        if exponent & 1:
            crc = _multiply(power, crc)
        exponent >>= 1
    return crc


def crc32c_combine(crc1: int, crc2: int, len2: int) -> int:
    """The CRC32C of two byte strings joined, from that of each.

    `len2` is the length of the second one in bytes.
    """
    if len2 < 0:
        raise ValueError("a length is not negative")
    return _times_x(crc1, 8 * len2) ^ crc2


def crc32c_without_prefix(whole: int, prefix: int, len_rest: int) -> int:
    """The CRC32C of what follows a prefix, from those of the whole and of the prefix.

    `len_rest` is the length in bytes of what follows.
    """
    return crc32c_combine(prefix, whole, len_rest)


def crc32c_without_suffix(whole: int, suffix: int, len_suffix: int) -> int:
    """The CRC32C of what precedes a suffix, from those of the whole and of the suffix.

    `len_suffix` is the length of the suffix in bytes.
    """
    if len_suffix < 0:
        raise ValueError("a length is not negative")
    return _times_x(whole ^ suffix, -8 * len_suffix)
