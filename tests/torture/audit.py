"""Triggers beside the ledger's tables that write down each claim, each change of a job's
state and each part, in the transaction that makes it. So what is checked in the end is
everything that ever was, and not only what was still there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row

from exportd_server.jobs.model import TRANSITIONS, JobState

SCRIPT = """
CREATE SCHEMA audit;
CREATE TABLE audit.claims (
    at float8, task_id bigint, job_id text, kind text, generation int, shard int,
    token bigint, former bigint, former_state text, owner text, attempts int);
CREATE TABLE audit.moves (
    at float8, number bigserial, job_id text, former text, state text, generation int);
CREATE TABLE audit.parts (
    at float8, job_id text, generation int, shard int, sequence int, token bigint);

CREATE FUNCTION audit.claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO audit.claims VALUES (
        extract(epoch FROM clock_timestamp()), NEW.task_id, NEW.job_id, NEW.kind,
        NEW.generation, NEW.shard, NEW.token, OLD.token, OLD.state, NEW.owner,
        NEW.attempts);
    RETURN NULL;
END $$;
CREATE TRIGGER claimed AFTER UPDATE OF token ON exportd.tasks
    FOR EACH ROW WHEN (NEW.token <> OLD.token) EXECUTE FUNCTION audit.claim();
CREATE TRIGGER planned AFTER INSERT ON exportd.tasks
    FOR EACH ROW WHEN (NEW.token <> 0) EXECUTE FUNCTION audit.claim();

CREATE FUNCTION audit.move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO audit.moves (at, job_id, former, state, generation) VALUES (
        extract(epoch FROM clock_timestamp()), coalesce(NEW.job_id, OLD.job_id),
        OLD.state, NEW.state, coalesce(NEW.generation, OLD.generation));
    RETURN NULL;
END $$;
CREATE TRIGGER created AFTER INSERT OR DELETE ON exportd.jobs
    FOR EACH ROW EXECUTE FUNCTION audit.move();
CREATE TRIGGER moved AFTER UPDATE ON exportd.jobs FOR EACH ROW
    WHEN (NEW.state <> OLD.state OR NEW.generation <> OLD.generation)
    EXECUTE FUNCTION audit.move();

CREATE FUNCTION audit.part() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO audit.parts VALUES (
        extract(epoch FROM clock_timestamp()), NEW.job_id, NEW.generation, NEW.shard,
        NEW.sequence, NEW.token);
    RETURN NULL;
END $$;
CREATE TRIGGER stored AFTER INSERT ON exportd.parts
    FOR EACH ROW EXECUTE FUNCTION audit.part();
"""

EXPORT_KINDS = ("plan", "shard")


@dataclass(frozen=True)
class Audit:
    """All that the triggers wrote. Moments are the database server's, in seconds."""

    claims: list[Any]
    moves: Mapping[str, list[Any]]
    parts: Mapping[tuple[str, int], list[Any]]
    """By job and generation."""

    @classmethod
    def read(cls, url: str) -> Audit:
        """Read everything; blocks."""
        with psycopg.connect(url, row_factory=namedtuple_row) as connection:
            claims = connection.execute("SELECT * FROM audit.claims ORDER BY token")
            moves = defaultdict(list)
            moved: list[Any] = connection.execute(
                "SELECT * FROM audit.moves ORDER BY number"
            ).fetchall()
            for move in moved:
                moves[move.job_id].append(move)
            parts = defaultdict(list)
            stored: list[Any] = connection.execute(
                "SELECT * FROM audit.parts ORDER BY shard, sequence"
            ).fetchall()
            for row in stored:
                parts[row.job_id, row.generation].append(row)
            return cls(claims.fetchall(), moves, parts)

    @property
    def takeovers(self) -> list[Any]:
        """Claims of exports that another worker had a lease on, which had run out."""
        return [
            claim
            for claim in self.claims
            if claim.former_state == "leased" and claim.kind in EXPORT_KINDS
        ]

    @property
    def restarts(self) -> int:
        """How many outputs were thrown away and begun anew."""
        return sum(
            move.generation > before.generation
            for moves in self.moves.values()
            for before, move in pairwise(moves)
        )

    def faults(self) -> list[str]:
        """Whatever contradicts the state machine or the fencing."""
        return [*self._bad_tokens(), *self._bad_moves(), *self._bad_parts()]

    def _bad_tokens(self) -> list[str]:
        tokens = [claim.token for claim in self.claims]
        wrong = []
        if len(set(tokens)) != len(tokens):
            wrong.append("a token was given twice")
        wrong += [
            f"claim {claim.token} of task {claim.task_id} came after {claim.former}"
            for claim in self.claims
            if claim.former is not None and claim.former >= claim.token
        ]
        return wrong

    def _bad_moves(self) -> list[str]:
        wrong = []
        for job_id, moves in self.moves.items():
            for move in moves:
                if move.former is None or move.state is None or move.former == move.state:
                    continue
                if JobState(move.state) not in TRANSITIONS[JobState(move.former)]:
                    wrong.append(f"job {job_id} went from {move.former} to {move.state}")
            ends = [m for m in moves if m.state and JobState(m.state).terminal]
            if len(ends) > 1:
                wrong.append(f"job {job_id} ended {len(ends)} times")
        return wrong

    def _bad_parts(self) -> list[str]:
        """Each part must have been recorded under the token that was its shard's last
        at that moment, whatever process wrote it."""
        claims = defaultdict(list)
        for claim in self.claims:
            claims[claim.job_id, claim.generation, claim.shard].append(claim)
        wrong = []
        for (job_id, generation), parts in self.parts.items():
            for part in parts:
                before = [
                    claim.token
                    for claim in claims[job_id, generation, part.shard]
                    if claim.at <= part.at
                ]
                if not before or before[-1] != part.token:
                    wrong.append(
                        f"job {job_id} has part {part.shard}/{part.sequence} of token "
                        f"{part.token}, recorded when {before[-1:]} was its shard's"
                    )
        return wrong
