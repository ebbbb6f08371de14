"""Hears what other processes tell over PostgreSQL's NOTIFY, and comes back after the
connection was lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import structlog

from exportd_server.jobs.ledger.news import CHANNEL
from exportd_server.jobs.ledger.postgres_server import Address

log = structlog.get_logger(__name__)

_QUIET_SECONDS = 15.0
"""After so long without news the connection is tried."""
_ANSWER_SECONDS = 10.0
"""A server that takes longer to answer nothing is as good as gone."""
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0


class Listener:
    """Calls `told` with each text, and `missed` whenever some may have been missed. For
    the event loop it is started on."""

    def __init__(
        self, address: Address, told: Callable[[str], None], missed: Callable[[], None]
    ) -> None:
        self._address = address
        self._told = told
        self._missed = missed
        self._listening = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen from now on; returns once news is heard."""
        self._task = asyncio.create_task(self._run())
        waiting = asyncio.create_task(self._listening.wait())
        try:
            # A first connection that fails is no reason to wait: it is tried again.
            await asyncio.wait((waiting,), timeout=_LONGEST_PAUSE)
        finally:
            waiting.cancel()

    async def stop(self) -> None:
        """Listen no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        pause, told = _FIRST_PAUSE, False
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - whatever it is, it comes back
                if self._listening.is_set() or not told:
                    log.warning("news of the ledger lost", error=str(error).strip())
                    told = True
                if self._listening.is_set():
                    self._listening.clear()
                    pause = _FIRST_PAUSE
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - spreads
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _listen(self) -> None:
        async with await self._address.connect_async() as connection:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await connection.execute(f"LISTEN {CHANNEL}")
            self._listening.set()
            self._missed()
            while True:
                heard = False
                async for notice in connection.notifies(timeout=_QUIET_SECONDS):
                    heard = True
                    self._told(notice.payload)
                if not heard:
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        await connection.execute("SELECT 1")
