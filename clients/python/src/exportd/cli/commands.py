"""The commands of `exportd`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

import click
import grpc

from exportd import errors
from exportd._client import Client, Job
from exportd._connection import DEFAULT_ADDRESS
from exportd._download import Download
from exportd._files import refuse_existing, safe_name
from exportd._model import JobInfo, JobState, counted
from exportd._request import (
    CompressionName,
    ExportOptions,
    FormatName,
    RowErrorPolicyName,
)
from exportd.cli import _malloc, show
from exportd.cli.progress import Reporter
from exportd.cli.where import parse_duration, parse_moment, parse_where

_Command = TypeVar("_Command", bound=Callable[..., Any])

EXIT_CODES: Sequence[tuple[type[errors.ExportdError], int]] = (
    (errors.InvalidRequest, 2),
    (errors.NotFound, 3),
    (errors.JobEnded, 4),
    (errors.Unavailable, 5),
    (errors.TimedOut, 5),
    (errors.DataLoss, 6),
    (errors.PreconditionFailed, 7),
    (errors.QuotaExceeded, 8),
)
"""Errors and their exit codes, which `EPILOG` explains; all others: 1."""

INTERRUPTED = 130

EPILOG = """\b
Exit codes:
    0  done
    1  unexpected error, or this machine's disk refused
    2  wrong usage or request
    3  not found, or expired
    4  the job failed or was cancelled
    5  the server cannot be reached, or takes too long
    6  the data is corrupt
    7  not possible now: job not finished, conflict, file in the way
    8  a quota is used up
  130  interrupted; the message says how to go on

\b
Environment:
  EXPORTD_SERVER   address of the server
  EXPORTD_TOKEN    sent as bearer token (not an option: those show in ps)
