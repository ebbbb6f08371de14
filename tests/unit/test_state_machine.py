"""The drawing, the table and the ledger say the same about states."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from itertools import product
from pathlib import Path

import pytest
import sqlalchemy as sa

from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.statements import lifecycle
from exportd_server.jobs.ledger.tables import jobs
from exportd_server.jobs.ledger.transaction import Transaction
from exportd_server.jobs.model import TRANSITIONS, JobState
from tests.support.ledger import World, sqlite_world

DRAWING = Path(__file__).parents[2] / "docs" / "state_machine.md"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with sqlite_world(tmp_path) as world:
        yield world


def arrows() -> set[tuple[str, str]]:
    text = DRAWING.read_text(encoding="utf-8")
    diagram, _ = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for line in diagram.splitlines() if line.strip()]
    found = [re.fullmatch(r"(\S+) --> (\S+): .+", line) for line in lines]
    assert all(found), f"not an arrow: {lines}"
    return {(match[1], match[2]) for match in found if match}


def test_the_drawing_has_the_transitions_of_the_table_and_no_others() -> None:
    drawn = {arrow for arrow in arrows() if "[*]" not in arrow}
    table = {(str(a), str(b)) for a, targets in TRANSITIONS.items() for b in targets}
    assert drawn == table


def test_the_drawing_begins_where_jobs_begin_and_ends_where_they_end() -> None:
    assert {to for start, to in arrows() if start == "[*]"} == {"PENDING"}
    assert {start for start, to in arrows() if to == "[*]"} == {
        str(state) for state in JobState if state.terminal
    }


def test_final_states_lead_nowhere() -> None:
    assert {state for state in JobState if state.terminal} == {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
    }


@pytest.mark.parametrize(("before", "after"), list(product(JobState, JobState)))
async def test_the_ledger_refuses_every_transition_that_the_table_lacks(
    world: World, before: JobState, after: JobState
) -> None:
    job = await world.create()
    assert isinstance(world.ledger, SqlLedger)
    database = world.ledger._database

    def force(tx: Transaction) -> None:
        tx.connection.execute(sa.update(jobs).values(state=before.value))

    await database.write(force)
    if after in TRANSITIONS[before]:
        await database.write(lambda tx: lifecycle.move(tx, job.job_id, after))
        assert (await world.job(job)).state is after
        assert (await world.job(job)).revision == job.revision + 1
    else:
        was = world.dump()
        with pytest.raises(lifecycle.IllegalTransition):
            await database.write(lambda tx: lifecycle.move(tx, job.job_id, after))
        assert world.dump() == was


@pytest.mark.parametrize("state", [state for state in JobState if state.terminal])
async def test_the_ledger_refuses_to_touch_a_job_that_has_ended(
    world: World, state: JobState
) -> None:
    job = await world.create()
    assert isinstance(world.ledger, SqlLedger)
    database = world.ledger._database
    await database.write(
        lambda tx: tx.connection.execute(sa.update(jobs).values(state=state.value)).close()
    )
    was = world.dump()
    with pytest.raises(lifecycle.IllegalTransition):
        await database.write(lambda tx: lifecycle.touch(tx, job.job_id))
    assert world.dump() == was


def test_only_one_module_writes_a_jobs_state() -> None:
    """What the refusal rests on: nobody goes around it."""
    statements = Path(lifecycle.__file__).parent
    writers = {
        path.name
        for path in statements.glob("*.py")
        if re.search(r"sa\.update\(jobs\)", path.read_text(encoding="utf-8"))
    }
    assert writers == {"lifecycle.py"}
