"""Waiting for the first of several things, in tasks and in threads."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import weakref

import pytest

from exportd_server.platform import threads
from exportd_server.platform.threads import in_daemon_thread, left_over
from exportd_server.platform.waits import Backoff, Patience, first
from tests.support.server import until
from tests.support.waits import ENOUGH


async def test_the_first_that_is_done_ends_the_waiting_and_the_others() -> None:
    ended = asyncio.Event()

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    await first(long(), asyncio.sleep(0))
    assert ended.is_set()


async def test_the_error_of_the_first_is_raised() -> None:
    async def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await first(asyncio.sleep(60), fails())


async def test_whoever_is_cancelled_leaves_nothing_running() -> None:
    before = asyncio.all_tasks()
    waiting = asyncio.create_task(first(asyncio.sleep(60), asyncio.sleep(60)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert asyncio.all_tasks() == before


def test_pauses_double_up_to_the_cap_and_half_of_each_is_by_chance() -> None:
    backoff = Backoff(0.1, 5.0)
    for failures, ceiling in ((1, 0.1), (2, 0.2), (4, 0.8), (7, 5.0), (10**6, 5.0)):
        pauses = [backoff.pause(failures) for _ in range(200)]
        assert ceiling / 2 <= min(pauses) < max(pauses) <= ceiling


async def test_a_thread_gives_its_result_its_error_and_sees_the_callers_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("mine")
    assert await in_daemon_thread(variable.get, "test") == "mine"

    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await in_daemon_thread(fails, "test")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that nobody else has used or uses."""
    monkeypatch.setattr(threads, "_threads", threads._Threads())


@pytest.mark.usefixtures("own")
async def test_a_thread_that_has_done_its_work_takes_the_next() -> None:
    first = await in_daemon_thread(threading.current_thread, "test-first")
    await until(lambda: first.name == "idle")
    assert await in_daemon_thread(threading.current_thread, "test-second") is first


async def test_work_that_blocks_keeps_no_other_from_a_thread() -> None:
    go_on = threading.Event()
    blocked = [in_daemon_thread(lambda: go_on.wait(ENOUGH), "test-b") for _ in range(20)]
    assert await in_daemon_thread(lambda: "done", "test") == "done"
    assert left_over().count("exportd-test-b") == 20
    go_on.set()
    assert all(await asyncio.gather(*blocked))


@pytest.mark.usefixtures("own")
async def test_threads_without_work_end_and_lose_none_that_comes_just_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "_IDLE_SECONDS", 0.001)
    for n in range(300):
        assert await in_daemon_thread(lambda: n, "test") == n  # noqa: B023 - called now
        await asyncio.sleep(0.0005 * (n % 4))
    await until(lambda: not threads._threads._idle and not left_over())


def test_threads_end_with_the_interpreter_and_are_begun_anew_by_a_fork() -> None:
    program = """
import os, threading, time
from exportd_server.platform.threads import daemon_thread
assert daemon_thread(lambda: 1, "a").result(30) == 1
child = os.fork()
assert daemon_thread(lambda: 2, "b").result(30) == 2
if child:
    assert os.waitpid(child, 0)[1] == 0
    thread = daemon_thread(threading.current_thread, "c").result(30)
    while thread.name != "idle":
        time.sleep(0.001)
    thread.join = lambda _timeout, join=thread.join: (join(30), print("joined", flush=True))
"""
    done = subprocess.run(
        # From Python 3.12 on a fork beside threads is warned of.
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=ENOUGH,
    )
    assert (done.stdout, done.stderr) == ("joined\n", "")


async def test_what_a_thread_has_worked_on_is_held_no_longer() -> None:
    class Large:
        pass

    large = Large()
    held = weakref.ref(large)

    def work(of: Large = large) -> None:
        del of

    await in_daemon_thread(work, "test")
    del large, work
    await until(lambda: held() is None)


async def test_a_thread_that_nobody_waits_for_is_left_behind_and_ends_quietly() -> None:
    go_on = threading.Event()
    blocked = in_daemon_thread(lambda: go_on.wait(10 * ENOUGH), "test-left")
    blocked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await blocked
    assert "exportd-test-left" in left_over()
    go_on.set()
    await until(lambda: "exportd-test-left" not in left_over())


