"""What each call may cost beside its own work, counted without a clock: see
`bench/unary.py`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import grpc
import pytest
import sqlalchemy as sa

from exportd_server.api.interceptors.handlers import OncePerMethod
from exportd_server.api.interceptors.limits import CapacityInterceptor
from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger import codec
from exportd_server.jobs.ledger.base import NewJob
from exportd_server.jobs.ledger.hands import Hands
from exportd_server.jobs.ledger.prepared import Prepared
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.sqlite import SqliteDatabase
from exportd_server.jobs.ledger.tables import counters
from exportd_server.platform.clock import SystemClock
from tests.support.ledger import spec

METHOD = "/exportd.v1.ExportService/GetJob"


def called(method: str) -> grpc.HandlerCallDetails:
    return cast("grpc.HandlerCallDetails", SimpleNamespace(method=method))


def served(method: str) -> Any:
    async def answer(request: bytes, _: object) -> bytes:
        return request

    handler: Any = grpc.unary_unary_rpc_method_handler(answer)

    async def look(details: grpc.HandlerCallDetails) -> Any:
        return handler if details.method == method else None

    return look


class Counting(grpc.aio.ServerInterceptor):
    """Counts how often it is run."""

    def __init__(self) -> None:
        self.runs = 0

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        self.runs += 1
        return await continuation(handler_call_details)


@pytest.fixture
async def database(tmp_path: Path) -> Any:
    database = SqliteDatabase(tmp_path / "ledger.db", SystemClock(), 5)
    await database.open()
    yield database
    await database.close()


# --- interceptors


async def test_interceptors_run_at_the_first_call_of_a_method_and_not_again() -> None:
    inner = Counting()
    once = OncePerMethod((CapacityInterceptor(frozenset(), 10, 1.0), inner))
    look = served(METHOD)
    first = await once.intercept_service(look, called(METHOD))
    assert first is not None
    assert await once.intercept_service(look, called(METHOD)) is first
    assert inner.runs == 1


async def test_nothing_is_kept_of_methods_that_nobody_serves() -> None:
    once = OncePerMethod((Counting(),))
    for number in range(50):
        path = f"/exportd.v1.ExportService/No{number}"
        assert await once.intercept_service(served(METHOD), called(path)) is None
    assert not once._handlers


async def test_an_answer_goes_out_together_with_its_status() -> None:
    """A method that waits for its request stays one with one answer."""
    service = METHOD.split("/")[1]
    capacity = CapacityInterceptor(frozenset({service}), 10, 1.0)
    handler = await capacity.intercept_service(served(METHOD), called(METHOD))
    assert handler is not None
    assert handler.request_streaming
    assert not handler.response_streaming


# --- threads


async def test_what_was_done_while_the_loop_was_busy_is_told_at_one_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    wake: Callable[..., Any] = loop.call_soon_threadsafe
    wakes: list[Callable[..., Any]] = []

    def counted(callback: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        wakes.append(callback)
        return wake(callback, *arguments, **named)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    hands = Hands(1, "test-hands")
    done = threading.Event()
    try:
        work = [asyncio.ensure_future(hands.run(lambda: None)) for _ in range(20)]
        last = asyncio.ensure_future(hands.run(done.set))
        await asyncio.sleep(0)  # all of them are handed over
        assert done.wait(60)  # and the loop is held meanwhile
        await asyncio.gather(*work, last)
        assert len(wakes) <= 2, len(wakes)
    finally:
        hands.close()


async def test_work_of_a_caller_who_has_gone_is_not_begun_and_errors_are_told() -> None:
    hands = Hands(1, "test-hands")
    hold = threading.Event()
    begun: list[int] = []
    try:
        holding = asyncio.ensure_future(hands.run(lambda: hold.wait(60)))
        gone = asyncio.ensure_future(hands.run(lambda: begun.append(1)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        hold.set()
        assert await holding
        with pytest.raises(ZeroDivisionError):
            await hands.run(lambda: 1 // len(begun))
        assert gone.cancelled()
        assert not begun
    finally:
        hands.close()
    with pytest.raises(RuntimeError, match="ended"):
        await hands.run(lambda: None)


async def test_an_error_that_no_future_takes_leaves_the_others_theirs() -> None:
    hands = Hands(1, "test-hands")
    hold = threading.Event()

    def stop() -> None:
        raise StopIteration

    try:
        holding = asyncio.ensure_future(hands.run(lambda: hold.wait(60)))
        odd = asyncio.ensure_future(hands.run(stop))
        even = asyncio.ensure_future(hands.run(lambda: 2))
        await asyncio.sleep(0)
        hold.set()
        assert await holding
        with pytest.raises(RuntimeError, match="StopIteration"):
            await odd
        assert await even == 2
    finally:
        hands.close()


def test_threads_that_nobody_closed_do_not_keep_a_process() -> None:
    program = """
