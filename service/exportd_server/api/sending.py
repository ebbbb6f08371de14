"""Sends the messages of a stream, to readers that take them in time."""

from __future__ import annotations

import asyncio
from typing import Any


class Messages:
    """The messages of one call, which are sent one after the other.

    The first of them takes the initial metadata along, and a call that is cancelled in
    between does not know that it has sent them: its status would have them sent again,
    which the library refuses, and the caller would wait for ever. So what ends a call waits
    for the first message to be on its way.
    """

    def __init__(self, context: Any, stall_timeout: float) -> None:
        """`stall_timeout`: seconds that a reader may take for a message."""
        self._context = context
        self._stall_timeout = stall_timeout
        self._begun = False

    async def send(self, message: Any) -> None:
        """Raises `TimeoutError` when the reader takes nothing, and `InternalError` of the
        library when it has gone."""
        if self._begun:
            async with asyncio.timeout(self._stall_timeout):
                await self._context.write(message)
            return
        self._begun = True
        writing = asyncio.ensure_future(self._context.write(message))
        writing.add_done_callback(_note_outcome)
        try:
            async with asyncio.timeout(self._stall_timeout):
                await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing}, timeout=self._stall_timeout)
            raise


def _note_outcome(writing: asyncio.Future[None]) -> None:
    """Nobody else may ask for it any more, and asyncio complains of that."""
    if not writing.cancelled():
        writing.exception()
