"""A fleet that is hurt loses nothing; and whoever looks for losses would find them.

What hurts a fleet is in `make long`; `make torture` does the same with many more faults.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from exportd.v1 import dataset_pb2, job_pb2
from tests.support.postgres import PostgresServer, running_postgres
from tests.torture import faults, poison, runner
from tests.torture.audit import Audit
from tests.torture.checker import Checker
from tests.torture.clients import Clients, Tracked
from tests.torture.data import BANK, LAKE, Bank, lake_fault, rows_of, write_lake
from tests.torture.history import History
from tests.torture.options import Options

SHORT = Options(seed=3, seconds=10.0, kills=6, workers=2, apis=2, clients=4, lease=1.5)


@pytest.mark.minutes
@pytest.mark.timeout(240)
async def test_a_fleet_that_is_hurt_in_every_way_loses_nothing() -> None:
    with running_postgres(durable=True) as server:
        report = await runner.run(SHORT, server)
    assert not report.violations, "\n".join(report.lines())
    # It was hurt, and it worked all the same. What is aimed at a process finds none now
    # and then, when all of them are down.
    assert set(faults.OF_THE_DATABASE) <= set(report.faults)
    assert report.faults["kill worker"] + report.faults["kill api"] == SHORT.kills
    assert report.states["SUCCEEDED"] >= 3
    assert report.verified >= 1
    assert report.claims > report.states["SUCCEEDED"]


@pytest.mark.minutes
@pytest.mark.timeout(240)
async def test_a_dataset_that_kills_its_worker_fails_and_the_others_go_on() -> None:
    with running_postgres(durable=True) as server:
        history = await poison.run(server, seed=1)
    assert not history.violations
    assert history.counts["ended"] >= poison.ATTEMPTS
    assert history.counts["final"] >= 5


def test_a_killed_server_keeps_what_it_committed() -> None:
    with running_postgres(durable=True) as server:
        server.sql("CREATE TABLE kept (number int)")
        for number in range(3):
            server.sql(f"INSERT INTO kept VALUES ({number})")
            server.kill()
            server.start()
        assert server.sql("SELECT count(*) FROM kept").strip() == "3"


# --- the plan


def test_a_seed_decides_the_faults_and_each_kind_comes() -> None:
    assert faults.plan(SHORT) == faults.plan(SHORT)
    other = Options(seed=4, seconds=SHORT.seconds, kills=SHORT.kills)
    assert faults.plan(other) != faults.plan(SHORT)
    kinds = Counter(fault.kind for fault in faults.plan(SHORT))
    assert kinds["kill"] == SHORT.kills
    assert set(kinds) == {"kill", *faults.EVERY}


# --- what would be found


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path / "history.jsonl")
    yield history
    history.close()


@pytest.fixture
def bank(history: History) -> Bank:
    return Bank("", history, seed=1)


def test_a_state_of_the_table_is_told_from_a_mixture_of_two(bank: Bank) -> None:
    for _ in range(20):
        bank.prepare()
        bank.apply()
    before = bank.table()
    assert bank.fault(before) is None
    bank.prepare()
    bank.apply()
    after = bank.table()
    assert bank.fault(after) is None
    half = len(before) // 2
    mixed = pa.concat_tables([before.slice(0, half), after.slice(half)])
    assert bank.fault(mixed) is not None
    assert "more than once" in str(bank.fault(pa.concat_tables([after, after.slice(9, 1)])))
    assert "broken pairs" in str(bank.fault(after.slice(0, len(after) - 1)))


def test_rows_that_are_lost_doubled_moved_or_altered_are_found(tmp_path: Path) -> None:
    rows = write_lake(tmp_path / "lake", random.Random(1))
    assert lake_fault(rows, rows) is None
    assert "1 missing from [7]" in str(
        lake_fault(rows, pa.concat_tables([rows.slice(0, 7), rows.slice(8)]))
    )
    assert "1 more than once from [3]" in str(
        lake_fault(rows, pa.concat_tables([rows, rows.slice(3, 1)]))
    )
    moved = pa.concat_tables([rows.slice(8000), rows.slice(0, 8000)])
    assert "order" in str(lake_fault(rows, moved))
    altered = rows.set_column(
        2,
        "cents",
        rows["cents"]
        .combine_chunks()
        .fill_null(0)
        .take(pa.array([1, 0, *range(2, len(rows))])),
    )
    assert "other values" in str(lake_fault(rows, altered))


def test_an_output_that_ends_early_cannot_be_read_back() -> None:
    request = job_pb2.CreateExportRequest(dataset=LAKE, format=dataset_pb2.FORMAT_PARQUET)
    with pytest.raises(pa.ArrowInvalid):
        rows_of(request, [b"PAR1 cut short"])


def _claim(token: int, at: float, **fields: Any) -> SimpleNamespace:
    known = {"job_id": "j", "generation": 1, "shard": 0, "task_id": 1, "kind": "shard"}
    return SimpleNamespace(
        token=token, at=at, former=token - 1, former_state="leased", **{**known, **fields}
    )


def _part(token: int, at: float) -> SimpleNamespace:
    return SimpleNamespace(token=token, at=at, shard=0, sequence=0)


def _moves(*states: str | None) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(former=former, state=state, generation=1)
        for former, state in zip([None, *states], states, strict=False)
    ]


def test_the_audit_finds_writers_that_were_not_fenced_and_jobs_that_end_twice() -> None:
    claims = [_claim(4, 1.0), _claim(5, 2.0)]
    good = Audit(
        claims,
        {"j": _moves("PENDING", "RUNNING", "SUCCEEDED", None)},
        {("j", 1): [_part(5, 3.0)]},
    )
    assert good.faults() == []
    late = Audit(claims, {}, {("j", 1): [_part(4, 3.0)]})
    assert "recorded when [5]" in late.faults()[0]
    twice = Audit([], {"j": _moves("RUNNING", "SUCCEEDED", "CANCELLED")}, {})
    assert len(twice.faults()) == 2
    assert "twice" in Audit([claims[0], claims[0]], {}, {}).faults()[0]


@pytest.fixture
def clients(history: History, bank: Bank, tmp_path: Path) -> Clients:
    return Clients([], history, 1, pa.table({}), bank, tmp_path)


def test_a_job_that_changes_after_its_end_or_goes_back_is_found(
    clients: Clients, history: History
) -> None:
    ended = job_pb2.Job(job_id="j", state=job_pb2.JOB_STATE_SUCCEEDED, revision=5)
    tracked = Tracked(job_pb2.CreateExportRequest(dataset=BANK), 0, job_id="j")
    clients._take(tracked, ended, floor=3)
    clients._take(tracked, ended, floor=5)
    assert not history.violations
    clients._take(tracked, job_pb2.Job(job_id="j", revision=4), floor=5)
    assert "older than one before" in history.violations[-1]
    other = job_pb2.Job(
        job_id="j", state=job_pb2.JOB_STATE_SUCCEEDED, revision=6, generation=2
    )
    clients._take(tracked, other, floor=5)
    assert "changed after its end" in history.violations[-1]
    nobody = Tracked(tracked.request, 0, job_id="k")
    clients._take(
        nobody, job_pb2.Job(job_id="k", state=job_pb2.JOB_STATE_CANCELLED), floor=0
    )
    assert "cancelled by nobody" in history.violations[-1]


async def test_what_is_left_in_ledger_and_store_is_found(
    clients: Clients, history: History, postgres: PostgresServer, tmp_path: Path
) -> None:
    url = await asyncio.to_thread(runner.audited_ledger, postgres)
    store = tmp_path / "store"
    checker = Checker(SHORT, clients, history, url, store, tmp_path)
    await checker.tidy()
    await checker.empty()
    assert not history.violations
    stray = store / "default" / "j" / "output" / "000000-000000.1"
    stray.parent.mkdir(parents=True)
    stray.touch()
    await checker.tidy()
    assert "no manifest names" in history.violations[-1]
    await checker.empty()
    assert "left in the store" in history.violations[-1]


def test_errors_in_logs_are_found(
    clients: Clients, history: History, tmp_path: Path
) -> None:
    fine = json.dumps({"event": "lease lost", "level": "info"})
    log = tmp_path / "worker-0.1.log"
    log.write_text(f'{fine}\n{fine}\n{{"event": "cut in the mid')
    checker = Checker(SHORT, clients, history, "", tmp_path, tmp_path)
    assert checker.log_lines()["lease lost"] == 2
    assert not history.violations
    log.write_text(json.dumps({"event": "broke", "level": "error"}) + "\nTraceback:\n")
    checker.log_lines()
    assert len(history.violations) == 2
