"""What exportd counts of jobs, and of the work that they are made of.

Datasets are those of the catalogue this process reads; one that only others know has an
empty name here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from prometheus_client import Counter, Gauge, Histogram

from exportd_server.errors import ErrorReason
from exportd_server.platform.metrics import REGISTRY

_LONG = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400, 86400)
_DATA = ("dataset", "format")

created = Counter(
    "exportd_jobs_created",
    "Jobs that were created.",
    _DATA,
    registry=REGISTRY,
)
finished = Counter(
    "exportd_jobs_finished",
    "Jobs that ended, by the state they ended in: SUCCEEDED, FAILED, CANCELLED.",
    (*_DATA, "state"),
    registry=REGISTRY,
)
failed = Counter(
    "exportd_jobs_failed",
    "Jobs that ended FAILED, by the reason of their error.",
    ("dataset", "reason"),
    registry=REGISTRY,
)
wait_seconds = Histogram(
    "exportd_job_wait_seconds",
    "From a job's creation until a worker took it up for the first time. Told when the "
    "job ends.",
    buckets=_LONG,
    registry=REGISTRY,
)
job_seconds = Histogram(
    "exportd_job_seconds",
    "From a job's creation to its end, by the state it ended in.",
    ("state",),
    buckets=_LONG,
    registry=REGISTRY,
)
unfinished = Gauge(
    "exportd_jobs_unfinished",
    "Jobs of the ledger by state: PENDING, RUNNING. Every process tells the same figure; "
    "NaN while the ledger is out of reach.",
    ("state",),
    registry=REGISTRY,
)
open_tasks = Gauge(
    "exportd_tasks_open",
    "Tasks of the ledger by kind and state: `ready` to be taken up, `scheduled` for "
    "later, `leased` to a worker. Every process tells the same figure; NaN while the "
    "ledger is out of reach.",
    ("kind", "state"),
    registry=REGISTRY,
)
task_oldest_seconds = Gauge(
    "exportd_task_oldest_seconds",
    "For how long the task of each kind has waited that has waited longest: since it was "
    "due, or since its lease ran out; 0 when none waits. Every process tells the same "
    "figure; NaN while the ledger is out of reach.",
    ("kind",),
    registry=REGISTRY,
)
queue_oldest_seconds = Gauge(
    "exportd_queue_oldest_seconds",
    "For how long exports have waited for a worker: the older of the plan and shard in "
    "exportd_task_oldest_seconds. Every process tells the same figure; NaN while the "
    "ledger is out of reach.",
    registry=REGISTRY,
)

rows = Counter(
    "exportd_rows_exported",
    "Rows of parts that were finished and recorded.",
    _DATA,
    registry=REGISTRY,
)
bytes_ = Counter(
    "exportd_bytes_exported",
    "Stored bytes of parts that were finished and recorded, error parts included.",
    _DATA,
    registry=REGISTRY,
)
stage_seconds = Histogram(
    "exportd_stage_seconds",
    "What each run of a shard spent in each stage, however it ended: `source` waiting for "
    "rows, `encode` encoding and hashing, `write` in the output store. The source is read "
    "beside the others.",
    ("stage",),
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600),
    registry=REGISTRY,
)
attempts = Counter(
    "exportd_attempts",
    "Attempts at tasks by what they came to: done, retried, failed (and the job with it), "
    "restarted (the source changed), lost, given_back, broken_off (unforeseen). Those at "
    "deliveries have exportd_sink_deliveries_total.",
    ("kind", "outcome"),
    registry=REGISTRY,
)

claims = Counter(
    "exportd_claims",
    "Times that a worker asked the ledger for work, by what it got: claimed, nothing, "
    "failed.",
    ("outcome",),
    registry=REGISTRY,
)
claim_seconds = Histogram(
    "exportd_claim_seconds",
    "How long the ledger took to answer a claim.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30),
    registry=REGISTRY,
)
leases_lost = Counter(
    "exportd_leases_lost",
    "Leases that work was stopped for, told by who lost them: job_ended (the job was "
    "cancelled, deleted or failed, or begins anew), taken_over (the lease was not renewed "
    "in time), unknown (the ledger was out of reach).",
    ("kind", "cause"),
    registry=REGISTRY,
)
takeovers = Counter(
    "exportd_lease_takeovers",
    "Tasks taken up whose lease had run out, told by who took them over: their holder "
    "died, hung, or could not reach the ledger.",
    ("kind",),
    registry=REGISTRY,
)

KINDS = ("plan", "shard", "cleanup", "reap", "sweep", "deliver")
TASK_STATES = ("ready", "scheduled", "leased")
UNFINISHED = ("PENDING", "RUNNING")
ENDS = ("SUCCEEDED", "FAILED", "CANCELLED")
ATTEMPT_OUTCOMES = (
    *("done", "retried", "failed", "restarted", "lost", "given_back", "broken_off"),
)
CLAIM_OUTCOMES = ("claimed", "nothing", "failed")
CAUSES = ("job_ended", "taken_over", "unknown")
STAGES = ("source", "encode", "write")
FAILURES = (
    ErrorReason.ATTEMPTS_EXHAUSTED,
    ErrorReason.DATASET_NOT_EXPORTABLE,
    ErrorReason.EXPORT_TOO_LARGE,
    ErrorReason.INTERNAL,
    ErrorReason.SOURCE_CHANGED,
    ErrorReason.SOURCE_FAILED,
    ErrorReason.STORE_FAILED,
    ErrorReason.STORE_FULL,
    ErrorReason.TOO_MANY_ROW_ERRORS,
    ErrorReason.VALUE_NOT_ENCODABLE,
)
"""Reasons that jobs fail for as a rule. Others make their series when they come up."""

for _state in ENDS:
    job_seconds.labels(_state)
for _kind in KINDS:
    takeovers.labels(_kind)
    for _cause in CAUSES:
        leases_lost.labels(_kind, _cause)
    if _kind != "deliver":
        for _outcome in ATTEMPT_OUTCOMES:
            attempts.labels(_kind, _outcome)
for _outcome in CLAIM_OUTCOMES:
    claims.labels(_outcome)

source_stage, encode_stage, write_stage = map(stage_seconds.labels, STAGES)

_datasets: set[str] = set()


def register_datasets(datasets: Iterable[str], formats: Iterable[str]) -> None:
    """Make the series of these datasets in each of these formats."""
    formats = tuple(formats)
    for dataset in ("", *datasets):
        _datasets.add(dataset)
        for format_ in formats:
            for metric in (created, rows, bytes_):
                metric.labels(dataset, format_)
            for state in ENDS:
                finished.labels(dataset, format_, state)
        for reason in FAILURES:
            failed.labels(dataset, reason.value)


def known(dataset: str) -> str:
    """What stands for a dataset in labels."""
    return dataset if dataset in _datasets else ""


def set_backlog(
    jobs: Mapping[str, int],
    tasks: Mapping[tuple[str, str], int],
    waiting: Mapping[str, float],
) -> None:
    """Tell how the ledger stands: jobs by state, tasks by kind and state, and for how many
    seconds the oldest of each kind has waited. What is not there is 0."""
    for state in UNFINISHED:
        unfinished.labels(state).set(jobs.get(state, 0))
    for kind in KINDS:
        for state in TASK_STATES:
            open_tasks.labels(kind, state).set(tasks.get((kind, state), 0))
        task_oldest_seconds.labels(kind).set(waiting.get(kind, 0.0))
    exports = (waiting.get("plan", 0.0), waiting.get("shard", 0.0))
    queue_oldest_seconds.set(max(exports))


def forget_backlog() -> None:
    """Tell that nobody knows how the ledger stands."""
    for state in UNFINISHED:
        unfinished.labels(state).set(math.nan)
    for kind in KINDS:
        for state in TASK_STATES:
            open_tasks.labels(kind, state).set(math.nan)
        task_oldest_seconds.labels(kind).set(math.nan)
    queue_oldest_seconds.set(math.nan)


set_backlog({}, {}, {})
