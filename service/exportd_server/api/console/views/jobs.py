"""The list of jobs."""

from __future__ import annotations

from typing import Any

from exportd_server.api.console import reading
from exportd_server.api.console.access import Visit
from exportd_server.api.console.site import Page, Site, address
from exportd_server.errors import InvalidRequest
from exportd_server.jobs.ledger.base import JobQuery
from exportd_server.jobs.manager import JobManager
from exportd_server.jobs.model import Job, JobState

PER_PAGE = 50
_ACTIVE = "ACTIVE"
_UNFINISHED = frozenset(state for state in JobState if not state.terminal)


class JobList:
    """The tenant's jobs, newest first."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    def add_to(self, site: Site) -> None:
        """Serve the page and what its script asks for."""
        site.page("/jobs", "ListJobs", self._page)
        site.page("/live/jobs", "ListJobs", self._fragment)

    async def _page(self, visit: Visit) -> Page:
        return Page("jobs.html", await self._values(visit))

    async def _fragment(self, visit: Visit) -> Page:
        # New jobs may come: there is no end to looking.
        return Page("_jobs.html", await self._values(visit))

    async def _values(self, visit: Visit) -> dict[str, Any]:
        state = reading.text(visit.request, "state")
        dataset = reading.text(visit.request, "dataset")
        before = reading.place(visit.request)
        query = JobQuery(states=_states(state), dataset=dataset)
        jobs = await self._manager.list_jobs(
            visit.tenant, query, limit=PER_PAGE + 1, before=before
        )
        page = jobs[:PER_PAGE]
        older = ""
        if len(jobs) > PER_PAGE:
            last = page[-1]
            place = reading.place_of(last.create_time, last.job_id)
            older = address("/jobs", state=state, dataset=dataset, before=place)
        return {
            "jobs": page,
            "fraction": fraction,
            "state": state,
            "states": [_ACTIVE, *JobState],
            "dataset": dataset,
            "datasets": self._manager.dataset_names(visit.tenant),
            "first": address("/jobs", state=state, dataset=dataset) if before else "",
            "older": older,
            "live": address(
                "/live/jobs",
                state=state,
                dataset=dataset,
                before=visit.request.query.get("before", ""),
            ),
        }


def _states(name: str) -> frozenset[JobState]:
    if not name:
        return frozenset()
    if name == _ACTIVE:
        return _UNFINISHED
    if name not in set(JobState):
        raise InvalidRequest.of("state", f"is none of {_ACTIVE}, {', '.join(JobState)}")
    return frozenset({JobState(name)})


def fraction(job: Job) -> float | None:
    """How much of a job is done, of 1; None where that is not known."""
    if job.state is JobState.SUCCEEDED:
        return 1.0
    if not job.progress.estimated_rows:
        return None
    return min(1.0, job.progress.rows / job.progress.estimated_rows)
