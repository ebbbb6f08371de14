"""Sends the messages of a stream, to readers that take them in time."""

from __future__ import annotations

import asyncio
from typing import Any

from exportd_server.errors import ErrorReason, ExportdError

_LAST_SECONDS = 10.0
"""How long the end of a call waits for its first message. A reader that has not even room
for that one will not get the status either."""


class Messages:
    """The messages of one call, which are sent one after the other.

    The first of them takes the initial metadata along, and a call that is cancelled in
    between does not know that it has sent them: its status would have them sent again,
    which the library refuses, and the caller would wait for ever. So what ends a call waits
    for the first message to be on its way.
    """

    def __init__(
        self, context: Any, stall_timeout: float, stalled: str | None = None
    ) -> None:
        """`stall_timeout`: seconds that a reader may take for a message; `stalled`: what
        one is told who takes longer."""
        self._context = context
        self._stall_timeout = stall_timeout
        self._stalled = stalled
        self._begun = False

    async def send(self, message: Any) -> None:
        """Raises READER_STALLED, and the library's `InternalError` when the reader has
        gone."""
        try:
            async with asyncio.timeout(self._stall_timeout):
                if self._begun:
                    await self._context.write(message)
                else:
                    await self._begin(message)
        except TimeoutError:
            raise ExportdError(ErrorReason.READER_STALLED, self._stalled) from None

    async def _begin(self, message: Any) -> None:
        self._begun = True
        writing = asyncio.ensure_future(self._context.write(message))
        writing.add_done_callback(_note_outcome)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing}, timeout=_LAST_SECONDS)
            raise


def _note_outcome(writing: asyncio.Future[None]) -> None:
    """Nobody else may ask for it any more, and asyncio complains of that."""
    if not writing.cancelled():
        writing.exception()
