"""A part that stops in its middle; light to import, for processes that are to be killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.sinks import BytesContent, BytesReader


class HeldContent(BytesContent):
    """A part that stops in its middle until it is let on, or for ever."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    @asynccontextmanager
    async def open(self, offset: int = 0) -> AsyncIterator[BytesReader]:
        """See `Content`."""
        yield _HeldReader(self, self.data[offset:])


class _HeldReader(BytesReader):
    def __init__(self, content: HeldContent, data: bytes) -> None:
        super().__init__(data, None)
        self._content = content
        self._begun = False

    async def readinto(self, buffer: memoryview, /) -> int:
        if self._begun:
            self._content.reached.set()
            await self._content.go_on.wait()
        self._begun = True
        return await super().readinto(buffer)
