"""The command `exportd-server`."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow as pa

from exportd_server.errors import ConfigurationError
from exportd_server.platform.logging import configure_logging
from exportd_server.platform.malloc import keep_large_buffers
from exportd_server.settings import LogSettings, Settings, load_settings

EXIT_CONFIGURATION = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="exportd-server")
def main() -> None:
    """Run dataset exports as background jobs, over gRPC."""


@main.command()
@click.option("--config", type=click.Path(path_type=Path), help="Settings, as a TOML file.")
@click.option("--listen", metavar="HOST:PORT", help="Where to serve gRPC.")
@click.option(
    "--allow-unauthenticated/--loopback-only",
    default=None,
    help="Listen beyond loopback although nobody has to identify themselves.",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Ledger, outputs and samples."
)
@click.option(
    "--catalogue", type=click.Path(path_type=Path), help="The datasets (datasets.toml)."
)
@click.option("--sample-rows", type=int, help="Token transfers in the sample data.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--log-style", type=click.Choice(["json", "console"]))
def serve(
    config: Path | None, log_level: str | None, log_style: str | None, **flags: Any
) -> None:
    """Serve the API and work off exports in one process.

    Settings come from the file, then EXPORTD_* variables, then flags.
    """
    with _configuration_errors():
        settings = load_settings(config, flags)
    style = {"level": log_level, "style": log_style}
    chosen = {**settings.log.model_dump(), **{k: v for k, v in style.items() if v}}
    log = LogSettings(**chosen)
    configure_logging(log.level, log.style)
    keep_large_buffers()
    # Arrow's own allocator keeps a share of every peak; the C library's was just told
    # not to.
    pa.set_memory_pool(pa.system_memory_pool())
    with _configuration_errors():
        asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    from exportd_server.app import serving  # noqa: PLC0415 - heavy, and --help is not

    async with serving(settings) as running:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, running.stop.set)
        # For scripts: the one line on standard output, once calls are answered.
        host = settings.listen.rpartition(":")[0]
        click.echo(f"{host}:{running.port}")
        await running.stop.wait()
        # A second signal does not wait for the drain.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


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
