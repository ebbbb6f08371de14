"""An HTTP receiver on loopback that counts who comes, keeps what it is sent, and answers
as a script says. It parses by hand, so that it does not share the sender's reading."""

from __future__ import annotations

import asyncio
import hashlib
import io
import ipaddress
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from uuid import uuid4

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]
"""Answers one request. When it returns the connection is kept, unless it closed it."""


@dataclass(frozen=True)
class Received:
    """One request, as it stood on the wire."""

    line: str
    headers: tuple[tuple[str, str], ...]
    size: int
    sha256: bytes
    kept: bytes | Path = field(repr=False)
    """The body, or the file that has it."""

    @property
    def body(self) -> bytes:
        """The body."""
        return self.kept.read_bytes() if isinstance(self.kept, Path) else self.kept

    def header(self, name: str) -> str:
        """The value of a header that is there exactly once."""
        (value,) = (text for key, text in self.headers if key.lower() == name)
        return value

    def webhook_headers(self) -> dict[str, str]:
        """What a verifier is given."""
        return {key: text for key, text in self.headers if key.startswith("webhook-")}


def reply(
    status: int = 204, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
) -> Script:
    """A plain answer."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {text}" for name, text in headers)]
    if status != 204:
        lines.append(f"content-length: {len(body)}")
    return raw("\r\n".join([*lines, "", ""]).encode() + body)


def raw(data: bytes, *, close: bool = False) -> Script:
    """These bytes."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()

    return answer


async def reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection off, without an orderly end."""
    raw_socket = writer.get_extra_info("socket")
    raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def hang(_writer: asyncio.StreamWriter) -> None:
    """Say nothing."""
    await asyncio.Event().wait()


def drip(head: bytes, piece: bytes = b"x", every: float = 0.02) -> Script:
    """Begin with `head`, and go on with `piece` for ever, now and then."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(every)

    return answer


class Receiver:
    """See above. `answers` are used in turn, the last one again and again; those of
    `early` before the body is read. Bodies are kept in memory, in a folder, or not."""

    def __init__(
        self, *answers: Script, early: bool = False, keep: bool | Path = True
    ) -> None:
        self.answers = list(answers) or [reply()]
        self.early = early
        self.keep = keep
        self.connections = 0
        self.open = 0
        self.requests: list[Received] = []
        self.arrived = asyncio.Event()
        """A request's head is there."""
        self.cut_short = asyncio.Event()
        """A request's body ended before its length."""
        self.port = 0
        self.host = ""
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listen(
        self,
        host: str = "127.0.0.1",
        *,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> AsyncIterator[Receiver]:
        """Listen while the context is open."""
        server = await asyncio.start_server(self._serve, host, port, ssl=tls)
        self.host = host
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    @property
    def url(self) -> str:
        """Where it listens, by plain HTTP."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/hook"

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                while not writer.is_closing():
                    await self._one(reader, writer)
        except asyncio.CancelledError:
            # The test is over; its server's own machinery wants no cancelled handlers.
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1")
        line, *fields = head.split("\r\n")
        pairs = [text.partition(":") for text in fields]
        headers = tuple((name, value.strip(" \t")) for name, _, value in pairs)
        self.arrived.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if self.early:
            await answer(writer)
            return
        length = int(next(text for name, text in headers if name == "content-length"))
        digest, left = hashlib.sha256(), length
        path = self.keep / str(uuid4()) if isinstance(self.keep, Path) else None
        with io.BytesIO() if path is None else path.open("w+b") as kept:
            while left:
                piece = await reader.read(min(left, 65_536))
                if not piece:
                    self.cut_short.set()
                    raise ConnectionResetError
                digest.update(piece)
                left -= len(piece)
                if self.keep:
                    kept.write(piece)
            body = path or cast("io.BytesIO", kept).getvalue()
        self.requests.append(Received(line, headers, length, digest.digest(), body))
        await answer(writer)


def certificates(folder: Path, *names: str) -> tuple[Path, ssl.SSLContext]:
    """An authority's PEM file, and what a server needs that it vouches for."""
    now = datetime.now(UTC)
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test authority")])

    def signed(
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        by: ec.EllipticCurvePrivateKey,
        *extensions: x509.ExtensionType,
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )
        for extension in extensions:
            critical = isinstance(extension, x509.BasicConstraints)
            builder = builder.add_extension(extension, critical=critical)
        made = builder.sign(by, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_file, server_file = folder / "ca.pem", folder / "server.pem"
    ca_file.write_bytes(
        signed(issuer, authority, authority, x509.BasicConstraints(ca=True, path_length=0))
    )
    server_file.write_bytes(
        own.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "receiver")]),
            own,
            authority,
            x509.SubjectAlternativeName([_general_name(name) for name in names]),
            x509.BasicConstraints(ca=False, path_length=None),
        )
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server_file)
    return ca_file, context


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
