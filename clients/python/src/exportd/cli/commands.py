"""The command `exportd`: its commands, its exit codes, its errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from exportd import errors
from exportd._connection import DEFAULT_ADDRESS
from exportd.cli import _malloc, show
from exportd.cli.audit import audit
from exportd.cli.create import create
from exportd.cli.deliveries import deliveries, queues, redrive
from exportd.cli.jobs import cancel, datasets, delete, get, list_jobs, watch
from exportd.cli.outputs import download, row_errors, urls
from exportd.cli.session import Interrupted, Settings

EXIT_CODES: Sequence[tuple[type[errors.ExportdError], int]] = (
    (errors.InvalidRequest, 2),
    (errors.NotFound, 3),
    (errors.JobEnded, 4),
    (errors.Unavailable, 5),
    (errors.TimedOut, 5),
    (errors.DataLoss, 6),
    (errors.PreconditionFailed, 7),
    (errors.QuotaExceeded, 8),
    (errors.NotDelivered, 9),
)
"""Errors and their exit codes, which `EPILOG` explains; all others: 1."""

INTERRUPTED = 130

EPILOG = """\b
Exit codes:
    0  done
    1  unexpected error, or this machine's disk refused
    2  wrong usage or request
    3  not found, expired, or dropped once delivered
    4  the job failed or was cancelled
    5  the server cannot be reached, or takes too long
    6  the data is corrupt
    7  not possible now: job not finished, conflict, file in the way, endpoint disabled
    8  a quota is used up
    9  the job succeeded, but a sink lacks something
  130  interrupted; the message says how to go on

\b
Environment:
  EXPORTD_SERVER          address of the server
  EXPORTD_TOKEN           sent as bearer token (not an option: those show in ps)
  EXPORTD_WEBHOOK_SECRET  signs what 'create --to webhook:...' sends
"""


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
    "--client-cert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Use TLS and show the server this certificate, a PEM file.",
)
@click.option(
    "--client-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The private key of --client-cert, a PEM file.",
)
@click.option(
    "--allow-plaintext-token",
    is_flag=True,
    help="Send EXPORTD_TOKEN without TLS to other machines, too.",
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


for _command in (
    create,
    datasets,
    get,
    list_jobs,
    watch,
    cancel,
    delete,
    download,
    urls,
    row_errors,
    deliveries,
    redrive,
    queues,
    audit,
):
    cli.add_command(_command)


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
