"""The part of the library that accepts calls: has it go on, whatever they are named."""

from __future__ import annotations

import asyncio
import codecs
from typing import Any

_LOOP = "_server_main_loop"
"""The library's own name of what accepts calls."""


def accept_any_path() -> None:
    """Have a call whose `:path` is not UTF-8 be one to a method that nobody serves.

    The library decodes the path in the loop that accepts calls (grpcio's
    aio/server.pyx.pxi, `_server_main_loop`), where an error ends the loop, and with it the
    server of everybody: a single frame does it, of whoever gets as far as HTTP/2. Nothing
    of it can be reached from here but the error handler of the decoding. That one is the
    process's; for all but this loop it stays what it was.
    """
    codecs.register_error("strict", _strict_but_for_paths)


def _strict_but_for_paths(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeDecodeError) and _accepting():
        return "\N{REPLACEMENT CHARACTER}", error.end
    return codecs.strict_errors(error)


def _accepting() -> bool:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return False
    return task is not None and _accepts(task)


def accepting() -> set[asyncio.Task[Any]]:
    """What accepts calls, for each server on this event loop."""
    return {task for task in asyncio.all_tasks() if _accepts(task)}


def _accepts(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__name__", "") == _LOOP
