"""Jobs with sinks, on a ledger under test, and short words for their deliveries."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger.base import DeliveryQuery, Lease, NewJob, TaskKind
from exportd_server.jobs.model import (
    DeliveryRecord,
    DeliveryState,
    Job,
    OnFull,
    QueuePolicy,
    SinkSpec,
)
from exportd_server.sinks.base import Takes
from tests.support.ledger import World, part

DELIVER = (TaskKind.DELIVER,)
DOWN = ErrorRecord(ErrorReason.DELIVERY_FAILED, "the sink is down")
EVERYTHING = DeliveryQuery()
SOON = timedelta(seconds=30)


def sink(name: str = "sink", queue: str = "q", takes: Takes = Takes.PARTS) -> SinkSpec:
    """A sink that takes parts, unless the test says otherwise."""
    return SinkSpec(name, "local_file", "disk", {"path": name}, queue, takes)


def whole(name: str = "whole", queue: str = "w") -> SinkSpec:
    """A sink that takes all at once."""
    return sink(name, queue, Takes.WHOLE)


class Deliveries:
    """What tests of deliveries do all the time in a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ledger = world.ledger
        self.clock = world.clock
        self.policies: dict[str, QueuePolicy] = {}

    def allow(
        self,
        queue: str = "q",
        *,
        concurrency: int = 100,
        depth: int = 1000,
        on_full: OnFull = OnFull.BLOCK,
        owner: str = "acme",
    ) -> None:
        """What the operator says of a queue; holds from the next job on."""
        self.policies[queue] = QueuePolicy(queue, owner, concurrency, depth, on_full)

    def new(self, *sinks: SinkSpec, tenant: str = "acme", **what: Any) -> NewJob:
        queues = []
        for each in sinks:
            if each.queue not in self.policies:
                self.allow(each.queue)
            queues.append(self.policies[each.queue])
        return replace(self.world.new(tenant, sinks=sinks, **what), queues=tuple(queues))

    async def create(self, *sinks: SinkSpec, tenant: str = "acme", **what: Any) -> Job:
        job, created = await self.ledger.create_job(self.new(*sinks, tenant=tenant, **what))
        assert created
        return job

    async def running(
        self,
        *sinks: SinkSpec,
        tenant: str = "acme",
        shards: int = 1,
        parts: int = 0,
        **what: Any,
    ) -> tuple[Job, Lease]:
        """A job at work, with so many parts, and the lease on its first shard."""
        job = await self.create(*sinks, tenant=tenant, **what)
        lease = await self.world.lease()
        assert lease.job_id == job.job_id
        lease = await self.world.plan(lease, shards)
        for sequence in range(parts):
            await self.ledger.add_part(lease, part(lease, sequence))
        return await self.world.job(job), lease

    async def succeeded(
        self, *sinks: SinkSpec, tenant: str = "acme", parts: int = 1, **what: Any
    ) -> Job:
        """A job that has ended well, with nothing delivered."""
        job, lease = await self.running(*sinks, tenant=tenant, parts=parts, **what)
        assert await self.ledger.complete_shard(lease)
        return await self.world.job(job)

    async def claim(self, owner: str = "worker") -> Lease | None:
        return await self.world.claim(DELIVER, owner=owner)

    async def lease(self) -> Lease:
        return await self.world.lease(DELIVER)

    async def deliver(self, receipt: str = "ok") -> str:
        """Deliver what is next; returns its id."""
        lease = await self.lease()
        work = await self.ledger.delivery_work(lease)
        await self.ledger.complete_delivery(lease, receipt)
        return work.delivery_id

    async def deliver_all(self) -> int:
        """Deliver all that is due; returns how many there were."""
        count = 0
        while (lease := await self.claim()) is not None:
            await self.ledger.complete_delivery(lease, "ok")
            count += 1
        return count

    async def bury(self, error: ErrorRecord = DOWN) -> str:
        """Have what is next fail for good; returns its id."""
        lease = await self.lease()
        work = await self.ledger.delivery_work(lease)
        told = await self.ledger.fail_delivery(lease, error, retry_in=None)
        assert told.dead
        return work.delivery_id

    async def bury_all(self) -> int:
        """Have all that is due fail for good; returns how many there were."""
        count = 0
        while (lease := await self.claim()) is not None:
            await self.ledger.fail_delivery(lease, DOWN, retry_in=None)
            count += 1
        return count

    async def all(
        self,
        query: DeliveryQuery = EVERYTHING,
        tenant: str = "acme",
    ) -> list[DeliveryRecord]:
        """Deliveries, oldest first."""
        found = await self.ledger.list_deliveries(tenant, query, limit=10_000)
        return found[::-1]

    async def of(self, job: Job, name: str = "sink") -> list[DeliveryRecord]:
        """The deliveries of one sink: parts in their order, then the completion."""
        found = await self.all(DeliveryQuery(job_id=job.job_id, sink=name), job.tenant)
        return sorted(found, key=lambda each: (each.part is None, each.part or ()))

    async def states(self, job: Job, name: str = "sink") -> list[DeliveryState]:
        return [each.state for each in await self.of(job, name)]

    async def redrive(self, tenant: str = "acme", **what: Any) -> int:
        return await self.ledger.redrive_deliveries(tenant, DeliveryQuery(**what))
