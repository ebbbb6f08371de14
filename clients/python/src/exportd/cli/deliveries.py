"""The commands about deliveries to sinks."""

from __future__ import annotations

import shlex
from typing import Any

import click

from exportd._deliveries import DeliveryState
from exportd._model import counted
from exportd.cli import show
from exportd.cli.session import Settings, json_option, limit_option, up_to

_STATES = {
    state.lower().replace("_", "-"): state
    for state in DeliveryState
    if state is not DeliveryState.UNKNOWN
}


@click.command()
@click.option("--job", "job_id", default="", metavar="JOB", help="Only of this job.")
@click.option("--sink", default="", help="Only to its sink of this name; needs --job.")
@click.option("--queue", default="", help="Only those in this queue.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(list(_STATES)),
    help="Only those in this state; may be repeated.",
)
@limit_option
@json_option
@click.pass_obj
def deliveries(
    settings: Settings, /, as_json: bool, limit: int | None, **given: Any
) -> None:
    """List deliveries to sinks, newest first: each part, and the completion that follows
    them."""
    _sink_needs_job(given["sink"], given["job_id"], "--job")
    with settings.client() as client:
        listed = client.deliveries(
            job_id=given["job_id"],
            sink=given["sink"],
            queue=given["queue"],
            states=[_STATES[name] for name in given["states"]],
        )
        found = (each for _, each in zip(up_to(limit), listed, strict=False))
        if as_json:
            for delivery in found:
                show.print_json(show.delivery_json(delivery.proto))
        else:
            show.show_deliveries(found, with_job=not given["job_id"])


@click.command()
@click.argument("job_id", metavar="JOB", required=False, default="")
@click.option("--sink", default="", help="Only to the sink of JOB with this name.")
@click.option("--delivery", "delivery_id", default="", metavar="ID", help="Only this one.")
@click.option("--queue", default="", help="Those in this queue.")
@json_option
@click.pass_obj
def redrive(settings: Settings, /, as_json: bool, **which: str) -> None:
    """Send deliveries of JOB, or those in a queue, again that failed for good or were
    dropped, without exporting again; what waits to be tried again is tried now."""
    if not (which["job_id"] or which["delivery_id"] or which["queue"]):
        raise click.UsageError("say which: a JOB, --delivery ID or --queue QUEUE")
    _sink_needs_job(which["sink"], which["job_id"], "a JOB")
    with settings.client() as client:
        redriven = client.redrive(**which)
    if as_json:
        # As protobuf's JSON writes 64-bit numbers.
        show.print_json({"redriven": str(redriven)})
    else:
        verb = "is" if redriven == 1 else "are"
        click.echo(f"{counted(redriven, 'delivery')} {verb} due again")


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def queues(context: click.Context, as_json: bool) -> None:
    """List the queues that deliveries stand in, or have one go on."""
    if context.invoked_subcommand is not None:
        return
    settings: Settings = context.obj
    with settings.client() as client:
        found = client.sink_queues()
        if as_json:
            for queue in found:
                show.print_json(show.queue_json(queue.proto))
        else:
            show.show_queues(found)


@queues.command()
@click.argument("queue")
@json_option
@click.pass_context
def enable(context: click.Context, queue: str, as_json: bool) -> None:
    """Let deliveries of a disabled QUEUE go on. Those that failed for good stay so until
    'exportd redrive --queue QUEUE'."""
    settings: Settings = context.obj
    with settings.client() as client:
        enabled = client.enable_sink_queue(queue)
    if as_json or (context.parent and context.parent.params["as_json"]):
        show.print_json(show.queue_json(enabled.proto))
        return
    click.echo(f"{show.clean(enabled.queue)} is enabled")
    if enabled.dead_lettered and not settings.quiet:
        failed = counted(enabled.dead_lettered, "delivery")
        again = f"exportd redrive --queue {shlex.quote(show.clean(enabled.queue))}"
        show.note(f"{failed} failed before: '{again}' sends them again")


def _sink_needs_job(sink: str, job_id: str, what: str) -> None:
    if sink and not job_id:
        raise click.UsageError(f"--sink is a name inside a job: give {what}, too")
