"""Runs that leave out what cannot be exported: no row is lost or doubled, whatever ends
them in between."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.errors import (
    ExportTooLarge,
    StoreFailed,
    TooManyRowErrors,
    ValueNotEncodable,
)
from exportd_server.jobs.caps import Caps
from exportd_server.jobs.ledger.base import Totals
from exportd_server.jobs.model import Manifest, PartRecord
from exportd_server.pipeline.run import FinishedPart, PartLimits, ShardRun, ShardTask
from exportd_server.sources.base import Query, Shard
from exportd_server.sources.batches import not_fitting
from exportd_server.sources.loose import LooseBatch
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from exportd_server.store.memory import MemoryPartWriter, MemoryStore
from tests.support.loose import BAD, SCHEMA, LooseSource, LooseStream, lines
from tests.support.store import keys, read

PREFIX = JobPrefix("acme", "0197c1f0-7a3e-7000-8000-000000000001")
QUERY = Query(tuple(SCHEMA.names))

Batches = Sequence[Sequence[str | None]]

bads = st.sampled_from([None, None, None, None, *BAD])
batch_lists = st.lists(st.lists(bads, min_size=1, max_size=25), min_size=1, max_size=5)


class WorkerDied(Exception):
    """The worker is gone, after or before its part was recorded."""


@dataclass
class Work:
    """A shard, what the ledger has of it, and who is at it."""

    source: LooseSource
    output: OutputFormat = field(default_factory=lambda: OutputFormat(Format.CSV))
    limits: PartLimits = field(default_factory=PartLimits)
    caps: Caps = field(default_factory=lambda: Caps(None, None, 10_000))
    store: MemoryStore = field(default_factory=MemoryStore)
    recorded: list[FinishedPart] = field(default_factory=list)
    token: int = 0
    skip_errors: bool = True

    def run(self, *, dies_at: int | None = None, recorded: bool = True) -> ShardRun:
        """Go on where the ledger stands; may die at the part with that number, once it is
        recorded or just before."""
        self.token += 1
        errors = [part.errors for part in self.recorded if part.errors is not None]

        def commit(part: FinishedPart) -> None:
            dies = len(self.recorded) == dies_at
            if dies and not recorded:
                raise WorkerDied
            self.recorded.append(part)
            if dies:
                raise WorkerDied

        run = ShardRun(
            ShardTask(
                source=self.source,
                query=QUERY,
                shard=Shard(0),
                output=self.output,
                limits=self.limits,
                prefix=PREFIX,
                token=self.token,
                done_parts=len(self.recorded),
                done_rows=sum(part.rows for part in self.recorded),
                done_bytes=sum(part.digest.bytes for part in [*self.recorded, *errors]),
                done_row_errors=sum(part.rows for part in errors),
                skip_errors=self.skip_errors,
            ),
            self.store,
            commit=commit,
            check=self.caps.check,
            max_bytes_in_flight=2**20,
        )
        run()
        return run

    async def exported(self) -> list[int]:
        """The ids in the output, in order."""
        found = []
        for part in self.recorded:
            data = await read(self.store, part.key)
            ids = _ids(self.output.format, data)
            assert len(ids) == part.rows
            found += ids
        return found

    async def told(self) -> list[tuple[int, str]]:
        """Row and column of what was left out, in order."""
        found = []
        for part in self.recorded:
            if part.errors is None:
                continue
            assert part.errors.key.kind is OutputKind.ERROR
            data = await read(self.store, part.errors.key)
            assert len(data) == part.errors.digest.bytes
            rows = lines(data)
            assert len(rows) == part.errors.rows
            found += [(row["row"], row["column"]) for row in rows]
        return found

    async def settle(self) -> None:
        """Assert that each row is in the output or told, once and in order."""
        flat = [column for bad in self.source.shards[0] for column in bad]
        good = [row for row, column in enumerate(flat) if column is None]
        assert await self.exported() == good
        assert await self.told() == [
            (row, column) for row, column in enumerate(flat) if column is not None
        ]


def _ids(form: Format, data: bytes) -> list[int]:
    match form:
        case Format.CSV:
            return [int(row["id"]) for row in csv.DictReader(io.StringIO(data.decode()))]
        case Format.JSONL:
            return [json.loads(line)["id"] for line in data.splitlines()]
        case Format.PARQUET:
            return pq.read_table(io.BytesIO(data))["id"].to_pylist()  # type: ignore[no-any-return]
        case Format.ARROW:
            return pa.ipc.open_stream(data).read_all()["id"].to_pylist()  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=60)
@given(batch_lists, st.sampled_from(Format), st.none() | st.integers(1, 30))
async def test_output_and_errors_together_are_all_rows(
    batches: Batches, form: Format, max_rows: int | None
) -> None:
    work = Work(LooseSource([batches]), OutputFormat(form), PartLimits(max_rows))
    run = work.run()
    await work.settle()
    assert (run.rows, run.row_errors) == (
        sum(part.rows for part in work.recorded),
        len(await work.told()),
    )
    stored = [await work.store.size(key) for key in await keys(work.store)]
    assert run.bytes == sum(stored)


@settings(deadline=None, max_examples=60)
@given(
    batch_lists,
    st.sampled_from(Format),
    st.integers(1, 10),
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=4),
)
async def test_a_worker_that_dies_loses_and_doubles_no_row(
    batches: Batches, form: Format, max_rows: int, deaths: list[tuple[int, bool]]
) -> None:
    work = Work(LooseSource([batches]), OutputFormat(form), PartLimits(max_rows))
    for at, recorded in deaths:
        try:
            work.run(dies_at=at, recorded=recorded)
        except WorkerDied:
            continue
        break
    else:
        work.run()
    await work.settle()
    sequences = [part.key.sequence for part in work.recorded]
    assert sequences == list(range(len(sequences)))
    for part in work.recorded:
        if part.errors is not None:
            key = part.errors.key
            assert (key.shard, key.sequence, key.token) == (
                part.key.shard,
                part.key.sequence,
                part.key.token,
            )


async def test_who_goes_on_skips_what_was_written_and_what_was_left_out() -> None:
    bad: list[str | None] = [None, "text", None, "small", None, None]
    work = Work(LooseSource([[bad]]), limits=PartLimits(2))
    with pytest.raises(WorkerDied):
        work.run(dies_at=0)
    (first,) = work.recorded
    assert first.errors is not None
    done = first.rows + first.errors.rows
    work.run()
    assert work.source.skipped == [0, done]
    await work.settle()


async def test_a_run_without_bad_rows_has_no_error_part() -> None:
    work = Work(LooseSource([[[None] * 10]]))
    work.run()
    assert [key.kind for key in await keys(work.store)] == [OutputKind.OUTPUT]
    await work.settle()


async def test_an_output_of_bad_rows_alone_is_an_empty_file_and_its_errors() -> None:
    work = Work(LooseSource([[["text", "small"]]]))
    work.run()
    (part,) = work.recorded
    assert part.rows == 0
    assert part.errors is not None
    assert part.errors.rows == 2
    await work.settle()


async def test_rows_left_out_after_a_full_part_are_not_lost() -> None:
    work = Work(LooseSource([[[None, None, "text"]]]), limits=PartLimits(2))
    work.run()
    await work.settle()
    assert [part.rows for part in work.recorded] == [2, 0]


async def test_by_default_the_first_bad_row_fails_the_run() -> None:
    work = Work(LooseSource([[[None, "text", None]]]), skip_errors=False)
    with pytest.raises(ValueNotEncodable) as caught:
        work.run()
    assert caught.value.metadata == {"column": "text"}
    assert not await keys(work.store), "and leaves nothing"


@pytest.mark.parametrize("kind", list(OutputKind)[:2])
async def test_a_store_that_fails_in_either_part_leaves_nothing(
    kind: OutputKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(LooseSource([[[None, "text", None]]]))
    create = work.store.create

    def failing(key: OutputKey) -> MemoryPartWriter:
        writer = create(key)
        if key.kind is kind:

            def write(_: object) -> int:
                raise StoreFailed

            monkeypatch.setattr(writer, "write", write)
        return writer

    monkeypatch.setattr(work.store, "create", failing)
    with pytest.raises(StoreFailed):
        work.run()
    assert not await keys(work.store)
    assert not work.recorded


# --- bounds


@pytest.mark.parametrize(
    ("caps", "error"),
    [
        (Caps(11, None, 1), None),
        (Caps(10, None, 1), ExportTooLarge),  # a row that was left out counts as well
        (Caps(None, 120, 1), None),
        (Caps(None, 119, 1), ExportTooLarge),
        (Caps(None, None, 0), TooManyRowErrors),
        (Caps(None, None, None), None),
    ],
)
def test_a_whole_output_is_held_against_the_caps_with_the_rows_that_it_lacks(
    caps: Caps, error: type[Exception] | None
) -> None:
    one = PartRecord(0, 0, 1, 5, 50, 0, 0, 0, 0, 0, 0, b"")
    lacking = replace(one, rows=1, bytes=20, kind=OutputKind.ERROR)
    output = Manifest((), (one, one), (lacking,))
    with pytest.raises(error) if error else nullcontext():
        caps.check_whole(output)


async def test_more_bad_rows_than_allowed_fail_the_run_with_cap_and_count() -> None:
    work = Work(LooseSource([[["text", None] * 50]]), caps=Caps(None, None, 9))
    with pytest.raises(TooManyRowErrors) as caught:
        work.run()
    assert caught.value.metadata["cap"] == "max_row_errors"
    assert caught.value.metadata["limit"] == "9"
    assert int(caught.value.metadata["count"]) > 9
    assert not await keys(work.store)
    assert not caught.value.retryable


def test_just_as_many_as_allowed_are_fine() -> None:
    Work(LooseSource([[["text", None] * 9]]), caps=Caps(None, None, 9)).run()


def test_bad_rows_of_other_shards_count_too() -> None:
    caps = Caps(None, None, 9)
    caps.others(Totals(rows=10, bytes=0, row_errors=8), Totals(0, 0, 0))
    with pytest.raises(TooManyRowErrors):
        Work(LooseSource([[["text", "text"]]]), caps=caps).run()


def test_a_row_that_was_left_out_counts_against_the_cap_on_rows() -> None:
    Work(LooseSource([[["text", None, None]]]), caps=Caps(3, None, 100)).run()
    with pytest.raises(ExportTooLarge):
        Work(LooseSource([[["text", None, None]]]), caps=Caps(2, None, 100)).run()


def test_error_parts_count_against_the_cap_on_bytes() -> None:
    plain = Work(LooseSource([[[None, None]]])).run()
    caps = Caps(None, plain.bytes + 50, 100)
    with pytest.raises(ExportTooLarge):
        Work(LooseSource([[["text", None, None]]]), caps=caps).run()


# --- a source that cannot tell the row


class BlindSource(LooseSource):
    """Fails in the middle without saying where."""

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> LooseStream:
        return BlindStream(self.shards[shard.index], skip_rows, 0)


class BlindStream(LooseStream):
    def loose(self) -> Iterator[LooseBatch]:
        yield from super().loose()
        raise not_fitting("price")


async def test_a_source_that_cannot_tell_the_row_fails_the_run_and_says_so() -> None:
    work = Work(BlindSource([[[None, "text"]]]))
    with pytest.raises(ValueNotEncodable, match="cannot tell in which row") as caught:
        work.run()
    assert caught.value.metadata == {"column": "price"}
    assert not await keys(work.store)
