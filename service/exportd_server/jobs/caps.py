"""The bounds on one export, held over all of its shards."""

from __future__ import annotations

from exportd_server.errors import ExportTooLarge

MAX_PARTS = 10_000
"""Most parts of one job: a manifest must stay a message that clients take."""


class Caps:
    """A job's caps, checked in the pipeline's thread against this shard's own count and
    what the other shards had when they last told. None: no cap."""

    def __init__(self, max_rows: int | None, max_bytes: int | None) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._others = (0, 0)

    @property
    def bounded(self) -> bool:
        """Whether there is a cap on rows or bytes at all."""
        return self._max_rows is not None or self._max_bytes is not None

    def others(self, rows: int, bytes_: int, *, own_rows: int, own_bytes: int) -> None:
        """Learn the job's total at a moment when this shard had so much of it."""
        self._others = (max(0, rows - own_rows), max(0, bytes_ - own_bytes))

    def check(self, rows: int, bytes_: int) -> None:
        """Raise `ExportTooLarge` when a cap is passed."""
        rows += self._others[0]
        bytes_ += self._others[1]
        if self._max_rows is not None and rows > self._max_rows:
            raise ExportTooLarge("max_rows", self._max_rows, rows)
        if self._max_bytes is not None and bytes_ > self._max_bytes:
            raise ExportTooLarge("max_bytes", self._max_bytes, bytes_)


def check_parts(parts: int) -> None:
    """Raise `ExportTooLarge` when a job of so many parts could not be told."""
    if parts > MAX_PARTS:
        raise ExportTooLarge("max_parts", MAX_PARTS, parts)
