"""A fleet whose processes are restarted one after the other loses nothing and fails no call
that the clients' service config repeats. `python -m tests.rolling` does it for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import rolling
from tests.support.postgres import PostgresServer


@pytest.mark.minutes
@pytest.mark.timeout(600)
async def test_a_rolling_restart_loses_nothing_and_fails_no_call_that_is_repeated(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    outcome = await rolling.run(postgres, tmp_path, lambda rounds: rounds == 2)
    assert outcome.failures == [], "\n".join(outcome.lines())
    assert outcome.restarts == 2 * rolling.MEMBERS
    # There was a load, of every kind.
    assert len(outcome.verified) >= rolling.MEMBERS
    assert {"GetJob", "ListJobs", "WatchJob", "StreamDownload"} <= outcome.calls.keys()
    assert outcome.cut
