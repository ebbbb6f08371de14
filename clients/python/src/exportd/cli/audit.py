"""The command about who did what."""

from __future__ import annotations

from typing import Any

import click

from exportd._audit import AuditOutcome
from exportd.cli import show
from exportd.cli.session import Settings, json_option, limit_option, up_to
from exportd.cli.where import parse_moment

_OUTCOMES = {
    outcome.lower().replace("_", "-"): outcome
    for outcome in AuditOutcome
    if outcome is not AuditOutcome.UNKNOWN
}


@click.command()
@click.option("--tenant", default="", help="Only of callers of this tenant.")
@click.option("--subject", default="", help="Only of this caller, such as key:ID.")
@click.option("--job", "job_id", default="", metavar="JOB", help="Only about this job.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="Only of this kind, such as DeleteJob; may be repeated.",
)
@click.option(
    "--outcome",
    "outcomes",
    multiple=True,
    type=click.Choice(list(_OUTCOMES)),
    help="Only what ended so; may be repeated.",
)
@click.option("--since", metavar="TIME", help="Only what ended from then on.")
@click.option("--until", metavar="TIME", help="Only what ended before.")
@limit_option
@json_option
@click.pass_obj
def audit(settings: Settings, /, as_json: bool, limit: int | None, **given: Any) -> None:
    """List who did what, newest first: of all tenants, for those who run the service."""
    since, until = given["since"], given["until"]
    with settings.client() as client:
        listed = client.audit_records(
            tenant=given["tenant"],
            subject=given["subject"],
            job_id=given["job_id"],
            methods=given["methods"],
            outcomes=[_OUTCOMES[name] for name in given["outcomes"]],
            from_time=parse_moment("--since", since) if since else None,
            before_time=parse_moment("--until", until) if until else None,
        )
        found = (each for _, each in zip(up_to(limit), listed, strict=False))
        if as_json:
            for record in found:
                show.print_json(show.as_json(record.proto))
        else:
            show.show_audit(found)
