"""Changes that are not given up half way."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

from exportd_server.errors import ExportdError, LedgerUnavailable
from exportd_server.jobs import audit

log = structlog.get_logger(__name__)

T = TypeVar("T")


async def to_its_end(change: Coroutine[Any, Any, T]) -> T:
    """What `change` gives. A caller that goes away does not end it.

    The ledger's threads know nothing of callers: what they have begun is committed, heard
    by somebody or not. So the change goes on, with all that belongs to it, and only then
    this raises `CancelledError`; how it ended is in the audit entry. Whoever counts calls
    under way counts this one until then.
    """
    task = asyncio.create_task(change)
    gone: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as cancelled:
            gone = cancelled
    if gone is None:
        return task.result()
    if (entry := audit.current()) is not None:
        entry.ending = _ending(task)
    raise gone


def _ending(task: asyncio.Task[Any]) -> audit.Ending:
    if task.cancelled():
        # Only a loop that is taken down does that. The ledger may have committed.
        return audit.ending_of(LedgerUnavailable())
    error = task.exception()
    if error is None:
        return audit.ENDED_WELL
    if not isinstance(error, ExportdError):
        # There is nobody else to whom it is told.
        log.error("unforeseen error", exc_info=error)
    return audit.ending_of(error)
