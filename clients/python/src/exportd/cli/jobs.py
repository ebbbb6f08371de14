"""The commands about datasets and jobs."""

from __future__ import annotations

from typing import Any

import click

from exportd._client import Job
from exportd._model import JobState
from exportd.cli import show
from exportd.cli.progress import Reporter
from exportd.cli.session import (
    Settings,
    json_option,
    labels_of,
    limit_option,
    resumable,
    up_to,
)
from exportd.cli.where import parse_moment
from exportd.errors import NotDelivered


@click.command()
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


@click.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
def get(settings: Settings, job_id: str, as_json: bool) -> None:
    """Tell where JOB stands, and how its delivery to sinks does."""
    with settings.client() as client:
        info = client.job(job_id).info
    if as_json:
        show.print_json(show.job_json(info.proto))
    else:
        show.show_job(info)


@click.command("list")
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
@limit_option
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
            labels=labels_of(given["label"]),
            created_from=parse_moment("--since", since) if since else None,
            created_before=parse_moment("--until", until) if until else None,
        )
        jobs = (job.info for _, job in zip(up_to(limit), found, strict=False))
        if as_json:
            for job in jobs:
                show.print_json(show.job_json(job.proto))
        else:
            show.show_jobs(jobs)


@click.command()
@click.argument("job_id", metavar="JOB")
@click.option(
    "--until-delivered",
    is_flag=True,
    help="Until its deliveries to sinks have ended, too; fails when one sink lacks "
    "something.",
)
@json_option
@click.pass_obj
def watch(settings: Settings, job_id: str, until_delivered: bool, as_json: bool) -> None:
    """Follow JOB until it has ended; fails when the job does."""
    with settings.client() as client:
        job = client.job(job_id)
        wait(settings, job, until_delivered=until_delivered, as_json=as_json)
        if not as_json:
            show.show_job(job.info)
        if until_delivered:
            raise_unless_delivered(job)


@click.command()
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


@click.command()
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


def wait(
    settings: Settings, job: Job, *, until_delivered: bool = False, as_json: bool = False
) -> None:
    """Follow a job to its end, or until its deliveries have ended; with `as_json` each
    message is printed instead. Raises for a job that did not succeed."""
    hint = (
        f"the job goes on: 'exportd watch {job.id} --until-delivered' follows it"
        if until_delivered
        else f"the job goes on: 'exportd watch {job.id}' follows it, "
        f"'exportd cancel {job.id}' ends it"
    )
    with resumable(hint), Reporter(quiet=settings.quiet or as_json) as reporter:
        for info in job.watch(until_delivered=until_delivered):
            reporter.job(info)
            if as_json:
                show.print_json(show.job_json(info.proto))
    job.info.raise_unless_succeeded()


def raise_unless_delivered(job: Job) -> None:
    """Raise `NotDelivered`, with the commands that help, when a sink lacks something."""
    try:
        job.info.raise_unless_delivered()
    except NotDelivered as error:
        error.message += (
            f"; 'exportd deliveries --job {job.id}' tells each, "
            f"'exportd redrive {job.id}' sends them again"
        )
        raise
