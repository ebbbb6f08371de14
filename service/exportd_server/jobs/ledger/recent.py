"""Jobs that were read a moment ago and are still as they were."""

from __future__ import annotations

from datetime import datetime

from exportd_server.jobs.model import Job

_Asked = tuple[str, str]
"""A tenant and the id of a job."""


class RecentJobs:
    """Jobs by tenant and id, all of one version of the ledger; a few MiB at most."""

    MOST = 256
    MOST_PARTS = 16

    def __init__(self) -> None:
        self._version: object = None
        self._jobs: dict[_Asked, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def find(self, asked: _Asked, version: object, now: datetime) -> Job | None:
        """The job as it would be read at the ledger's `version` and the moment `now`;
        None when it has to be read."""
        if version != self._version or (job := self._jobs.get(asked)) is None:
            return None
        # The only thing about it that time alone changes.
        if not job.expired and job.expire_time is not None and job.expire_time <= now:
            return None
        return job.read_at(now)

    def keep(self, asked: _Asked, version: object, job: Job) -> None:
        """Keep what was read at this version or later, unless it is large."""
        if version != self._version or len(self._jobs) >= self.MOST:
            self._jobs.clear()
            self._version = version
        if job.progress.parts_done + job.progress.error_parts <= self.MOST_PARTS:
            self._jobs[asked] = job
