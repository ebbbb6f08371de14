"""The command that starts an export."""

from __future__ import annotations

from typing import Any, get_args

import click

from exportd._client import Client, Job
from exportd._model import counted
from exportd._request import (
    CompressionName,
    ExportOptions,
    FormatName,
    RowErrorPolicyName,
)
from exportd.cli import show
from exportd.cli.jobs import raise_unless_delivered, wait
from exportd.cli.outputs import fetch, refuse_target
from exportd.cli.session import Settings, json_option, labels_of
from exportd.cli.sinks import parse_sinks, said_as_typed, sink_options
from exportd.cli.where import parse_duration, parse_moment, parse_where


@click.command()
@click.argument("dataset")
@click.option(
    "-f",
    "--format",
    "format_",
    type=click.Choice(get_args(FormatName)),
    required=True,
    help="File format.",
)
@click.option("--target", default="", help="Only rows of this target.")
@click.option("--network", default="", help="Only rows of this network.")
@click.option(
    "--since",
    metavar="TIME",
    help="Only rows from this moment on: 2026-01-31T12:00:00Z, or a date (UTC).",
)
@click.option("--until", metavar="TIME", help="Only rows before this moment.")
@click.option("--columns", metavar="A,B,...", help="Only these columns, in this order.")
@click.option(
    "-w",
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Only rows that meet this; may be repeated, all must hold. Operators: = != < <= "
    "> >= ~ (contains) ^= (starts with), in (a, b), not in (a, b), is null, is not null.",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most this many rows.")
@click.option(
    "--compression",
    type=click.Choice(get_args(CompressionName)),
    help="Around CSV and JSON Lines, inside Parquet and Arrow.",
)
@click.option("--delimiter", help="CSV: separator.")
@click.option("--header/--no-header", default=None, help="CSV: column names first.")
@click.option("--null-marker", help="CSV: how a missing value is written.")
@click.option(
    "--spreadsheet-safe", is_flag=True, help="CSV: make formulas harmless; not lossless."
)
@click.option("--part-rows", type=click.IntRange(min=1), help="Rows in a part at most.")
@click.option("--part-bytes", type=click.IntRange(min=1), help="Bytes in a part, about.")
@click.option("--ttl", metavar="24h", help="How long the output is kept once finished.")
@click.option("--priority", type=click.IntRange(-100, 100), default=0)
@click.option("-l", "--label", multiple=True, metavar="K=V", help="Mark; may be repeated.")
@click.option("--request-id", metavar="UUID", help="The same id again finds the same job.")
@click.option(
    "--on-row-error",
    type=click.Choice(get_args(RowErrorPolicyName)),
    default="fail",
    show_default=True,
    help="What a row does that cannot be exported: fail the job, or be left out and told; "
    "'exportd errors' shows them.",
)
@click.option(
    "--max-row-errors",
    type=click.IntRange(min=1),
    help="With --on-row-error skip: most rows that may be left out.",
)
@sink_options
@click.option(
    "--validate-only",
    is_flag=True,
    help="Check, try the sinks and estimate, but start nothing.",
)
@click.option("--wait", "wait_", is_flag=True, help="Wait until it has finished.")
@click.option(
    "--until-delivered",
    is_flag=True,
    help="Wait until every sink has everything; fails when one lacks something.",
)
@click.option(
    "-o",
    "--download",
    type=click.Path(),
    metavar="PATH",
    help="Wait, then download to this file or directory.",
)
@click.option("--force", is_flag=True, help="With --download: replace a file.")
@json_option
@click.pass_obj
def create(settings: Settings, /, dataset: str, **given: Any) -> None:
    """Export DATASET. Prints the job's id, with --download the file's path."""
    path: str | None = given["download"]
    if path is not None and given["drop_after_delivery"]:
        raise click.UsageError(
            "--download does not go with --drop-after-delivery: the output may be dropped "
            "before it is here"
        )
    if path is not None and not given["validate_only"]:
        refuse_target(path, overwrite=given["force"])
    with settings.client() as client:
        options = _export_options(client, dataset, given)
        with said_as_typed(given["to"]):
            job = client.export(dataset, **options)
        if given["validate_only"]:
            _print_estimate(job, given["as_json"])
            return
        if path is None and not given["wait_"] and not given["until_delivered"]:
            _print_created(job, given["as_json"])
            return
        if not settings.quiet:
            show.note(f"job {job.id}")
        _finish(settings, job, path, given)


def _finish(settings: Settings, job: Job, path: str | None, given: dict[str, Any]) -> None:
    """Wait, download and wait for the deliveries, as far as it was asked for."""
    if path is None:
        wait(settings, job, until_delivered=given["until_delivered"])
        _print_created(job, given["as_json"])
    else:
        wait(settings, job)
        fetch(settings, job, path, overwrite=given["force"], as_json=given["as_json"])
        if given["until_delivered"]:
            wait(settings, job, until_delivered=True)
    if given["until_delivered"]:
        raise_unless_delivered(job)


def _export_options(client: Client, name: str, given: dict[str, Any]) -> ExportOptions:
    options = ExportOptions(
        format=given["format_"],
        target_id=given["target"],
        network=given["network"],
        limit=given["limit"],
        compression=given["compression"],
        delimiter=given["delimiter"],
        header=given["header"],
        null_marker=given["null_marker"],
        spreadsheet_safe=given["spreadsheet_safe"],
        max_part_rows=given["part_rows"],
        max_part_bytes=given["part_bytes"],
        priority=given["priority"],
        labels=labels_of(given["label"]),
        request_id=given["request_id"],
        on_row_error=given["on_row_error"],
        max_row_errors=given["max_row_errors"],
        sinks=parse_sinks(given),
        drop_after_delivery=given["drop_after_delivery"],
        validate_only=given["validate_only"],
    )
    if given["since"]:
        options["start"] = parse_moment("--since", given["since"])
    if given["until"]:
        options["end"] = parse_moment("--until", given["until"])
    if given["columns"]:
        options["columns"] = [c.strip() for c in given["columns"].split(",")]
    if given["ttl"]:
        options["ttl"] = parse_duration("--ttl", given["ttl"])
    if given["where"]:
        dataset = client.dataset(name)  # its columns type the values
        options["filters"] = [parse_where(text, dataset) for text in given["where"]]
    return options


def _print_created(job: Job, as_json: bool) -> None:
    if as_json:
        show.print_json(show.job_json(job.info.proto))
    else:
        click.echo(job.id)


def _print_estimate(job: Job, as_json: bool) -> None:
    if as_json:
        show.print_json(show.job_json(job.info.proto))
        return
    rows = job.progress.estimated_rows
    about = "" if rows is None else f"; about {counted(rows, 'row')}"
    click.echo(f"the request is valid{about}")
