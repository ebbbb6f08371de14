"""Stands between the store and a real S3 service, and spoils what it is told to."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from tests.support.waits import ENOUGH

_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `operation` is create, part, complete, abort, get, head, list,
    uploads, delete, delete_many or other; `index` counts those of one operation."""

    operation: str
    index: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """What to do to a request: pass it on or not, changed or not, and then answer or not.

    With `truncate` the answer ends after so many bytes of its body, by a cut; with `cut`
    there is none; with `stall` it comes only when the proxy is told to let go.
    """

    forward: bool = False
    cut: bool = False
    stall: bool = False
    status: int = 0
    body: str = ""
    truncate: int | None = None
    corrupt: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


def error(status: int, code: str, *, forward: bool = False, extra: str = "") -> Fault:
    """An answer as S3 gives it when it refuses."""
    body = f"<Error><Code>{code}</Code><Message>so it is</Message>{extra}</Error>"
    return Fault(forward=forward, status=status, body=f"<?xml version='1.0'?>{body}")


Plan = Callable[[Call], Fault | None]


@dataclass
class S3Proxy:
    """The proxy; `plan` decides about each request, and may be changed at any time."""

    upstream: str
    plan: Plan = lambda _: None
    endpoint: str = ""
    calls: list[Call] = field(default_factory=list)
    sent: int = 0
    most_at_once: Counter[str] = field(default_factory=Counter)
    _counts: Counter[str] = field(default_factory=Counter)
    _active: Counter[str] = field(default_factory=Counter)
    _released: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop | None = None

    def count(self, operation: str) -> int:
        """How many requests of a kind there were."""
        return self._counts[operation]

    @property
    def active(self) -> int:
        """How many requests are under way."""
        return self._active.total()

    def release(self) -> None:
        """Let go of what is stalled, now and later."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._released.set)

    async def serve(self, ready: Future[None], stop: asyncio.Event) -> None:
        self._loop = asyncio.get_running_loop()
        application = web.Application(client_max_size=64 << 20)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            ready.set_result(None)
            await stop.wait()
            self._released.set()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        operation = _operation(request)
        index = self._counts[operation]
        self._counts[operation] += 1
        call = Call(
            operation,
            index,
            {name.lower(): value for name, value in request.headers.items()},
            await request.read(),
        )
        self.calls.append(call)
        self._active[operation] += 1
        self.most_at_once[operation] = max(
            self.most_at_once[operation], self._active[operation]
        )
        try:
            return await self._answer(request, call, self.plan(call) or Fault(forward=True))
        finally:
            self._active[operation] -= 1

    async def _answer(
        self, request: web.Request, call: Call, fault: Fault
    ) -> web.StreamResponse:
        if fault.stall:
            await self._released.wait()
        if fault.corrupt:
            middle = len(call.body) // 2
            flipped = bytes([call.body[middle] ^ 1])
            body = call.body[:middle] + flipped + call.body[middle + 1 :]
            call = replace(call, body=body)
        if not fault.forward:
            return self._own_answer(request, fault)
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in _HOP
        }
        async with self._session.request(
            request.method,
            URL(f"{self.upstream}{request.raw_path}", encoded=True),
            headers=headers,
            data=io.BytesIO(call.body) if call.body else None,
            skip_auto_headers=("Content-Type", "User-Agent", "Accept", "Accept-Encoding"),
        ) as answer:
            if fault.cut or fault.status:
                await answer.read()
                return self._own_answer(request, fault)
            return await self._pass_on(request, answer, fault.truncate)

    async def _pass_on(
        self, request: web.Request, answer: Any, truncate: int | None
    ) -> web.StreamResponse:
        headers = {
            name: value
            for name, value in answer.headers.items()
            if name.lower() not in _HOP
        }
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        sent = 0
        async for chunk in answer.content.iter_any():
            data = chunk if truncate is None else chunk[: truncate - sent]
            await response.write(data)
            sent += len(data)
            self.sent += len(data)
            if sent == truncate:
                _cut(request)
                break
        return response

    def _own_answer(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        if fault.cut:
            _cut(request)
            return web.Response()
        return web.Response(
            status=fault.status,
            text=fault.body,
            content_type="application/xml",
            headers=fault.headers,
        )


@contextmanager
def s3_proxy(upstream: str) -> Iterator[S3Proxy]:
    """A proxy in a thread of its own, because a writer blocks the test's."""
    proxy = S3Proxy(upstream)
    ready: Future[None] = Future()
    stop: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def main() -> None:
        event = asyncio.Event()
        stop.set_result((asyncio.get_running_loop(), event))
        await proxy.serve(ready, event)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    ready.result(ENOUGH)
    try:
        yield proxy
    finally:
        loop, event = stop.result(ENOUGH)
        loop.call_soon_threadsafe(event.set)
        thread.join(ENOUGH)


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _operation(request: web.Request) -> str:
    query, method = request.query, request.method
    table = {
        ("POST", "uploads"): "create",
        ("PUT", "partNumber"): "part",
        ("POST", "uploadId"): "complete",
        ("DELETE", "uploadId"): "abort",
        ("GET", "list-type"): "list",
        ("GET", "uploads"): "uploads",
        ("POST", "delete"): "delete_many",
    }
    for (wanted, parameter), name in table.items():
        if method == wanted and parameter in query:
            return name
    return {"GET": "get", "HEAD": "head", "DELETE": "delete"}.get(method, "other")
