"""The commands about what a job has made: download, URLs, rows left out."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from exportd import errors
from exportd._client import Job
from exportd._download import Download
from exportd._files import refuse_existing, safe_name
from exportd._model import counted
from exportd.cli import show
from exportd.cli.progress import Reporter
from exportd.cli.session import Settings, json_option, resumable
from exportd.cli.where import parse_duration


@click.command()
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
        fetch(
            settings,
            client.job(job_id),
            path,
            part=given["part"],
            parallel=given["parallel"],
            follow=given["follow"],
            overwrite=given["force"],
            as_json=given["as_json"],
        )


@click.command()
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


@click.command("errors")
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


def fetch(
    settings: Settings, job: Job, path: str | None, *, as_json: bool, **plan: Any
) -> None:
    """Download a job's output and print where it is."""
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


def refuse_target(path: str, *, overwrite: bool) -> None:
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
