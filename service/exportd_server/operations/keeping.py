"""Checks of what is kept: the ledger, the outputs, the keys beside them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from exportd_server.errors import ConfigurationError
from exportd_server.jobs.ledger import schema
from exportd_server.jobs.ledger.looking import TookTooLong, file_version
from exportd_server.jobs.ledger.postgres_server import Address
from exportd_server.jobs.ledger.statements import standing
from exportd_server.operations.checking import (
    Check,
    Outcome,
    blocking,
    failed,
    ok,
    told,
    warning,
)
from exportd_server.operations.glance import size
from exportd_server.operations.standing import look
from exportd_server.places import (
    KEPT_LINK_KEY,
    KEPT_SECRETS,
    is_embedded,
    ledger_file,
    ledger_url,
    outputs,
    refuse_embedded,
)
from exportd_server.platform.clock import Clock, SystemClock
from exportd_server.platform.files import Directory
from exportd_server.platform.secrets import kept_key
from exportd_server.settings import Settings
from exportd_server.store.local import OWNER
from exportd_server.store.local import probe as probe_directory

if TYPE_CHECKING:
    from exportd_server.store.s3_client import S3Options

_SKEW_SECONDS = 1.0
"""Clocks that a time service keeps differ by far less."""
_MOST_SKEW_SECONDS = 30.0
"""What tokens are allowed for by default; pre-signed URLs and S3 suffer as well."""
_ATTEMPTS = 2
"""Of a call to S3: an endpoint that is away is to be told within the time limit."""


# --- directories


def data_dir_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """The directory of everything that has no URL. A start makes it, and what is written
    there is tried by those who write it: the ledger, the outputs, the sample data, keys."""
    del serves
    path = settings.data_dir

    def run() -> Outcome:
        try:
            if path.is_dir():
                return ok("is there")
            try_to_write(path)
        except OSError as error:
            return failed(
                f"cannot be made ({error.strerror}); name a directory that this user may "
                "write to as data_dir"
            )
        return ok("can be made")

    yield Check("data_dir", str(path), lambda: blocking(run))


def _nearest(path: Path) -> Path:
    """The directory, or the one above it that is there and that it would be made in."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def try_to_write(path: Path) -> None:
    """Make a file in a directory, or where it would be made, and remove it. Raises
    `OSError`."""
    name = f".check-{secrets.token_hex(8)}"
    with Directory.at(_nearest(path)) as directory:
        directory.create(name).close()
        directory.unlink(name)


# --- the ledger


def ledger_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """Whether a server of this release can have it."""
    if not serves:
        refuse_embedded(settings, "workers alone")
    elif not settings.worker.enabled:
        refuse_embedded(settings, "an API without workers")
    if is_embedded(settings):
        path = ledger_file(settings)
        yield Check(
            "ledger",
            str(path),
            lambda: blocking(lambda: _check_file(path)),
            needs=() if ledger_url(settings) else ("data_dir",),
        )
        return
    address = Address.parse(ledger_url(settings))

    def run() -> Outcome:
        return ok(f"version {address.check()}, with all rights")

    yield Check("ledger", address.shown, lambda: blocking(run))
    yield Check(
        "ledger", "clock", lambda: blocking(lambda: check_clock(address, SystemClock()))
    )


def _check_file(path: Path) -> Outcome:
    try:
        try_to_write(path.parent)
    except OSError as error:
        return failed(
            f"its directory cannot be written to ({error.strerror}); name a file that the "
            "service may read and write in ledger.url, or another data_dir"
        )
    if not path.exists():
        return ok("is made at the start")
    if not os.access(path, os.R_OK | os.W_OK):
        return failed("this user may not read and write it; make the file this user's")
    if _is_held(path.with_name(f"{path.name}.lock")):
        return failed(
            "another process has it open; stop that one, or give this one a file of its own"
        )
    found = file_version(path)
    if found is None or found == schema.HEAD:
        return ok(f"version {found or schema.HEAD}, and nobody has it open")
    if found not in schema.known():
        raise ConfigurationError(schema.too_new(path, found))
    return ok(f"version {found}, brought to {schema.HEAD} at the start")


