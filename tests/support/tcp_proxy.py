"""Stands between a client and a server on loopback: cuts connections, or holds them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.support.waits import ENOUGH

_BLOCK = 16 * 1024


@dataclass
class TcpProxy:
    """Passes bytes both ways.

    Attributes:
        upstream: Port of the server, on loopback. May change; new connections go there.
        cuts: For each connection in turn: reset it after so many bytes of the server's.
        hold_after: Hold the first connection that has brought so many bytes of the
            server's.
        held: Set once one is held.
        connections: How many there were.
    """

    upstream: int
    cuts: Sequence[int] = ()
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    connections: int = 0
    port: int = 0
    _let_go: threading.Event = field(default_factory=threading.Event)
    _open: list[socket.socket] = field(default_factory=list)
    _listening: tuple[socket.socket, threading.Thread] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[TcpProxy]:
        """Listen on a port of the system's choice."""
        self.up()
        try:
            yield self
        finally:
            self._let_go.set()
            self.down()

    def up(self) -> None:
        """Listen, on the port it had if it had one."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        accepting.start()
        self._listening = listener, accepting

    def down(self) -> None:
        """Reset what is open and refuse what comes, as a machine whose server died."""
        if self._listening is None:
            return
        listener, accepting = self._listening
        self._listening = None
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        accepting.join(ENOUGH)
        listener.close()
        for each in self._open:
            _reset(each)

    def let_go(self) -> None:
        """Pass on what is held."""
        self._let_go.set()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            index, self.connections = self.connections, self.connections + 1
            self._open.append(client)
            threading.Thread(target=self._serve, args=(client, index), daemon=True).start()

    def _serve(self, client: socket.socket, index: int) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.upstream), 10)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        self._open.append(server)
        threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
        cut = self.cuts[index] if index < len(self.cuts) else None
        self._pass(server, client, cut, self.hold_after)

    def _pass(
        self,
        source: socket.socket,
        target: socket.socket,
        cut: int | None = None,
        hold: int | None = None,
    ) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK):
                if hold is not None and passed >= hold and not self.held.is_set():
                    self.held.set()
                    self._let_go.wait(10 * ENOUGH)
                target.sendall(block)
                passed += len(block)
                if cut is not None and passed >= cut:
                    break
        _reset(source)
        _reset(target)


def _reset(connection: socket.socket) -> None:
    """Close at once, with a reset: what a machine that vanishes leaves to its peers."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        connection.close()
