"""Brings up the processes of a fleet.

Most of what a server does at start is to load libraries. This process loads those that
can be shared once and forks: every process of the fleet then runs the server's own
command from its first line on, only sooner. So the faults, and not the starts, get the
machine's time. It is also the parent that learns how each of them ended, and takes them
with it when whoever ordered them is gone.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

# None of these starts a thread, which a fork would lose: that is checked below.
SHARED = (
    *("adbc_driver_postgresql", "aiohttp", "alembic.command", "click", "duckdb"),
    *("exportd.v1.export_service_pb2_grpc", "google.rpc.error_details_pb2", "grpc.aio"),
    *("grpc_health.v1.health", "grpc_reflection.v1alpha.reflection", "grpc_status"),
    *("isal.igzip", "psycopg", "pydantic_settings", "sqlalchemy.dialects.postgresql"),
    *("sqlglot.dialects.duckdb", "sqlglot.dialects.postgres", "structlog", "uuid_utils"),
)
_PR_SET_PDEATHSIG = 1


class Nursery:
    """Forks on request: JSON lines on standard input, answers on standard output."""

    def __init__(self) -> None:
        self._children: dict[int, str] = {}
        self._selector = DefaultSelector()
        self._woken, wake = socket.socketpair()
        for end in (self._woken, wake):
            end.setblocking(False)
        self._wake = wake
        self._buffer = b""

    def serve(self) -> Mapping[str, Any] | None:
        """Returns in each child what it is to do, and None in the parent at the end."""
        signal.set_wakeup_fd(self._wake.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(0, EVENT_READ)
        self._selector.register(self._woken, EVENT_READ)
        self._say({"ready": True})
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == 0:
                    data = os.read(0, 65536)
                    if not data:
                        self._end()
                        return None
                    order = self._orders(data)
                    if order is not None:
                        return order
                else:
                    self._woken.recv(4096)
                    self._reap()

    def _orders(self, data: bytes) -> Mapping[str, Any] | None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            pid = os.fork()
            if not pid:
                self._leave(order)
                return order  # type: ignore[no-any-return]
            self._children[pid] = order["id"]
            self._say({"id": order["id"], "pid": pid})
        return None

    def _leave(self, order: Mapping[str, Any]) -> None:
        """In a child: nothing is left of the parent but its libraries."""
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        self._woken.close()
        self._wake.close()
        for target, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            (2, order["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ):
            descriptor = os.open(path, flags, 0o644)
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(order["env"])

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            self._say({"id": self._children.pop(pid), "code": code})

    def _end(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            os.waitpid(pid, 0)

    def _say(self, what: Mapping[str, Any]) -> None:
        os.write(1, json.dumps(what).encode() + b"\n")


def main() -> None:
    """Serve; in a child, become what was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cold = "--cold" in sys.argv
    for name in () if cold else SHARED:
        importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise SystemExit(f"one of the shared libraries started a thread: {threads}")
    order = Nursery().serve()
    if order is None:
        return
    if cold:
        command = [sys.executable, "-m", "tests.torture.child", *order["arguments"]]
        os.execv(sys.executable, command)  # noqa: S606 - what was asked for
    from tests.torture import child  # noqa: PLC0415 - in the child alone

    child.main(order["arguments"])


if __name__ == "__main__":
    main()
