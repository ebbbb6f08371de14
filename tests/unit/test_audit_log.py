"""Calls never wait for audit records, and what is not kept is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock

import pytest
from structlog.testing import capture_logs

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs import audit_log
from exportd_server.jobs.audit import (
    ENDED_WELL,
    AuditMethod,
    AuditRecord,
    Ending,
    Entry,
    current,
    ending_of,
    note_sent,
    printable,
    printable_names,
    uuid_or_nothing,
)
from exportd_server.jobs.audit_log import BATCH, AuditLog
from exportd_server.jobs.audit_queue import FairQueue
from exportd_server.platform import metrics
from tests.support.ledger import FakeClock
from tests.support.waits import ENOUGH

CAUSES = ("full", "refused", "refusals", "shutdown", "unidentified")


class Shelf:
    """Stands for the ledger: takes records while `open`, and fails by `fault`."""

    def __init__(self) -> None:
        self.kept: list[AuditRecord] = []
        self.calls = 0
        self.open = asyncio.Event()
        self.open.set()
        self.fault: Callable[[Sequence[AuditRecord]], Exception | None] = lambda _: None

    async def append_audit(self, records: Sequence[AuditRecord]) -> None:
        self.calls += 1
        assert len(records) <= BATCH
        if (fault := self.fault(records)) is not None:
            raise fault
        await self.open.wait()
        self.kept += records


@asynccontextmanager
async def keeping(shelf: Shelf, **options: Any) -> AsyncIterator[AuditLog]:
    ledger = AsyncMock()
    ledger.append_audit = shelf.append_audit
    log = AuditLog(ledger, FakeClock(), **options)
    try:
        yield log
    finally:
        await log.close(0.05)


def dropped() -> dict[str, float]:
    return {cause: metrics.audit_dropped.labels(cause)._value.get() for cause in CAUSES}


@pytest.fixture
def lost() -> Callable[[], dict[str, int]]:
    """How many were counted as lost since the test began, by cause."""
    before = dropped()

    def since() -> dict[str, int]:
        return {c: int(n - before[c]) for c, n in dropped().items() if n != before[c]}

    return since


def record(
    number: int = 0,
    identity: str = "api_key",
    tenant: str = "acme",
    ending: Ending = ENDED_WELL,
) -> AuditRecord:
    who = tenant if identity else ""
    method = AuditMethod.CANCEL_JOB
    entry = Entry(method, "127.0.0.1:1", who, part=number, identity=identity)
    return entry.record(ending, FakeClock().now(), timedelta(0))


def parts(records: Sequence[AuditRecord]) -> list[int | None]:
    return [each.part for each in records]


async def test_everything_is_kept_in_order_and_in_few_transactions(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    async with keeping(shelf) as log:
        for number in range(3 * BATCH + 1):
            log.add(record(number))
        await log.flushed()
        assert parts(shelf.kept) == list(range(3 * BATCH + 1))
        assert shelf.calls == 4
    assert lost() == {}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No record is kept because it has waited for long enough."""
    monkeypatch.setattr(audit_log, "_GATHERING", 10 * ENOUGH)


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.usefixtures("patient")
async def test_records_of_calls_that_follow_each_other_are_kept_together() -> None:
    shelf = Shelf()
    async with keeping(shelf) as log:
        for number in range(3):
            log.add(record(number))
            await turns()
        assert shelf.calls == 0
        await log.flushed()
        assert (parts(shelf.kept), shelf.calls) == ([0, 1, 2], 1)
        await log.flushed()
        log.add(record(3))
        await turns()
        assert shelf.calls == 1, "who wanted the others does not want this one"
        await log.flushed()
        assert shelf.calls == 2


@pytest.mark.usefixtures("patient")
async def test_a_full_batch_is_kept_at_once_and_what_comes_meanwhile_together() -> None:
    shelf = Shelf()
    shelf.open.clear()
    async with keeping(shelf) as log:
        for number in range(BATCH):
            log.add(record(number))
        await turns()
        assert shelf.calls == 1
        for number in range(3):
            log.add(record(BATCH + number))
            await turns()
        shelf.open.set()
        await turns()
        assert (len(shelf.kept), shelf.calls) == (BATCH, 1)
        await log.flushed()
        assert (len(shelf.kept), shelf.calls) == (BATCH + 3, 2)


