"""Checksums of a part, taken while its bytes pass by on their way to the store."""

from __future__ import annotations

import builtins
import hashlib
from dataclasses import dataclass
from typing import Protocol

from crc32c import crc32c

from exportd_server.platform.checksum import crc32c_without_prefix, crc32c_without_suffix

Buffer = bytes | bytearray | memoryview

EDGE_BYTES = 65_536
"""How much of either end is kept, to find a prefix or suffix in afterwards."""


class Sink(Protocol):
    """Where the bytes go on to."""

    def write(self, data: Buffer, /) -> object:
        """Take all of `data`."""
        ...


@dataclass(frozen=True, slots=True)
class PartDigest:
    """Size and checksums of one part; the body is what lies between prefix and suffix."""

    bytes: int
    prefix_bytes: int
    suffix_bytes: int
    crc32c: int
    prefix_crc32c: int
    body_crc32c: int
    suffix_crc32c: int
    sha256: builtins.bytes


class HashingSink:
    """Passes bytes on to a writer and keeps count and checksums of them.

    Memory is a few times `EDGE_BYTES`, however long the part. Both hashes release the
    GIL while they work on a large buffer. For one thread at a time.
    """

    def __init__(self, writer: Sink) -> None:
        self._writer = writer
        self._bytes = 0
        self._crc = 0
        self._sha = hashlib.sha256(usedforsecurity=False)
        self._head = bytearray()
        self._tail = bytearray()
        # CRC32C of everything before an offset, where it is known for certain.
        self._marks = {0: 0}
        self._segment_start = 0
        self.error: BaseException | None = None
        """The first error of the writer: an encoder library that stands between may have
        turned it into one of its own, or swallowed it."""

    @property
    def bytes(self) -> int:
        """Bytes taken so far."""
        return self._bytes

    def write(self, data: Buffer, /) -> int:
        """Pass `data` on; counts it only if the writer took it, and raises what the
        writer raises."""
        view = memoryview(data).cast("B")
        try:
            self._writer.write(view)
        except BaseException as error:
            if self.error is None:
                self.error = error
            raise
        self._crc = crc32c(view, self._crc)
        self._sha.update(view)
        self._bytes += len(view)
        if len(self._head) < EDGE_BYTES:
            self._head += view[: EDGE_BYTES - len(self._head)]
        if len(view) >= EDGE_BYTES:
            self._tail[:] = view[-EDGE_BYTES:]
        else:
            self._tail += view
            # Cut seldom, so that many small writes do not each move the whole tail.
            if len(self._tail) > 2 * EDGE_BYTES:
                del self._tail[:-EDGE_BYTES]
        return len(view)

    def mark(self) -> tuple[int, int]:
        """Close the current segment, which began at the mark before or at the start;
        returns its length in bytes and its CRC32C.

        Each distinct place that is marked costs a few bytes of memory.
        """
        start = self._segment_start
        length = self._bytes - start
        crc = crc32c_without_prefix(self._crc, self._marks[start], length)
        self._marks[self._bytes] = self._crc
        self._segment_start = self._bytes
        return length, crc

    def finish(self, prefix_bytes: int, suffix_bytes: int) -> PartDigest:
        """The digest of everything written.

        Raises `ValueError` when prefix and suffix do not fit into what was written, or
        when one of them is longer than `EDGE_BYTES` and does not end, or begin, at a
        mark.
        """
        end_of_body = self._bytes - suffix_bytes
        if prefix_bytes < 0 or suffix_bytes < 0 or prefix_bytes > end_of_body:
            raise ValueError(
                f"a prefix of {prefix_bytes} and a suffix of {suffix_bytes} bytes do not "
                f"fit into {self._bytes} bytes"
            )
        prefix = self._crc_before(prefix_bytes)
        to_suffix = self._crc_before(end_of_body)
        return PartDigest(
            bytes=self._bytes,
            prefix_bytes=prefix_bytes,
            suffix_bytes=suffix_bytes,
            crc32c=self._crc,
            prefix_crc32c=prefix,
            body_crc32c=crc32c_without_prefix(
                to_suffix, prefix, end_of_body - prefix_bytes
            ),
            suffix_crc32c=crc32c_without_prefix(self._crc, to_suffix, suffix_bytes),
            sha256=self._sha.digest(),
        )

    def _crc_before(self, offset: int) -> int:
        """CRC32C of the first `offset` bytes."""
        known = self._marks.get(offset)
        if known is not None:
            return known
        if offset <= len(self._head):
            return crc32c(memoryview(self._head)[:offset])
        rest = self._bytes - offset
        if rest <= len(self._tail):
            ending = crc32c(memoryview(self._tail)[len(self._tail) - rest :])
            return crc32c_without_suffix(self._crc, ending, rest)
        raise ValueError(f"byte {offset} lies too far from both ends and was not marked")
