"""What commands print: JSON for programs, plain text for people.

Answers go to stdout, everything about their making to stderr.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from google.protobuf import any_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import (
    error_details_pb2,  # noqa: F401 - registers the details, so that JSON can show them
    status_pb2,
)

from exportd._audit import AuditOutcome, AuditRecord
from exportd._deliveries import Delivery, DeliveryStatus, SinkDelivery, SinkQueue
from exportd._model import Dataset, JobInfo, JobState, counted
from exportd.errors import ExportdError
from exportd.v1 import job_pb2, sink_pb2

_STANDARD_DETAILS = "type.googleapis.com/google.rpc."
_COMMANDS = {
    "ListDatasets": "exportd datasets",
    "ListDeliveries": "exportd deliveries",
    "ListSinkQueues": "exportd queues",
}
"""Calls that the server's messages speak of, as commands."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def as_json(message: Message) -> dict[str, Any]:
    """The contract's JSON, with its field names; fields at their default included."""
    return MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


def job_json(job: job_pb2.Job) -> dict[str, Any]:
    """A job as JSON."""
    copy = job_pb2.Job()
    copy.CopyFrom(job)
    _keep_known_details(copy.error)
    for delivery in copy.deliveries:
        _keep_known_details(delivery.last_error)
    return as_json(copy)


def delivery_json(delivery: sink_pb2.Delivery) -> dict[str, Any]:
    """A delivery as JSON."""
    copy = sink_pb2.Delivery()
    copy.CopyFrom(delivery)
    _keep_known_details(copy.last_error)
    return as_json(copy)


def queue_json(queue: sink_pb2.SinkQueue) -> dict[str, Any]:
    """A queue as JSON."""
    copy = sink_pb2.SinkQueue()
    copy.CopyFrom(queue)
    _keep_known_details(copy.disabled_reason)
    return as_json(copy)


def _keep_known_details(status: status_pb2.Status) -> None:
    """Take out error details of a kind unknown here, which cannot be printed. A status
    that is absent stays so."""
    known: list[any_pb2.Any] = [
        d for d in status.details if d.type_url.startswith(_STANDARD_DETAILS)
    ]
    if len(known) < len(status.details):
        del status.details[:]
        status.details.extend(known)


def print_json(value: object) -> None:
    """One object on one line."""
    click.echo(json.dumps(value, ensure_ascii=False))


