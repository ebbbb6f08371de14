"""Moments as the contract writes them."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf import timestamp_pb2

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
_DAY = 86_400


def timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A moment as the contract writes it."""
    if moment is None:
        return None
    # The library's own way to do this takes several times as long.
    since = min(moment, _LATEST) - _EPOCH
    return timestamp_pb2.Timestamp(
        seconds=since.days * _DAY + since.seconds, nanos=since.microseconds * 1000
    )
