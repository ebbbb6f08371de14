"""What commands print: JSON for programs, plain text for people.

Answers go to stdout, everything about their making to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from google.protobuf import any_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import (
    error_details_pb2,  # noqa: F401 - registers the details, so that JSON can show them
)

from exportd._model import Dataset, JobInfo, JobState, counted
from exportd.errors import ExportdError
from exportd.v1 import job_pb2

_STANDARD_DETAILS = "type.googleapis.com/google.rpc."
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def as_json(message: Message) -> dict[str, Any]:
    """The contract's JSON, with its field names; fields at their default included."""
    return MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


def job_json(job: job_pb2.Job) -> dict[str, Any]:
    """A job as JSON. Error details of a kind unknown here cannot be printed and are
    left out."""
    known: list[any_pb2.Any] = [
        d for d in job.error.details if d.type_url.startswith(_STANDARD_DETAILS)
    ]
    if len(known) < len(job.error.details):
        copy = job_pb2.Job()
        copy.CopyFrom(job)
        del copy.error.details[:]
        copy.error.details.extend(known)
        job = copy
    return as_json(job)


def print_json(value: object) -> None:
    """One object on one line."""
    click.echo(json.dumps(value, ensure_ascii=False))


def note(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(text, err=True)


def error_line(error: ExportdError) -> str:
    """One line: what, which fields, and when to try again."""
    text = str(error)
    missing = [
        f"{v.subject}: {v.description}"
        for v in error.violations
        if v.description not in text
    ]
    if missing:
        text += " (" + "; ".join(missing) + ")"
    if error.retry_after is not None:
        text += f"; try again in {error.retry_after.total_seconds():g} s"
    return "error: " + " ".join(clean(text).split())


def clean(text: str) -> str:
    """Text from the server without what would steer a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


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
        }
    )


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


def _moment(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