"""


@dataclass(slots=True)
class Settings:
    """What every command knows."""

    server: str
    tls: bool
    ca_cert: Path | None
    timeout: float
    quiet: bool

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """A client of the server that was named."""
        tls: bool | grpc.ChannelCredentials = self.tls
        if self.ca_cert is not None:
            tls = grpc.ssl_channel_credentials(self.ca_cert.read_bytes())
        token = os.environ.get("EXPORTD_TOKEN")
        with Client(self.server, tls=tls, token=token, timeout=self.timeout) as client:
            yield client


class Interrupted(Exception):
    """Ctrl-C, with a word on how to go on."""


@contextlib.contextmanager
def resumable(hint: str) -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted` with a hint; a server that stays away gets it too."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(hint) from None
    except (errors.Unavailable, errors.TimedOut) as error:
        error.message += f"; {hint}"
        raise


def json_option(command: _Command) -> _Command:
    """`--json`, which every command has."""
    option = click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print JSON for programs: one object, or one a line for lists and watch.",
    )
    return option(command)


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="exportd")
@click.option(
    "--server",
    envvar="EXPORTD_SERVER",
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="HOST:PORT",
    help="Address of the server.",
)
@click.option("--tls", is_flag=True, help="Use TLS with the system's roots.")
@click.option(
    "--ca-cert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Use TLS with the certificates of this PEM file as roots.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for one call; waiting and downloading have no limit.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress, only results and errors.")
@click.pass_context
def cli(context: click.Context, /, **settings: Any) -> None:
    """Export datasets through an exportd server."""
    context.obj = Settings(**settings)


@cli.command()
@click.argument("name", required=False)
@json_option
@click.pass_obj
def datasets(settings: Settings, name: str | None, as_json: bool) -> None:
    """List the datasets, or describe the one called NAME."""
    with settings.client() as client:
        if name is not None:
            dataset = client.dataset(name)
            if as_json:
                show.print_json(show.as_json(dataset.proto))
            else:
                show.show_dataset(dataset)
        elif as_json:
            for dataset in client.datasets():
                show.print_json(show.as_json(dataset.proto))
        else:
            show.show_datasets(client.datasets())


@cli.command()
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
@click.option("--validate-only", is_flag=True, help="Check and estimate, start nothing.")
@click.option("--wait", is_flag=True, help="Wait until it has finished.")
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
    if given["download"] is not None and not given["validate_only"]:
        _refuse_target(given["download"], overwrite=given["force"])
    with settings.client() as client:
        job = client.export(dataset, **_export_options(client, dataset, given))
        if given["validate_only"]:
            _print_estimate(job, given["as_json"])
            return
        path: str | None = given["download"]
        if path is None and not given["wait"]:
            _print_created(job, given["as_json"])
            return
        if not settings.quiet:
            show.note(f"job {job.id}")
        _wait(settings, job)
        if path is None:
            _print_created(job, given["as_json"])
            return
        _download(settings, job, path, overwrite=given["force"], as_json=given["as_json"])


@cli.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
def get(settings: Settings, job_id: str, as_json: bool) -> None:
    """Tell where JOB stands."""
    with settings.client() as client:
        _print_job(client.job(job_id).info, as_json)


@cli.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([s.lower() for s in JobState if s is not JobState.UNKNOWN]),
    help="Only jobs in this state; may be repeated.",
)
@click.option("--dataset", default="", help="Only jobs of this dataset.")
@click.option("-l", "--label", multiple=True, metavar="K=V", help="Only with this label.")
@click.option("--since", metavar="TIME", help="Only jobs created from then on.")
@click.option("--until", metavar="TIME", help="Only jobs created before.")
@click.option(
    "-n", "--limit", type=click.IntRange(min=1), help="At most so many; default all."
)
@json_option
@click.pass_obj
def list_jobs(
    settings: Settings, /, as_json: bool, limit: int | None, **given: Any
) -> None:
    """List jobs, newest first."""
    since, until = given["since"], given["until"]
    with settings.client() as client:
        found = client.jobs(
            states=[s.upper() for s in given["states"]],
            dataset=given["dataset"],
            labels=_labels(given["label"]),
            created_from=parse_moment("--since", since) if since else None,
            created_before=parse_moment("--until", until) if until else None,
        )
        jobs = (job.info for i, job in zip(_up_to(limit), found, strict=False))
        if as_json:
            for job in jobs:
                show.print_json(show.job_json(job.proto))
        else:
            show.show_jobs(jobs)


@cli.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
def watch(settings: Settings, job_id: str, as_json: bool) -> None:
    """Follow JOB until it has ended; fails when the job does."""
    with settings.client() as client:
        job = client.job(job_id)
        _wait(settings, job, as_json=as_json)
        if not as_json:
            show.show_job(job.info)


@cli.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
def cancel(settings: Settings, job_id: str, as_json: bool) -> None:
    """Cancel JOB. Cancelling twice, or a job that has ended, changes nothing."""
    with settings.client() as client:
        job = client.job(job_id)
        outcome = job.cancel()
        if as_json:
            value = {
                "job": show.job_json(job.info.proto),
                "outcome": f"CANCEL_OUTCOME_{outcome}",
            }
            show.print_json(value)
        else:
            words = outcome.lower().replace("_", " ")
            click.echo(f"{words}: job {job.id} is {job.state.lower()}")


@cli.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
def delete(settings: Settings, job_id: str, as_json: bool) -> None:
    """Delete JOB, which must have ended, and its output."""
    with settings.client() as client:
        client.job(job_id).delete()
        if as_json:
            show.print_json({"job_id": job_id, "deleted": True})
        elif not settings.quiet:
            show.note(f"deleted job {job_id}")


@cli.command()
@click.argument("job_id", metavar="JOB")
@click.argument("path", required=False, type=click.Path())
@click.option("--part", type=click.IntRange(min=0), help="Only this part.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 32),
    default=1,
    show_default=True,
    help="Ranges to fetch at a time, each over a connection of its own.",
)
@click.option(
    "--follow", is_flag=True, help="Take the parts of a running job as they are finished."
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@json_option
@click.pass_obj
def download(settings: Settings, /, job_id: str, path: str | None, **given: Any) -> None:
    """Download the output of JOB to PATH, a file or a directory; by default here, under
    the server's name. Prints the path. The same command again goes on where one ended."""
    with settings.client() as client:
        _download(
            settings,
            client.job(job_id),
            path,
            part=given["part"],
            parallel=given["parallel"],
            follow=given["follow"],
            overwrite=given["force"],
            as_json=given["as_json"],
        )


