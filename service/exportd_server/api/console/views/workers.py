"""Who is at work, as far as the ledger knows."""

from __future__ import annotations

import itertools
from typing import Any

from exportd_server.api.console import reading
from exportd_server.api.console.access import WORKERS, Visit
from exportd_server.api.console.site import Page, Site, address
from exportd_server.jobs.manager import JobManager

PER_PAGE = 200


class WorkerList:
    """Leases of the whole fleet, by worker. Which job of another tenant one is for is not
    shown."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    def add_to(self, site: Site) -> None:
        """Serve the page and what its script asks for."""
        site.page("/workers", WORKERS, self._page)
        site.page("/live/workers", WORKERS, self._fragment)

    async def _page(self, visit: Visit) -> Page:
        return Page("workers.html", await self._values(visit))

    async def _fragment(self, visit: Visit) -> Page:
        return Page("_workers.html", await self._values(visit))

    async def _values(self, visit: Visit) -> dict[str, Any]:
        owner, task = (
            reading.text(visit.request, "owner"),
            reading.whole(visit.request, "task"),
        )
        found = await self._manager.list_leases(
            limit=PER_PAGE + 1, after=(owner, task) if owner else None
        )
        page = found[:PER_PAGE]
        more = ""
        if len(found) > PER_PAGE:
            last = page[-1]
            more = address("/workers", owner=last.owner, task=str(last.task_id))
        return {
            "leases": [
                (owner, list(held))
                for owner, held in itertools.groupby(page, key=lambda lease: lease.owner)
            ],
            "first": "/workers" if owner else "",
            "more": more,
            "live": address("/live/workers", owner=owner, task=str(task) if owner else ""),
        }
