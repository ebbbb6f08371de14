"""A dataset whose source kills whoever opens it."""

from __future__ import annotations

import asyncio
import random
import time

from exportd.v1 import dataset_pb2, job_pb2
from tests.support.postgres import PostgresServer
from tests.torture.audit import Audit
from tests.torture.child import POISONED
from tests.torture.clients import Clients, Tracked
from tests.torture.data import LAKE, Bank, write_catalogue, write_lake
from tests.torture.fleet import Fleet, Member, free_port
from tests.torture.history import History
from tests.torture.runner import audited_ledger, environment, scene

ATTEMPTS = 3
_LEASE = 1.0
_SECONDS = 60.0


async def run(postgres: PostgresServer, seed: int) -> History:
    """Have it exported beside jobs that must not suffer by it. Workers do one thing at a
    time here: what shares a process with the poison shares its end."""
    async with scene("exportd-poison-") as (directory, history):
        url = await asyncio.to_thread(audited_ledger, postgres)
        bank = Bank(postgres.url(postgres.create_database()), history, seed)
        await bank.create()
        lake = write_lake(directory / "lake", random.Random(seed))
        write_catalogue(directory, bank.url)
        env = environment(
            directory, url, lease=_LEASE, max_attempts=ATTEMPTS, concurrency=1
        )
        port = free_port(random.Random())
        places = [
            Member(f"worker-{n}", (POISONED, "worker"), directory / f"{n}.clock")
            for n in range(2)
        ]
        serving = Member("api", (POISONED, "serve"), directory / "api.clock", port=port)
        env |= {"EXPORTD_LISTEN": serving.address}
        async with Fleet([*places, serving], directory, env, history, mortal=True) as fleet:
            clients = Clients([serving.address], history, seed, lake, bank, directory)
            await _poison(clients, history)
            await fleet.everyone_up()
            await fleet.stop()
        audit = await asyncio.to_thread(Audit.read, url)
        for fault in audit.faults():
            history.violation(fault)
        return history


async def _poison(clients: Clients, history: History) -> None:
    api = clients.api("poison")
    try:
        wanted = job_pb2.CreateExportRequest(
            dataset="poison", format=dataset_pb2.FORMAT_CSV
        )
        poison = Tracked(wanted, 0)
        poison.job_id = (await api.call("CreateExport", wanted)).job.job_id
        others = []
        deadline = time.monotonic() + _SECONDS
        while poison.final is None and time.monotonic() < deadline:
            request = job_pb2.CreateExportRequest(
                dataset=LAKE, format=dataset_pb2.FORMAT_JSONL, max_part_rows=3000
            )
            job = (await api.call("CreateExport", request)).job
            others.append(Tracked(request, 0, job_id=job.job_id))
            await asyncio.sleep(0.4)
            await clients.look(api, poison)
        if (poison.state, poison.failure) != ("FAILED", "ATTEMPTS_EXHAUSTED"):
            history.violation(
                "poison did not use up its attempts",
                state=poison.state,
                reason=poison.failure,
            )
        deadline = time.monotonic() + _SECONDS
        for other in others:
            while other.final is None and time.monotonic() < deadline:
                await clients.look(api, other)
                await asyncio.sleep(0.05)
            await clients.check(api, other)
            if other.state != "SUCCEEDED":
                history.violation(
                    "suffered by the poison", job=other.job_id, state=other.state
                )
        await clients.check(api, poison)
        history.note(
            "poisoned",
            others=len(others),
            attempts=poison.final.attempt if poison.final else 0,
        )
    finally:
        await api.close()