async def test_a_record_is_kept_although_nobody_waits_for_it() -> None:
    shelf = Shelf()
    asked = asyncio.Event()

    def fault(_: Sequence[AuditRecord]) -> None:
        asked.set()

    shelf.fault = fault
    async with keeping(shelf) as log:
        log.add(record())
        async with asyncio.timeout(ENOUGH):
            await asked.wait()


async def test_records_beyond_the_queue_are_logged_and_counted(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    shelf.open.clear()
    async with keeping(shelf, capacity=5) as log:
        with capture_logs() as lines:
            for number in range(8):
                log.add(record(number))
        assert len([line for line in lines if line["event"] == "audit"]) == 8
        assert len([line for line in lines if "cannot be kept" in line["event"]]) == 1
        assert lost() == {"full": 3}
        shelf.open.set()
        await log.flushed()
        log.add(record(8))
        await log.flushed()
    assert parts(shelf.kept) == [0, 1, 2, 3, 4, 8]
    assert lost() == {"full": 3}


async def test_records_wait_for_a_ledger_that_is_away(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    shelf.fault = lambda _: LedgerUnavailable() if shelf.calls < 3 else None
    async with keeping(shelf) as log:
        log.add(record(1))
        log.add(record(2))
        await log.flushed()
    assert parts(shelf.kept) == [1, 2]
    assert shelf.calls == 3
    assert lost() == {}


async def test_what_the_ledger_cannot_take_does_not_hold_up_the_rest(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    shelf.fault = lambda records: ValueError() if records[0].part == 1 else None
    async with keeping(shelf) as log:
        with capture_logs() as lines:
            log.add(record(1))
            await log.flushed()
        assert [line["records"] for line in lines if "log only" in line["event"]] == [1]
        log.add(record(2))
        await log.flushed()
    assert parts(shelf.kept) == [2]
    assert lost() == {"refused": 1}


async def test_a_shutdown_keeps_what_waits_and_counts_what_it_had_no_time_for(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    async with keeping(shelf) as log:
        log.add(record(1))
    assert parts(shelf.kept) == [1]
    shelf.open.clear()
    async with keeping(shelf) as log:
        log.add(record(2))
        log.add(record(3))
    log.add(record(4))
    assert parts(shelf.kept) == [1]
    assert lost() == {"shutdown": 3}


async def test_callers_that_nobody_knows_do_not_fill_the_ledger(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    async with keeping(shelf, refusals=3) as log:
        with capture_logs() as lines:
            for number in range(5):
                log.add(record(number, identity=""))
            log.add(record(5))
        await log.flushed()
    assert len(lines) == 6
    assert sorted(each.part or 0 for each in shelf.kept) == [0, 1, 2, 5]
    assert lost() == {"unidentified": 2}


REFUSED = Ending("PERMISSION_DENIED", "PERMISSION_DENIED")


async def test_refusals_of_a_tenant_have_a_share_that_leaves_everything_else_alone(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    async with keeping(shelf, refusals=3) as log:
        with capture_logs() as lines:
            for number in range(5):
                log.add(record(number, ending=REFUSED))
            # What was done, or failed by no fault of the caller's, is kept in any case.
            log.add(record(5))
            log.add(record(6, ending=Ending("UNAVAILABLE", "LEDGER_UNAVAILABLE")))
            log.add(record(7, ending=Ending("INTERNAL", "INTERNAL")))
            # Others have shares of their own.
            log.add(record(8, tenant="globex", ending=REFUSED))
            log.add(record(9, identity=""))
        await log.flushed()
    assert len(lines) == 10, "each has its line"
    assert sorted(each.part or 0 for each in shelf.kept) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert lost() == {"refusals": 2}


async def test_a_download_that_was_broken_off_is_no_refusal(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    async with keeping(shelf, refusals=0) as log:
        entry = Entry(AuditMethod.STREAM_DOWNLOAD, "p", "acme", identity="api_key")
        entry.bytes_sent = 0
        log.add(entry.record(Ending("CANCELLED"), FakeClock().now(), timedelta(0)))
        await log.flushed()
    assert [each.outcome for each in shelf.kept] == ["BROKEN_OFF"]
    assert lost() == {}


async def test_one_tenant_does_not_crowd_out_the_records_of_others(
    lost: Callable[[], dict[str, int]],
) -> None:
    shelf = Shelf()
    shelf.open.clear()
    async with keeping(shelf, capacity=30) as log:
        for number in range(1000):
            log.add(record(number))
        for number in range(10):
            log.add(record(number, tenant="globex"))
        for number in range(10):
            log.add(record(number, tenant="initech"))
        assert lost() == {"full": 990}
        shelf.open.set()
        await log.flushed()
    for tenant in ("acme", "globex", "initech"):
        kept = [each.part for each in shelf.kept if each.tenant == tenant]
        assert kept == list(range(10)), tenant


def test_a_queue_gives_each_of_many_owners_its_share_and_its_turn() -> None:
    queue = FairQueue(10)
    for number in range(20):
        assert queue.add("a", record(number)) is (number < 10)
    assert not queue.add("b", record(0))
    assert not queue.add("c", record(0))
    assert len(queue) == 10
    assert [each.part for each in queue.take(4)] == [0, 0, 0, 1]
    assert queue.add("b", record(1))
    assert [each.part for each in queue.take(100)] == [2, 1, 3, 4, 5, 6, 7]
    assert len(queue) == 0
    assert queue.take(1) == []
    for owner in range(20):
        queue.add(str(owner), record(owner))
    assert len(queue.take(100)) == 10


async def test_the_record_tells_how_it_ended_and_not_what_its_caller_saw() -> None:
    shelf = Shelf()
    async with keeping(shelf) as log:
        for ending in (ENDED_WELL, Ending("NOT_FOUND", "JOB_NOT_FOUND")):
            with (
                suppress(asyncio.CancelledError),
                log.auditing(AuditMethod.DELETE_JOB, "p", ending_of) as entry,
            ):
                entry.identity = "api_key"
                entry.ending = ending
                raise asyncio.CancelledError
        await log.flushed()
    assert [(each.code, each.reason) for each in shelf.kept] == [
        ("OK", ""),
        ("NOT_FOUND", "JOB_NOT_FOUND"),
    ]


async def test_an_operation_leaves_one_record_however_it_ends() -> None:
    shelf = Shelf()

    def classify(error: BaseException) -> Ending:
        return Ending("X", type(error).__name__)

    async with keeping(shelf) as log:
        for ends_with, sent in ((None, 0), (KeyError, 0), (asyncio.CancelledError, 7)):
            try:
                with log.auditing(AuditMethod.STREAM_DOWNLOAD, "p", classify) as entry:
                    assert current() is entry
                    entry.identity = "api_key"
                    if sent:
                        note_sent(0)
                        note_sent(sent)
                    if ends_with is not None:
                        raise ends_with
            except (KeyError, asyncio.CancelledError):
                pass
            assert current() is None
        await log.flushed()
    told = [(r.outcome, r.code, r.reason, r.bytes_sent) for r in shelf.kept]
    assert told == [
        ("SUCCEEDED", "OK", "", None),
        ("FAILED", "X", "KeyError", None),
        ("BROKEN_OFF", "X", "CancelledError", 7),
    ]
    note_sent(1)  # nothing is audited, and nothing happens


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("ä 漢", "ä 漢"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x00\u202e\u2028\x9b", "\\x00\\u202e\\u2028\\x9b"),
        ("\ud800", "\\ud800"),
        ("x" * 200, "x" * 200),
        ("x" * 2**20, "x" * 199 + "…"),
        ("\n" * 200, ("\\n" * 100)[:199] + "…"),
    ],
)
def test_a_text_from_outside_is_one_short_printable_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_more_names_than_a_record_tells_are_hinted_at() -> None:
    assert printable_names(["a\n"] * 20) == ("a\\n",) * 20
    assert printable_names(["a"] * 21) == (*("a",) * 20, "…")


@pytest.mark.parametrize(
    "text", ["", "x", "exportd_a_b", "{" + "0" * 32 + "}", "0" * 2**20]
)
def test_what_is_no_uuid_is_not_repeated(text: str) -> None:
    assert uuid_or_nothing(text) == ""


def test_a_uuid_is_told_in_its_canonical_form() -> None:
    job = "01890a5d-ac96-774b-bcce-b302099a8057"
    assert uuid_or_nothing(job.upper()) == job
