"""Counts what transactions did, once they are committed: whoever commits a change counts
it, so that each is counted by one process and once.

A commit whose answer was lost is not counted.
"""

from __future__ import annotations

from exportd_server.jobs.ledger.signals import Changes
from exportd_server.platform import metrics_exports as metrics


def count(changes: Changes) -> None:
    """Count what a committed transaction did; from any thread."""
    for created in changes.created:
        metrics.created.labels(metrics.known(created.dataset), created.format).inc()
    for ended in changes.ended:
        dataset = metrics.known(ended.dataset)
        metrics.finished.labels(dataset, ended.format, ended.state).inc()
        if ended.reason:
            metrics.failed.labels(dataset, ended.reason).inc()
        if ended.waited is not None:
            metrics.wait_seconds.observe(ended.waited)
        metrics.job_seconds.labels(ended.state).observe(ended.lasted)
