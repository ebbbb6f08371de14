"""What exportd counts, for Prometheus.

Labels are stable and few: types and connections that the operator configured, never
addresses, jobs or tenants. Each series is there, at 0, from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

# They double the series, and nothing here asks when one was made.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()

_SINK = ("sink", "connection")

deliveries = Counter(
    "exportd_sink_deliveries",
    "Attempts at deliveries by what they came to: delivered, retried, dead_lettered, "
    "given_back.",
    (*_SINK, "outcome"),
    registry=REGISTRY,
)
dropped = Counter(
    "exportd_sink_dropped",
    "Deliveries that were dropped because the queue was full.",
    _SINK,
    registry=REGISTRY,
)
delivered_bytes = Counter(
    "exportd_sink_delivered_bytes",
    "Stored bytes of the parts that were delivered.",
    _SINK,
    registry=REGISTRY,
)
delivery_seconds = Histogram(
    "exportd_sink_delivery_seconds",
    "How long attempts took, successful or not.",
    _SINK,
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800),
    registry=REGISTRY,
)
queue_depth = Gauge(
    "exportd_sink_queue_depth",
    "Deliveries by what they wait for: `waiting` for their turn or under way, `retrying` "
    "for their next attempt.",
    (*_SINK, "state"),
    registry=REGISTRY,
)
endpoints_disabled = Counter(
    "exportd_sink_endpoints_disabled",
    "Endpoints that were disabled because they are gone or failed for too long.",
    _SINK,
    registry=REGISTRY,
)
queues_disabled = Gauge(
    "exportd_sink_queues_disabled",
    "Queues whose endpoint is disabled now.",
    _SINK,
    registry=REGISTRY,
)

audit_dropped = Counter(
    "exportd_audit_dropped",
    "Audit records that stand in the log and not in the ledger, by why: full (more waited "
    "than may), refused (the ledger did not take them), refusals (too many of a tenant's "
    "refused operations), shutdown (no time was left), unidentified (too many of callers "
    "that nobody knows).",
    ("cause",),
    registry=REGISTRY,
)
for _cause in ("full", "refused", "refusals", "shutdown", "unidentified"):
    audit_dropped.labels(_cause)

OUTCOMES = ("delivered", "retried", "dead_lettered", "given_back")
STATES = ("waiting", "retrying")


def register_sinks(sinks: Iterable[tuple[str, str]]) -> None:
    """Make the series of these pairs of type and connection."""
    for pair in sinks:
        for outcome in OUTCOMES:
            deliveries.labels(*pair, outcome)
        for state in STATES:
            queue_depth.labels(*pair, state)
        for metric in (dropped, delivered_bytes, endpoints_disabled):
            metric.labels(*pair)
        delivery_seconds.labels(*pair)
        queues_disabled.labels(*pair)


def set_queue_depths(depths: Mapping[tuple[str, str, str], int]) -> None:
    """Set the depth of every queue, by type, connection and state; of others it is 0."""
    for labels in _known(queue_depth) | set(depths):
        queue_depth.labels(*labels).set(depths.get((labels[0], labels[1], labels[2]), 0))


def set_disabled(queues: Mapping[tuple[str, str], int]) -> None:
    """Set how many queues are disabled, by type and connection; of others none is."""
    for labels in _known(queues_disabled) | set(queues):
        queues_disabled.labels(*labels).set(queues.get((labels[0], labels[1]), 0))


def _known(gauge: Gauge) -> set[tuple[str, ...]]:
    """The labels of every series, also of those that were made for a sink no connection
    names."""
    return {
        tuple(sample.labels.values())
        for metric in gauge.collect()
        for sample in metric.samples
    }
