"""Moments as the contract writes them."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf import timestamp_pb2

_LATEST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A moment as the contract writes it."""
    if moment is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(min(moment, _LATEST))
    return message
