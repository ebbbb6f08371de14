"""A sink type that does as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, SecretStr

from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import (
    BadSinkRequest,
    Batching,
    Delivery,
    Export,
    RetryPolicy,
    SinkDefaults,
    SinkPlan,
    Takes,
)
from tests.support.waits import ENOUGH

FAST = RetryPolicy(max_attempts=3, base=0.02, cap=0.05)


class ScriptedRequest(BaseModel):
    """What a caller says. `label` only tells sinks of one job apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = ""
    takes: Literal["parts", "whole"] = "parts"
    endpoint: str = ""
    token: SecretStr | None = None


class ScriptedConnection(BaseModel):
    """What an operator says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    note: str = ""


Behaviour = Callable[[Delivery], DeliveryFailed | Exception | None]


class ScriptedSink:
    """The type and the sink in one. `behave` says what a delivery fails with; one that
    `holds` waits until it is let go. What arrived is in `got`, by label."""

    name = "scripted"
    request_model = ScriptedRequest
    connection_model = ScriptedConnection
    needs_connection = False

    def __init__(
        self,
        *,
        retry: RetryPolicy = FAST,
        timeout: float = 10 * ENOUGH,
        concurrency: int = 4,
        disable_after: float | None = None,
        batching: Batching | None = None,
    ) -> None:
        self.defaults = SinkDefaults(retry, timeout, concurrency, disable_after, batching)
        self.batches: list[int] = []
        self.behaviour: dict[str, Behaviour] = {}
        self.held: dict[str, asyncio.Event] = {}
        self.got: dict[str, list[Delivery]] = {}
        self.tried: dict[str, list[Delivery]] = {}
        self.tokens: list[str] = []
        self.changed = asyncio.Event()
        self.at_work = 0
        self.most_at_work = 0
        self.unreachable = False

    def hold(self, label: str) -> asyncio.Event:
        """Have deliveries wait until the event is set."""
        return self.held.setdefault(label, asyncio.Event())

    async def arrived(self, label: str, count: int, timeout: float = ENOUGH) -> None:
        """Wait until so many deliveries have arrived."""
        await self._reached(self.got, label, count, timeout)

    async def was_tried(self, label: str, count: int, timeout: float = ENOUGH) -> None:
        """Wait until so many attempts were made."""
        await self._reached(self.tried, label, count, timeout)

    async def _reached(
        self, where: dict[str, list[Delivery]], label: str, count: int, timeout: float
    ) -> None:
        async with asyncio.timeout(timeout):
            while len(where.get(label, [])) < count:
                self.changed.clear()
                await self.changed.wait()

    # --- the type

    def check(
        self,
        request: ScriptedRequest,
        connection: ScriptedConnection | None,
        export: Export,
    ) -> SinkPlan:
        """See `SinkType`."""
        if request.label == "bad":
            raise BadSinkRequest("label", "must not be bad; choose another one")
        return SinkPlan(Takes(request.takes), request.endpoint)

    async def open(self, connection: ScriptedConnection | None) -> ScriptedSink:
        """See `SinkType`."""
        return self

    # --- the sink

    async def probe(self, request: ScriptedRequest, export: Export) -> None:
        """See `Sink`."""
        if self.unreachable:
            raise DeliveryFailed("the sink is not there", retryable=True)

    async def deliver(self, request: ScriptedRequest, delivery: Delivery) -> str:
        """See `Sink`."""
        label = request.label
        if request.token is not None:
            self.tokens.append(request.token.get_secret_value())
        self.tried.setdefault(label, []).append(delivery)
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        self.changed.set()
        try:
            if label in self.held:
                await self.held[label].wait()
            behave = self.behaviour.get(label)
            error = None if behave is None else behave(delivery)
            if error is not None:
                raise error
            if delivery.part is not None:
                async with delivery.part.content.open() as reader:
                    size = 0
                    buffer = memoryview(bytearray(64 * 1024))
                    while count := await reader.readinto(buffer):
                        size += count
                assert size == delivery.part.bytes
            self.got.setdefault(label, []).append(delivery)
            self.changed.set()
            return f"got {label or 'it'}"
        finally:
            self.at_work -= 1

    async def deliver_batch(
        self, request: ScriptedRequest, deliveries: Sequence[Delivery]
    ) -> list[str | DeliveryFailed]:
        """See `BatchSink`."""
        self.batches.append(len(deliveries))
        outcomes: list[str | DeliveryFailed] = []
        for delivery in deliveries:
            try:
                outcomes.append(await self.deliver(request, delivery))
            except DeliveryFailed as error:
                outcomes.append(error)
        return outcomes

    async def close(self) -> None:
        """See `Sink`."""
