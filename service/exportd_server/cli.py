"""The command `exportd-server`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from exportd_server.errors import ConfigurationError, ExportdError, ServerLost
from exportd_server.identity.base import KeyStore, KeysUnreadable, Scope
from exportd_server.identity.keys import new_key
from exportd_server.platform.garbage import uncollected
from exportd_server.platform.logging import configure_logging, log_everything
from exportd_server.platform.malloc import keep_large_buffers
from exportd_server.platform.threads import left_over
from exportd_server.settings import LogSettings, Settings, load_settings
from exportd_server.store.key import is_tenant

T = TypeVar("T")

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
    log_everything()
    keep_large_buffers()
    code = 0
    with _configuration_errors():
        try:
            asyncio.run(command(settings))
        except ServerLost:
            # Whoever watches the process is to start it anew.
            code = 1
    if left_over():
        # A source still blocks, in a driver's own code. Taking the interpreter down
        # beneath such a thread may crash; everything of ours is closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


async def _serve(settings: Settings) -> None:
    with uncollected():
        from exportd_server.app import serving  # noqa: PLC0415 - heavy, and --help is not

    async with serving(settings) as running:
        host = settings.listen.rpartition(":")[0]
        await _until_told(running.stop, f"{host}:{running.port}")


async def _work(settings: Settings) -> None:
    with uncollected():
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
@click.option("--config", type=click.Path(path_type=Path), help="Settings, as a TOML file.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="As of `serve`.")
@click.option("--catalogue", type=click.Path(path_type=Path), help="As of `serve`.")
@click.option("--listen", metavar="HOST:PORT", help="As of `serve`.")
@click.option("--worker", is_flag=True, help="Check for a `worker`, which serves nobody.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=15.0,
    show_default=True,
    help="Seconds that one check may take.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def check(
    config: Path | None, *, worker: bool, timeout: float, as_json: bool, **flags: Any
) -> None:
    """Try everything that the settings name, and say what is wrong and how to mend it.

    Run it before a deployment, where and as the server will run. Settings come from the
    file, then EXPORTD_* variables, then flags. It leaves nothing behind. Exit code 1: a
    check has failed.
    """
    from exportd_server.operations.check import check as findings  # noqa: PLC0415 - heavy
    from exportd_server.operations.checking import Level  # noqa: PLC0415 - as above

    configure_logging("error", "console")

    async def run() -> bool:
        good = True
        found = findings(config, flags, serves=not worker, seconds=timeout)
        async for finding in found:
            click.echo(json.dumps(finding.as_json()) if as_json else finding.line())
            good = good and finding.level is not Level.FAILED
        return good

    _end(0 if asyncio.run(run()) else 1)


@main.command()
@click.option("--config", type=click.Path(path_type=Path), help="Settings, as a TOML file.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="As of `serve`.")
@click.option("--watch", is_flag=True, help="Go on until interrupted.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.5),
    default=2.0,
    show_default=True,
    help="Seconds between two looks, with --watch.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each look.")
def status(
    config: Path | None,
    data_dir: Path | None,
    *,
    watch: bool,
    interval: float,
    as_json: bool,
) -> None:
    """Show who works, what waits, what is late and how much is stored.

    It reads the ledger, beside servers that run, and disturbs none. Give it the server's
    settings.
    """
    from exportd_server.operations.glance import glance  # noqa: PLC0415 - heavy
    from exportd_server.operations.standing import read_standing  # noqa: PLC0415 - heavy

    with _configuration_errors():
        settings = load_settings(config, {"data_dir": data_dir}, serves=False)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                standing = read_standing(settings)
                if as_json:
                    click.echo(json.dumps(standing.as_json(), default=_text))
                else:
                    if watch:
                        # Nothing of the kind where it is no terminal.
                        click.clear()
                    click.echo("\n".join(glance(standing)))
                if not watch:
                    break
                time.sleep(interval)


def _text(value: object) -> str:
    return _moment(value) if isinstance(value, datetime) else str(value)


def _end(code: int) -> NoReturn:
    """End the process although a thread may block in a driver's own code: taking the
    interpreter down beneath it may crash."""
    if not left_over():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


@main.group()
def keys() -> None:
    """Manage the API keys that callers identify themselves with.

    Servers that run take a change up within seconds. Give it the server's settings.
    """


_WHERE = (
    click.option(
        "--config", type=click.Path(path_type=Path), help="Settings, as a TOML file."
    ),
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        help="Where the embedded ledger's keys are.",
    ),
)


def _where(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_WHERE):
        command = option(command)
    return command


class _Lifetime(click.ParamType[timedelta]):
    """A length of time such as 90d, 12h, 30m or 45s."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        """See the base."""
        match = re.fullmatch(r"(\d{1,6})([smhdw])", str(value))
        if match is None or not int(match[1]):
            self.fail(f"{value!r} is no duration such as 90d or 12h", param, ctx)
        return timedelta(**{_UNITS[match[2]]: int(match[1])})


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@keys.command("create")
@click.option("--tenant", required=True, help="Whose jobs its owner sees and makes.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What its owner may do; repeat it for several. Default: read and write.",
)
@click.option("--name", default="", help="What it is for, to be told from others.")
@click.option(
    "--expires-in", type=_Lifetime(), help="Such as 90d; otherwise until it is revoked."
)
@_where
def create_key(
    config: Path | None,
    data_dir: Path | None,
    tenant: str,
    scopes: tuple[str, ...],
    name: str,
    expires_in: timedelta | None,
) -> None:
    """Make a key and print it, this once: the service keeps only a hash."""
    if not is_tenant(tenant):
        raise click.BadParameter(
            f"{tenant!r} must be 1 to 63 small letters, digits, - and _, with a letter or "
            "digit first",
            param_hint="--tenant",
        )
    if not name.isprintable() or len(name) > 100:
        raise click.BadParameter("at most 100 printable characters", param_hint="--name")
    chosen = [Scope(scope) for scope in scopes] or [Scope.READ, Scope.WRITE]
    text, key = new_key(
        tenant, chosen, name=name, now=datetime.now(UTC), lifetime=expires_in
    )
    settings = _with_keys(config, data_dir, lambda store: store.add(key))[0]
    click.echo(
        f"Key {key.key_id} of tenant {tenant} may {', '.join(sorted(key.scopes))}. It "
        + ("does not expire" if key.expire_time is None else _until(key.expire_time))
        + ", and is shown this once:",
        err=True,
    )
    click.echo(text)
    if not settings.identity.api_keys:
        click.echo(
            "Servers with these settings ask nobody for a key: set identity.api_keys = "
            "true (EXPORTD_IDENTITY__API_KEYS=true).",
            err=True,
        )


@keys.command("list")
@click.option("--tenant", help="Only those of this tenant.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@_where
def list_keys(
    config: Path | None, data_dir: Path | None, tenant: str | None, *, as_json: bool
) -> None:
    """List the keys, the oldest first, those that work no more included."""
    found = _with_keys(config, data_dir, lambda store: store.keys())[1]
    now = datetime.now(UTC)
    for key in found:
        if tenant is not None and key.tenant != tenant:
            continue
        row = {
            "id": key.key_id,
            "tenant": key.tenant,
            "scopes": sorted(key.scopes),
            "name": key.name,
            "created": _moment(key.create_time),
            "expires": key.expire_time and _moment(key.expire_time),
            "revoked": key.revoke_time and _moment(key.revoke_time),
        }
        if as_json:
            click.echo(json.dumps(row))
            continue
        state = "no expiry" if key.expire_time is None else _until(key.expire_time)
        if key.revoke_time is not None:
            state = f"revoked {_moment(key.revoke_time)}"
        elif key.expire_time is not None and key.expire_time <= now:
            state = f"expired {_moment(key.expire_time)}"
        click.echo(
            f"{key.key_id}  {key.tenant:<16}  {','.join(sorted(key.scopes)):<26}  "
            f"created {_moment(key.create_time)}  {state}  {key.name}".rstrip()
        )


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@_where
def revoke_key(config: Path | None, data_dir: Path | None, key_id: str) -> None:
    """Have the key ID, as `list` shows it, work no more."""
    now = datetime.now(UTC)
    found = _with_keys(config, data_dir, lambda store: store.revoke(key_id, now))[1]
    if found is None:
        # It may be a whole key, which does not belong into a log.
        click.echo("exportd-server: there is no key of that id; see `keys list`", err=True)
        sys.exit(1)
    if found.revoke_time is not None:
        click.echo(f"Key {key_id} was revoked {_moment(found.revoke_time)} already.")
    else:
        click.echo(f"Key {key_id} of tenant {found.tenant} is revoked.")


def _with_keys(
    config: Path | None,
    data_dir: Path | None,
    use: Callable[[KeyStore], Awaitable[T]],
) -> tuple[Settings, T]:
    """What `use` gives, of the keys that the settings lead to."""
    from exportd_server.app import key_store  # noqa: PLC0415 - heavy, and --help is not

    async def run(settings: Settings) -> T:
        async with key_store(settings) as store:
            return await use(store)

    with _configuration_errors():
        settings = load_settings(config, {"data_dir": data_dir}, serves=False)
        # Audit lines are written whatever the level, and belong where logs are collected.
        configure_logging("error", settings.log.style)
        try:
            return settings, asyncio.run(run(settings))
        except (OSError, KeysUnreadable, ExportdError) as error:
            raise ConfigurationError(f"keys: {error}") from error


def _moment(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _until(moment: datetime) -> str:
    return f"expires {_moment(moment)}"


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
