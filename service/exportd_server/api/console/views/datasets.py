"""What may be exported."""

from __future__ import annotations

import structlog

from exportd_server.api.console import reading
from exportd_server.api.console.access import Visit
from exportd_server.api.console.site import Page, Site, address
from exportd_server.errors import SourceFailed
from exportd_server.jobs.manager import JobManager
from exportd_server.sources.catalogue import Dataset

log = structlog.get_logger(__name__)

PER_PAGE = 100


class Datasets:
    """The tenant's datasets, and one of them."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    def add_to(self, site: Site) -> None:
        """Serve the pages."""
        site.page("/datasets", "ListDatasets", self._list)
        site.page("/datasets/{name}", "GetDataset", self._one)

    async def _list(self, visit: Visit) -> Page:
        after = reading.text(visit.request, "after")
        names = self._manager.dataset_names(visit.tenant)
        rest = [name for name in names if name > after]
        page = [self._manager.dataset(visit.tenant, name) for name in rest[:PER_PAGE]]
        more = len(rest) > PER_PAGE
        return Page(
            "datasets.html",
            {
                "datasets": page,
                "first": "/datasets" if after else "",
                "more": address("/datasets", after=page[-1].name) if more else "",
            },
        )

    async def _one(self, visit: Visit) -> Page:
        dataset = self._manager.dataset(visit.tenant, visit.request.match_info["name"])
        policy = self._manager.policy
        return Page(
            "dataset.html",
            {
                "dataset": dataset,
                "rows": await self._count(visit, dataset),
                "max_rows": policy.row_cap(dataset),
                "max_bytes": policy.byte_cap(dataset),
            },
        )

    async def _count(self, visit: Visit, dataset: Dataset) -> int | None:
        try:
            return await self._manager.count(visit.tenant, dataset)
        except SourceFailed as error:
            # The rest of the page is as good without.
            log.info("rows could not be counted", dataset=dataset.name, cause=repr(error))
            return None
