"""Who is downloading what, so that expiry does not cut a download in progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Readers:
    """Downloads of this process, by job. For the event loop's thread only."""

    def __init__(self) -> None:
        self._active: Counter[str] = Counter()
        self._cut: set[str] = set()

    @contextmanager
    def reading(self, job_id: str) -> Iterator[None]:
        """Mark a download for as long as it runs."""
        self._active[job_id] += 1
        try:
            yield
        finally:
            self._active[job_id] -= 1
            if not self._active[job_id]:
                del self._active[job_id]
                self._cut.discard(job_id)

    def cut(self, job_id: str) -> None:
        """End the job's downloads: it was cancelled or deleted, not merely expired."""
        if job_id in self._active:
            self._cut.add(job_id)

    def is_cut(self, job_id: str) -> bool:
        """Whether a running download of the job must end now."""
        return job_id in self._cut

    def in_use(self, job_id: str) -> bool:
        """Whether deleting the job's output would break a download."""
        return job_id in self._active and job_id not in self._cut
