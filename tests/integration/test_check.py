"""`exportd-server check`: each thing that can be wrong before a deployment is red for its
cause, green once that is mended, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from exportd_server.jobs.ledger.postgres import migrate_postgres_ledger
from exportd_server.jobs.ledger.postgres_server import Address
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.operations.check import check
from exportd_server.operations.checking import (
    Check,
    Finding,
    Level,
    Outcome,
    ok,
    run_checks,
)
from exportd_server.operations.keeping import check_clock
from exportd_server.platform.clock import SystemClock
from exportd_server.samples import generate
from exportd_server.sinks.connections import survey_connections
from exportd_server.sinks.registry import SinkTypes
from exportd_server.store.local import LocalStore
from tests.support.canaries import Canaries
from tests.support.identity import AUDIENCE, ISSUER, Authority, Issuer, api_key
from tests.support.ledger import FakeClock
from tests.support.postgres import PostgresServer
from tests.support.receiver import Receiver
from tests.support.s3_proxy import error, s3_proxy
from tests.support.seaweed import BUCKET, SECRET, RawS3, SeaweedServer
from tests.support.server import ROOT

LONG = "0123456789abcdef" * 2
ENOUGH = 30.0


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing but the file says how things are."""
    for name in list(os.environ):
        if name.startswith(("EXPORTD_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@dataclass
class Site:
    """A configuration that works, as dotted keys of the file, until a test changes it."""

    folder: Path
    keys: dict[str, Any] = field(default_factory=dict)

    def write(self, **more: Any) -> Path:
        """The file; `more` are keys with `__` for dots, None for those to leave out."""
        keys = self.keys | {name.replace("__", "."): value for name, value in more.items()}
        lines = [f"{key} = {_toml(v)}\n" for key, v in keys.items() if v is not None]
        file = self.folder / "server.toml"
        file.write_text("".join(lines))
        return file

    async def found(
        self, *, serves: bool = True, seconds: float = ENOUGH, **more: Any
    ) -> dict[tuple[str, str], Finding]:
        """What a check finds, by area and name; several texts of one are joined."""
        found: dict[tuple[str, str], Finding] = {}
        async for each in check(self.write(**more), {}, serves=serves, seconds=seconds):
            key = each.area, each.name
            text = f"{found[key].text}\n{each.text}" if key in found else each.text
            found[key] = Finding(each.level, each.area, each.name, text)
        return found

    async def one(self, area: str, name: str, **more: Any) -> Finding:
        """One finding, where all others of a good site stay as they are."""
        return (await self.found(**more))[area, name]

    def path(self, name: str) -> Path:
        return self.folder / name


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    catalogue = folder / "datasets.toml"
    (folder / "orders.csv").write_text("id,name,at,owner\n1,a,2026-01-01T00:00:00Z,acme\n")
    catalogue.write_text('[datasets.orders]\ncsv = "orders.csv"\n')
    keys = {"listen": "127.0.0.1:0", "data_dir": folder / "data", "catalogue": catalogue}
    return Site(folder, keys)


def red(finding: Finding | Outcome, *told: str) -> None:
    assert finding.level is Level.FAILED, finding
    for text in told:
        assert text in finding.text, finding


def green(finding: Finding | Outcome, *told: str) -> None:
    assert finding.level is Level.OK, finding
    for text in told:
        assert text in finding.text, finding


def yellow(finding: Finding | Outcome, *told: str) -> None:
    assert finding.level is Level.WARNING, finding
    for text in told:
        assert text in finding.text, finding


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and directory, when it was made, and what is in it."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


# --- as a whole


async def test_a_site_that_works_is_green_throughout_and_left_as_it_was(
    site: Site,
) -> None:
    file = site.write()
    before = tree(site.folder)
    found = [each async for each in check(file, {}, seconds=ENOUGH)]
    assert {each.level for each in found} == {Level.OK}
    areas = {each.area for each in found}
    assert areas == {
        *("settings", "data_dir", "ledger", "store", "catalogue", "sinks", "keys"),
        *("tls", "identity", "ports"),
    }
    assert tree(site.folder) == before


async def test_a_site_that_was_used_is_left_as_it_was(site: Site) -> None:
    data = site.path("data")
    ledger = await open_sqlite_ledger(data / "ledger.db", SystemClock())
    store = LocalStore(data / "outputs")
    await store.claim(await ledger.identity())
    await store.close()
    await ledger.close()
    file = site.write()
    before = tree(site.folder)
    found = {(e.area, e.name): e async for e in check(file, {}, seconds=ENOUGH)}
    green(found["store", "owner"], "this ledger")
    green(found["ledger", str(data / "ledger.db")], "nobody has it open")
    after = tree(site.folder)
    # Files are made and removed in them.
    for directory in ("data", "data/outputs"):
        assert before.pop(directory)[1] == after.pop(directory)[1]
    assert after == before


async def test_one_that_hangs_fails_in_its_time_and_holds_up_no_other() -> None:
    never = asyncio.Event()

    async def hang() -> Any:
        await never.wait()

    async def work() -> Any:
        return ok("fine")

    checks = [Check("a", "hangs", hang, left="a probe"), Check("a", "works", work)]
    found = [each async for each in run_checks(checks, seconds=0.2)]
    red(found[0], "no answer within 0.2 s", "a probe")
    green(found[1], "fine")


async def test_one_that_breaks_is_told_without_its_text_and_the_others_go_on() -> None:
    async def breaks() -> Any:
        raise RuntimeError("s3cr3t")

    async def work() -> Any:
        return ok("two\nlines")

    checks = [Check("a", "breaks", breaks), Check("a", "works", work)]
    found = [each async for each in run_checks(checks, seconds=ENOUGH)]
    red(found[0], "RuntimeError")
    assert "s3cr3t" not in found[0].text
    assert found[1].text == "two lines"


@pytest.mark.minutes
def test_the_command_says_all_in_lines_and_by_its_exit_code(site: Site) -> None:
    good = run(site.write())
    assert good.returncode == 0, good.stdout + good.stderr
    assert all(line.startswith("ok ") for line in good.stdout.splitlines())
    bad = run(site.write(store__url=f"file://{site.folder / 'orders.csv'}"))
    assert bad.returncode == 1
    lines = [line for line in bad.stdout.splitlines() if not line.startswith("ok ")]
    assert len(lines) == 1
    assert lines[0].startswith("failed   store ")
    told = run(site.write(store__url=f"file://{site.folder / 'orders.csv'}"), "--json")
    assert told.returncode == 1
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    assert all(set(row) == {"level", "area", "name", "text"} for row in rows)
    assert [row["area"] for row in rows if row["level"] == "failed"] == ["store"]


def run(file: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "exportd_server", "check"),
            *("--config", str(file), *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=60,
    )


# --- settings


async def test_every_wrong_setting_is_told_at_once_and_the_rest_is_tried(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPORTD_WROKER__LEASE", "3")
    monkeypatch.setenv("EXPORTD_IDENTITY__MTLS", "{not json")
    monkeypatch.setenv("EXPORTD_LIMITS__MAX_ROWS", "many")
    found = await site.found(
        worker__lease=-1, worker__typo=1, retention__ttl=0, delivery__secret_keys=["short"]
    )
    settings = found["settings", str(site.path("server.toml"))]
    red(
        settings,
        "EXPORTD_WROKER__LEASE is no setting; did you mean EXPORTD_WORKER__LEASE",
        "EXPORTD_IDENTITY__MTLS: lists and tables stand there as JSON",
        "worker.lease: Input should be greater than 0",
        "worker.typo is no setting",
        "retention.ttl: ",
        "limits.max_rows: ",
        "delivery.secret_keys: Value error, each key needs at least 32 bytes",
    )
    assert len(settings.text.splitlines()) == 7
    yellow(found["keys", "delivery.secret_keys"], "first mend delivery.secret_keys")
    yellow(found["identity", "mtls"], "first mend identity.mtls")
    yellow(found["settings", "listen"], "is not checked; first mend identity.mtls")
    yellow(found["settings", "retention"], "is not checked; first mend retention.ttl")
    green(found["catalogue", "orders"])
    for name in ("WROKER__LEASE", "IDENTITY__MTLS", "LIMITS__MAX_ROWS"):
        monkeypatch.delenv(f"EXPORTD_{name}")
    green((await site.found())["settings", str(site.path("server.toml"))])


async def test_a_wrong_field_keeps_only_what_needs_it_from_being_checked(
    site: Site,
) -> None:
    name = str(site.path("server.toml"))
    wrong: dict[str, Any] = {
        "listen": "0.0.0.0:0",
        "http__listen": "10.1.2.3:80",
        "metrics__listen": "0.0.0.0:0",
    }
    told = ("listen: 0.0.0.0 is", "http.listen: 10.1.2.3 is", "metrics.listen: 0.0.0.0 is")
    for odd in ("http__console_session", "identity__jwt__leeway_seconds"):
        red((await site.found(**(wrong | {odd: -1})))["settings", name], *told)
    found = await site.found(**wrong, metrics__allow_remote="perhaps")
    red(found["settings", name], *told[:2])
    assert told[2] not in found["settings", name].text
    yellow(found["settings", "metrics.listen"], "first mend metrics.allow_remote")
    green(found["ports", "metrics.listen"])
    found = await site.found(**wrong, identity__api_keys="perhaps")
    red(found["settings", name], told[2], "tls.allow_plaintext")
    for key in ("listen", "http.listen"):
        yellow(found["settings", key], "first mend identity.api_keys")
    found = await site.found(**(wrong | {"listen": "nowhere"}))
    red(found["settings", name], "listen: 'nowhere' is not host:port", *told[1:])
    yellow(found["ports", "listen"], "not tried; first mend listen")
    green(found["ports", "metrics.listen"])


async def test_what_a_wrong_field_may_have_broken_besides_is_not_told_as_a_mistake(
    site: Site,
) -> None:
    found = await site.found(tls__cert_file=5, tls__key_file="key.pem")
    settings = found["settings", str(site.path("server.toml"))]
    red(settings, "tls.cert_file: ")
    assert len(settings.text.splitlines()) == 1
    yellow(found["settings", "tls"], "is not checked; first mend tls.cert_file")
    yellow(found["tls", "all"], "not tried; first mend tls.cert_file")
    found = await site.found(retention__odd=1, retention__ttl=9, retention__max_ttl=8)
    settings = found["settings", str(site.path("server.toml"))]
    red(settings, "retention.odd is no setting", "ttl (9) must not pass max_ttl (8)")


async def test_a_key_that_does_not_exist_keeps_nothing_from_being_tried(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await site.found()
    monkeypatch.setenv("EXPORTD_PARTS__TYPO", "1")
    odd: dict[str, Any] = {
        "worker__laese": 1,
        "store__s3__typo": 1,
        "ledger__typo": 1,
        "typo": 1,
    }
    after = await site.found(**odd)
    settings = after.pop(("settings", str(site.path("server.toml"))))
    assert len(settings.text.splitlines()) == 5
    red(settings, *(f"{key.replace('__', '.')} is no setting" for key in odd))
    before.pop(("settings", str(site.path("server.toml"))))
    assert after == before


async def test_a_mistake_that_is_in_the_way_of_several_areas_is_told_once(
    site: Site,
) -> None:
    wrong: dict[str, Any] = {"http__listen": "127.0.0.1:0", "identity__api_keys": True}
    found = await site.found(ledger__url="mysql://x/y", **wrong)
    (only,) = (each for each in found.values() if each.level is Level.FAILED)
    assert only == found["ledger", "all"]
    for where in (
        ("store", "all"),
        ("keys", "delivery.secret_keys"),
        ("keys", "http.signing_keys"),
        ("identity", "api_keys"),
    ):
        yellow(found[where], "first mend what has failed in ledger")


def test_three_mistakes_in_three_files_are_each_told_once_with_their_mend(
    site: Site,
) -> None:
    site.keys["catalogue"].write_text(
        '[datasets.orders]\ncsv = "orders.csv"\ntme_column = "at"\n'
        '[datasets.good]\ncsv = "orders.csv"\n'
    )
    sinks = site.path("sinks.toml")
    sinks.write_text(
        f'[connections.lost]\ntype = "local_file"\nroot = "{site.folder}/none"\n'
        f'[connections.kept]\ntype = "local_file"\nroot = "{site.folder}"\n'
    )
    told = run(site.write(worker__laese=3, sinks=sinks, metrics__listen="0.0.0.0:0"))
    assert told.returncode == 1
    assert told.stderr == ""
    lines = told.stdout.splitlines()
    wrong = [line for line in lines if not line.startswith("ok ")]
    mends = (
        ("settings", "worker.laese is no setting; did you mean worker.lease?"),
        ("settings", "metrics.listen: 0.0.0.0 is reachable from elsewhere"),
        ("catalogue", "tme_column: unknown key; did you mean 'time_column'?"),
        ("sinks", "make it, or name another one; mend connections.lost in"),
    )
    assert len(wrong) == len(mends), told.stdout
    for area, mend in mends:
        (line,) = (each for each in wrong if mend in each)
        assert line.startswith(f"failed   {area} ")
    for area, name in (
        ("ledger", "ledger.db"),
        ("store", "outputs"),
        ("store", "owner"),
        ("catalogue", "good"),
        ("sinks", "kept"),
        ("ports", "metrics.listen"),
    ):
        assert any(
            line.startswith("ok ") and f" {area} " in line and name in line
            for line in lines
        ), (area, name)


async def test_addresses_that_contradict_each_other_are_told_at_once(site: Site) -> None:
    wrong = {
        "listen": "0.0.0.0:0",
        "metrics__listen": "0.0.0.0:0",
        "http__listen": "nowhere",
    }
    settings = await site.one("settings", str(site.path("server.toml")), **wrong)
    red(
        settings, "listen: 0.0.0.0 is reachable", "metrics.listen", "http.listen: 'nowhere'"
    )
    green(await site.one("settings", str(site.path("server.toml"))))


async def test_a_file_that_cannot_be_read_is_all_that_is_told(site: Site) -> None:
    file = site.path("server.toml")
    (missing,) = [each async for each in check(file, {})]
    red(missing, "cannot be read")
    file.write_text("listen = ")
    (broken,) = [each async for each in check(file, {})]
    red(broken, "is not valid TOML")


# --- the embedded ledger and its directory


async def test_a_data_directory_that_cannot_be_one_is_told(site: Site) -> None:
    data = site.path("data")
    data.write_text("a file")
    red(await site.one("data_dir", str(data)), "Not a directory", "data_dir")
    data.unlink()
    green(await site.one("data_dir", str(data)), "can be made")
    data.mkdir()
    green(await site.one("data_dir", str(data)), "is there")


NO_FILES_HERE = Path("/sys")
"""A directory in which nobody can make a file, the superuser included."""


async def test_what_a_start_would_write_to_a_directory_that_takes_nothing_is_told(
    site: Site,
) -> None:
    data = NO_FILES_HERE
    found = await site.found(data_dir=data, catalogue=None, http__listen="127.0.0.1:0")
    green(found["data_dir", str(data)])
    red(found["ledger", str(data / "ledger.db")], "cannot be written to", "ledger.url")
    red(found["store", str(data / "outputs")], "cannot keep files", "store.url")
    red(found["catalogue", "samples"], "Permission denied", "as catalogue")
    red(found["keys", "delivery.secret_keys"], "one in delivery.secret_keys")
    red(found["keys", "http.signing_keys"], "one in http.signing_keys")
    elsewhere: dict[str, Any] = {
        "ledger__url": f"sqlite:///{site.folder}/ledger.db",
        "store__url": f"file://{site.folder}/outputs",
        "delivery__secret_keys": [LONG],
        "http__listen": "127.0.0.1:0",
        "http__signing_keys": [LONG],
    }
    found = await site.found(data_dir=data, **elsewhere)
    assert {each.level for each in found.values()} == {Level.OK}


async def test_a_fleet_whose_data_directory_takes_nothing_is_green(fleet: Site) -> None:
    migrate_postgres_ledger(fleet.keys["ledger.url"])
    found = await fleet.found(data_dir=NO_FILES_HERE)
    assert {each.level for each in found.values()} == {Level.OK}
    red(await fleet.one("catalogue", "samples", data_dir=NO_FILES_HERE, catalogue=None))
    # Nor are they where a start would refuse to.
    other = fleet.path("data") / "samples" / "other"
    other.parent.mkdir(parents=True)
    other.touch()
    red(await fleet.one("catalogue", "samples", catalogue=None), "holds other files")
    other.unlink()
    # Samples that are there already are not generated.
    generate(fleet.path("data") / "samples", 10)
    there = await fleet.one("catalogue", "samples", catalogue=None, sample_rows=10)
    green(there, "sample data, in ")


async def test_an_embedded_ledger_that_a_process_has_open_is_told(site: Site) -> None:
    path = site.path("data") / "ledger.db"
    ledger = await open_sqlite_ledger(path, SystemClock())
    red(await site.one("ledger", str(path)), "another process has it open")
    await ledger.close()
    green(await site.one("ledger", str(path)))
    # The look took nothing away from who comes next.
    await (await open_sqlite_ledger(path, SystemClock())).close()


async def test_a_ledger_of_another_release_is_told(site: Site) -> None:
    path = site.path("data") / "ledger.db"
    await (await open_sqlite_ledger(path, SystemClock())).close()
    _set_version(path, "9999")
    red(await site.one("ledger", str(path)), "version 9999", "run the release that made it")
    _set_version(path, "0007")
    green(await site.one("ledger", str(path)), "version 0007, brought to")


def _set_version(path: Path, version: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("UPDATE alembic_version SET version_num = ?", (version,))


async def test_a_file_that_is_no_ledger_is_told(site: Site) -> None:
    path = site.path("data") / "ledger.db"
    path.parent.mkdir()
    path.write_bytes(b"something else, of more than a hundred bytes" * 10)
    red(await site.one("ledger", str(path)), "not a database", "SQLite file")
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE shopping (item)")
    red(await site.one("ledger", str(path)), "tables that are not a ledger's")
    path.unlink()
    green(await site.one("ledger", str(path)), "is made at the start")


async def test_an_embedded_ledger_is_for_one_process_that_does_both(site: Site) -> None:
    red(await site.one("ledger", "all", worker__enabled=False), "an API without workers")
    red(await site.one("ledger", "all", serves=False), "workers alone")


# --- the ledger in PostgreSQL


@pytest.fixture
def fleet(site: Site, postgres_url: str) -> Site:
    """A site with its ledger in PostgreSQL, whose tables are not made yet."""
    site.keys["ledger.url"] = postgres_url
    site.keys["store.url"] = f"file://{site.folder / 'outputs'}"
    site.keys["delivery.secret_keys"] = [LONG]
    return site


async def test_a_database_without_a_ledger_or_with_an_old_one_is_told(
    fleet: Site, postgres: PostgresServer, postgres_database: str
) -> None:
    name = Address.parse(fleet.keys["ledger.url"]).shown
    red(await fleet.one("ledger", name), "no ledger yet", "`exportd-server migrate`")
    migrate_postgres_ledger(fleet.keys["ledger.url"])
    green(await fleet.one("ledger", name), "with all rights")
    change = "UPDATE exportd.alembic_version SET version_num = '{}'"
    postgres.sql(change.format("0007"), database=postgres_database)
    red(await fleet.one("ledger", name), "version 0007", "run `exportd-server migrate`")
    # A later release whose tables this one cannot work with.
    postgres.sql(
        f"{change.format('9999')}; UPDATE exportd.counters SET value = 9999 "
        "WHERE name = 'compatible_from'",
        database=postgres_database,
    )
    red(await fleet.one("ledger", name), "run the release that made it")


async def test_rights_that_lack_in_the_database_are_told(
    fleet: Site, postgres: PostgresServer, postgres_database: str
) -> None:
    migrate_postgres_ledger(fleet.keys["ledger.url"])
    user = f"u_{postgres_database}"
    postgres.sql(f"CREATE ROLE {user} LOGIN")
    try:
        url = fleet.keys["ledger.url"].replace("postgres@", f"{user}@")
        name = Address.parse(url).shown
        red(await fleet.one("ledger", name, ledger__url=url), "GRANT USAGE ON SCHEMA")
        postgres.sql(
            f"GRANT USAGE ON SCHEMA exportd TO {user};"
            f"GRANT SELECT ON ALL TABLES IN SCHEMA exportd TO {user}",
            database=postgres_database,
        )
        red(await fleet.one("ledger", name, ledger__url=url), "lacks INSERT", "GRANT ALL")
        postgres.sql(
            f"GRANT ALL ON ALL TABLES IN SCHEMA exportd TO {user};"
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA exportd TO {user}",
            database=postgres_database,
        )
        green(await fleet.one("ledger", name, ledger__url=url))
    finally:
        postgres.sql(f"DROP OWNED BY {user}; DROP ROLE {user}", database=postgres_database)


async def test_a_database_that_is_down_or_says_nothing_is_told(fleet: Site) -> None:
    down = f"postgresql://exportd:s3cr3tp4ss@127.0.0.1:{free_port()}/exportd"
    found = await fleet.found(ledger__url=down)
    finding = found["ledger", Address.parse(down).shown]
    red(finding, "is it up, and are host and port in ledger.url right?")
    yellow(found["ledger", "clock"], "without the ledger")
    assert "s3cr3tp4ss" not in str(found)
    with listening() as port:
        silent = f"postgresql://exportd@127.0.0.1:{port}/exportd"
        finding = await fleet.one(
            "ledger", Address.parse(silent).shown, ledger__url=silent, seconds=1.0
        )
        red(finding, "no answer within 1 s")
    red(await fleet.one("ledger", "all", ledger__url="mysql://x/y"), "must begin with")


async def test_clocks_that_differ_are_told(fleet: Site) -> None:
    migrate_postgres_ledger(fleet.keys["ledger.url"])
    green(await fleet.one("ledger", "clock"))
    address, clock = Address.parse(fleet.keys["ledger.url"]), FakeClock()
    clock.time = datetime.now(UTC) + timedelta(seconds=20)
    yellow(check_clock(address, clock), "ahead of the database", "NTP")
    clock.time = datetime.now(UTC) - timedelta(seconds=3600)
    red(check_clock(address, clock), "behind the database", "NTP")


async def test_what_a_fleet_must_share_is_told(fleet: Site) -> None:
    migrate_postgres_ledger(fleet.keys["ledger.url"])
    wrong: dict[str, Any] = {
        "store__url": None,
        "delivery__secret_keys": None,
        "http__listen": "127.0.0.1:0",
    }
    found = await fleet.found(**wrong)
    red(found["store", "all"], "one place for their outputs")
    yellow(found["keys", "delivery.secret_keys"], "are refused")
    red(found["keys", "http.signing_keys"], "give all of them the same key")
    found = await fleet.found(http__listen="127.0.0.1:0", http__signing_keys=[LONG, LONG])
    green(found["store", str(fleet.path("outputs"))])
    green(found["keys", "delivery.secret_keys"], "1 given")
    green(found["keys", "http.signing_keys"], "2 given")


DOCUMENTED = re.compile(r"(ok|warning|failed) +(\w+) +(\S+)  (.+)")


def documented(area: str) -> list[tuple[str, str]]:
    """Level and text of an area in the example of the page."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    example = text.partition("$ exportd-server check --config exportd.toml\n")[2]
    lines = map(DOCUMENTED.fullmatch, example.partition("```")[0].splitlines())
    return [(found[1], found[4]) for found in lines if found and found[2] == area]


def test_the_example_of_the_page_is_what_the_command_says(
    fleet: Site, bucket: RawS3, seaweed: SeaweedServer
) -> None:
    migrate_postgres_ledger(fleet.keys["ledger.url"])
    fleet.path("data").mkdir()
    with s3_proxy(seaweed.endpoint) as proxy:
        proxy.plan = lambda call: (
            error(403, "AccessDenied") if call.operation == "delete" else None
        )
        file = fleet.write(worker__laese=9, store__s3__endpoint_url=proxy.endpoint)
        file.rename(file.with_name("exportd.toml"))
        told = run(Path("exportd.toml"), "--json", cwd=fleet.folder)
    assert told.returncode == 1
    rows = [json.loads(line) for line in told.stdout.splitlines()]

    def said(area: str) -> list[tuple[str, str]]:
        return [(row["level"], row["text"]) for row in rows if row["area"] == area]

    assert said("settings") == documented("settings")
    assert said("data_dir") == documented("data_dir")
    ledger, clock = documented("ledger")
    assert said("ledger")[0] == ledger
    ((level, text),) = documented("store")
    found = said("store")[0]
    # The probe that cannot be deleted is named besides.
    assert (found[0], found[1].partition("; the object ")[0]) == (level, text)
    fake = FakeClock()
    fake.time = datetime.now(UTC) + timedelta(seconds=4)
    late = check_clock(Address.parse(fleet.keys["ledger.url"]), fake)
    seconds = re.compile(r"\d+\.\d")
    shown = late.level, seconds.sub("N", late.text)
    assert shown == (clock[0], seconds.sub("N", clock[1]))


# --- the store


async def test_outputs_that_cannot_be_kept_in_a_directory_are_told(site: Site) -> None:
    place = site.path("outputs")
    place.write_text("a file")
    red(await site.one("store", str(place), store__url=f"file://{place}"), "store.url")
    place.unlink()
    green(await site.one("store", str(place), store__url=f"file://{place}"), "can be made")
    assert not place.exists()
    much = 2**60
    yellow(await site.one("store", "room", parts__parquet_bytes=much), "make room")
    green(await site.one("store", "room"), "free")


async def test_outputs_of_another_ledger_are_told(site: Site) -> None:
    data = site.path("data")
    store = LocalStore(data / "outputs")
    await store.claim("00000000-0000-0000-0000-000000000001")
    await store.close()
    red(await site.one("store", "owner"), "yet to be made", "delete the file")
    ledger = await open_sqlite_ledger(data / "ledger.db", SystemClock())
    await ledger.identity()
    await ledger.close()
    red(await site.one("store", "owner"), "belong to another ledger", "0001")
    (data / "outputs" / ".owner").unlink()
    green(await site.one("store", "owner"))


@pytest.fixture
def bucket(site: Site, seaweed: SeaweedServer) -> RawS3:
    """A site with its outputs on S3; gives what lies there."""
    options = seaweed.options()
    site.keys |= {
        "store.url": options.url,
        "store.s3.endpoint_url": seaweed.endpoint,
        "store.s3.path_style": True,
        "store.s3.region": "us-east-1",
        "store.s3.access_key_id": "writer",
        "store.s3.secret_access_key": SECRET,
        "store.s3.attempts": 1,
    }
    return RawS3(seaweed.raw, options)


async def test_a_bucket_is_tried_and_left_empty(site: Site, bucket: RawS3) -> None:
    url = site.keys["store.url"]
    green(await site.one("store", url), "list, write, read and delete")
    assert bucket.objects() == bucket.uploads() == []
    green(await site.one("store", "owner"), "nobody's")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            {"store__s3__access_key_id": "reader"},
            ("access is denied", "s3:PutObject", "s3:DeleteObject", "store.s3"),
        ),
        ({"store__s3__access_key_id": "nobody"}, ("store.s3.access_key_id",)),
        ({"store__s3__secret_access_key": "no"}, ("store.s3.secret_access_key",)),
        ({"store__s3__endpoint_url": "http://127.0.0.1:1"}, ("cannot be reached",)),
        ({"store__url": "s3://elsewhere/x"}, ("there is no such bucket", "store.url")),
    ],
)
async def test_what_is_wrong_with_s3_is_told(
    site: Site, bucket: RawS3, wrong: dict[str, Any], told: tuple[str, ...]
) -> None:
    found = await site.found(**wrong)
    (finding,) = (f for (area, name), f in found.items() if name.startswith("s3://"))
    red(finding, *told)
    assert bucket.objects() == bucket.uploads() == []


@pytest.mark.parametrize(
    ("denied", "right"),
    [
        ("list", "s3:ListBucket"),
        ("uploads", "s3:ListBucketMultipartUploads"),
        ("get", "s3:GetObject"),
        ("abort", "s3:AbortMultipartUpload"),
        ("delete", "s3:DeleteObject"),
    ],
)
async def test_each_right_that_s3_denies_is_named_alone(
    site: Site, bucket: RawS3, seaweed: SeaweedServer, denied: str, right: str
) -> None:
    with s3_proxy(seaweed.endpoint) as proxy:
        site.keys["store.s3.endpoint_url"] = proxy.endpoint
        proxy.plan = lambda call: (
            error(403, "AccessDenied") if call.operation == denied else None
        )
        finding = await site.one("store", site.keys["store.url"])
        red(finding, f"allow {right} to the keys of store.s3")
        if denied == "delete":
            (left,) = bucket.objects()
            assert left in finding.text
        proxy.plan = lambda _: None
        green(await site.one("store", site.keys["store.url"]))


async def test_an_owner_on_s3_that_cannot_be_read_is_told(
    site: Site, bucket: RawS3, seaweed: SeaweedServer
) -> None:
    found = await site.found(store__s3__endpoint_url="http://127.0.0.1:1")
    red(found["store", "owner"], "cannot be read", "the endpoint cannot be reached")
    with s3_proxy(seaweed.endpoint) as proxy:
        site.keys["store.s3.endpoint_url"] = proxy.endpoint
        proxy.plan = lambda call: (
            error(403, "AccessDenied") if call.operation == "get" else None
        )
        finding = await site.one("store", "owner")
        red(finding, ".owner", "cannot be read: access is denied; allow s3:GetObject")
        proxy.plan = lambda _: None
        green(await site.one("store", "owner"), "nobody's")


async def test_an_owner_in_a_directory_that_cannot_be_read_is_told(site: Site) -> None:
    owner = site.path("data") / "outputs" / ".owner"
    owner.mkdir(parents=True)
    red(await site.one("store", "owner"), ".owner", "cannot be read (Is a directory)")
    owner.rmdir()
    green(await site.one("store", "owner"), "nobody's")


async def test_half_of_the_keys_of_s3_is_told(site: Site, bucket: RawS3) -> None:
    found = await site.found(store__s3__secret_access_key=None)
    red(found["store", "all"], "access_key_id and secret_access_key", "or neither")


# --- the catalogue


async def test_each_dataset_that_cannot_be_opened_is_told_for_itself(site: Site) -> None:
    database = site.path("shop.db")
    site.keys["catalogue"].write_text("""
        [connections.shop]
        url = "sqlite:///shop.db"
        [connections.gone]
        url = "sqlite:///gone.db"
        [connections.down]
        url = "postgresql://reader:s3cr3tp4ss@127.0.0.1:1/x"
        [datasets.files]
        csv = "missing-*.csv"
        [datasets.timed]
        csv = "orders.csv"
        time_column = "att"
        [datasets.targeted]
        csv = "orders.csv"
        target_column = "at"
        [datasets.owned]
        csv = "orders.csv"
        tenant_column = "ownr"
        [datasets.sold]
        connection = "shop"
        table = "sold"
        [datasets.away]
        connection = "down"
        table = "x"
        [datasets.orders]
        csv = "orders.csv"
        time_column = "at"
        target_column = "name"
        tenant_column = "owner"
    """)
    database.touch()
    found = await site.found()
    red(found["catalogue", "connections.gone"], "there is no file")
    red(found["catalogue", "files"], "no file matches")
    red(found["catalogue", "timed"], "time_column", "did you mean 'at'?")
    red(found["catalogue", "targeted"], "target_column", "set its type")
    red(found["catalogue", "owned"], "tenant_column", "did you mean 'owner'?")
    red(found["catalogue", "sold"], "there is no such table")
    red(found["catalogue", "away"], "connection 'down'")
    green(found["catalogue", "connections.shop"])
    green(found["catalogue", "orders"], "4 columns", "time 'at'", "tenant 'owner'")
    assert "s3cr3tp4ss" not in str(found)
    with contextlib.closing(sqlite3.connect(database)) as raw:
        raw.execute("CREATE TABLE sold (id INTEGER)")
    green((await site.found())["catalogue", "sold"], "1 columns")


async def test_every_mistake_in_a_catalogue_is_told_and_the_rest_of_it_is_tried(
    site: Site,
) -> None:
    site.keys["catalogue"].write_text("""
        mask_kee = "x"
        [connections.typo]
        ur = "sqlite:///shop.db"
        [connections.gone]
        url = "sqlite:///gone.db"
        [datasets.two]
        parqet = "x"
        max_rows = 0
        [datasets.none]
        csv = "missing.csv"
        [datasets.sold]
        connection = "typo"
        table = "sold"
        [datasets.bought]
        connection = "gone"
        table = "bought"
        [datasets.orders]
        csv = "orders.csv"
    """)
    found = await site.found()
    red(found["catalogue", str(site.keys["catalogue"])], "did you mean 'mask_key'?")
    typo = ("connections.typo.url: is missing", "connections.typo.ur: unknown key")
    red(found["catalogue", "connections.typo"], *typo)
    red(found["catalogue", "connections.gone"], "there is no file")
    red(found["catalogue", "two"], "two.parqet: unknown key", "two.max_rows: must be")
    red(found["catalogue", "none"], "no file matches")
    yellow(found["catalogue", "sold"], "not tried; first mend connections.typo")
    yellow(found["catalogue", "bought"], "not tried; first mend connections.gone")
    green(found["catalogue", "orders"], "4 columns")
    site.keys["catalogue"].write_text("mask_key = 5\nconnections = 5\n")
    told = await site.one("catalogue", str(site.keys["catalogue"]))
    red(told, "mask_key: must be", "connections: must be", "datasets: is empty")


async def test_a_catalogue_that_is_none_is_told(site: Site) -> None:
    site.keys["catalogue"].write_text("[datasets.x]\nparqet = 'x'\n")
    red(await site.one("catalogue", "x"), "datasets.x.parqet", "did you mean 'parquet'")
    site.keys["catalogue"].write_text("[datasets")
    red(await site.one("catalogue", "all"), "is not TOML")
    missing = site.path("none.toml")
    red(await site.one("catalogue", "all", catalogue=missing), "there is no such file")
    found = await site.found(catalogue=None)
    green(found["catalogue", "samples"], "generated into")
    assert not site.path("data").exists()


# --- sinks


@dataclass
class SinkFile:
    """`sinks.toml` with one connection that a test is about."""

    site: Site
    path: Path

    async def one(self, text: str, name: str = "it", **more: Any) -> Finding:
        self.path.write_text(f"[connections.it]\n{text}\n")
        return await self.site.one("sinks", name, **more)


@pytest.fixture
def sinks(site: Site) -> SinkFile:
    path = site.path("sinks.toml")
    site.keys["sinks"] = path
    return SinkFile(site, path)


async def test_a_directory_of_a_sink_that_is_not_there_is_told(sinks: SinkFile) -> None:
    root = sinks.site.path("reports")
    text = f'type = "local_file"\nroot = "{root}"'
    red(await sinks.one(text), "cannot open the directory", "connections.it in ")
    root.mkdir()
    green(await sinks.one(text), "would take a delivery")
    assert list(root.iterdir()) == []


async def test_a_table_without_its_prefix_is_told_beside_the_connection_of_its_name(
    sinks: SinkFile,
) -> None:
    text = '[it]\ntype = "local_file"\n[connections.it]\ntype = "none"\n'
    path = sinks.site.path("sinks.toml")
    path.write_text(text)
    _, wrong = survey_connections(path, SinkTypes.installed())
    assert [name for name, _ in wrong] == ["it", "it"]
    assert "is not known; connections stand under" in wrong[0][1]
    assert "connections.it" in wrong[1][1]


async def test_places_of_tenants_are_tried_for_each_that_is_named(sinks: SinkFile) -> None:
    root = sinks.site.path("reports")
    (root / "acme").mkdir(parents=True)
    text = f'type = "local_file"\nroot = "{root}/{{tenant}}"\n'
    named = text + 'tenants = ["acme", "beta"]'
    green(await sinks.one(named, "it (acme)"))
    red(await sinks.one(named, "it (beta)"), "cannot open the directory")
    (root / "beta").mkdir()
    green(await sinks.one(named, "it (beta)"))
    yellow(await sinks.one(text + 'tenants = "*"', "it (tenant)"), "cannot open")


async def test_a_bucket_of_a_sink_that_refuses_is_told(
    sinks: SinkFile, seaweed: SeaweedServer
) -> None:
    text = (
        f'type = "object_storage"\nbucket = "{BUCKET}"\npath_style = true\nattempts = 1\n'
        f'endpoint_url = "{seaweed.endpoint}"\nregion = "us-east-1"\n'
        'access_key_id = "writer"\nsecret_access_key = '
    )
    red(await sinks.one(f'{text}"s3cr3tp4ss"'), "does not accept the connection's")
    green(await sinks.one(f'{text}"{SECRET}"'))


async def test_a_database_of_a_sink_that_is_away_or_lacks_rights_is_told(
    sinks: SinkFile, postgres: PostgresServer, postgres_database: str, postgres_url: str
) -> None:
    down = 'type = "database"\nurl = "postgresql://u:s3cr3tp4ss@127.0.0.1:1/x"'
    finding = await sinks.one(down)
    red(finding, "connections.it in ")
    assert "s3cr3tp4ss" not in finding.text
    green(await sinks.one(f'type = "database"\nurl = "{postgres_url}"'))
    tables = "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'exportd%'"
    assert postgres.sql(tables, database=postgres_database).strip() == "0"
    user = f"u_{postgres_database}"
    postgres.sql(
        f"CREATE ROLE {user} LOGIN; REVOKE TEMPORARY ON DATABASE {postgres_database} "
        "FROM public; GRANT CREATE ON SCHEMA public TO public",
        database=postgres_database,
    )
    try:
        url = postgres_url.replace("postgres@", f"{user}@")
        text = f'type = "database"\nurl = "{url}"'
        red(await sinks.one(text), "TEMPORARY")
        postgres.sql(f"GRANT TEMPORARY ON DATABASE {postgres_database} TO {user}")
        green(await sinks.one(text))
        postgres.sql(
            "REVOKE CREATE ON SCHEMA public FROM public", database=postgres_database
        )
        yellow(await sinks.one(text), "it answers")
    finally:
        postgres.sql(f"DROP OWNED BY {user}; DROP ROLE {user}", database=postgres_database)


async def test_a_sqlite_database_of_a_sink_that_is_not_there_is_told(
    sinks: SinkFile,
) -> None:
    database = sinks.site.path("sink.db")
    text = f'type = "database"\nurl = "sqlite:///{database}"'
    red(await sinks.one(text), "connections.it in ")
    with contextlib.closing(sqlite3.connect(database)) as raw:
        raw.execute("CREATE TABLE t (id)")
    green(await sinks.one(text))
    with contextlib.closing(sqlite3.connect(database)) as raw:
        assert [*raw.execute("SELECT name FROM sqlite_master")] == [("t",)]


async def test_a_receiver_of_a_webhook_that_cannot_be_reached_is_told(
    sinks: SinkFile,
) -> None:
    receiver = Receiver()
    text = 'type = "webhook"\nallow_http = true\nallow_private = ["127.0.0.0/8"]\nurl = '
    async with receiver.listen():
        url = receiver.url
        green(await sinks.one(f'{text}"{url}"'))
    red(await sinks.one(f'{text}"{url}"'), "connections.it in ")
    assert receiver.requests == []
    green(await sinks.one('type = "webhook"'), "each request names its own")


async def test_each_connection_that_cannot_be_read_is_told_for_itself(
    sinks: SinkFile,
) -> None:
    root = sinks.site.path("reports")
    root.mkdir()
    good = f'type = "local_file"\nroot = "{root}"\n'
    more = (
        f"{good}[connections.odd]\ntype = 'pigeon'\n"
        "[connections.typo]\ntype = 'local_file'\nrot = '/'\n"
        "[conections.lost]\ntype = 'local_file'\nroot = '/'\n"
    )
    sinks.path.write_text(f"[connections.it]\n{more}")
    found = await sinks.site.found()
    green(found["sinks", "it"])
    red(found["sinks", "odd"], "there is no sink type 'pigeon'")
    red(found["sinks", "typo"], "connections.typo")
    red(found["sinks", "conections"], "is not known; connections stand under")
    finding = await sinks.one(good, identity__api_keys=True)
    red(finding, "connections.it.tenants", "is required")
    green(await sinks.one(f'{good}tenants = "*"\nshared = true', identity__api_keys=True))
    sinks.path.write_text("[connections")
    red((await sinks.site.found())["sinks", "all"], "is not valid TOML")


# --- TLS


async def test_tls_files_that_will_not_do_are_told(site: Site) -> None:
    authority = Authority(site.path("pki"))
    good = authority.pair("server", not_after=datetime.now(UTC) + timedelta(days=60))
    other = authority.pair("other")
    name = str(good.cert_file)
    site.keys["tls.cert_file"] = good.cert_file
    site.keys["tls.key_file"] = good.key_file
    site.keys["tls.client_ca_file"] = authority.cert_file
    site.keys["tls.require_client_cert"] = True
    green(await site.one("tls", name), "CN=server is valid until")
    green(await site.one("tls", str(authority.cert_file)), "is valid until")
    red(await site.one("tls", name, tls__key_file=other.key_file), "is not the key of")
    red(await site.one("tls", name, tls__key_file=good.cert_file), "holds no private key")
    missing = site.path("none.pem")
    red(
        await site.one("tls", name, tls__key_file=missing), "tls.key_file", "cannot be read"
    )
    red(await site.one("tls", str(missing), tls__cert_file=missing), "cannot be read")
    found = await site.found(tls__client_ca_file=good.key_file, tls__key_file=missing)
    red(found["tls", str(good.key_file)], "holds no certificate")
    red(found["tls", name], "cannot be read")
    for days, verdict, told in ((-0.5, red, "expired at"), (13, yellow, "renew it")):
        pair = authority.pair("late", not_after=datetime.now(UTC) + timedelta(days=days))
        finding = await site.one(
            "tls",
            str(pair.cert_file),
            tls__cert_file=pair.cert_file,
            tls__key_file=pair.key_file,
        )
        verdict(finding, told)


# --- identity


async def test_keys_of_tokens_that_cannot_be_had_are_told(site: Site) -> None:
    issuer = Issuer()
    issuer.add("one")
    file = site.path("jwks.json")
    file.write_bytes(issuer.jwks())
    tokens: dict[str, Any] = {
        "identity__jwt__issuer": ISSUER,
        "identity__jwt__audience": AUDIENCE,
    }
    with listening() as port:
        url = f"http://127.0.0.1:{port}/jwks"
        found = await site.found(**tokens, identity__jwt__jwks_url=url, seconds=1.0)
        red(found["identity", "jwt"], "no answer within 1 s")
    finding = await site.one("identity", "jwt", **tokens, identity__jwt__jwks_url=url)
    red(finding, "cannot be fetched", "identity.jwt.jwks_url")
    named = {**tokens, "identity__jwt__jwks_file": file}
    green(await site.one("identity", "jwt", **named), "1 keys")
    file.write_text("{}")
    red(await site.one("identity", "jwt", **named), "is no JSON Web Key Set")
    file.unlink()
    red(await site.one("identity", "jwt", **named), "cannot be read", "jwks_file")


async def test_an_embedded_server_without_a_key_that_works_is_told(site: Site) -> None:
    keys = {"identity__api_keys": True}
    yellow(await site.one("identity", "api_keys", **keys), "`exportd-server keys create`")
    await api_key(site.path("data"))
    green(await site.one("identity", "api_keys", **keys), "1 keys work")
    (site.path("data") / "api-keys.json").write_text("{")
    red(await site.one("identity", "api_keys", **keys), "is no file of keys")


async def test_a_fleet_without_a_key_that_works_is_told(
    fleet: Site, postgres: PostgresServer, postgres_database: str
) -> None:
    migrate_postgres_ledger(fleet.keys["ledger.url"])
    yellow(await fleet.one("identity", "api_keys", identity__api_keys=True), "no key works")
    insert = (
        "INSERT INTO exportd.api_keys (key_id, tenant, scopes, name, digest, create_time, "
        "revoke_time) VALUES ('{}', 't', 'admin', '', '', 0, {})"
    )
    postgres.sql(insert.format("old", 1), database=postgres_database)
    yellow(await fleet.one("identity", "api_keys", identity__api_keys=True), "no key works")
    postgres.sql(insert.format("new", "NULL"), database=postgres_database)
    green(await fleet.one("identity", "api_keys", identity__api_keys=True), "1 keys work")


async def test_two_callers_by_one_name_in_a_certificate_are_told(site: Site) -> None:
    caller = {"cn": "a", "tenant": "acme", "scopes": ["admin"]}
    found = await site.found(identity__mtls=[caller, caller])
    red(found["identity", "mtls"], "cn:a is there twice")


# --- keys


async def test_kept_keys_that_will_not_do_are_told(site: Site) -> None:
    data = site.path("data")
    data.mkdir()
    secret, link = data / "secrets.key", data / "download-url.key"
    http = {"http__listen": "127.0.0.1:0"}
    green(await site.one("keys", "delivery.secret_keys", **http), "is made in")
    for file, name in ((secret, "delivery.secret_keys"), (link, "http.signing_keys")):
        file.write_bytes(b"short")
        file.chmod(0o600)
        red(await site.one("keys", name, **http), str(file), "is no key")
        file.write_bytes(b"x" * 32)
        file.chmod(0o644)
        red(await site.one("keys", name, **http), "may be read by others")
        file.chmod(0o600)
        green(await site.one("keys", name, **http), str(file))


# --- ports


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """A port that somebody has, who says nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("key", ["listen", "http.listen", "metrics.listen"])
async def test_a_port_that_cannot_be_had_is_told(site: Site, key: str) -> None:
    setting = key.replace(".", "__")
    with listening() as port:
        finding = await site.one("ports", key, **{setting: f"127.0.0.1:{port}"})
        red(finding, "Address already in use", "stop the process that has it")
    green(await site.one("ports", key, **{setting: f"127.0.0.1:{port}"}), "is free")


async def test_an_address_that_two_want_or_nobody_has_is_told(site: Site) -> None:
    address = f"127.0.0.1:{free_port()}"
    found = await site.found(listen=address, http__listen=address)
    red(found["ports", "listen"], "is http.listen as well")
    red(found["ports", "http.listen"], "is listen as well")
    foreign = {"listen": "192.0.2.1:50051", "allow_unauthenticated": True}
    red(await site.one("ports", "listen", **foreign), "name an address of this machine")
    green(await site.one("ports", "listen", listen=address))


async def test_a_worker_needs_no_ports_of_callers(fleet: Site) -> None:
    migrate_postgres_ledger(fleet.keys["ledger.url"])
    with listening() as port:
        found = await fleet.found(serves=False, listen=f"127.0.0.1:{port}")
    assert {level.level for level in found.values()} == {Level.OK}
    assert not any(area in {"ports", "tls", "identity"} for area, _ in found)


# --- secrets


@pytest.mark.minutes
def test_no_secret_is_shown_whatever_is_wrong(site: Site) -> None:
    canaries = Canaries()
    word = canaries.word
    site.path("sinks.toml").write_text(
        f"""
        [connections.db]
        type = "database"
        url = "postgresql://u:{word("sink url")}@127.0.0.1:1/x"
        [connections.bad]
        type = "database"
        url = "mysql://u:{word("bad sink url")}@x/y"
        [connections.s3]
        type = "object_storage"
        bucket = "b"
        endpoint_url = "http://u:{word("sink endpoint")}@127.0.0.1:1"
        access_key_id = "k"
        secret_access_key = "{word("sink key")}"
        attempts = 1
        [connections.hook]
        type = "webhook"
        url = "https://127.0.0.1:1/x?key={word("hook url")}"
        headers = {{ authorization = "{word("hook header")}" }}
        """
    )
    site.keys["catalogue"].write_text(
        f"""
        [connections.a]
        url = "postgresql://u:{word("source url")}@127.0.0.1:1/x"
        [connections.b]
        url = "mysql://u:{word("bad source url")}@x/y"
        [datasets.a]
        connection = "a"
        table = "t"
        [datasets.b]
        connection = "b"
        table = "t"
        """
    )
    file = site.write(
        sinks=site.path("sinks.toml"),
        ledger__url=f"postgresql://u:{word('ledger url')}@127.0.0.1:1/x",
        store__url="s3://bucket/x",
        store__s3__endpoint_url=f"http://u:{word('endpoint')}@127.0.0.1:1",
        store__s3__access_key_id="k",
        store__s3__secret_access_key=word("store key"),
        store__s3__attempts=1,
        http__listen="127.0.0.1:0",
        http__signing_keys=[word("short")[:20]],
        delivery__secret_keys=[word("sealing key")],
        identity__jwt__issuer=ISSUER,
        identity__jwt__audience=AUDIENCE,
        identity__jwt__jwks_url=f"http://127.0.0.1:1/{word('path')}?k={word('jwks')}",
    )
    canaries.add("short", canaries.secrets["short"][:20].decode())
    # A path is no secret.
    del canaries.secrets["path"]
    for arguments in ((), ("--json",)):
        told = run(file, *arguments)
        assert told.returncode == 1
        assert told.stdout.count("failed") >= 9, told.stdout
        shown = (told.stdout + told.stderr).encode()
        found = [place for place, secret in canaries.secrets.items() if secret in shown]
        assert found == []
