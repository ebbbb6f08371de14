"""A change that has begun ends, whether or not somebody still waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from exportd_server.errors import ErrorReason, ExportdError
from exportd_server.jobs.audit import AuditMethod, Ending, Entry, under
from exportd_server.jobs.changes import to_its_end


@dataclass
class Change:
    """One that stands still in its middle until it is let on."""

    error: Exception | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    done: bool = False

    async def run(self) -> str:
        self.begun.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        self.done = True
        return "done"


@contextmanager
def noted() -> Iterator[Entry]:
    entry = Entry(AuditMethod.DELETE_JOB, "")
    with under(entry):
        yield entry


async def abandoned(change: Change, times: int = 1) -> None:
    """Let the caller go away in its middle; raises what the caller's task ends with."""
    calling = asyncio.create_task(to_its_end(change.run()))
    await change.begun.wait()
    for _ in range(times):
        calling.cancel()
        await asyncio.sleep(0)
        assert not calling.done(), "whoever counts calls still counts this one"
    change.go_on.set()
    await calling


async def test_it_gives_what_the_change_gives() -> None:
    change = Change()
    change.go_on.set()
    with noted() as entry:
        assert await to_its_end(change.run()) == "done"
    assert entry.ending is None


async def test_it_raises_what_the_change_raises() -> None:
    change = Change(ExportdError(ErrorReason.JOB_NOT_FOUND))
    change.go_on.set()
    with pytest.raises(ExportdError):
        await to_its_end(change.run())


@pytest.mark.parametrize("times", [1, 3])
async def test_a_caller_that_goes_away_ends_after_the_change(times: int) -> None:
    change = Change()
    with noted() as entry, pytest.raises(asyncio.CancelledError):
        await abandoned(change, times)
    assert change.done
    assert entry.ending == Ending("OK")


async def test_a_change_that_was_refused_is_noted_as_such() -> None:
    with noted() as entry, pytest.raises(asyncio.CancelledError):
        await abandoned(Change(ExportdError(ErrorReason.JOB_NOT_FOUND)))
    assert entry.ending == Ending("NOT_FOUND", "JOB_NOT_FOUND")


async def test_an_error_that_nobody_foresaw_is_logged_as_nobody_is_told() -> None:
    with (
        capture_logs() as lines,
        noted() as entry,
        pytest.raises(asyncio.CancelledError),
    ):
        await abandoned(Change(ValueError("odd")))
    assert entry.ending == Ending("INTERNAL", "INTERNAL")
    assert [line["event"] for line in lines] == ["unforeseen error"]


async def test_what_became_of_a_change_is_not_known_when_the_loop_is_taken_down() -> None:
    change = Change()
    with noted() as entry:
        calling = asyncio.create_task(to_its_end(change.run()))
        await change.begun.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    assert entry.ending == Ending("UNAVAILABLE", "LEDGER_UNAVAILABLE")
    assert not change.done
