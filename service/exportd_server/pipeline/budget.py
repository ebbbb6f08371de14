"""Bounded hand-over between two stages of a pipeline.

The bound is on bytes in flight, so that wide rows and narrow rows cost the same memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Weighed(Protocol):
    """What has a size in memory, in bytes."""

    @property
    def nbytes(self) -> int:
        """The size."""
        ...


B = TypeVar("B", bound=Weighed)


class HandoverClosed(Exception):
    """The other side has gone; stop."""


class Handover(Generic[B]):
    """A queue of batches between one producer and one consumer thread.

    `put` blocks while the batches that were put and not yet given back weigh more than
    `max_bytes`; one batch always fits, however large. Iterating yields the batches until
    `finish`, and counts a batch as given back when the next one is asked for. `close`
    may be called from any thread; both sides then raise `HandoverClosed`.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._batches: deque[tuple[B, int]] = deque()
        self._in_flight = 0
        self.handed_over = 0
        """Bytes that were put, all in all."""
        self._finished = False
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()

    def put(self, batch: B) -> None:
        """Hand a batch over; waits for room."""
        weight = max(1, batch.nbytes)
        with self._changed:
            while not self._closed and self._in_flight > 0:
                if self._in_flight + weight <= self._max_bytes:
                    break
                self._changed.wait()
            if self._closed:
                raise HandoverClosed
            self._in_flight += weight
            self.handed_over += weight
            self._batches.append((batch, weight))
            self._changed.notify_all()

    def finish(self, error: BaseException | None = None) -> None:
        """No more batches; with an error the consumer gets it once it has read what was
        put before."""
        with self._changed:
            self._finished = True
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Stop both sides; idempotent."""
        with self._changed:
            self._closed = True
            self._batches.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[B]:
        while True:
            with self._changed:
                while not (self._batches or self._finished or self._closed):
                    self._changed.wait()
                if self._closed:
                    raise HandoverClosed
                if not self._batches:
                    if self._error is not None:
                        raise self._error
                    return
                batch, weight = self._batches.popleft()
            yield batch
            del batch
            with self._changed:
                self._in_flight -= weight
                self._changed.notify_all()
