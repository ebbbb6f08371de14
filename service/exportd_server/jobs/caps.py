"""The bounds on one export, held over all of its shards."""

from __future__ import annotations

import time

from exportd_server.errors import ExportTooLarge, TooManyRowErrors
from exportd_server.jobs.ledger.base import Totals
from exportd_server.jobs.model import Job, Manifest

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

    def others(self, total: Totals, own: Totals) -> None:
        """Learn the job's total at a moment when this shard had so much of it."""
        self._others = Totals(
            max(0, total.rows - own.rows),
            max(0, total.bytes - own.bytes),
            max(0, total.row_errors - own.row_errors),
        )

    def check(self, rows: int, bytes_: int, row_errors: int = 0) -> None:
        """Raise `ExportTooLarge` or `TooManyRowErrors` when a cap is passed."""
        others = self._others
        self._check(
            rows + others.rows, bytes_ + others.bytes, row_errors + others.row_errors
        )

    def check_whole(self, output: Manifest) -> None:
        """The same for all that the job has come to."""
        self._check(
            sum(part.rows for part in output.parts),
            sum(part.bytes for part in output.all_parts),
            sum(part.rows for part in output.error_parts),
        )

    def _check(self, rows: int, bytes_: int, row_errors: int) -> None:
        rows += row_errors
        if self._max_row_errors is not None and row_errors > self._max_row_errors:
            raise TooManyRowErrors(self._max_row_errors, row_errors)
        if self._max_rows is not None and rows > self._max_rows:
            raise ExportTooLarge("max_rows", self._max_rows, rows)
        if self._max_bytes is not None and bytes_ > self._max_bytes:
            raise ExportTooLarge("max_bytes", self._max_bytes, bytes_)


class TimeCap:
    """A job's cap on its running time, from its start on the ledger's clock: whoever
    takes the job over has as much left as is left. None: no cap. `job` was read a moment
    ago."""

    def __init__(self, max_seconds: int | None, job: Job) -> None:
        self._max_seconds = max_seconds
        ran = 0.0
        if job.start_time is not None and job.read_time is not None:
            ran = (job.read_time - job.start_time).total_seconds()
        self._started = time.monotonic() - ran

    @property
    def left(self) -> float | None:
        """Seconds left, not below 0; None without a cap."""
        if self._max_seconds is None:
            return None
        return max(0.0, self._started + self._max_seconds - time.monotonic())

    def passed(self) -> ExportTooLarge | None:
        """The error for a job that has run too long; None while it has not."""
        if self._max_seconds is None or self.left:
            return None
        ran = int(time.monotonic() - self._started)
        return ExportTooLarge("max_seconds", self._max_seconds, ran)


def check_parts(parts: int) -> None:
    """Raise `ExportTooLarge` when a job of so many parts, error parts among them, could
    not be told."""
    if parts > MAX_PARTS:
        raise ExportTooLarge("max_parts", MAX_PARTS, parts)
