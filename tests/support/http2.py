"""The little of HTTP/2 that it takes to be a bad client of a gRPC server, by hand:
libraries do not let one misbehave."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD = struct.Struct(">BHBBI")

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1


@dataclass(frozen=True)
class Frame:
    """A frame as it came."""

    kind: int
    flags: int
    stream: int
    body: bytes


class Connection:
    """An HTTP/2 connection without TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(
        self, kind: int, flags: int = 0, stream: int = 0, body: bytes = b""
    ) -> None:
        """Send a frame."""
        head = _HEAD.pack(len(body) >> 16, len(body) & 0xFFFF, kind, flags, stream)
        self._writer.write(head + body)
        await self._writer.drain()

    async def begin_call(
        self,
        stream: int,
        path: str | bytes,
        metadata: Mapping[str, str | bytes] = MappingProxyType({}),
    ) -> None:
        """Send the headers of a gRPC call, and nothing after."""
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            **metadata,
        }
        await self.send(HEADERS, END_HEADERS, stream, _fields(headers))

    async def frame(self) -> Frame:
        """The next frame; raises `EOFError` when the server has closed."""
        try:
            head = await self._reader.readexactly(9)
            high, low, kind, flags, stream = _HEAD.unpack(head)
            body = await self._reader.readexactly(high << 16 | low)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError from None
        return Frame(kind, flags, stream, body)

    async def frames(self) -> list[Frame]:
        """All frames until the server closes; those that are not ours to answer."""
        found = []
        with suppress(EOFError):
            while True:
                found.append(await self.frame())
        return found


def _fields(headers: Mapping[str, str | bytes]) -> bytes:
    """Header fields as HPACK has them, in its plainest form."""
    out = bytearray()
    for name, value in headers.items():
        out += b"\0" + bytes([len(name)]) + name.encode()
        raw = value if isinstance(value, bytes) else value.encode()
        out += bytes([len(raw)]) + raw
    return bytes(out)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """A connection on which HTTP/2 has begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = Connection(reader, writer)
    try:
        writer.write(_PREFACE)
        await connection.send(SETTINGS)
        yield connection
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
