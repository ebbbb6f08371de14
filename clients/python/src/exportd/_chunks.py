"""Reads the messages of StreamDownload, with their data where it came in.

The generated class copies the data twice more, which is a quarter of what a reader takes.
This reads the protobuf wire format (protobuf.dev/programming-guides/encoding) of messages
that have nothing but numbers and data in them, which are all but the first; the generated
class reads the others.
"""

from __future__ import annotations

from typing import NamedTuple

from exportd.v1 import export_service_pb2

METHOD = "/exportd.v1.ExportService/StreamDownload"

# Field numbers of `StreamDownloadResponse` with their wire types.
_OFFSET = 2 << 3 | 0
_CRC32C = 3 << 3 | 5
_DATA = 15 << 3 | 2

# Bytes of the numbers that are read here: an offset that is not negative, and the length
# of a message's data. The class knows what to make of longer ones.
_OFFSET_BYTES = 9
_SIZE_BYTES = 4


class Chunk(NamedTuple):
    """A message of the stream, its data as bytes of the message itself."""

    offset: int
    crc32c: int
    data: memoryview
    metadata: export_service_pb2.DownloadMetadata | None = None


def read_chunk(wire: bytes) -> Chunk:
    """Read a message. Raises `google.protobuf.message.DecodeError`."""
    offset = crc32c = at = 0
    data = memoryview(wire)
    try:
        while wire[at] != _DATA:
            if wire[at] == _OFFSET:
                offset, at = _varint(wire, at + 1, _OFFSET_BYTES)
            elif wire[at] == _CRC32C:
                crc32c, at = int.from_bytes(wire[at + 1 : at + 5], "little"), at + 5
            else:
                return _by_class(wire)
        size, at = _varint(wire, at + 1, _SIZE_BYTES)
    except IndexError:
        return _by_class(wire)
    if at + size != len(wire):
        return _by_class(wire)
    return Chunk(offset, crc32c, data[at:])


def _varint(wire: bytes, at: int, most: int) -> tuple[int, int]:
    """The number of at most so many bytes that begins there, and where the next field
    does. Raises `IndexError` when it does not end by then."""
    number = 0
    for count in range(most):
        byte = wire[at + count]
        number |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return number, at + count + 1
    raise IndexError


def _by_class(wire: bytes) -> Chunk:
    message = export_service_pb2.StreamDownloadResponse.FromString(wire)
    metadata = message.metadata if message.HasField("metadata") else None
    return Chunk(message.offset, message.crc32c, memoryview(message.data), metadata)