def _is_held(lock: Path) -> bool:
    """Whether a process has the ledger. The lock is shared, so that two who look do not
    see each other, and is given back at once."""
    try:
        file = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def check_clock(address: Address, clock: Clock) -> Outcome:
    """Compare a clock with the database server's; blocks."""
    try:
        with contextlib.closing(address.connect()) as connection:
            begin = time.monotonic()
            here = clock.now().timestamp()
            row = connection.execute(
                "SELECT extract(epoch FROM clock_timestamp())::float8"
            ).fetchone()
            took = time.monotonic() - begin
    except psycopg.Error:
        return warning("cannot be compared without the ledger")
    assert row is not None  # noqa: S101 - it is one row
    # The server looked at some moment in between.
    ahead = here + took / 2 - row[0]
    off = max(0.0, abs(ahead) - took / 2)
    text = (
        f"this machine is {off:.1f} s {'ahead of' if ahead > 0 else 'behind'} the database"
    )
    mend = "have a time service (NTP) keep both"
    if off > _MOST_SKEW_SECONDS:
        return failed(f"{text}: tokens and download URLs end at wrong times; {mend}")
    if off > _SKEW_SECONDS:
        return warning(f"{text}; {mend}")
    return ok(f"within {_SKEW_SECONDS:g} s of the database's")


# --- the outputs


def store_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """Whether outputs can be kept, and whose are there."""
    del serves
    place = outputs(settings)
    if isinstance(place, Path):
        where = () if settings.store.url else ("ledger.url", "data_dir")
        yield Check(
            "store",
            str(place),
            lambda: blocking(lambda: _check_root(place)),
            needs=where,
        )
        need = settings.worker.concurrency * max(
            settings.parts.text_bytes, settings.parts.parquet_bytes
        )
        yield Check(
            "store",
            "room",
            lambda: blocking(lambda: _check_room(place, need)),
            needs=(*where, "worker.concurrency", "parts"),
        )

        async def read_owner() -> str | None:
            return await blocking(lambda: _owner_in(place))
    else:
        options = replace(place, attempts=min(place.attempts, _ATTEMPTS))
        yield Check(
            "store",
            options.url,
            lambda: _check_bucket(options),
            left="an object .probe-* may be left there",
        )

        async def read_owner() -> str | None:
            return await _owner_on_s3(options)

    async def owner() -> Outcome:
        try:
            holder = await read_owner()
        except OSError as error:
            return failed(
                f"{OWNER}, which tells it, cannot be read ({error.strerror}); make the "
                "outputs this user's, or name another directory in store.url"
            )
        return await blocking(lambda: _compare_owner(settings, holder))

    ledger = ("ledger.url",) if ledger_url(settings) else ("ledger.url", "data_dir")
    yield Check("store", "owner", owner, needs=ledger)


def _check_root(root: Path) -> Outcome:
    try:
        place = _nearest(root)
        with Directory.at(place) as directory:
            probe_directory(directory)
    except OSError as error:
        return failed(
            f"cannot keep files there ({error.strerror}); name a directory that this user "
            "may write to, on a file system with hard links and file locks, in store.url"
        )
    return ok("writable" if root.exists() else f"can be made in {place}")


def _check_room(root: Path, need: int) -> Outcome:
    free = shutil.disk_usage(_nearest(root)).free
    if free < need:
        return warning(
            f"{size(free)} free, and the parts that are written at a time may have "
            f"{size(need)}; make room, or lower worker.concurrency or parts"
        )
    return ok(f"{size(free)} free")


async def _check_bucket(options: S3Options) -> Outcome:
    # The SDK takes a while to load, and most do without.
    from exportd_server.store.s3_probe import survey  # noqa: PLC0415 - see above
    from exportd_server.store.s3_upload import Uploads  # noqa: PLC0415 - see above

    uploads = await blocking(lambda: Uploads(options))
    try:
        found = await asyncio.wrap_future(uploads.submit(survey(uploads)))
    finally:
        await blocking(uploads.close)
    more = "".join(f"; {text}" for text in found.warnings)
    if found.lacking:
        rights = ", ".join(dict.fromkeys(found.lacking))
        return failed(f"access is denied; allow {rights} to the keys of store.s3{more}")
    if more:
        return warning(more.removeprefix("; "))
    return ok("there, with the rights to list, write, read and delete")


