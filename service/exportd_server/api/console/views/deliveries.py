"""Deliveries, dead letters above all."""

from __future__ import annotations

from exportd_server.api.console import reading
from exportd_server.api.console.access import Visit
from exportd_server.api.console.site import Page, Site, address
from exportd_server.api.requests import Reader
from exportd_server.errors import InvalidRequest
from exportd_server.jobs.ledger.base import DeliveryQuery
from exportd_server.jobs.manager import JobManager
from exportd_server.jobs.model import DeliveryRecord, DeliveryState

PER_PAGE = 50
DEAD = DeliveryState.DEAD_LETTERED


class DeliveryList:
    """The tenant's deliveries, newest first."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    def add_to(self, site: Site) -> None:
        """Serve the page."""
        site.page("/deliveries", "ListDeliveries", self._page)

    async def _page(self, visit: Visit) -> Page:
        reader = Reader()
        state = reading.text(visit.request, "state")
        job = reader.uuid("job", reading.text(visit.request, "job"), required=False)
        reader.check()
        queue = reading.text(visit.request, "queue")
        before = reading.place(visit.request)
        if state and state not in set(DeliveryState):
            raise InvalidRequest.of("state", f"is none of {', '.join(DeliveryState)}")
        query = DeliveryQuery(
            job_id=job,
            queue=queue,
            states=frozenset({DeliveryState(state)} if state else ()),
        )
        found = await self._manager.list_deliveries(
            visit.tenant, query, limit=PER_PAGE + 1, before=before
        )
        page = found[:PER_PAGE]
        older = ""
        if len(found) > PER_PAGE:
            place = reading.place_of(page[-1].create_time, page[-1].delivery_id)
            older = address("/deliveries", state=state, job=job, queue=queue, before=place)
        return Page(
            "deliveries.html",
            {
                "deliveries": page,
                "redrivable": _redrivable,
                "dead": DEAD,
                "state": state,
                "states": list(DeliveryState),
                "job": job,
                "queue": queue,
                "first": address("/deliveries", state=state, job=job, queue=queue)
                if before
                else "",
                "older": older,
            },
        )


def _redrivable(delivery: DeliveryRecord) -> bool:
    """Whether it makes sense to send it again now."""
    return (
        delivery.state in (DEAD, DeliveryState.DROPPED)
        or delivery.next_attempt_time is not None
    )
