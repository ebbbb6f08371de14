"""The bounds on one export, held over all of its shards."""

from __future__ import annotations

from exportd_server.errors import ExportTooLarge, TooManyRowErrors
from exportd_server.jobs.ledger.base import Totals

MAX_PARTS = 10_000
"""Most parts of one job: a manifest must stay a message that clients take."""


class Caps:
    """A job's caps, checked in the pipeline's thread against this shard's own count and
    what the other shards had when they last told. None: no cap. A row that was left out
    counts against the cap on rows like any other."""

    def __init__(
        self,
        max_rows: int | None,
        max_bytes: int | None,
        max_row_errors: int | None = None,
    ) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_row_errors = max_row_errors
        self._others = Totals(0, 0, 0)

    @property
    def bounded(self) -> bool:
        """Whether there is a cap at all."""
        caps = (self._max_rows, self._max_bytes, self._max_row_errors)
        return any(cap is not None for cap in caps)

    def others(self, total: Totals, own: Totals) -> None:
        """Learn the job's total at a moment when this shard had so much of it."""
        self._others = Totals(
            max(0, total.rows - own.rows),
            max(0, total.bytes - own.bytes),
            max(0, total.row_errors - own.row_errors),
        )

    def check(self, rows: int, bytes_: int, row_errors: int = 0) -> None:
        """Raise `ExportTooLarge` or `TooManyRowErrors` when a cap is passed."""
        row_errors += self._others.row_errors
        rows += self._others.rows + row_errors
        bytes_ += self._others.bytes
        if self._max_row_errors is not None and row_errors > self._max_row_errors:
            raise TooManyRowErrors(self._max_row_errors, row_errors)
        if self._max_rows is not None and rows > self._max_rows:
            raise ExportTooLarge("max_rows", self._max_rows, rows)
        if self._max_bytes is not None and bytes_ > self._max_bytes:
            raise ExportTooLarge("max_bytes", self._max_bytes, bytes_)


def check_parts(parts: int) -> None:
    """Raise `ExportTooLarge` when a job of so many parts, error parts among them, could
    not be told."""
    if parts > MAX_PARTS:
        raise ExportTooLarge("max_parts", MAX_PARTS, parts)