def note(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(text, err=True)


def error_line(error: ExportdError) -> str:
    """One line: what, which fields, and when to try again."""
    text = _in_commands(str(error), error.metadata)
    missing = [
        f"{v.subject}: {v.description}"
        for v in error.violations
        if v.description not in text
    ]
    if missing:
        text += " (" + "; ".join(missing) + ")"
    if error.retry_after is not None:
        text += f"; try again in {error.retry_after.total_seconds():g} s"
    return f"error: {one_line(clean(text))}"


def _in_commands(text: str, metadata: Mapping[str, str]) -> str:
    """The server's words, with commands for the calls of the contract."""
    for call, command in _COMMANDS.items():
        text = text.replace(call, f"'{command}'")
    queue = shlex.quote(metadata.get("queue", "QUEUE"))
    return text.replace("EnableSinkQueue", f"'exportd queues enable {queue}'")


def clean(text: str) -> str:
    """Text from the server without what would steer a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def one_line(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns that line up, never cut off."""
    lines = [list(header), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def show_datasets(datasets: Iterable[Dataset]) -> None:
    """The list of datasets."""
    table(
        ("NAME", "ROWS", "FORMATS", "DESCRIPTION"),
        (
            (
                d.name,
                "" if d.estimated_rows is None else f"{d.estimated_rows:,}",
                ",".join(d.formats) if d.exportable else "(not exportable)",
                d.description,
            )
            for d in datasets
        ),
    )


def show_dataset(dataset: Dataset) -> None:
    """One dataset with its columns."""
    facts = {
        "name": dataset.name,
        "description": dataset.description,
        "exportable": "yes" if dataset.exportable else "no",
        "formats": ", ".join(dataset.formats),
        "--target": dataset.target_column,
        "--network": dataset.network_column,
        "--since, --until": dataset.time_column,
        "rows": _count(dataset.estimated_rows, "about "),
        "most rows": _count(dataset.max_rows),
        "most bytes": _count(dataset.max_bytes),
    }
    _facts(facts)
    if dataset.columns:
        click.echo()
        table(
            ("COLUMN", "TYPE", "NULLS", "FILTER", "DESCRIPTION"),
            (
                (
                    c.name,
                    c.type,
                    "yes" if c.nullable else "no",
                    "yes" if c.operators else "no",
                    c.description,
                )
                for c in dataset.columns
            ),
        )


def show_job(job: JobInfo) -> None:
    """One job."""
    manifest = job.manifest
    _facts(
        {
            "job": job.id,
            "state": str(job.state),
            "dataset": job.dataset,
            "format": job.format,
            "progress": "" if job.state.final else progress_text(job),
            "created": _moment(job.create_time),
            "started": _moment(job.start_time),
            "finished": _moment(job.finish_time),
            "expires": _moment(job.expire_time),
            "attempt": str(job.attempt) if job.attempt > 1 else "",
            "labels": ", ".join(f"{k}={v}" for k, v in sorted(job.labels.items())),
            "error": str(job.error or ""),
            "rows": _count(manifest.rows) if manifest else "",
            "left out": _left_out(job) if job.progress.row_errors else "",
            "size": size_text(manifest.size) if manifest else "",
            "parts": str(len(manifest.parts)) if manifest else "",
            "file": manifest.file_name if manifest else "",
            "dropped": _moment(job.drop_time),
            "delivery": _delivery(job),
        }
    )
    if job.deliveries:
        click.echo()
        _show_sinks(job.deliveries)


def show_jobs(jobs: Iterable[JobInfo]) -> None:
    """The list of jobs."""
    table(
        ("JOB", "STATE", "DATASET", "FORMAT", "ROWS", "CREATED"),
        (
            (
                j.id,
                str(j.state),
                j.dataset,
                j.format,
                f"{j.progress.rows:,}",
                _moment(j.create_time),
            )
            for j in jobs
        ),
    )


def _show_sinks(deliveries: Iterable[SinkDelivery]) -> None:
    """How the delivery of a job to each of its sinks stands."""
    table(
        (
            *("SINK", "STATUS", "DELIVERED", "PENDING", "DROPPED", "FAILED", "ATTEMPTS"),
            "RECEIPT OR LAST ERROR",
        ),
        (
            (
                d.sink,
                str(d.status),
                f"{d.delivered:,}",
                f"{d.pending:,}",
                f"{d.dropped:,}",
                f"{d.dead_lettered:,}",
                f"{d.attempts:,}",
                one_line(str(d.last_error or d.receipt)),
            )
            for d in deliveries
        ),
    )


def show_deliveries(deliveries: Iterable[Delivery], *, with_job: bool) -> None:
    """The list of deliveries."""
    skip = 0 if with_job else 1
    header = (
        "JOB",
        "STATE",
        "SINK",
        "FILE",
        "ATTEMPTS",
        "NEXT ATTEMPT",
        "ID",
        "LAST ERROR",
    )
    table(
        header[skip:],
        (
            (
                d.job_id,
                str(d.state),
                d.sink,
                d.file_name or "completion",
                f"{d.attempts:,}",
                _moment(d.next_attempt_time),
                d.id,
                one_line(str(d.last_error or "")),
            )[skip:]
            for d in deliveries
        ),
    )


def show_queues(queues: Iterable[SinkQueue]) -> None:
    """The list of queues."""
    table(
        ("QUEUE", "WAITING", "RETRYING", "FAILED", "STATE"),
        (
            (
                q.queue,
                f"{q.waiting:,}",
                f"{q.retrying:,}",
                f"{q.dead_lettered:,}",
                _queue_state(q),
            )
            for q in queues
        ),
    )


def show_audit(records: Iterable[AuditRecord]) -> None:
    """The list of audit records."""
    table(
        ("TIME", "TENANT", "SUBJECT", "FROM", "METHOD", "ABOUT", "OUTCOME"),
        (
            (
                _moment(r.time),
                r.tenant,
                r.subject or r.identity,
                r.peer,
                r.method,
                one_line(r.job_id or r.key_id or r.delivery_id or r.queue or r.dataset),
                _audit_outcome(r),
            )
            for r in records
        ),
    )


def _audit_outcome(record: AuditRecord) -> str:
    pieces = [record.outcome.lower().replace("_", " ")]
    if record.bytes_sent is not None:
        pieces.append(f"{size_text(record.bytes_sent)} sent")
    if record.outcome is not AuditOutcome.SUCCEEDED:
        pieces.append(record.reason or record.code)
    return ", ".join(pieces)


def _queue_state(queue: SinkQueue) -> str:
    if queue.disabled_time is not None:
        why = one_line(str(queue.disabled_reason or ""))
        return f"disabled since {_moment(queue.disabled_time)}" + (
            f": {why}" if why else ""
        )
    if queue.failing_since is not None:
        return f"failing since {_moment(queue.failing_since)}"
    return "enabled"


def delivery_text(job: JobInfo) -> str:
    """How far a job's deliveries are, in a few words; empty without any."""
    counts = (
        (sum(d.delivered for d in job.deliveries), "delivered"),
        (sum(d.pending for d in job.deliveries), "to deliver"),
        (sum(d.dead_lettered for d in job.deliveries), "not delivered"),
        (sum(d.dropped for d in job.deliveries), "dropped"),
    )
    return ", ".join(f"{number:,} {words}" for number, words in counts if number)


def progress_text(job: JobInfo) -> str:
    """How far a job is, in a few words."""
    progress = job.progress
    pieces = [job.state.lower()]
    if job.state is JobState.PENDING and progress.queue_position is not None:
        pieces.append(f"{progress.queue_position} before it")
    if job.state is not JobState.PENDING:
        pieces.append(counted(progress.rows, "row"))
        if progress.size:
            pieces.append(size_text(progress.size))
    if job.state is JobState.RUNNING:
        if progress.fraction is not None:
            pieces.append(f"{progress.fraction:.0%}")
        if progress.rows_per_second is not None:
            pieces.append(f"{counted(round(progress.rows_per_second), 'row')}/s")
    if delivered := delivery_text(job):
        pieces.append(delivered)
    return ", ".join(pieces)


def size_text(size: float) -> str:
    """Bytes for people."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def _facts(facts: dict[str, str]) -> None:
    shown = {k: v for k, v in facts.items() if v}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        click.echo(f"{name.ljust(width)}  {clean(value)}")


def _count(value: int | None, prefix: str = "") -> str:
    return "" if value is None else f"{prefix}{value:,}"


def _left_out(job: JobInfo) -> str:
    return f"{counted(job.progress.row_errors, 'row')}: exportd errors {job.id}"


def _delivery(job: JobInfo) -> str:
    """How it stands in all, and where to look when something is not there."""
    status = job.delivery_status
    if status is None or status is DeliveryStatus.DELIVERED:
        return str(status or "")
    return f"{status}: exportd deliveries --job {job.id}"


def _moment(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