def _owner_in(root: Path) -> str | None:
    """Whose the outputs are; None while nobody has them. Raises `OSError`."""
    try:
        return (root / OWNER).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


async def _owner_on_s3(options: S3Options) -> str | None:
    """As `_owner_in`; raises `ConfigurationError`."""
    from exportd_server.store.s3_client import (  # noqa: PLC0415 - as above
        CallFailed,
        open_bucket,
    )
    from exportd_server.store.s3_probe import remedy  # noqa: PLC0415 - as above

    async with open_bucket(options) as bucket:
        try:
            text = await bucket.text(f"{options.root}{OWNER}")
        except CallFailed as error:
            raise ConfigurationError(
                f"{OWNER}, which tells it, cannot be read: {remedy(error, 'read')}"
            ) from error
    return None if text is None else text.strip()


def _compare_owner(settings: Settings, holder: str | None) -> Outcome:
    if holder is None:
        return ok("nobody's so far")
    mend = (
        "name another directory or prefix in store.url, or, if that ledger is gone for "
        f"good, delete the file or object `{OWNER}` there: what it left is deleted then"
    )
    try:
        if is_embedded(settings) and not ledger_file(settings).exists():
            return failed(
                f"the outputs there belong to ledger {holder}, and this one is yet to be "
                f"made; {mend}"
            )
        with look(settings) as ledger:
            mine = [row.ledger_id for row in ledger.ask(standing.ledger_id())]
    except (ConfigurationError, TookTooLong):
        return warning(f"ledger {holder}; whether that is this one the ledger cannot tell")
    if holder not in mine:
        return failed(f"the outputs there belong to another ledger ({holder}); {mend}")
    return ok("this ledger")


# --- keys


def secret_key_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """What secrets of callers are encrypted with."""
    del serves
    embedded = is_embedded(settings)
    given = len(settings.delivery.secret_keys)
    if not given and not embedded:
        outcome = warning(
            "none: requests with secrets of their own, such as signing keys of webhooks, "
            "are refused; give all processes the same, such as `openssl rand -base64 32` "
            "makes"
        )
        yield Check("keys", "delivery.secret_keys", told(outcome))
        return
    # One that was kept before the setting was made stays in use.
    kept = settings.data_dir / KEPT_SECRETS if embedded else None
    yield _keys("delivery.secret_keys", given, kept)


def signing_key_checks(settings: Settings, serves: bool) -> Iterator[Check]:
    """What signs download URLs."""
    del serves
    if not settings.http.listen:
        return
    given = len(settings.http.signing_keys)
    if not given and not is_embedded(settings):
        outcome = failed(
            "the processes of a fleet must accept each other's URLs; give all of them the "
            "same key, such as `openssl rand -base64 32` makes"
        )
        yield Check("keys", "http.signing_keys", told(outcome))
        return
    kept = None if given else settings.data_dir / KEPT_LINK_KEY
    yield _keys("http.signing_keys", given, kept)


def _keys(name: str, given: int, kept: Path | None) -> Check:
    """Of keys in the settings, and of one in a file that may be there."""
    if kept is None:
        return Check("keys", name, told(ok(f"{given} given")))
    return Check(
        "keys",
        name,
        lambda: blocking(lambda: _check_kept(name, given, kept)),
        needs=("data_dir",),
    )


def _check_kept(name: str, given: int, kept: Path) -> Outcome:
    text = f"{given} given" if given else ""
    if kept.exists():
        try:
            kept_key(kept.parent, kept.name)
        except OSError as error:
            return failed(
                f"{kept} cannot be read ({error.strerror}); make it this user's, or "
                "restore it"
            )
        except ValueError as error:
            return failed(str(error))
        return ok(f"{text}{' and ' if text else ''}one in {kept}")
    if text:
        return ok(text)
    try:
        try_to_write(kept.parent)
    except OSError as error:
        return failed(
            f"none, and none can be made in {kept} ({error.strerror}); give one in {name}, "
            "such as `openssl rand -base64 32` makes, or another data_dir"
        )
    return ok(f"one is made in {kept} at the start")
