"""What a transaction changed, as text that processes tell each other.

PostgreSQL carries at most 8 000 bytes at a time, so much news goes in several pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from exportd_server.jobs.ledger.signals import Changes

CHANNEL = "exportd"
_MOST_JOBS = 100
"""Identifiers in one piece, some fifty bytes each."""


@dataclass(frozen=True, slots=True)
class News:
    """One piece: which instance tells it, and what has changed."""

    sender: str
    changes: Changes = field(default_factory=Changes)


def pieces(sender: str, changes: Changes) -> Iterator[str]:
    """The texts that tell of the changes; none when nobody can be waiting for them."""
    entries: Iterator[tuple[str, str, int | None]] = iter(
        [("jobs", job_id, revision) for job_id, revision in changes.revisions.items()]
        + [("gone", job_id, None) for job_id in sorted(changes.gone)]
        + [("fenced", job_id, None) for job_id in sorted(changes.fenced)]
        + [("cut", job_id, None) for job_id in sorted(changes.cut)]
    )
    work = changes.work
    while (some := list(islice(entries, _MOST_JOBS))) or work:
        piece: dict[str, Any] = {"from": sender, "work": work}
        for kind, job_id, revision in some:
            if kind == "jobs":
                piece.setdefault(kind, {})[job_id] = revision
            else:
                piece.setdefault(kind, []).append(job_id)
        yield json.dumps(piece, separators=(",", ":"))
        work = False


def parse(text: str) -> News | None:
    """A piece of news; None when it is none of ours, for anybody may use a channel."""
    try:
        piece = json.loads(text)
        return News(
            sender=str(piece["from"]),
            changes=Changes(
                revisions={str(k): int(v) for k, v in piece.get("jobs", {}).items()},
                gone=set(map(str, piece.get("gone", ()))),
                fenced=set(map(str, piece.get("fenced", ()))),
                cut=set(map(str, piece.get("cut", ()))),
                work=bool(piece.get("work")),
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return None
    except RecursionError:
        return None
