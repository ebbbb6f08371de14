"""The standing of the service as a screen of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from exportd_server.operations.standing import Standing

_MOST_LINES = 30
"""Lines of one table; how many more there are is told."""
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")

_T = TypeVar("_T")


def glance(standing: Standing) -> Iterator[str]:
    """Its lines."""
    now = standing.time
    yield f"at {now:%Y-%m-%d %H:%M:%S} UTC, by the ledger's clock"
    yield from _table(
        "Workers",
        ("process", "at", "leases", "first ends in"),
        standing.workers,
        lambda one: (one.owner, one.kind, str(one.leases), _until(one.expires, now)),
        "no process holds a lease",
    )
    yield from _table(
        "Leases near or past their end",
        ("process", "at", "job", "attempt", "ends in"),
        standing.late_leases,
        lambda one: (
            *(one.owner, one.kind, one.job_id or "-", str(one.attempt)),
            _until(one.expires, now),
        ),
        "none",
    )
    yield from _table(
        "Jobs",
        ("state", "dataset", "jobs", "oldest"),
        standing.jobs,
        lambda one: (one.state, one.dataset, str(one.jobs), span(now - one.oldest)),
        "none is pending or running",
    )
    yield from _table(
        "Tasks",
        ("kind", "state", "tasks", "oldest", "due in"),
        standing.tasks,
        lambda one: (
            *(one.kind, one.state, str(one.tasks)),
            span(now - one.oldest) if one.oldest else "-",
            _until(one.due, now) if one.state == "scheduled" else "-",
        ),
        "none",
    )
    yield from _table(
        "Sink queues",
        ("queue", "waiting", "retrying", "delivering", "oldest", "dead", "sink"),
        standing.sink_queues,
        lambda one: (
            *(one.queue, str(one.waiting), str(one.retrying), str(one.delivering)),
            span(now - one.oldest) if one.oldest else "-",
            str(one.dead_letters),
            _sink(one.failing_since, one.disabled_since, now),
        ),
        "nothing waits, and there are no dead letters",
    )
    yield from _table(
        "Storage",
        ("parts of", "parts", "size"),
        standing.storage,
        lambda one: (one.kind, str(one.parts), size(one.bytes)),
        "no parts",
    )


def _table(
    title: str,
    names: Sequence[str],
    rows: Sequence[_T] | None,
    cells: Callable[[_T], Sequence[str]],
    none: str,
) -> Iterator[str]:
    yield ""
    if rows is None:
        yield f"{title}: the ledger did not tell in time"
        return
    if not rows:
        yield f"{title}: {none}"
        return
    yield title
    shown = [names, *map(cells, rows[:_MOST_LINES])]
    widths = [max(len(row[at]) for row in shown) for at in range(len(names))]
    for row in shown:
        cells_ = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  " + "  ".join(cells_).rstrip()
    if len(rows) > _MOST_LINES:
        yield f"  and {len(rows) - _MOST_LINES} more; --json tells all"


def _until(moment: datetime, now: datetime) -> str:
    return span(moment - now) if moment >= now else f"past by {span(now - moment)}"


def _sink(failing: datetime | None, disabled: datetime | None, now: datetime) -> str:
    if disabled is not None:
        return f"disabled for {span(now - disabled)}"
    return "works" if failing is None else f"fails for {span(now - failing)}"


def span(length: timedelta) -> str:
    """A length of time in its two largest units, such as `2h 5m`."""
    seconds = max(0, int(length.total_seconds()))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    for large, small, texts in (
        (days, hours, "dh"),
        (hours, minutes, "hm"),
        (minutes, seconds, "ms"),
    ):
        if large:
            return f"{large}{texts[0]} {small}{texts[1]}"
    return f"{seconds}s"


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a whole number before the point."""
    amount, unit = float(count), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{count} bytes" if unit == 0 else f"{amount:.1f} {_UNITS[unit]}"
