"""Who keeps account of the downloads of servers in this process."""

from __future__ import annotations

import pytest

from exportd_server import app
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.jobs.readers import Readers
from tests.support.server import until


class Downloads:
    """The downloads that are under way, of all servers that the test starts."""

    def __init__(self) -> None:
        self._readers: list[Readers] = []

    def account(self, ledger: Ledger) -> Readers:
        """Stands in for `Readers`."""
        self._readers.append(Readers(ledger))
        return self._readers[-1]

    async def begun(self) -> None:
        """Wait until there is one."""
        await until(self._any)

    async def over(self) -> None:
        """Wait until there is none."""
        await until(lambda: not self._any())

    def _any(self) -> bool:
        return any(each._reads for each in self._readers)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """What the servers of this test send."""
    made = Downloads()
    monkeypatch.setattr(app, "Readers", made.account)
    return made
