"""Downloads are pinned when their job is about to expire, and cut when it is cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.jobs.model import Job, JobState
from exportd_server.jobs.readers import Cut, Readers
from tests.support.ledger import spec
from tests.support.server import until

JOB_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
PIN = timedelta(seconds=0.3)
NOW = datetime(2026, 1, 2, tzinfo=UTC)


class Pins:
    """The ledger, as far as readers know it."""

    def __init__(self) -> None:
        self.pinned: list[str] = []
        self.unpinned: list[str] = []
        self.asked = 0
        self.length = PIN
        self.cut = False
        self.refuses = False
        self.away = False
        self.tellers: list[Callable[[], None]] = []

    async def pin_output(
        self, tenant: str, job_id: str, reader: str, *, length: timedelta
    ) -> bool:
        assert (tenant, job_id, length) == ("acme", JOB_ID, self.length)
        self._reach()
        if self.refuses:
            return False
        self.pinned.append(reader)
        return True

    async def unpin_output(self, job_id: str, reader: str) -> None:
        assert job_id == JOB_ID
        self._reach()
        self.unpinned.append(reader)

    async def is_cut(self, job_id: str, reader: str) -> bool:
        assert (job_id, bool(reader)) == (JOB_ID, True)
        self.asked += 1
        self._reach()
        return self.cut

    def on_cut(self, job_id: str, tell: Callable[[], None]) -> AbstractContextManager[None]:
        @contextmanager
        def told() -> Iterator[None]:
            self.tellers.append(tell)
            yield
            self.tellers.remove(tell)

        return told()

    def tell(self) -> None:
        for tell in self.tellers:
            tell()

    def _reach(self) -> None:
        if self.away:
            raise LedgerUnavailable


@pytest.fixture
def pins() -> Pins:
    return Pins()


@pytest.fixture
def readers(pins: Pins) -> Readers:
    return Readers(cast("Ledger", pins), pin=PIN)


def job(left: float) -> Job:
    """A job that has so many seconds left."""
    return Job(
        JOB_ID,
        "acme",
        JobState.SUCCEEDED,
        spec(),
        "",
        NOW,
        expire_time=NOW + timedelta(seconds=left),
        read_time=NOW,
    )


async def test_a_download_far_from_the_expiry_asks_the_ledger_nothing(
    readers: Readers, pins: Pins
) -> None:
    with readers.reading(JOB_ID):
        await readers.keep(job(3600))
        await asyncio.sleep(0.05)
    await readers.close()
    assert (pins.pinned, pins.unpinned, pins.asked) == ([], [], 0)


async def test_a_download_near_the_expiry_is_pinned_before_it_begins_and_until_it_ends(
    readers: Readers, pins: Pins
) -> None:
    with readers.reading(JOB_ID):
        await readers.keep(job(0.1))
        assert len(pins.pinned) == 1
        await until(lambda: len(pins.pinned) >= 4)
    await until(lambda: pins.unpinned)
    assert set(pins.pinned) == set(pins.unpinned)
    count = len(pins.pinned)
    await asyncio.sleep(0.2)
    assert len(pins.pinned) == count


async def test_a_download_is_pinned_in_time_before_its_job_expires(pins: Pins) -> None:
    pins.length = timedelta(seconds=30)
    readers = Readers(cast("Ledger", pins), pin=pins.length)
    loop = asyncio.get_running_loop()
    with readers.reading(JOB_ID):
        # Two thirds of a pin before the end, which is in a moment.
        await readers.keep(job(20.2))
        assert not pins.pinned
        begun = loop.time()
        await until(lambda: pins.pinned)
        assert loop.time() - begun < 20.2
    await readers.close()


async def test_two_downloads_of_a_job_share_a_pin(readers: Readers, pins: Pins) -> None:
    with readers.reading(JOB_ID):
        await readers.keep(job(0.1))
        with readers.reading(JOB_ID):
            await readers.keep(job(0.1))
        assert len(pins.pinned) == 1
        assert not pins.unpinned
    await until(lambda: len(pins.unpinned) == 1)


async def test_a_download_that_comes_too_late_is_refused(
    readers: Readers, pins: Pins
) -> None:
    pins.refuses = True
    with readers.reading(JOB_ID), pytest.raises(Cut):
        await readers.keep(job(0.1))


async def test_a_job_that_has_not_ended_has_no_expiry_to_mind(
    readers: Readers, pins: Pins
) -> None:
    with readers.reading(JOB_ID):
        await readers.keep(replace(job(0), expire_time=None))
        await readers.keep(job(0.1))
        assert len(pins.pinned) == 1


async def test_a_cut_ends_a_download_whatever_it_waits_for(
    readers: Readers, pins: Pins
) -> None:
    async def download() -> None:
        with readers.reading(JOB_ID):
            async with readers.until_cut(JOB_ID):
                await asyncio.Event().wait()

    running = [asyncio.create_task(download()) for _ in range(2)]
    await until(lambda: len(pins.tellers) == 2)
    pins.cut = True
    pins.tell()
    for task in running:
        with pytest.raises(Cut):
            await task
    assert not readers.is_cut(JOB_ID)


async def test_who_begins_while_a_cut_one_still_ends_is_cut_too(
    readers: Readers, pins: Pins
) -> None:
    with readers.reading(JOB_ID):
        pins.cut = True
        pins.tell()
        await until(lambda: readers.is_cut(JOB_ID))
        with readers.reading(JOB_ID):
            with pytest.raises(Cut):
                await readers.keep(job(3600))
            with pytest.raises(Cut):
                async with readers.until_cut(JOB_ID):
                    pytest.fail("it began")


async def test_false_news_does_not_cut(readers: Readers, pins: Pins) -> None:
    with readers.reading(JOB_ID):
        async with readers.until_cut(JOB_ID):
            pins.tell()
            await until(lambda: pins.asked)
            await asyncio.sleep(0.01)
        assert not readers.is_cut(JOB_ID)
        assert pins.asked == 1


async def test_a_timeout_of_the_downloads_own_is_no_cut(readers: Readers) -> None:
    with readers.reading(JOB_ID), pytest.raises(TimeoutError):
        async with readers.until_cut(JOB_ID):
            raise TimeoutError


async def test_a_cut_is_found_out_once_the_ledger_is_back(
    readers: Readers, pins: Pins
) -> None:
    with readers.reading(JOB_ID):
        pins.away = pins.cut = True
        pins.tell()
        await until(lambda: pins.asked)
        assert not readers.is_cut(JOB_ID)
        pins.away = False
        await until(lambda: readers.is_cut(JOB_ID))


async def test_a_pin_that_cannot_be_prolonged_ends_the_download(
    readers: Readers, pins: Pins
) -> None:
    with readers.reading(JOB_ID):
        await readers.keep(job(0.1))
        pins.refuses = True
        await until(lambda: readers.is_cut(JOB_ID))
