"""What must hold in the end, whatever happened before."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.torture.audit import Audit
from tests.torture.clients import Api, Clients, Tracked
from tests.torture.faults import Injector
from tests.torture.history import History
from tests.torture.options import Options

EXPLAINED = ("ATTEMPTS_EXHAUSTED", "SOURCE_CHANGED", "SOURCE_FAILED")
"""Failures that faults can explain. With attempts in plenty there are none."""

_SETTLE_SECONDS = 90.0
_NOT_JSON = (
    "exportd-server: ",
    "FATAL:  terminating",
    "WARNING:  terminating",
    "DETAIL:  ",
)
_BAD_LEVELS = ("error", "critical")


@dataclass(frozen=True, slots=True)
class Recovery:
    """From the end of a worker to the next claim of what it had, in seconds."""

    all: list[float]
    clean: list[float]
    """Of those, in times when the database was not in trouble as well."""
    moot: int
    """Those that nobody had to take over, because the job ended."""


class Checker:
    """Looks at a fleet that nobody hurts any more."""

    def __init__(
        self,
        options: Options,
        clients: Clients,
        history: History,
        url: str,
        store: Path,
        logs: Path,
    ) -> None:
        self._options = options
        self._clients = clients
        self._history = history
        self._url = url
        self._store = store
        self._logs = logs

    # --- jobs

    async def all_ended(self, api: Api) -> None:
        """Every job whose creation was answered ends."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        for tracked in self._clients.jobs:
            while tracked.final is None and await self._clients.look(api, tracked):
                if time.monotonic() > deadline:
                    self._history.violation("a job does not end", job=tracked.job_id)
                    break
                await asyncio.sleep(0.1)

    def failures(self) -> None:
        """Jobs fail for reasons that the faults explain, or not at all."""
        jobs = self._clients.jobs
        failed = [job for job in jobs if job.state == "FAILED"]
        for job in failed:
            self._history.note("failed job", job=job.job_id, reason=job.failure)
            if job.failure not in EXPLAINED:
                self._history.violation(
                    "failed for a reason that no fault explains",
                    job=job.job_id,
                    reason=job.failure,
                    error=job.final.error.message if job.final is not None else "",
                )
        if len(failed) > self._options.allow_failed * len(jobs):
            reasons = Counter(job.failure for job in failed)
            self._history.violation(
                "more jobs failed than may", of=len(jobs), reasons=dict(reasons)
            )

    async def look_again(self, api: Api) -> None:
        """What has ended says the same, everywhere, with the same bytes."""
        for tracked in list(self._clients.jobs):
            if not tracked.deleting and not tracked.may_be_gone():
                await self._clients.check(api, tracked)

    async def delete_all(self, api: Api) -> None:
        """Delete what is left."""
        for tracked in self._clients.jobs:
            if not tracked.deleting and not tracked.may_be_gone():
                await self._clients.delete(api, tracked)

    # --- the store

    async def tidy(self) -> None:
        """Once the cleanups are through, the store has what manifests name and no more."""
        await self._cleanups_done()
        named = await self._named()
        found = {str(path.relative_to(self._store)) for path in self._files()}
        for name in sorted(found - named):
            self._history.violation("a file that no manifest names", file=name)
        # Some may have expired while we looked: what counts is what is kept afterwards.
        kept = await self._named("hidden_time IS NULL")
        for name in sorted((named & kept) - found):
            self._history.violation("a part of a manifest is missing", file=name)

    async def empty(self) -> None:
        """Once all jobs are deleted there is nothing left of them."""
        await self._cleanups_done(forgetting=True)
        rows = await self._query(
            "SELECT 'jobs', count(*) FROM exportd.jobs UNION ALL "
            "SELECT 'tasks', count(*) FROM exportd.tasks WHERE job_id IS NOT NULL "
            "UNION ALL "
            "SELECT 'parts', count(*) FROM exportd.parts UNION ALL "
            "SELECT 'deliveries', count(*) FROM exportd.deliveries UNION ALL "
            "SELECT 'labels', count(*) FROM exportd.labels UNION ALL "
            "SELECT 'standing tasks that are there twice', "
            "count(*) - count(DISTINCT kind) FROM exportd.tasks WHERE job_id IS NULL"
        )
        for name, count in rows:
            if count:
                self._history.violation("rows are left", table=name, rows=count)
        own = ("default", ".owner")
        left = [path for path in self._store.rglob("*") if path.name not in own]
        for path in left[:5]:
            self._history.violation("something is left in the store", path=path)

    async def _cleanups_done(self, *, forgetting: bool = False) -> None:
        """Wait until no cleanup is due any more."""
        table = "jobs" if forgetting else "tasks WHERE kind = 'cleanup'"
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            ((left,),) = await self._query(f"SELECT count(*) FROM exportd.{table}")
            if not left:
                return
            if time.monotonic() > deadline:
                self._history.violation("cleanups do not end", left=left)
                return
            await asyncio.sleep(0.1)

    async def _named(self, which: str = "true") -> set[str]:
        rows = await self._query(
            "SELECT j.tenant, j.job_id, p.kind, p.shard, p.sequence, p.token "
            "FROM exportd.jobs j JOIN exportd.parts p USING (job_id, generation) "
            f"WHERE j.state = 'SUCCEEDED' AND {which} UNION ALL "
            "SELECT tenant, job_id, 'manifest', 0, 0, manifest_token "
            f"FROM exportd.jobs WHERE manifest_token IS NOT NULL AND {which}"
        )
        return {
            f"{tenant}/{job_id}/{kind}/{shard:06d}-{sequence:06d}.{token}"
            for tenant, job_id, kind, shard, sequence, token in rows
        }

    def _files(self) -> list[Path]:
        """All but the mark of whose outputs these are."""
        return [
            path
            for path in self._store.rglob("*")
            if path.is_file() and path.name != ".owner"
        ]

    async def _query(self, text: str) -> list[tuple[Any, ...]]:
        async with await psycopg.AsyncConnection.connect(
            self._url, autocommit=True
        ) as connection:
            cursor = await connection.execute(text)
            return await cursor.fetchall()

    # --- what was written down meanwhile

    def audit(self, audit: Audit) -> None:
        """The claims, states and parts of the whole run."""
        for fault in audit.faults():
            self._history.violation(fault)
        for tracked in self._clients.jobs:
            if tracked.state != "SUCCEEDED" or tracked.final is None:
                continue
            published = [
                move
                for move in audit.moves[tracked.job_id]
                if move.state == "SUCCEEDED" and move.former != "SUCCEEDED"
            ]
            if [move.generation for move in published] != [tracked.final.generation]:
                self._history.violation("not published once", job=tracked.job_id)
            parts = audit.parts[tracked.job_id, tracked.final.generation]
            if len(parts) != len(tracked.final.manifest.parts):
                self._history.violation("parts are not the manifest's", job=tracked.job_id)

    def recovery(self, audit: Audit, injector: Injector) -> Recovery:
        """How soon the work of killed workers was taken up."""
        later: dict[int, list[Any]] = {}
        starts: dict[str, list[Any]] = {}
        for claim in audit.claims:
            later.setdefault(claim.task_id, []).append(claim)
            starts.setdefault(claim.job_id, []).append(claim)
        found, clean, slow, moot = [], [], [], 0
        bound = self._options.lease + 2.0
        for lease in injector.orphaned:
            again = [c.at for c in later.get(lease.task_id, []) if c.token > lease.token]
            anew = [
                c.at
                for c in starts.get(lease.job_id, [])
                if c.generation > lease.generation
            ]
            moments = [*again, *anew]
            if not moments:
                moot += 1
                continue
            at = min(moments)
            found.append(at - lease.at)
            if not any(b <= at and lease.at <= e for b, e in injector.disturbed):
                clean.append(at - lease.at)
                if at - lease.at > bound:
                    slow.append((round(at - lease.at, 2), lease))
        for seconds, lease in slow:
            self._history.violation(
                "taken over too late", bound=bound, seconds=seconds, lease=lease
            )
        return Recovery(found, clean, moot)

    def log_lines(self) -> Counter[str]:
        """Read the logs; errors in them are violations. Returns how often each event was
        logged."""
        events: Counter[str] = Counter()
        for path in sorted(self._logs.glob("*.log")):
            for line in path.read_text(errors="replace").splitlines(keepends=True):
                self._log_line(path, line, events)
        return events

    def _log_line(self, path: Path, line: str, events: Counter[str]) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            # The last line of one that was killed, a refusal to start, or what libpq
            # says beside its errors.
            if line.endswith("\n") and not line.startswith(_NOT_JSON):
                self._history.violation(
                    "something unforeseen in a log", log=path.name, line=line.strip()[:300]
                )
            return
        events[str(entry.get("event"))] += 1
        if entry.get("level") in _BAD_LEVELS:
            self._history.violation("an error in a log", log=path.name, entry=_told(entry))


def _told(entry: dict[str, Any]) -> str:
    frames = [
        f"{e.get('exc_type')}: {e.get('exc_value')}" for e in entry.get("exception", [])
    ]
    rest = {k: v for k, v in entry.items() if k not in ("exception", "timestamp")}
    return f"{rest} {frames}"


def states(jobs: list[Tracked]) -> Counter[str]:
    """Jobs by their end."""
    return Counter(job.state for job in jobs)
