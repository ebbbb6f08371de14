"""Queues of sinks."""

from __future__ import annotations

from exportd_server.api.console import reading
from exportd_server.api.console.access import Visit
from exportd_server.api.console.site import Page, Site, address
from exportd_server.jobs.manager import JobManager

PER_PAGE = 100


class QueueList:
    """The queues that the tenant has deliveries in."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    def add_to(self, site: Site) -> None:
        """Serve the page."""
        site.page("/queues", "ListSinkQueues", self._page)

    async def _page(self, visit: Visit) -> Page:
        after = reading.text(visit.request, "after")
        found = await self._manager.list_queues(
            visit.tenant, limit=PER_PAGE + 1, after=after
        )
        page = found[:PER_PAGE]
        more = len(found) > PER_PAGE
        return Page(
            "queues.html",
            {
                "queues": page,
                "first": "/queues" if after else "",
                "more": address("/queues", after=page[-1].queue) if more else "",
            },
        )
