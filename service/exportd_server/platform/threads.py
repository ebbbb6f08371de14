"""Threads for what may block for ever, in a database or in a driver.

A thread pool joins its threads when the process ends. These are daemon threads, one for
each piece of work, so that no exit and no drain waits for them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

PREFIX = "exportd-"
_IDLE = "idle"
_IDLE_SECONDS = 5.0


def in_daemon_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `work` in a thread of its own; the future tells how it ended. Cancelling the
    future only ends the waiting."""
    loop = asyncio.get_running_loop()
    return asyncio.wrap_future(daemon_thread(work, name), loop=loop)


def daemon_thread(work: Callable[[], T], name: str) -> Future[T]:
    """The same for threads."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()
    context = contextvars.copy_context()
    todo = [work]
    del work

    def run() -> None:
        try:
            # The caller may let go of what it works on as soon as it knows the outcome.
            result = context.run(todo.pop())
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    _threads.run(run, f"{PREFIX}{name}")
    return outcome


def left_over() -> list[str]:
    """Names of daemon threads of exportd that have not ended their work."""
    return sorted(
        thread.name
        for thread in threading.enumerate()
        if thread.daemon and thread.name.startswith(PREFIX)
    )


_Work = tuple[str, Callable[[], None]]


class _Threads:
    """Threads that have done their work, kept for a while for who wants one next: to start
    one, and to wait until it says that it runs, takes half a millisecond beside others."""

    def __init__(self) -> None:
        self._idle: list[_Thread] = []
        self._lock = threading.Lock()

    def run(self, work: Callable[[], None], name: str) -> None:
        with self._lock:
            thread = self._idle.pop() if self._idle else None
            if thread is not None:
                thread.give((name, work))
        if thread is None:
            _Thread(self, (name, work)).start()

    def add(self, thread: _Thread) -> None:
        with self._lock:
            thread.name = _IDLE
            self._idle.append(thread)

    def remove(self, thread: _Thread) -> bool:
        """False when it is to have work."""
        with self._lock:
            if thread not in self._idle:
                return False
            self._idle.remove(thread)
            return True

    def begin_anew(self) -> None:
        """After a fork: none of the threads is there, and their lock may be held."""
        self._idle = []
        self._lock = threading.Lock()

    def end_idle(self) -> None:
        """Before the interpreter ends: what libraries keep for a thread is to be let go of
        while they are there."""
        with self._lock:
            idle, self._idle = self._idle, []
            for thread in idle:
                thread.give(None)
        for thread in idle:
            thread.join(1.0)


class _Thread(threading.Thread):
    def __init__(self, threads: _Threads, first: _Work) -> None:
        super().__init__(daemon=True)
        self._threads = threads
        self._given: SimpleQueue[_Work | None] = SimpleQueue()
        self.give(first)

    def give(self, work: _Work | None) -> None:
        """None: end."""
        # Here already, for `left_over`.
        self.name = _IDLE if work is None else work[0]
        self._given.put(work)

    def run(self) -> None:
        while (given := self._next()) is not None:
            _, work = given
            work()
            del given, work
            self._threads.add(self)

    def _next(self) -> _Work | None:
        try:
            return self._given.get(timeout=_IDLE_SECONDS)
        except Empty:
            return None if self._threads.remove(self) else self._given.get()


_threads = _Threads()


os.register_at_fork(after_in_child=_threads.begin_anew)
atexit.register(_threads.end_idle)
