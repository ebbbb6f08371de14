"""Writes what StreamDownload messages begin with as wire bytes, without the generated
classes, so that the data behind it is not copied.

The encoding is that of the protobuf wire format for `StreamDownloadResponse`: fields in the
order of their numbers, defaults left out, `data` last. A test holds it to the generated
class.
"""

from __future__ import annotations

import struct

_OFFSET_TAG = b"\x10"  # field 2, varint
_CRC32C_TAG = b"\x1d"  # field 3, 32-bit
_DATA_TAG = b"\x7a"  # field 15, length-delimited
_FIXED32 = struct.Struct("<I")


def varint(number: int) -> bytes:
    """A non-negative number as a base-128 varint."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def data_head(offset: int, crc32c: int, count: int) -> bytes:
    """What a `StreamDownloadResponse` with `offset`, `crc32c` and `count` bytes of `data`
    begins with; the data follows."""
    head = bytearray()
    if offset:
        head += _OFFSET_TAG + varint(offset)
    if crc32c:
        head += _CRC32C_TAG + _FIXED32.pack(crc32c)
    if count:
        head += _DATA_TAG + varint(count)
    return bytes(head)


def usual_head_length(offset: int, count: int) -> int:
    """How long the head is unless the checksum happens to be 0, which is left out; `count`
    at least 1."""
    length = 1 + 4 + 1 + (count.bit_length() + 6) // 7
    return length + 1 + (offset.bit_length() + 6) // 7 if offset else length
