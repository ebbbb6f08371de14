"""Messages of a stream that is ended meanwhile, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from exportd_server.api.sending import Messages
from exportd_server.errors import ErrorReason, ExportdError
from tests.support.waits import ENOUGH

Behaviour = Callable[[Messages], Awaitable[None]]
PATIENCE = 0.3


@asynccontextmanager
async def calling(
    behaviour: Behaviour, *options: tuple[str, int]
) -> AsyncIterator[grpc.aio.UnaryStreamCall[bytes, bytes]]:
    """A call of a method that behaves so, and is aborted when that runs into a timeout."""

    async def method(_request: bytes, context: Any) -> None:
        try:
            await behaviour(Messages(context, PATIENCE))
        except (TimeoutError, ExportdError):
            await context.abort(grpc.StatusCode.ABORTED, "ended")

    server = grpc.aio.server()
    handler: Any = grpc.unary_stream_rpc_method_handler(method)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("a", {"b": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with (
            asyncio.timeout(ENOUGH),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel,
        ):
            stub: Any = channel.unary_stream("/a/b")
            yield stub(b"")
    finally:
        await server.stop(None)


async def test_a_call_that_is_ended_in_its_first_message_has_a_status() -> None:
    async def behaviour(messages: Messages) -> None:
        async with asyncio.timeout(0):
            await messages.send(b"first")

    async with calling(behaviour) as call:
        assert await call.read() == b"first"
        with pytest.raises(grpc.aio.AioRpcError, match="ended"):
            await call.read()


async def test_a_call_that_is_ended_in_a_later_message_has_a_status() -> None:
    async def behaviour(messages: Messages) -> None:
        await messages.send(b"first")
        async with asyncio.timeout(0):
            await messages.send(b"second")

    async with calling(behaviour) as call:
        # Whether or not its message came.
        with pytest.raises(grpc.aio.AioRpcError, match="ended"):
            _ = [each async for each in call]


async def test_a_reader_that_takes_nothing_is_given_up() -> None:
    given_up = asyncio.Event()

    async def behaviour(messages: Messages) -> None:
        try:
            while True:
                await messages.send(bytes(2**20))
        except ExportdError as error:
            if error.reason is ErrorReason.READER_STALLED:
                given_up.set()
            raise

    async with calling(behaviour):
        await given_up.wait()
