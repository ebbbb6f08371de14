"""A blocking call in a thread, which its caller can stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from exportd_server.platform.threads import in_daemon_thread
from exportd_server.sinks.database.rows import Feed, Stopped

T = TypeVar("T")

_LEAVE_SECONDS = 2.0
"""How long a call that was stopped is waited for. It is let go of then, and changes
nothing any more: it looks whether it was stopped before it commits."""


class Call:
    """What a thread is at, and how to end it from outside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cut: Callable[[], None] | None = None
        self._stopped = False

    def cut_by(self, cut: Callable[[], None] | None) -> None:
        """From now on the call can be ended by this; None: only by asking."""
        with self._lock:
            self._cut = cut

    def check(self) -> None:
        """Raises `Stopped` when the call was stopped."""
        if self._stopped:
            raise Stopped

    def stop(self) -> None:
        """End it soon."""
        with self._lock:
            self._stopped = True
            if self._cut is not None:
                self._cut()


async def run(work: Callable[[Call], T], feed: Feed | None = None) -> T:
    """Run `work` in a thread of its own, with the feed it reads from. Raises what it
    raised; when cancelled, stops it first."""
    call = Call()
    done = in_daemon_thread(lambda: work(call), "database-sink")
    pump = None if feed is None else asyncio.ensure_future(feed.pump())
    # An outcome that nobody waits for any more is no news.
    done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        await asyncio.wait({done})
    except asyncio.CancelledError:
        call.stop()
        if feed is not None:
            feed.stop()
        await asyncio.wait({done}, timeout=_LEAVE_SECONDS)
        raise
    finally:
        if pump is not None:
            pump.cancel()
            await asyncio.wait({pump})
    return done.result()
