"""The command `exportd-server`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click
import pyarrow as pa

from exportd_server.errors import ConfigurationError
from exportd_server.platform.logging import configure_logging
from exportd_server.platform.malloc import keep_large_buffers
from exportd_server.platform.threads import left_over
from exportd_server.settings import LogSettings, Settings, load_settings

EXIT_CONFIGURATION = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="exportd-server")
def main() -> None:
    """Run dataset exports as background jobs, over gRPC."""


_COMMON = (
    click.option(
        "--config", type=click.Path(path_type=Path), help="Settings, as a TOML file."
    ),
    click.option(
        "--data-dir", type=click.Path(path_type=Path), help="Ledger, outputs and samples."
    ),
    click.option(
        "--catalogue", type=click.Path(path_type=Path), help="The datasets (datasets.toml)."
    ),
    click.option("--sample-rows", type=int, help="Token transfers in the sample data."),
    click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"])),
    click.option("--log-style", type=click.Choice(["json", "console"])),
)


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that runs for long."""
    for option in reversed(_COMMON):
        command = option(command)
    return command


@main.command()
@click.option("--listen", metavar="HOST:PORT", help="Where to serve gRPC.")
@click.option(
    "--allow-unauthenticated/--loopback-only",
    default=None,
    help="Listen beyond loopback although nobody has to identify themselves.",
)
@click.option(
    "--workers/--no-workers",
    default=None,
    help="Work off exports in this process too, or leave that to `worker` processes.",
)
@_common
def serve(**options: Any) -> None:
    """Serve the API and work off exports in one process.

    Settings come from the file, then EXPORTD_* variables, then flags.
    """
    _run(_serve, **options)


@main.command()
@_common
def worker(**options: Any) -> None:
    """Work off exports beside `serve` processes, on a ledger that they share.

    Settings come from the file, then EXPORTD_* variables, then flags.
    """
    _run(_work, serves=False, **options)


def _run(
    command: Callable[[Settings], Coroutine[Any, Any, None]],
    *,
    config: Path | None,
    log_level: str | None,
    log_style: str | None,
    serves: bool = True,
    **flags: Any,
) -> None:
    with _configuration_errors():
        settings = load_settings(config, flags, serves=serves)
    style = {"level": log_level, "style": log_style}
    chosen = {**settings.log.model_dump(), **{k: v for k, v in style.items() if v}}
    log = LogSettings(**chosen)
    configure_logging(log.level, log.style)
    keep_large_buffers()
    # Arrow's own allocator keeps a share of every peak; the C library's was just told
    # not to.
    pa.set_memory_pool(pa.system_memory_pool())
    with _configuration_errors():
        asyncio.run(command(settings))
    if left_over():
        # A source still blocks, in a driver's own code. Taking the interpreter down
        # beneath such a thread may crash; everything of ours is closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


async def _serve(settings: Settings) -> None:
    from exportd_server.app import serving  # noqa: PLC0415 - heavy, and --help is not

    async with serving(settings) as running:
        host = settings.listen.rpartition(":")[0]
        await _until_told(running.stop, f"{host}:{running.port}")


async def _work(settings: Settings) -> None:
    from exportd_server.app import working  # noqa: PLC0415 - heavy, and --help is not

    async with working(settings) as stop:
        await _until_told(stop, "working")


async def _until_told(stop: asyncio.Event, ready: str) -> None:
    """Wait for a signal to stop, or for `stop` to be set."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    # For scripts: the one line on standard output, once it is up.
    click.echo(ready)
    await stop.wait()
    # A second signal does not wait for the drain.
    for number in (signal.SIGINT, signal.SIGTERM):
        # As a crash would: tearing everything down from under the calls and threads that
        # are under way is what a process does not always live through.
        loop.add_signal_handler(number, os._exit, 128 + number)


@main.command()
@click.option("--config", type=click.Path(path_type=Path), help="Settings, as a TOML file.")
def migrate(config: Path | None) -> None:
    """Make the ledger's tables in PostgreSQL, or bring them up to date.

    Run it before the processes of a new release; several at once are fine.
    """
    from exportd_server.app import migrate as migrate_ledger  # noqa: PLC0415 - heavy

    with _configuration_errors():
        before, after = migrate_ledger(load_settings(config, {}))
    if before == after:
        click.echo(f"The ledger is at version {after} already.")
    else:
        click.echo(f"The ledger is at version {after} now.")


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="Token transfers to generate; the other datasets go along.",
)
@click.option("--seed", type=int, default=1, show_default=True)
def samples(directory: Path, rows: int, seed: int) -> None:
    """Generate the sample datasets, and a catalogue of them, into DIRECTORY."""
    from exportd_server.samples import generate  # noqa: PLC0415 - heavy

    with _configuration_errors():
        try:
            generate(directory, rows, seed)
        except OSError as error:
            raise ConfigurationError(
                f"{directory}: cannot be written ({error.strerror}); name another directory"
            ) from None
    click.echo(str(directory / "datasets.toml"))


class _configuration_errors:  # noqa: N801 - reads as a statement
    """One line and an exit code for what the operator must mend."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, ConfigurationError):
            click.echo(f"exportd-server: {error}", err=True)
            sys.exit(EXIT_CONFIGURATION)


if __name__ == "__main__":
    main()
