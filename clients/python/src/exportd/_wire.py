"""Pieces of the contract's messages as Python values."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.timestamp_pb2 import Timestamp


def enum_name(descriptor: EnumDescriptor, number: int, prefix: str) -> str:
    """An enum value's name without its prefix; its number when it is newer than us."""
    value = descriptor.values_by_number.get(number)
    return str(number) if value is None else value.name.removeprefix(prefix)


def moment(proto: Timestamp) -> datetime | None:
    """A moment in UTC; None for one that is absent."""
    if not proto.seconds and not proto.nanos:
        return None
    return proto.ToDatetime(tzinfo=UTC)