# --- patience


async def test_what_comes_in_time_is_given_and_leaves_nothing_behind() -> None:
    patience = Patience(ENOUGH)

    async def soon(value: int) -> int:
        await asyncio.sleep(0)
        return value

    waits = [asyncio.create_task(patience.wait(soon(number))) for number in range(5)]
    assert await asyncio.gather(*waits) == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        await patience.wait(_raise(KeyError()))
    assert not len(patience)


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _raise(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


async def test_each_that_waits_too_long_is_told_so() -> None:
    patience = Patience(0.05)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(3):
        late = [asyncio.create_task(patience.wait(_for_ever())) for _ in range(3)]
        found = await asyncio.gather(*late, return_exceptions=True)
        assert [type(each) for each in found] == [TimeoutError] * 3
        # They may wait for other things.
        assert not any(task.cancelling() for task in late)
    assert loop.time() - begun >= 3 * 0.05
    assert not len(patience)


async def test_those_who_came_later_are_told_later() -> None:
    patience = Patience(0.2)
    loop = asyncio.get_running_loop()

    async def late() -> float:
        with pytest.raises(TimeoutError):
            await patience.wait(_for_ever())
        return loop.time()

    async with asyncio.timeout(ENOUGH):
        first_one = asyncio.create_task(late())
        await asyncio.sleep(0.1)
        begun = loop.time()
        second = asyncio.create_task(late())
        await first_one
        assert await second >= begun + 0.2


async def test_what_does_not_end_when_it_is_cancelled_is_cancelled_once() -> None:
    patience = Patience(0.05)
    told: list[int] = []

    async def deaf() -> int:
        loop = asyncio.get_running_loop()
        while len(told) < 2 and not (told and loop.time() > ends):
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                told.append(1)
                # Others end meanwhile, and the timer comes by again.
                await asyncio.gather(*others, return_exceptions=True)
        return len(told)

    ends = asyncio.get_running_loop().time() + 0.2
    others: list[asyncio.Task[None]] = []
    task = asyncio.create_task(patience.wait(deaf()))
    for _ in range(3):
        await asyncio.sleep(0.02)
        others.append(asyncio.create_task(patience.wait(_for_ever())))
    # It gave something after all, and nothing of it is left with the task.
    assert await task == 1
    assert task.cancelling() == 0
    await asyncio.gather(*others, return_exceptions=True)
    assert not len(patience)


async def test_a_task_that_is_cancelled_already_is_told_of_what_takes_too_long() -> None:
    patience = Patience(0.02)

    async def ending() -> None:
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(asyncio.CancelledError):
            await _for_ever()
        assert task.cancelling() == 1
        with pytest.raises(TimeoutError):
            await patience.wait(_for_ever())
        assert task.cancelling() == 1

    waiting = asyncio.create_task(ending())
    await asyncio.sleep(0)
    waiting.cancel()
    await waiting


async def test_a_task_has_patience_for_one_thing_at_a_time() -> None:
    patience = Patience(ENOUGH)
    answer = asyncio.get_running_loop().create_future()
    with pytest.raises(RuntimeError, match="already"):
        await patience.wait(patience.wait(answer))
    assert not len(patience)


async def test_who_is_cancelled_while_it_waits_is_cancelled() -> None:
    patience = Patience(ENOUGH)
    waiting = asyncio.create_task(patience.wait(_for_ever()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not len(patience)


async def test_who_is_cancelled_in_the_moment_that_patience_ends_is_cancelled() -> None:
    patience = Patience(0.05)
    ends = asyncio.get_running_loop().time() + 0.05
    waiting = asyncio.create_task(patience.wait(_for_ever()))
    await asyncio.sleep(0)
    # Both before the task gets to run again.
    asyncio.get_running_loop().call_at(ends, waiting.cancel)
    while asyncio.get_running_loop().time() < ends + 0.05:
        pass
    with pytest.raises(asyncio.CancelledError):
        await waiting