@cli.command()
@click.argument("job_id", metavar="JOB")
@click.option("--part", type=click.IntRange(min=0), help="Only this part.")
@click.option("--joined", is_flag=True, help="Of all parts joined into one file.")
@click.option("--lifetime", metavar="1h", help="How long the URLs are to work.")
@json_option
@click.pass_obj
def urls(settings: Settings, /, job_id: str, as_json: bool, **given: Any) -> None:
    """Print URLs of the output of JOB, one a line for each part: any HTTP client can
    download by them until they expire. Who has them has the data."""
    text = given["lifetime"]
    lifetime = parse_duration("--lifetime", text) if text else None
    if given["joined"] and given["part"] is not None:
        raise click.UsageError("--joined does not go with --part")
    with settings.client() as client:
        found = client.job(job_id).download_urls(lifetime=lifetime, part=given["part"])
    if as_json:
        show.print_json(show.as_json(found.proto))
        return
    chosen = found.parts
    if given["joined"]:
        if found.joined is None:
            raise errors.PartsNotJoinable(
                f"there is no URL of all {counted(len(found.parts), 'part')} joined; "
                "leave out --joined for one of each"
            )
        chosen = (found.joined,)
    for url in chosen:
        click.echo(url.url)
    if chosen and not settings.quiet:
        first = min(url.expire_time for url in chosen)
        show.note(f"they work until {first:%Y-%m-%d %H:%M:%S} UTC")


@cli.command("errors")
@click.argument("job_id", metavar="JOB")
@click.argument("path", required=False, type=click.Path())
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@json_option
@click.pass_obj
def row_errors(
    settings: Settings, job_id: str, path: str | None, force: bool, as_json: bool
) -> None:
    """Show the rows that were left out of the output of JOB, with the reasons, as JSON
    Lines; with PATH, a file or a directory, download them there instead."""
    with settings.client() as client:
        job = client.job(job_id)
        manifest = job.info.raise_unless_succeeded()
        if not settings.quiet:
            show.note(f"{counted(manifest.row_errors, 'row')} left out")
        if not manifest.error_parts:
            return
        if path is None:
            with TemporaryDirectory() as directory:
                for file in job.download_errors(directory).files:
                    with file.open(encoding="utf-8") as lines:
                        for line in lines:
                            show.print_json(json.loads(line))
            return
        done = job.download_errors(path, overwrite=force)
        if as_json:
            show.print_json(_download_json(job, done))
        else:
            click.echo(str(done.path))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with a code that means something."""
    _malloc.tune()
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; answers with the exit code."""
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="exportd",
            standalone_mode=False,
        )
    except errors.ExportdError as error:
        show.note(show.error_line(error))
        return exit_code(error)
    except Interrupted as interrupted:
        show.note(f"interrupted; {interrupted}")
        return INTERRUPTED
    except (click.Abort, KeyboardInterrupt):
        show.note("interrupted")
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        show.note(f"error: {error}")
        return 1
    return result if isinstance(result, int) else 0


