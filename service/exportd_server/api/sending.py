"""Sends what a stream begins with, and its messages to readers that take them in time."""

from __future__ import annotations

import asyncio
from typing import Any

from exportd_server.errors import ErrorReason, ExportdError

_LAST_SECONDS = 10.0
"""How long the end of a call waits for its initial metadata. Only a connection that takes
nothing at all makes it wait, which the pings then find dead."""


async def begin(context: Any) -> None:
    """Send the initial metadata of a call that has sent nothing yet.

    The library notes that it has sent them only when that is done. Where it is cancelled
    before, be it in a first message that takes them along, it sends them once more with the
    status; its core refuses that, and the caller waits for ever. So nothing cancels this:
    whatever ends the call goes on once they are on their way, which no reader's window
    holds up.
    """
    sending = asyncio.ensure_future(context.send_initial_metadata(()))
    loop = asyncio.get_running_loop()
    cancelled: asyncio.CancelledError | None = None
    left: float | None = None
    while not sending.done():
        try:
            await asyncio.wait({sending}, timeout=left)
        except asyncio.CancelledError as error:
            if cancelled is None:
                end = loop.time() + _LAST_SECONDS
            cancelled, left = error, max(0.0, end - loop.time())
        else:
            break
    if cancelled is not None:
        sending.add_done_callback(_note_outcome)
        raise cancelled
    sending.result()


def _note_outcome(sending: asyncio.Future[None]) -> None:
    """Nobody asks for it any more, and asyncio would complain of that."""
    if not sending.cancelled():
        sending.exception()


class Messages:
    """The messages of one call, which are sent one after the other."""

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
        if not self._begun:
            self._begun = True
            await begin(self._context)
        try:
            async with asyncio.timeout(self._stall_timeout):
                await self._context.write(message)
        except TimeoutError:
            raise ExportdError(ErrorReason.READER_STALLED, self._stalled) from None
