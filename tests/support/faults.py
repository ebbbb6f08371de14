"""A ledger that cannot be reached when the test says so."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from contextlib import nullcontext
from typing import Any, cast

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.ledger.base import Ledger


class Faults:
    """Stands between a worker and its ledger, which is `ledger`. A call that fails does so
    before anything happened, or after all of it did: the caller cannot tell."""

    def __init__(self, ledger: Ledger) -> None:
        self._real = ledger
        self._planned: defaultdict[str, deque[bool]] = defaultdict(deque)
        self.out_of_reach = False
        """Whether every call fails."""
        self.cut_off: set[str] = set()
        """Methods of which every call fails; a fence that is cut off tells nothing."""
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []

    @property
    def ledger(self) -> Ledger:
        """The ledger as the worker sees it."""
        return cast("Ledger", self)

    def fail(self, method: str, times: int = 1, *, after: bool) -> None:
        """Have the next calls of a method fail."""
        self._planned[method].extend([after] * times)

    @property
    def pending(self) -> dict[str, int]:
        """Failures that were planned and have not happened."""
        return {name: len(planned) for name, planned in self._planned.items() if planned}

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name == "fence":
            deaf = name in self.cut_off
            return (lambda _lease: nullcontext(asyncio.Event())) if deaf else real
        if name in ("on_cut", "watching"):  # they ask the ledger nothing
            return real

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            self.log.append(name)
            if self.out_of_reach or name in self.cut_off:
                raise LedgerUnavailable
            planned = self._planned[name]
            if not planned:
                return await real(*args, **kwargs)
            if planned.popleft():
                await real(*args, **kwargs)
            raise LedgerUnavailable

        return call
