"""One run: a fleet, its clients, the faults, and the checks after them."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psycopg

from exportd_server.jobs.ledger.postgres import migrate_postgres_ledger
from tests.support.postgres import PostgresServer
from tests.torture import audit as audits
from tests.torture.audit import Audit
from tests.torture.checker import Checker, states
from tests.torture.clients import Clients
from tests.torture.data import SHARD_ROWS, Bank, write_catalogue, write_lake
from tests.torture.delivered import Delivered, sinks_of, write_sinks
from tests.torture.faults import EVERY, Injector
from tests.torture.fleet import Fleet, Member, free_port
from tests.torture.history import History
from tests.torture.options import Options
from tests.torture.report import KILLS, Report

_MAX_ATTEMPTS = 60
"""More than the faults of a run can use up, so that no job may fail for want of them."""
_REAP_SECONDS = 1.0
_LAST_JOB_SECONDS = 120.0


def repeat(options: Options) -> str:
    """The command that repeats a run."""
    extra = " --cold" if options.cold else ""
    return (
        f'make torture ARGS="--seed {options.seed} --seconds {options.seconds:g} '
        f"--kills {options.kills} --workers {options.workers} --apis {options.apis} "
        f'--clients {options.clients} --lease {options.lease:g}{extra}"'
    )


def environment(
    directory: Path, url: str, *, lease: float, max_attempts: int, concurrency: int = 2
) -> dict[str, str]:
    """The settings of a fleet."""
    passed = {
        name: os.environ[name]
        for name in ("PATH", "HOME", "LANG", "PYTHONPATH")
        if name in os.environ
    }
    return {
        **passed,
        "EXPORTD_LEDGER__URL": url,
        "EXPORTD_LEDGER__CONNECTIONS": "4",
        "EXPORTD_STORE__URL": (directory / "store").as_uri(),
        "EXPORTD_DATA_DIR": str(directory / "data"),
        "EXPORTD_CATALOGUE": str(directory / "datasets.toml"),
        "EXPORTD_WORKER__LEASE": str(lease),
        "EXPORTD_WORKER__SHARD_ROWS": str(SHARD_ROWS),
        "EXPORTD_WORKER__MAX_ATTEMPTS": str(max_attempts),
        "EXPORTD_WORKER__CONCURRENCY": str(concurrency),
        "EXPORTD_RETENTION__REAP_INTERVAL": str(_REAP_SECONDS),
        "EXPORTD_DRAIN_TIMEOUT": "2",
    }


def members(options: Options, directory: Path) -> list[Member]:
    """The fleet's places: workers, and API processes of which the first works as well."""
    chosen = random.Random()
    found = [
        Member(f"worker-{number}", ("worker",), directory / f"worker-{number}.clock")
        for number in range(options.workers)
    ]
    for number in range(options.apis):
        port, name = free_port(chosen), f"api-{number}"
        flags = ("serve", "--listen", f"127.0.0.1:{port}")
        found.append(
            Member(
                name,
                flags if number == 0 else (*flags, "--no-workers"),
                directory / f"{name}.clock",
                port=port,
                works=number == 0,
            )
        )
    return found


@asynccontextmanager
async def scene(prefix: str, *, keep: bool = False) -> AsyncIterator[tuple[Path, History]]:
    """A directory and a history. The directory stays if anything was wrong."""
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    history = History(directory / "history.jsonl")
    whole = False
    try:
        yield directory, history
        whole = True
    finally:
        history.close()
        if whole and not history.violations and not keep:
            shutil.rmtree(directory)
        elif not whole:
            print(f"history and logs are in {directory}", flush=True)  # noqa: T201 - told to whoever broke it off


def audited_ledger(postgres: PostgresServer) -> str:
    """A ledger in a new database, with the triggers that write everything down."""
    url = postgres.url(postgres.create_database())
    migrate_postgres_ledger(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(audits.SCRIPT)
    return url


async def run(options: Options, postgres: PostgresServer) -> Report:
    """Run it on a PostgreSQL server of its own."""
    async with scene("exportd-torture-", keep=options.keep) as (directory, history):
        history.note("options", options=options)
        url = await asyncio.to_thread(audited_ledger, postgres)
        bank = Bank(postgres.url(postgres.create_database()), history, options.seed)
        await bank.create()
        lake = write_lake(directory / "lake", random.Random(f"lake {options.seed}"))
        write_catalogue(directory, bank.url)
        warehouse = postgres.url(postgres.create_database())
        env = environment(directory, url, lease=options.lease, max_attempts=_MAX_ATTEMPTS)
        env["EXPORTD_SINKS"] = str(write_sinks(directory, warehouse))
        fleet = Fleet(
            members(options, directory), directory, env, history, cold=options.cold
        )
        mutating = asyncio.create_task(bank.mutate())
        try:
            async with fleet:
                addresses = [member.address for member in fleet.apis]
                clients = Clients(
                    addresses,
                    history,
                    options.seed,
                    lake,
                    bank,
                    directory / "fetched",
                    sinks_of,
                )
                delivered = Delivered(clients, history, directory, warehouse)
                injector = Injector(options, fleet, postgres, url, history)
                begun = time.monotonic()
                await _hurt(options, clients, injector)
                hurt = time.monotonic() - begun
                await fleet.everyone_up()
                checker = Checker(
                    options, clients, history, url, directory / "store", fleet.logs
                )
                await _check(clients, checker, delivered)
                await fleet.stop()
        finally:
            mutating.cancel()
            with suppress(asyncio.CancelledError):
                await mutating
        audit = await asyncio.to_thread(Audit.read, url)
        checker.audit(audit)
        recovery = checker.recovery(audit, injector)
        logged = checker.log_lines()
        report = Report(
            seed=options.seed,
            repeat=repeat(options),
            seconds=hurt,
            states=states(clients.jobs),
            failures=Counter(job.failure for job in clients.jobs if job.state == "FAILED"),
            faults=_only(history.counts, (*KILLS, *EVERY)),
            claims=len(audit.claims),
            takeovers=len(audit.takeovers),
            leases_lost=logged["lease lost"],
            restarts=audit.restarts,
            verified=clients.verified,
            delivered=delivered.jobs,
            deliveries=delivered.deliveries,
            delivery_attempts=delivered.attempts,
            rows=clients.rows,
            bytes=clients.bytes,
            retries=history.counts["retry"],
            cancelled=history.cancelled,
            recovery=recovery,
            violations=history.violations,
            kept=directory if history.violations or options.keep else None,
        )
        history.note("report", lines=report.lines())
        return report


async def _hurt(options: Options, clients: Clients, injector: Injector) -> None:
    """Create jobs and inject faults; returns when no client is at work any more."""
    over = asyncio.Event()
    loops = [
        asyncio.create_task(clients.run(number, over.is_set))
        for number in range(options.clients)
    ]
    try:
        await injector.run()
        over.set()
        await asyncio.gather(*loops)
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


async def _check(clients: Clients, checker: Checker, delivered: Delivered) -> None:
    api = clients.api("checker")
    try:
        await checker.all_ended(api)
        checker.failures()
        await delivered.check(api)
        delivered.leftovers(clients.jobs)
        await checker.tidy()
        await checker.look_again(api)
        await checker.delete_all(api)
        await checker.empty()
    finally:
        await api.close()


def _only(counts: Mapping[str, int], kinds: tuple[str, ...]) -> Counter[str]:
    return Counter({kind: counts[kind] for kind in kinds if counts.get(kind)})
