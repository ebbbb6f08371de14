"""The seam between exportd and where exports are delivered.

A sink type is one class, registered under the entry point group `exportd.sinks`. exportd
keeps the queues, the retries and the record of what arrived; a sink only delivers.
"""

from __future__ import annotations

import builtins
import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from pydantic import BaseModel

from exportd_server.encoders.base import OutputFormat
from exportd_server.errors import DeliveryFailed
from exportd_server.store.base import PartReader


class Takes(enum.StrEnum):
    """What a sink wants to be given. Each job ends with one completion, when it has
    succeeded and everything before has been delivered."""

    PARTS = "parts"
    """Each part as soon as it is finalized, while the job may still run; then the
    completion."""
    WHOLE = "whole"
    """The completion alone: all or nothing."""


@dataclass(frozen=True, slots=True)
class ExportColumn:
    """A column of the output; `kind` is a `ColumnKind`, `type` in Arrow's notation."""

    name: str
    kind: str
    type: str
    nullable: bool


@dataclass(frozen=True, slots=True)
class Export:
    """What is exported. While a request is checked there is no job yet: `job_id` and
    `file_stem` are empty. `columns` are those of the output, in its order; `file_stem` is
    what the names of all files of the job begin with, and of no other."""

    tenant: str
    dataset: str
    output: OutputFormat
    columns: tuple[ExportColumn, ...]
    job_id: str = ""
    file_stem: str = ""
    generation: int = 1
    create_time: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


class Content(Protocol):
    """The stored bytes of one part. They can be read as often as needed."""

    def open(self, offset: int = 0) -> AbstractAsyncContextManager[PartReader]:
        """Read from a byte offset on. Raises `StoreFailed`, and `KeyError` when the part
        is gone because the job was cancelled, deleted or has expired: leave both to the
        caller."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One immutable file of an export: complete and valid by itself. (`shard`,
    `sequence`) is its place in the order of the output; `file_name` is safe in a path, a
    URL and a header, and no other part of the job has it."""

    shard: int
    sequence: int
    file_name: str
    rows: int
    bytes: int
    prefix_bytes: int
    suffix_bytes: int
    crc32c: int
    sha256: builtins.bytes
    content: Content = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Link:
    """Where a part can be fetched by HTTP, until when."""

    file_name: str
    url: str
    expire_time: datetime
    bytes: int
    sha256: builtins.bytes


@dataclass(frozen=True, slots=True)
class Delivery:
    """One thing to deliver: a part, or the completion when `part` is None.

    A completion has all parts of the job, in the order of the output, but for `dropped`
    of them that were not delivered because the sink's queue was full. `delivery_id` is
    the same at each attempt, and no other delivery has it: a receiver knows by it what
    it has already.
    """

    delivery_id: str
    attempt: int
    export: Export
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    dropped: int = 0
    links: Callable[[], Awaitable[Sequence[Link]]] | None = field(
        default=None, repr=False, compare=False
    )
    """Makes links to the parts; None where the service has none to give. Raises
    `ExportdError`."""


class Place:
    """Marks a field of a connection's model that says where deliveries go, as in
    `root: Annotated[Path, PLACE]`. The operator may write `{tenant}` into it, and each
    tenant's deliveries go to a place of their own: a sink is opened for each tenant then,
    with its name in place of that. Let no two tenants reach each other's by it."""


PLACE = Place()


class BadSinkRequest(ValueError):
    """A request for a sink that cannot work. `field` is a dotted path inside it, empty
    for the whole; `description` says what is wrong and the mend."""

    def __init__(self, field: str, description: str) -> None:
        self.field = field
        self.description = description
        super().__init__(f"{field}: {description}")