def exit_code(error: errors.ExportdError) -> int:
    """The exit code of an error."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


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
        labels=_labels(given["label"]),
        request_id=given["request_id"],
        on_row_error=given["on_row_error"],
        max_row_errors=given["max_row_errors"],
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


def _wait(settings: Settings, job: Job, *, as_json: bool = False) -> None:
    """Follow a job to its end; with `as_json` each message is printed instead."""
    hint = (
        f"the job goes on: 'exportd watch {job.id}' follows it, "
        f"'exportd cancel {job.id}' ends it"
    )
    with resumable(hint), Reporter(quiet=settings.quiet or as_json) as reporter:
        for info in job.watch():
            reporter.job(info)
            if as_json:
                show.print_json(show.job_json(info.proto))
    job.info.raise_unless_succeeded()


def _download(
    settings: Settings, job: Job, path: str | None, *, as_json: bool, **plan: Any
) -> None:
    target = _default_path(job) if path is None else path
    again = shlex.join(_download_command(job, path, plan))
    hint = f"what is there is kept: '{again}' goes on where this ended"
    if plan.get("follow") and not settings.quiet:
        show.note(f"following job {job.id}")
    with resumable(hint), Reporter(quiet=settings.quiet or as_json) as reporter:
        done = _with_the_commands_words(job, target, reporter, plan)
    if as_json:
        show.print_json(_download_json(job, done))
        return
    click.echo(str(done.path))
    if not settings.quiet:
        resumed = f", {show.size_text(done.resumed)} from before" if done.resumed else ""
        show.note(f"{show.size_text(done.size)}, verified by {done.verified_by}{resumed}")


def _with_the_commands_words(
    job: Job, target: str | Path, reporter: Reporter, plan: dict[str, Any]
) -> Download:
    try:
        return job.download(target, on_progress=reporter.download, **plan)
    except errors.PartsNotJoinable as error:
        error.message = error.message.replace("without follow", "without --follow")
        raise


def _download_command(job: Job, path: str | None, plan: dict[str, Any]) -> list[str]:
    """The command that goes on with a download."""
    words = ["exportd", "download", job.id]
    if path is not None:
        words.append(path)
    if plan.get("part") is not None:
        words += ["--part", str(plan["part"])]
    if plan.get("parallel", 1) > 1:
        words += ["--parallel", str(plan["parallel"])]
    if plan.get("follow"):
        words.append("--follow")
    if plan.get("overwrite"):
        words.append("--force")
    return words


def _refuse_target(path: str, *, overwrite: bool) -> None:
    """Raise for a target that a download could not be written to, before a job runs for
    nothing. A path that ends in a slash is a directory, which will be made."""
    target = Path(path)
    if path.endswith(os.sep) or target.is_dir():
        return
    if not overwrite:
        refuse_existing(target)
    if not target.parent.is_dir():
        raise errors.LocalFileError(
            f"cannot write {path}: {target.parent} is no directory; make it first"
        )


def _default_path(job: Job) -> Path:
    """Here; parts that do not join get a directory named after the output."""
    manifest = job.manifest
    if manifest is None or manifest.joinable or len(manifest.parts) == 1:
        return Path()
    return Path(Path(safe_name(manifest.file_name, job.id)).stem)


def _download_json(job: Job, done: Download) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "path": str(done.path),
        "files": [str(f) for f in done.files],
        "bytes": str(done.size),  # as protobuf's JSON writes 64-bit numbers
        "crc32c": done.crc32c,
        "sha256": done.sha256,
        "verified_by": done.verified_by,
        "resumed_bytes": str(done.resumed),
    }


def _print_created(job: Job, as_json: bool) -> None:
    if as_json:
        show.print_json(show.job_json(job.info.proto))
    else:
        click.echo(job.id)


def _print_job(info: JobInfo, as_json: bool) -> None:
    if as_json:
        show.print_json(show.job_json(info.proto))
    else:
        show.show_job(info)


def _print_estimate(job: Job, as_json: bool) -> None:
    if as_json:
        show.print_json(show.job_json(job.info.proto))
        return
    rows = job.progress.estimated_rows
    about = "" if rows is None else f"; about {counted(rows, 'row')}"
    click.echo(f"the request is valid{about}")


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise errors.InvalidRequest.of("--label", f"{pair!r}: write key=value")
        labels[key] = value
    return labels


def _up_to(limit: int | None) -> range:
    return range(sys.maxsize if limit is None else limit)
