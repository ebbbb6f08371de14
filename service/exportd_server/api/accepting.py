"""The part of the library that accepts calls: has it go on, whatever they are named, and
knows it from other tasks."""

from __future__ import annotations

import asyncio
import codecs
from typing import Any
from weakref import WeakKeyDictionary

import grpc

_LOOP = "_server_main_loop"
"""The library's own name of what accepts calls."""


def accept_any_path() -> None:
    """Have a call whose `:path` is not UTF-8 be one to a method that nobody serves.

    The library decodes the path in the loop that accepts calls (grpcio's
    aio/server.pyx.pxi, `_server_main_loop`), where an error ends the loop, and with it the
    server of everybody: a single frame does it, of whoever gets as far as HTTP/2. Nothing
    of it can be reached from here but the error handler of the decoding. That one is the
    process's, and stays for good; for all but such loops it is what it was.
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


async def start(server: grpc.aio.Server) -> asyncio.Task[Any] | None:
    """Start a server; returns what accepts its calls from now on, until the server ends.
    None is that it cannot be told from other tasks, as the library names it otherwise."""
    one_by_one = _starting.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    async with one_by_one:
        others = _all_accepting()
        await server.start()
        found = _all_accepting() - others
    return found.pop() if len(found) == 1 else None


_starting: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def _all_accepting() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if _accepts(task)}


def _accepts(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__name__", "") == _LOOP
