"""A process that works on a ledger until it is killed, and says what is durable."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from exportd_server.jobs.ledger.base import NewJob
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.platform.clock import SystemClock
from tests.support.ledger import COLUMNS, EXPORT, part, shards, spec


def say(job_id: str, said: str) -> None:
    sys.stdout.write(json.dumps({"job_id": job_id, "said": said}) + "\n")
    sys.stdout.flush()


async def work(path: Path, round_: int) -> None:
    ledger = await open_sqlite_ledger(path, SystemClock(), max_attempts=1_000)
    number = 0
    while True:
        number += 1
        job_id = str(UUID(int=round_ * 2**64 + number))
        await ledger.create_job(NewJob(job_id, "acme", spec()))
        say(job_id, "PENDING")
        if number % 4 == 0:
            await ledger.cancel_job("acme", job_id)
            say(job_id, "CANCELLED")
            continue
        lease = await ledger.claim("child", EXPORT, lease=timedelta(seconds=60))
        assert lease is not None
        if lease.shard is None:
            lease = await ledger.record_plan(lease, shards(1), COLUMNS, estimated_rows=None)
        for sequence in range(len(await ledger.shard_parts(lease)), 2):
            await ledger.add_part(lease, part(lease, sequence))
        await ledger.complete_shard(lease)
        say(lease.job_id, "SUCCEEDED")


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1]), int(sys.argv[2])))
