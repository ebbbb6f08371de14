"""Jobs that were read a moment ago and are still as they were."""

from __future__ import annotations

from datetime import datetime

from exportd_server.jobs.model import Job

_Asked = tuple[str, str]
"""A tenant and the id of a job."""


class RecentJobs:
    """Jobs by tenant and id, all of one version of the ledger. None has many parts, or
    deliveries, whose texts are the sinks'; long requests are not to be kept either."""

    MOST = 128
    MOST_PARTS = 16

    def __init__(self) -> None:
        self._version: object = None
        # In the order in which they were last asked for.
        self._jobs: dict[_Asked, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def find(self, asked: _Asked, version: object, now: datetime) -> Job | None:
        """The job as it would be read at the ledger's `version` and the moment `now`;
        None when it has to be read."""
        if version != self._version or (job := self._jobs.pop(asked, None)) is None:
            return None
        # The only thing about it that time alone changes. A clock may be set back.
        if job.expired != (job.expire_time is not None and job.expire_time <= now):
            return None
        self._jobs[asked] = job
        return job.read_at(now)

    def keep(self, asked: _Asked, version: object, job: Job) -> None:
        """Keep what was read at this version or later."""
        if version != self._version:
            self._jobs.clear()
            self._version = version
        if job.deliveries:
            return
        if job.manifest is not None:
            parts = len(job.manifest.parts) + len(job.manifest.error_parts)
            if parts > self.MOST_PARTS:
                return
        self._jobs[asked] = job
        if len(self._jobs) > self.MOST:
            del self._jobs[next(iter(self._jobs))]
