"""Asks a source for a plan, without being at its mercy."""

from __future__ import annotations

import threading

from exportd_server.jobs.anchors import Anchors
from exportd_server.jobs.leases import Held
from exportd_server.jobs.strays import Strayable, Strays
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.sources.base import Plan, Query, Source


async def make_plan(
    source: Source,
    query: Query,
    shard_rows: int,
    held: Held,
    anchors: Anchors,
    strays: Strays,
) -> Plan:
    """The source's plan; raises what the source raises. The anchor is the caller's to
    close. Raises `LeaseLost` or `GivenBack` as soon as the work is to stop: a plan that
    comes after that is thrown away, its anchor closed."""
    planning = _Planning(source, query, shard_rows)
    work = Strayable(strays, planning)
    made = in_daemon_thread(work, "plan")
    try:
        await held.unless_stopped(made)
        return made.result()
    except BaseException:
        work.leave()
        late = planning.abandon()
        if late is not None and late.anchor is not None:
            anchors.close_in_thread(late.anchor)
        raise


class _Planning:
    """A plan being made in a thread, which cannot be interrupted."""

    def __init__(self, source: Source, query: Query, shard_rows: int) -> None:
        self._source = source
        self._query = query
        self._shard_rows = shard_rows
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._abandoned = False

    def __call__(self) -> Plan:
        plan = self._source.plan(self._query, shard_rows=self._shard_rows)
        with self._lock:
            self._plan = plan
            abandoned = self._abandoned
        if abandoned and plan.anchor is not None:
            plan.anchor.close()
        return plan

    def abandon(self) -> Plan | None:
        """Nobody waits any more. Returns the plan if it is there already, for its anchor
        to be closed; one that comes later closes it itself."""
        with self._lock:
            self._abandoned = True
            return self._plan
