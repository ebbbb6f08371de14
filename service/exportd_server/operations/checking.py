"""Checks that run side by side, each within a time limit, and what they find."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TypeVar

from exportd_server.errors import ConfigurationError, DeliveryFailed, ExportdError
from exportd_server.platform.threads import in_daemon_thread

_AT_ONCE = 16
"""Checks at a time: a catalogue may have hundreds of datasets of one database."""

_T = TypeVar("_T")


class Level(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """The service starts, and something is odd or will be missed."""
    FAILED = "failed"
    """The service does not start, or does not do what it is configured for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    area: str
    name: str
    text: str

    def line(self) -> str:
        """For people."""
        return f"{self.level:<7}  {self.area:<9}  {self.name}  {self.text}".rstrip()

    def as_json(self) -> dict[str, str]:
        """For machines."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check says of the thing that it looked at."""

    level: Level
    text: str


def ok(text: str) -> Outcome:
    """All is well."""
    return Outcome(Level.OK, text)


def warning(text: str) -> Outcome:
    """See `Level`."""
    return Outcome(Level.WARNING, text)


def failed(text: str) -> Outcome:
    """See `Level`."""
    return Outcome(Level.FAILED, text)


def told(outcome: Outcome) -> Callable[[], Awaitable[Outcome]]:
    """For a `Check` whose outcome is known."""

    async def run() -> Outcome:
        return outcome

    return run


@dataclass(frozen=True, slots=True)
class Check:
    """Looks at one thing. `run` raises `ConfigurationError` for what has failed."""

    area: str
    name: str
    run: Callable[[], Awaitable[Outcome]]
    left: str = ""
    """What it may leave behind when it is broken off."""
    needs: tuple[str, ...] = ()
    """Fields of the settings that must be right for it to be tried."""


async def run_checks(checks: Iterable[Check], *, seconds: float) -> AsyncIterator[Finding]:
    """What the checks find, in their order. Each may take so many seconds."""
    turn = asyncio.Semaphore(_AT_ONCE)
    tasks = [asyncio.create_task(_run(check, turn, seconds)) for check in checks]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()


async def _run(check: Check, turn: asyncio.Semaphore, seconds: float) -> Finding:
    async with turn:
        outcome = await _outcome(check, seconds)
    # Whoever writes the text: it stays one line.
    return Finding(outcome.level, check.area, check.name, " ".join(outcome.text.split()))


async def _outcome(check: Check, seconds: float) -> Outcome:
    try:
        async with asyncio.timeout(seconds) as limit:
            return await check.run()
    except TimeoutError:
        if not limit.expired():
            return failed("it did not answer in time; is it up, and can it be reached?")
        left = f"; {check.left}" if check.left else ""
        return failed(
            f"no answer within {seconds:g} s; is it up, and can it be reached?{left}"
        )
    except (ConfigurationError, DeliveryFailed) as error:
        return failed(str(error))
    except (ExportdError, OSError) as error:
        return failed(str(error) or type(error).__name__)
    except Exception as error:  # noqa: BLE001 - a plug-in or a driver; the others go on
        # Its text is nobody's: it may hold a secret.
        return failed(f"it broke unexpectedly ({type(error).__name__})")


def blocking(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Run what blocks, and may for ever, so that nobody waits for its thread."""
    return in_daemon_thread(work, "check")
