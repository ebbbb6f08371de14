"""Calls never wait for audit records, and what is not kept is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import AsyncMock

import pytest
from structlog.testing import capture_logs

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.audit import (
    AuditMethod,
    AuditRecord,
    Ending,
    Entry,
    current,
    note_sent,
    printable,
    printable_names,
    uuid_or_nothing,
)
from exportd_server.jobs.audit_log import BATCH, AuditLog
from exportd_server.platform import metrics
from tests.support.ledger import FakeClock

CAUSES = ("full", "refused", "shutdown", "unidentified")


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


def record(number: int = 0, identity: str = "api_key") -> AuditRecord:
    entry = Entry(AuditMethod.CANCEL_JOB, "127.0.0.1:1", part=number, identity=identity)
    return entry.record(
        Ending("OK"), FakeClock().now(), FakeClock().now() - FakeClock().now()
    )


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
    async with keeping(shelf, strangers=3) as log:
        with capture_logs() as lines:
            for number in range(5):
                log.add(record(number, identity=""))
            log.add(record(5))
        await log.flushed()
    assert len(lines) == 6
    assert parts(shelf.kept) == [0, 1, 2, 5]
    assert lost() == {"unidentified": 2}


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
