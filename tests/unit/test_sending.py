"""Streams that are ended while they begin, over real connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest

from exportd_server.api.interceptors.open_streams import OpenStreamsInterceptor
from exportd_server.api.sending import Messages
from exportd_server.errors import ErrorReason, ExportdError
from tests.support.http2 import (
    DATA,
    END_STREAM,
    HEADERS,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    connected,
)
from tests.support.waits import ENOUGH

Behaviour = Callable[[Any], Awaitable[None]]
STALLED = 0.3


@asynccontextmanager
async def serving(
    behaviour: Behaviour, *interceptors: grpc.aio.ServerInterceptor
) -> AsyncIterator[int]:
    """The port of a server with a method `/a/b` that behaves so."""

    async def method(_request: bytes, context: Any) -> None:
        try:
            await behaviour(context)
        except (TimeoutError, ExportdError):
            await context.abort(grpc.StatusCode.ABORTED, "ended")

    server = grpc.aio.server(interceptors=interceptors)
    handler: Any = grpc.unary_stream_rpc_method_handler(method)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("a", {"b": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(ENOUGH):
            yield port
    finally:
        await server.stop(None)


async def outcome(port: int) -> tuple[list[bytes], str]:
    """The messages of a call, and what its status says."""
    found: list[bytes] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: Any = channel.unary_stream("/a/b")
        try:
            async for message in method(b""):
                found += [message]
        except grpc.aio.AioRpcError as error:
            return found, error.details() or ""
    return found, ""


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("scopes", [1, 2])
async def test_a_call_that_is_ended_as_it_begins_has_a_status(
    scopes: int, turns: int
) -> None:
    """By one that ends it, and by another one turns of the loop later."""

    async def behaviour(context: Any) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as first, asyncio.timeout(None) as second:

            async def end() -> None:
                second.reschedule(0)
                for _ in range(turns):
                    await asyncio.sleep(0)
                if scopes == 2:
                    first.reschedule(0)

            ending = loop.create_task(end())
            try:
                await Messages(context, STALLED).send(b"first")
            finally:
                with suppress(asyncio.CancelledError):
                    await ending
        raise TimeoutError

    async with serving(behaviour) as port:
        assert (await outcome(port))[1] == "ended"


async def test_a_call_that_is_ended_in_a_later_message_has_a_status() -> None:
    async def behaviour(context: Any) -> None:
        messages = Messages(context, STALLED)
        await messages.send(b"first")
        async with asyncio.timeout(0):
            await messages.send(b"second")

    async with serving(behaviour) as port:
        found, status = await outcome(port)
        assert found[0] == b"first"
        assert status == "ended"


async def test_a_service_that_writes_as_its_time_is_up_has_a_status() -> None:
    """The library's own do so without `Messages`."""

    async def behaviour(context: Any) -> None:
        time.sleep(0.3)  # noqa: ASYNC251 - so that the time is up at its next step
        await context.write(b"late")

    open_streams = OpenStreamsInterceptor(frozenset(), 100, 0.1)
    async with serving(behaviour, open_streams) as port:
        assert "call again" in (await outcome(port))[1]


async def test_a_reader_without_room_for_one_message_is_given_up_and_told_in_the_end() -> (
    None
):
    given_up = asyncio.Event()

    async def behaviour(context: Any) -> None:
        try:
            await Messages(context, STALLED).send(b"first")
        except ExportdError as error:
            if error.reason is ErrorReason.READER_STALLED:
                given_up.set()
            raise

    async with serving(behaviour) as port, connected(port) as reader:
        no_window = b"\0\4" + bytes(4)
        await reader.send(SETTINGS, body=no_window)
        await reader.begin_call(1, "/a/b")
        await reader.send(DATA, END_STREAM, 1, bytes(5))
        await given_up.wait()
        await reader.send(WINDOW_UPDATE, stream=1, body=(1000).to_bytes(4, "big"))
        found: list[tuple[int, int]] = []
        while not found or not found[-1][1] & END_STREAM:
            frame = await reader.frame()
            if frame.stream == 1:
                found.append((frame.kind, frame.flags))
                assert frame.kind != RST_STREAM
        assert [kind for kind, _ in found] == [HEADERS, DATA, HEADERS]
