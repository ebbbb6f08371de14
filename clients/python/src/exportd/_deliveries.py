"""What the server tells about deliveries to sinks, as plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from exportd._wire import enum_name, moment
from exportd.errors import DeliveryFailed, from_delivery_error
from exportd.v1 import sink_pb2


class DeliveryStatus(enum.StrEnum):
    """Where the delivery to one sink, or to all of a job, stands."""

    UNKNOWN = "UNKNOWN"  # a status newer than this client
    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    DROPPED = "DROPPED"
    FAILED = "FAILED"


class DeliveryState(enum.StrEnum):
    """States of one delivery."""

    UNKNOWN = "UNKNOWN"  # a state newer than this client
    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    DROPPED = "DROPPED"
    DEAD_LETTERED = "DEAD_LETTERED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class SinkDelivery:
    """How the delivery of a job to one of its sinks stands, in numbers of deliveries.

    Attributes:
        sink: Name of the sink inside the job.
        status: Where it stands.
        pending: Waiting, under way, or to be tried again.
        delivered: The sink has them.
        dropped: Not tried, because the sink's queue was full.
        dead_lettered: Failed for good; `redrive` sends them again.
        attempts: Attempts in all.
        last_error: Why the last attempt failed, while its delivery is still not there.
        receipt: What the sink said to the completion.
    """

    sink: str
    status: DeliveryStatus
    pending: int
    delivered: int
    dropped: int
    dead_lettered: int
    attempts: int
    last_error: DeliveryFailed | None
    receipt: str

    @classmethod
    def of(cls, proto: sink_pb2.SinkDelivery) -> Self:
        """From the wire."""
        return cls(
            proto.sink,
            delivery_status(proto.status) or DeliveryStatus.UNKNOWN,
            proto.pending,
            proto.delivered,
            proto.dropped,
            proto.dead_lettered,
            proto.attempts,
            _last_error(proto),
            proto.receipt,
        )

    @property
    def lacks(self) -> str:
        """In a few words, what the sink does not have although nothing is pending; empty
        when it has everything, or may still get it."""
        if self.status in {DeliveryStatus.DELIVERED, DeliveryStatus.PENDING}:
            return ""
        counts = ((self.dead_lettered, "failed"), (self.dropped, "dropped"))
        words = ", ".join(f"{number:,} {word}" for number, word in counts if number)
        words = words or self.status.lower()
        return words if self.last_error is None else f"{words}: {self.last_error.message}"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One thing that is delivered to one sink: a part, or the completion.

    Attributes:
        id: Receivers are told it, the same at each attempt.
        job_id: The job.
        sink: Name of the sink inside the job.
        queue: The queue it stands in.
        file_name: Name of the part's file; empty for the completion.
        generation: Of the output it belongs to.
        state: Where it stands.
        attempts: How often it was tried.
        last_error: Why the last attempt failed; None once it has been delivered.
        receipt: What the sink said, once it has been delivered.
        create_time: When it became due, in UTC like all times.
        finish_time: When it ended.
        next_attempt_time: When it is tried next; None while it waits for nothing but its
            turn.
    """

    id: str
    job_id: str
    sink: str
    queue: str
    file_name: str
    generation: int
    state: DeliveryState
    attempts: int
    last_error: DeliveryFailed | None
    receipt: str
    create_time: datetime | None
    finish_time: datetime | None
    next_attempt_time: datetime | None
    proto: sink_pb2.Delivery = field(repr=False, compare=False)

    @classmethod
    def of(cls, proto: sink_pb2.Delivery) -> Self:
        """From the wire."""
        return cls(
            proto.delivery_id,
            proto.job_id,
            proto.sink,
            proto.queue,
            proto.file_name,
            proto.generation,
            _state(proto.state),
            proto.attempts,
            _last_error(proto),
            proto.receipt,
            moment(proto.create_time),
            moment(proto.finish_time),
            moment(proto.next_attempt_time),
            proto,
        )


@dataclass(frozen=True, slots=True)
class SinkQueue:
    """A queue of the caller's deliveries: all that go to one endpoint stand in one.

    Attributes:
        queue: Its name.
        waiting: Deliveries that wait for their turn or are under way.
        retrying: Deliveries that failed and will be tried again.
        dead_lettered: Deliveries that failed for good.
        failing_since: Since when everything has failed; None after a success.
        disabled_time: When it was disabled; None while it is enabled.
        disabled_reason: Why it was.
    """

    queue: str
    waiting: int
    retrying: int
    dead_lettered: int
    failing_since: datetime | None
    disabled_time: datetime | None
    disabled_reason: DeliveryFailed | None
    proto: sink_pb2.SinkQueue = field(repr=False, compare=False)

    @classmethod
    def of(cls, proto: sink_pb2.SinkQueue) -> Self:
        """From the wire."""
        disabled = proto.HasField("disabled_reason")
        return cls(
            proto.queue,
            proto.waiting,
            proto.retrying,
            proto.dead_lettered,
            moment(proto.failing_since),
            moment(proto.disabled_time),
            from_delivery_error(proto.disabled_reason) if disabled else None,
            proto,
        )


def delivery_status(status: int) -> DeliveryStatus | None:
    """The status by its number; None for a job without sinks, `UNKNOWN` for one this
    client does not know."""
    if status == sink_pb2.DELIVERY_STATUS_UNSPECIFIED:
        return None
    name = enum_name(sink_pb2.DeliveryStatus.DESCRIPTOR, status, "DELIVERY_STATUS_")
    return DeliveryStatus.__members__.get(name, DeliveryStatus.UNKNOWN)


def _state(state: int) -> DeliveryState:
    name = enum_name(sink_pb2.DeliveryState.DESCRIPTOR, state, "DELIVERY_STATE_")
    return DeliveryState.__members__.get(name, DeliveryState.UNKNOWN)


def _last_error(proto: sink_pb2.Delivery | sink_pb2.SinkDelivery) -> DeliveryFailed | None:
    if not proto.HasField("last_error"):
        return None
    return from_delivery_error(proto.last_error)