import asyncio
from exportd_server.jobs.ledger.hands import Hands
async def main():
    await Hands(2, "left").run(lambda: None)
asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, timeout=60)


async def test_jobs_that_are_asked_for_at_once_are_read_at_one_go(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = SqlLedger(database)
    ids = [str(UUID(int=number)) for number in range(40)]
    for job_id in ids:
        await ledger.create_job(NewJob(job_id, "acme", spec()))
    transactions: list[Any] = []
    read = SqliteDatabase._read

    def counted(self: SqliteDatabase, work: Callable[[Any], Any]) -> Any:
        transactions.append(work)
        return read(self, work)

    monkeypatch.setattr(SqliteDatabase, "_read", counted)
    found = await asyncio.gather(*(ledger.get_job("acme", job_id) for job_id in ids))
    assert [job and job.job_id for job in found] == ids
    # The first one alone, and then sixteen at a time.
    assert len(transactions) == 4
    assert await ledger.get_job("other", ids[0]) is None


# --- statements


async def test_a_statement_is_compiled_once_for_the_values_it_is_given(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[list[str]] = []
    compile_ = Prepared._compile

    def counted(self: Prepared, dialect: sa.Dialect, names: list[str]) -> Any:
        compiled.append(names)
        return compile_(self, dialect, names)

    monkeypatch.setattr(Prepared, "_compile", counted)
    add = Prepared(sa.insert(counters))
    find = Prepared(sa.select(counters.c.value).where(counters.c.name == sa.bindparam("n")))
    for number in range(5):
        name = f"test-{number}"

        def work(tx: Any, name: str = name, number: int = number) -> Any:
            add.rows(tx.connection, name=name, value=number)
            return find.scalar(tx.connection, n=name)

        assert await database.write(work) == number
    assert compiled == [["name", "value"], ["n"]]
    assert await database.read(lambda tx: find.first(tx.connection, n="none")) is None


async def test_a_value_that_is_left_out_is_an_error_and_no_null(
    database: SqliteDatabase,
) -> None:
    find = Prepared(sa.select(counters.c.value).where(counters.c.name == sa.bindparam("n")))
    with pytest.raises(KeyError):
        await database.read(lambda tx: find.rows(tx.connection))


async def test_a_driver_that_fails_is_told_as_by_the_library(
    database: SqliteDatabase,
) -> None:
    nowhere = Prepared(sa.select(sa.table("nowhere", sa.column("x")).c.x))
    with pytest.raises(LedgerUnavailable) as failed:
        await database.read(lambda tx: nowhere.rows(tx.connection))
    assert isinstance(failed.value.__cause__, sa.exc.OperationalError)
    # The connection was given up, and the next one works.
    assert await database.read(lambda tx: tx.now) > 0


def test_long_texts_are_not_kept() -> None:
    before = codec._kept_columns.cache_info().currsize
    name = "x" * 2 * codec._KEPT_LENGTH
    text = f'[{{"name":"{name}","kind":"STRING","type":"string","nullable":true}}]'
    assert codec.load_columns(text)[0].name == name
    assert codec._kept_columns.cache_info().currsize == before
