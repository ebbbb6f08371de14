"""One job: how far it is, what it gave, where that went, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from exportd_server.api.console import reading, words
from exportd_server.api.console.access import Visit
from exportd_server.api.console.site import Page, Site, address
from exportd_server.api.console.views.jobs import fraction
from exportd_server.api.requests import Reader
from exportd_server.jobs.audit import AuditQuery, AuditRecord
from exportd_server.jobs.manager import JobManager
from exportd_server.jobs.model import Job, JobState, PartRecord
from exportd_server.jobs.output import error_part_file_name, part_file_name

PARTS_PER_PAGE = 100
RECORDS = 100


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, or is to."""

    when: datetime
    what: str


@dataclass(frozen=True, slots=True)
class PartRow:
    """A part as the page shows it."""

    file_name: str
    record: PartRecord


class JobPage:
    """The page of a job."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    def add_to(self, site: Site) -> None:
        """Serve the page and what its script asks for."""
        site.page("/jobs/{job_id}", "GetJob", self._page)
        site.page("/live/jobs/{job_id}", "GetJob", self._fragment)

    async def _page(self, visit: Visit) -> Page:
        return Page("job.html", await self._values(visit))

    async def _fragment(self, visit: Visit) -> Page:
        values = await self._values(visit)
        return Page("_job.html", values, settled=values["job"].settled)

    async def _values(self, visit: Visit) -> dict[str, Any]:
        reader = Reader()
        job_id = reader.uuid("job_id", visit.request.match_info["job_id"], required=True)
        reader.check()
        job, parts = await self._look(visit.tenant, job_id)
        first = reading.whole(visit.request, "parts_from")
        shown = parts[first : first + PARTS_PER_PAGE]
        records: Sequence[AuditRecord] = ()
        if visit.may("ListAuditRecords"):
            query = AuditQuery(tenant=visit.tenant, job_id=job_id)
            records = await self._manager.list_audit(query, limit=RECORDS + 1, before=None)
        errors = job.manifest.error_parts if job.manifest else ()
        path = f"/jobs/{job_id}"
        return {
            "job": job,
            "fraction": fraction,
            "parts": [
                PartRow(part_file_name(job, first + index), part)
                for index, part in enumerate(shown)
            ],
            "all_parts": len(parts),
            "parts_from": first,
            "next_parts": address(path, parts_from=str(first + PARTS_PER_PAGE))
            if len(parts) > first + PARTS_PER_PAGE
            else "",
            "first_parts": path if first else "",
            "error_parts": [
                PartRow(error_part_file_name(job, index), part)
                for index, part in enumerate(errors[:PARTS_PER_PAGE])
            ],
            "all_error_parts": len(errors),
            "events": _events(job, records[:RECORDS]),
            "more_records": len(records) > RECORDS,
            "live": address(f"/live{path}", parts_from=str(first) if first else ""),
        }

    async def _look(self, tenant: str, job_id: str) -> tuple[Job, list[PartRecord]]:
        """The job with the parts that it has so far."""
        async with aclosing(self._manager.follow(tenant, job_id)) as changes:
            return await anext(changes)


def _events(job: Job, records: Sequence[AuditRecord]) -> list[Event]:
    ended = {
        JobState.SUCCEEDED: "succeeded",
        JobState.FAILED: "failed",
        JobState.CANCELLED: "cancelled",
    }
    moments = [
        (job.create_time, "created"),
        (job.start_time, "started"),
        (job.finish_time, ended.get(job.state, "ended")),
        (job.drop_time, "output dropped, for every sink had it"),
        (job.expire_time, "output expired" if job.expired else "output expires"),
    ]
    events = [Event(when, what) for when, what in moments if when is not None]
    events += [
        Event(
            record.time,
            f"{record.method.value} by {record.subject or 'somebody unknown'}: "
            f"{words.words(record.outcome)} {record.reason}".strip(),
        )
        for record in records
    ]
    return sorted(events, key=lambda event: event.when)
