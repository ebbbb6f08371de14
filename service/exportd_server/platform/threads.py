"""Threads for what may block for ever, in a database or in a driver.

A thread pool joins its threads when the process ends. These are daemon threads, one for
each call, so that no exit and no drain waits for them.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

PREFIX = "exportd-"


def in_daemon_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `work` in a thread of its own; the future tells how it ended. Cancelling the
    future only ends the waiting."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(work)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    told = asyncio.wrap_future(outcome)
    threading.Thread(target=run, name=f"{PREFIX}{name}", daemon=True).start()
    return told


def left_over() -> list[str]:
    """Names of daemon threads of exportd that have not ended."""
    return sorted(
        thread.name
        for thread in threading.enumerate()
        if thread.daemon and thread.name.startswith(PREFIX)
    )