@dataclass(frozen=True, slots=True)
class SinkPlan:
    """What a checked request comes to. `endpoint` tells apart receivers behind one
    connection that fail each for itself, such as URLs; it is shown to callers and must
    not hold secrets. `overwrites` is the field of the request, such as a mode, by which
    the delivery changes or removes what others have put there; empty when it only adds.
    Where several tenants share the place that is refused."""

    takes: Takes
    endpoint: str = ""
    overwrites: str = ""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a delivery is tried again. With a `schedule` (seconds) pauses are taken from
    it in order, its last one again and again; else they double from `base` up to `cap`
    seconds. Each is spread by chance."""

    max_attempts: int = 4
    base: float = 0.1
    cap: float = 5.0
    schedule: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Batching:
    """How many parts of one job a sink gains by taking together, and how many seconds it
    is worth waiting for them while the job still makes some."""

    most: int
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class SinkDefaults:
    """What holds for a connection unless its operator says otherwise; times in seconds.

    An endpoint that has failed for `disable_after` without a success in between is
    disabled; None: never. A sink with `batching` is a `BatchSink`.
    """

    retry: RetryPolicy = RetryPolicy()
    timeout: float = 300.0
    concurrency: int = 4
    disable_after: float | None = None
    batching: Batching | None = None


RequestT = TypeVar("RequestT", bound=BaseModel)
ConnectionT = TypeVar("ConnectionT", bound=BaseModel)
_RequestT_contra = TypeVar("_RequestT_contra", bound=BaseModel, contravariant=True)


class Sink(Protocol[_RequestT_contra]):
    """An open connection. It serves many deliveries at a time, of many jobs, from one
    event loop, and never blocks that."""

    async def probe(self, request: _RequestT_contra, export: Export) -> None:
        """See whether a delivery would arrive, without leaving a trace: is it reachable,
        is there such a table, does it fit. Raises `BadSinkRequest` for what the caller
        must mend, `DeliveryFailed` for what the sink itself fails at."""
        ...

    async def deliver(self, request: _RequestT_contra, delivery: Delivery) -> str:
        """Deliver; what it returns, a short text without secrets, is kept as the receipt.

        When it returns the sink has the data durably. It may be called again with the
        same delivery after a success that was not heard of, and the outcome must be the
        same. Memory is bounded, whatever the size. Raises `DeliveryFailed`; anything
        else is taken for a failure that may pass. When cancelled, it stops soon and
        leaves no piece behind under a final name.
        """
        ...

    async def close(self) -> None:
        """Free what is held. Nothing is under way any more."""
        ...


class BatchSink(Sink[_RequestT_contra], Protocol[_RequestT_contra]):
    """A sink that gains by taking several parts of one job together. It may be given one
    alone, and completions always are, by `deliver`."""

    async def deliver_batch(
        self, request: _RequestT_contra, deliveries: Sequence[Delivery]
    ) -> Sequence[str | DeliveryFailed]:
        """As `deliver`, of several: for each, in their order, its receipt, or why it did
        not arrive. What it raises holds for all of them."""
        ...


class SinkType(Protocol[RequestT, ConnectionT]):
    """A kind of sink. `request_model` is what a caller says, with secrets in `SecretStr`;
    `connection_model` what the operator configures. Both must refuse unknown fields."""

    name: str
    request_model: type[RequestT]
    connection_model: type[ConnectionT]
    needs_connection: bool
    defaults: SinkDefaults

    def check(
        self, request: RequestT, connection: ConnectionT | None, export: Export
    ) -> SinkPlan:
        """See at once, without asking anybody, whether the request can work. Raises
        `BadSinkRequest`."""
        ...

    async def open(self, connection: ConnectionT | None) -> Sink[RequestT]:
        """Make a sink. It need not connect before it is used. Without connection for
        types that need none. Raises `DeliveryFailed`, and `ConfigurationError` for what
        the operator must mend."""
        ...


def retry_after(seconds: float) -> timedelta:
    """A pause that a receiver asked for, bounded so that a typing error of its own does
    not put a delivery off for ever."""
    return timedelta(seconds=min(max(seconds, 0.0), 86_400.0))
