"""What every output store promises, held against each of them."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from exportd_server.errors import ErrorReason, StoreFailed
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix, OutputKind
from tests.support.faulty_store import FAILS, FULL, Fault, FaultyStore, on
from tests.support.seaweed import S3Case
from tests.support.store import (
    JOB,
    LocalCase,
    MemoryCase,
    StoreCase,
    drain,
    jobs,
    keys,
    part_key,
    put,
    read,
)
from tests.support.waits import ENOUGH


def _local(request: pytest.FixtureRequest) -> StoreCase:
    path: Path = request.getfixturevalue("tmp_path")
    return LocalCase(path / "store")


def _s3(request: pytest.FixtureRequest) -> StoreCase:
    return S3Case(request.getfixturevalue("seaweed"))


CASES: dict[str, Callable[[pytest.FixtureRequest], StoreCase]] = {
    "local": _local,
    "memory": lambda _: MemoryCase(),
    "s3": _s3,
}

SAME_JOB_OF_ANOTHER = JobPrefix("rival", JOB.job_id)
OTHER_JOB = JobPrefix(JOB.tenant, "0197c1f0-7a3e-7000-8000-000000000002")


@pytest.fixture(params=list(CASES))
async def case(request: pytest.FixtureRequest) -> AsyncIterator[StoreCase]:
    case = CASES[request.param](request)
    yield case
    await case.store.close()


@pytest.fixture
def store(case: StoreCase) -> OutputStore:
    return case.store


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


# --- writing and reading


async def test_a_finalized_part_is_read_back_as_it_was_written(store: OutputStore) -> None:
    key = part_key()
    writer = store.create(key)
    assert writer.write(b"one,") == 4
    assert writer.write(bytearray(b"two,")) == 4
    assert writer.write(memoryview(b"-three-")[1:-1]) == 5
    writer.finalize()
    assert await read(store, key) == b"one,two,three"
    assert await store.size(key) == 13
    assert await keys(store) == {key}
    assert await jobs(store) == {JOB}


async def test_the_writer_does_not_hold_on_to_the_callers_buffer(
    store: OutputStore,
) -> None:
    buffer = bytearray(b"first")
    writer = store.create(part_key())
    writer.write(buffer)
    buffer[:] = b"other"
    buffer.clear()
    writer.finalize()
    assert await read(store, part_key()) == b"first"


async def test_a_part_without_bytes_is_a_part(store: OutputStore) -> None:
    writer = store.create(part_key())
    writer.write(b"")
    writer.finalize()
    assert await store.size(part_key()) == 0
    assert await read(store, part_key()) == b""
    assert await keys(store) == {part_key()}


async def test_a_large_part_survives_many_writes_of_odd_sizes(store: OutputStore) -> None:
    rng = random.Random(1)
    data = rng.randbytes(24 << 20)
    view, position = memoryview(data), 0
    writer = store.create(part_key())
    while position < len(data):
        size = rng.choice([1, 7, 4096, 65_537, 1 << 20, 3_000_001])
        position += writer.write(view[position : position + size])
    writer.finalize()
    assert await store.size(part_key()) == len(data)
    assert await read(store, part_key()) == data


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 1_500_000, 2_999_999, 3_000_000])
async def test_a_part_is_read_from_any_offset_to_its_end(
    store: OutputStore, offset: int
) -> None:
    data = random.Random(2).randbytes(3_000_000)
    put(store, part_key(), data)
    assert await read(store, part_key(), offset) == data[offset:]


async def test_an_offset_past_the_end_reads_nothing_and_a_negative_one_is_refused(
    store: OutputStore,
) -> None:
    put(store, part_key(), b"short")
    assert await read(store, part_key(), 6) == b""
    assert await read(store, part_key(), 1 << 40) == b""
    with pytest.raises(ValueError, match="not negative"):
        await store.open(part_key(), -1)


async def test_a_read_fills_the_buffer_from_its_start_and_no_further_than_it_says(
    store: OutputStore,
) -> None:
    put(store, part_key(), b"0123456789")
    reader = await store.open(part_key(), 2)
    buffer = bytearray(b"????????????????")
    count = await reader.readinto(memoryview(buffer)[3:7])
    assert 0 < count <= 4
    assert buffer == b"???" + b"2345"[:count] + b"?" * (13 - count)
    assert await drain(reader, 3) == b"0123456789"[2 + count :]
    assert await reader.readinto(memoryview(buffer)) == 0
    assert await reader.readinto(memoryview(buffer)) == 0
    await reader.close()


async def test_readers_do_not_disturb_each_other_and_close_twice(
    store: OutputStore,
) -> None:
    put(store, part_key(), b"abcdef")
    one, two = await store.open(part_key()), await store.open(part_key(), 3)
    assert await drain(one, 2) == b"abcdef"
    await one.close()
    await one.close()
    assert await drain(two, 2) == b"def"
    await two.close()


async def test_another_client_sees_what_was_finalized(case: StoreCase) -> None:
    put(case.store, part_key(), b"data")
    other = case.again()
    assert await read(other, part_key()) == b"data"
    assert await keys(other) == {part_key()}
    await other.close()


async def test_a_missing_part_is_a_key_error(store: OutputStore) -> None:
    put(store, part_key(), b"data")
    for key in (
        part_key(token=2),
        part_key(shard=1),
        part_key(sequence=1),
        part_key(kind=OutputKind.ERROR),
        part_key(OTHER_JOB),
        part_key(SAME_JOB_OF_ANOTHER),
    ):
        with pytest.raises(KeyError):
            await store.open(key)
        with pytest.raises(KeyError):
            await store.size(key)


# --- nothing before finalize, everything after


async def test_an_unfinished_part_is_not_readable_sized_or_listed(
    store: OutputStore,
) -> None:
    writer = store.create(part_key())
    for _ in range(2):
        with pytest.raises(KeyError):
            await store.open(part_key())
        with pytest.raises(KeyError):
            await store.size(part_key())
        assert await keys(store) == set()
        writer.write(bytes(100_000))
    writer.finalize()
    assert await keys(store) == {part_key()}


async def test_an_unfinished_part_makes_its_job_listed(store: OutputStore) -> None:
    writer = store.create(part_key())
    assert await jobs(store) == {JOB}
    writer.abort()
    assert await jobs(store) == set()


async def test_no_reader_and_no_lister_ever_sees_a_piece_of_a_part(
    store: OutputStore, threads: ThreadPoolExecutor
) -> None:
    data = random.Random(3).randbytes(300_000)
    wanted = [part_key(sequence=i) for i in range(40)]
    done, looked = threading.Event(), threading.Event()

    def write_all() -> None:
        try:
            for key in wanted:
                writer = store.create(key)
                for start in range(0, len(data), 50_000):
                    writer.write(memoryview(data)[start : start + 50_000])
                writer.finalize()
                if key.sequence % 8 == 7:
                    looked.clear()
                    assert looked.wait(ENOUGH)
        finally:
            done.set()

    writing = threads.submit(write_all)
    seen = 0
    while not done.is_set():
        for key in await keys(store):
            assert await read(store, key) == data
            seen += 1
        for key in wanted:
            try:
                assert await store.size(key) == len(data)
            except KeyError:
                break
        looked.set()
    writing.result()
    assert seen > 0
    assert await keys(store) == set(wanted)


async def test_abort_leaves_nothing_and_may_be_repeated(case: StoreCase) -> None:
    writer = case.store.create(part_key())
    writer.write(b"data")
    writer.abort()
    writer.abort()
    assert case.remains() == []
    with pytest.raises(KeyError):
        await case.store.open(part_key())


async def test_abort_after_finalize_changes_nothing(store: OutputStore) -> None:
    writer = store.create(part_key())
    writer.write(b"data")
    writer.finalize()
    writer.abort()
    assert await read(store, part_key()) == b"data"


@pytest.mark.parametrize("ending", ["finalize", "abort"])
async def test_a_writer_that_is_done_refuses_to_go_on(
    store: OutputStore, ending: str
) -> None:
    writer = store.create(part_key())
    writer.write(b"data")
    getattr(writer, ending)()
    with pytest.raises(ValueError, match="finalized or aborted"):
        writer.write(b"more")
    with pytest.raises(ValueError, match="finalized or aborted"):
        writer.finalize()
    if ending == "finalize":
        assert await read(store, part_key()) == b"data"
    else:
        assert await keys(store) == set()


async def test_a_finalized_part_is_never_overwritten(case: StoreCase) -> None:
    """Also not by a writer that began before it was there."""
    store = case.store
    early = store.create(part_key())
    early.write(b"early")
    put(store, part_key(), b"the part")
    held = case.remains()
    with pytest.raises(StoreFailed):
        early.finalize()
    early.abort()
    # A store may refuse as early as at create.
    with pytest.raises(StoreFailed):
        put(store, part_key(), b"late")
    gc.collect()
    await store.sweep_unfinished(JOB)
    assert await read(store, part_key()) == b"the part"
    assert len(case.remains()) <= len(held)


async def test_two_tokens_never_collide(store: OutputStore) -> None:
    """P3: the worker that lost its lease and the one that took over write one part."""
    lost, taken_over = part_key(token=7), part_key(token=8)
    zombie, successor = store.create(lost), store.create(taken_over)
    zombie.write(b"zombie")
    successor.write(b"successor")
    successor.finalize()
    zombie.finalize()
    assert await read(store, taken_over) == b"successor"
    assert await read(store, lost) == b"zombie"
    await store.delete(lost)
    assert await read(store, taken_over) == b"successor"


async def test_kinds_do_not_collide(store: OutputStore) -> None:
    output, error = part_key(kind=OutputKind.OUTPUT), part_key(kind=OutputKind.ERROR)
    put(store, output, b"rows")
    put(store, error, b"rejects")
    assert await keys(store) == {output, error}
    await store.delete(output)
    assert await read(store, error) == b"rejects"


# --- deleting


async def test_deleting_a_part_is_idempotent_and_spares_the_others(
    case: StoreCase,
) -> None:
    store = case.store
    put(store, part_key(sequence=0), b"zero")
    put(store, part_key(sequence=1), b"one")
    await store.delete(part_key(sequence=0))
    await store.delete(part_key(sequence=0))
    await store.delete(part_key(OTHER_JOB))
    assert await keys(store) == {part_key(sequence=1)}
    await store.delete(part_key(sequence=1))
    assert await jobs(store) == set()
    assert case.remains() == []


async def test_deleting_a_job_takes_all_of_it_and_counts_what_went(
    case: StoreCase,
) -> None:
    store = case.store
    put(store, part_key(sequence=0), b"zero")
    put(store, part_key(sequence=1, token=2), b"one")
    put(store, part_key(kind=OutputKind.ERROR), b"rejects")
    writer = store.create(part_key(sequence=2))
    writer.write(b"unfinished")
    case.abandon(part_key(sequence=3), b"abandoned")
    assert await store.delete_job(JOB) == 5
    assert case.remains() == []
    assert await store.delete_job(JOB) == 0
    writer.abort()


async def test_deleting_a_job_that_never_was_is_fine(store: OutputStore) -> None:
    assert await store.delete_job(JOB) == 0
    assert await keys(store) == set()
    assert await store.sweep_unfinished(JOB) == 0


async def test_deleting_a_job_touches_no_other_tenant_and_no_other_job(
    store: OutputStore,
) -> None:
    for prefix in (JOB, OTHER_JOB, SAME_JOB_OF_ANOTHER):
        put(store, part_key(prefix), str(prefix).encode())
    assert await store.delete_job(JOB) == 1
    assert await jobs(store) == {OTHER_JOB, SAME_JOB_OF_ANOTHER}
    for prefix in (OTHER_JOB, SAME_JOB_OF_ANOTHER):
        assert await read(store, part_key(prefix)) == str(prefix).encode()


@pytest.mark.minutes
async def test_a_job_of_very_many_parts_is_listed_and_deleted_whole(
    case: StoreCase,
) -> None:
    """More than any backend answers with in one page."""
    store = case.store
    wanted = {part_key(sequence=i) for i in range(1_100)}
    case.fill(sorted(wanted, key=str), b"x")
    assert await keys(store) == wanted
    assert await store.delete_job(JOB) == len(wanted)
    assert await keys(store) == set()


async def test_listing_may_be_broken_off(store: OutputStore) -> None:
    for i in range(3):
        put(store, part_key(sequence=i), b"x")
    listing = store.list_job(JOB)
    assert (await anext(listing)).prefix == JOB
    assert await store.delete_job(JOB) == 3


async def test_an_open_reader_survives_the_deletion(store: OutputStore) -> None:
    data = random.Random(4).randbytes(5 << 20)
    put(store, part_key(), data)
    reader = await store.open(part_key())
    buffer = memoryview(bytearray(1000))
    count = await reader.readinto(buffer)
    await store.delete_job(JOB)
    with pytest.raises(KeyError):
        await store.open(part_key())
    assert bytes(buffer[:count]) + await drain(reader) == data
    await reader.close()


async def test_a_writer_whose_job_was_deleted_cannot_bring_it_back(
    case: StoreCase,
) -> None:
    """L1: neither by writing on, nor by finishing, nor by giving up."""
    store = case.store
    finishing, aborting = store.create(part_key()), store.create(part_key(sequence=1))
    finishing.write(b"before")
    await store.delete_job(JOB)
    for writer in (finishing, aborting):
        with suppress(StoreFailed):
            writer.write(b"after")
    with pytest.raises(StoreFailed) as failure:
        finishing.finalize()
    assert failure.value.reason is ErrorReason.STORE_FAILED
    finishing.abort()
    aborting.abort()
    assert case.remains() == []
    assert await jobs(store) == set()


async def test_a_late_writer_cannot_enter_the_job_that_was_begun_anew(
    case: StoreCase,
) -> None:
    store = case.store
    late = store.create(part_key(token=1))
    late.write(b"late")
    await store.delete_job(JOB)
    put(store, part_key(token=2), b"anew")
    with pytest.raises(StoreFailed):
        late.finalize()
    late.abort()
    assert await keys(store) == {part_key(token=2)}
    assert await read(store, part_key(token=2)) == b"anew"
    await store.delete_job(JOB)
    assert case.remains() == []


async def test_a_job_is_gone_when_its_deletion_races_with_its_writers(
    case: StoreCase, threads: ThreadPoolExecutor
) -> None:
    """Whatever a writer had begun before, and whether or not it was told of a failure."""
    store = case.store
    loop = asyncio.get_running_loop()

    def write(shard: int, turn: int, start: threading.Barrier) -> None:
        writers = [
            store.create(part_key(shard=shard, sequence=i, token=turn)) for i in range(4)
        ]
        start.wait()
        for writer in writers:
            with suppress(StoreFailed):
                writer.write(b"data")
                writer.finalize()
            writer.abort()

    def delete(start: threading.Barrier) -> None:
        start.wait()
        asyncio.run_coroutine_threadsafe(store.delete_job(JOB), loop).result(ENOUGH)

    for turn in range(25):
        start = threading.Barrier(3, timeout=20)
        work = [threads.submit(write, shard, turn, start) for shard in range(2)]
        work.append(threads.submit(delete, start))
        await asyncio.gather(*map(asyncio.wrap_future, work))
        # A part that was finalized after the deletion had passed is rightly there.
        await store.delete_job(JOB)
        assert case.remains() == []


async def test_jobs_come_and_go_without_disturbing_their_neighbours(
    store: OutputStore, threads: ThreadPoolExecutor
) -> None:
    """The last part of one job is deleted while the first one of another of the same
    tenant is begun: neither fails, and nothing is lost."""
    loop = asyncio.get_running_loop()

    async def leave(job: JobPrefix, turn: int) -> None:
        if turn % 2:
            await store.delete(part_key(job, token=turn))
        else:
            await store.delete_job(job)

    def live(number: int) -> None:
        job = JobPrefix(JOB.tenant, f"0197c1f0-7a3e-7000-8000-{number:012d}")
        for turn in range(60):
            key = part_key(job, token=turn)
            put(store, key, b"data")
            store.create(part_key(job, token=turn, sequence=1)).abort()
            found = asyncio.run_coroutine_threadsafe(read(store, key), loop).result(ENOUGH)
            assert found == b"data"
            asyncio.run_coroutine_threadsafe(leave(job, turn), loop).result(ENOUGH)

    await asyncio.gather(
        *(asyncio.wrap_future(threads.submit(live, number)) for number in range(3))
    )
    assert await jobs(store) == set()


async def test_deleting_one_job_from_several_sides_at_once_is_fine(
    case: StoreCase,
) -> None:
    case.fill([part_key(sequence=i) for i in range(200)], b"x")
    other = case.again()
    counts = await asyncio.gather(
        *(store.delete_job(JOB) for store in (case.store, other) for _ in range(3))
    )
    if case.knows_writers:
        assert sum(counts) == 200
    else:
        assert sum(counts) >= 200
    assert case.remains() == []
    await other.close()


# --- writers that died


async def test_what_a_dead_writer_left_is_unreadable_and_listed_until_it_is_swept(
    case: StoreCase,
) -> None:
    store = case.store
    case.abandon(part_key(), bytes(100_000))
    case.abandon(part_key(kind=OutputKind.ERROR, sequence=5), b"rejects")
    gc.collect()
    with pytest.raises(KeyError):
        await store.open(part_key())
    assert await keys(store) == set()
    assert await jobs(store) == {JOB}
    assert await store.sweep_unfinished(OTHER_JOB) == 0
    assert await store.sweep_unfinished(SAME_JOB_OF_ANOTHER) == 0
    assert await store.sweep_unfinished(JOB) == 2
    assert await store.sweep_unfinished(JOB) == 0
    assert case.remains() == []
    assert await jobs(store) == set()


async def test_a_sweep_spares_living_writers_and_finished_parts(case: StoreCase) -> None:
    if not case.knows_writers:
        pytest.skip("the backend does not know who lives; its own suite has its rule")
    store = case.store
    put(store, part_key(sequence=0), b"finished")
    writer = store.create(part_key(sequence=1))
    case.abandon(part_key(sequence=2), b"abandoned")
    gc.collect()
    other = case.again()
    assert await other.sweep_unfinished(JOB) == 1
    assert await store.sweep_unfinished(JOB) == 0
    await other.close()
    writer.write(b"living")
    writer.finalize()
    assert await keys(store) == {part_key(sequence=0), part_key(sequence=1)}
    assert await read(store, part_key(sequence=1)) == b"living"


async def test_sweeping_and_deleting_all_the_time_never_costs_a_writer_its_part(
    case: StoreCase, threads: ThreadPoolExecutor
) -> None:
    """What is swept is another job where the backend does not know who lives."""
    store = case.store
    swept = JOB if case.knows_writers else OTHER_JOB
    wanted = [part_key(sequence=i) for i in range(60)]
    done = threading.Event()

    def write_all() -> None:
        try:
            for key in wanted:
                put(store, key, b"data")
        finally:
            done.set()

    writing = threads.submit(write_all)
    while not done.is_set():
        await store.sweep_unfinished(swept)
        await store.delete_job(OTHER_JOB)
    writing.result()
    assert await keys(store) == set(wanted)


async def test_the_part_can_be_written_anew_after_its_writer_died(case: StoreCase) -> None:
    case.abandon(part_key(), b"abandoned")
    put(case.store, part_key(), b"anew")
    gc.collect()
    assert await case.store.sweep_unfinished(JOB) == 1
    assert await read(case.store, part_key()) == b"anew"


# --- the store that fails on demand, which other suites lean on


async def test_a_faulty_store_fails_as_told_and_leaves_no_half_part(
    case: StoreCase,
) -> None:
    store = FaultyStore(case.store, on("write", FULL, first=1, times=1))
    writer = store.create(part_key())
    writer.write(b"one")
    with pytest.raises(StoreFailed) as failure:
        writer.write(b"two")
    assert failure.value.reason is ErrorReason.STORE_FULL
    writer.abort()
    assert case.remains() == []
    store.plan = on("open", FAILS, times=2)
    put(store, part_key(), b"data")
    for _ in range(2):
        with pytest.raises(StoreFailed):
            await store.open(part_key())
    assert await read(store, part_key()) == b"data"
    store.plan = on("readinto", Fault(flipped=True))
    assert await read(store, part_key()) == b"da" + bytes([ord("t") ^ 1]) + b"a"
    store.plan = on("readinto", Fault(ends=True), first=1)
    assert await read(store, part_key()) == b"data"
    store.plan = on("readinto", Fault(ends=True))
    assert await read(store, part_key()) == b""
    store.plan = on("readinto", Fault(short=True))
    assert await read(store, part_key()) == b"data"
    assert store.counts["write"] == 3


async def test_a_faulty_stores_lost_writer_leaves_what_a_sweep_takes(
    case: StoreCase,
) -> None:
    plan = on("finalize", Fault(fails=True, lost=True), times=1)
    store = FaultyStore(case.store, plan)
    with pytest.raises(StoreFailed):
        put(store, part_key(), b"data")
    assert case.remains() != []
    assert await keys(store) == set()
    assert await store.sweep_unfinished(JOB) == 1
    assert case.remains() == []


# --- whose it is


OWNERS = [f"0197c1f0-7a3e-4000-8000-00000000000{number}" for number in range(8)]


async def test_the_first_to_claim_a_place_has_it(case: StoreCase) -> None:
    mine, theirs = OWNERS[:2]
    assert await case.store.claim(mine) == mine
    other = case.again()
    assert await other.claim(theirs) == mine
    assert await other.claim(mine) == mine
    if other is not case.store:
        await other.close()


async def test_of_several_claims_at_once_all_are_told_the_same_owner(
    store: OutputStore,
) -> None:
    told = await asyncio.gather(*map(store.claim, OWNERS))
    assert len(set(told)) == 1
    assert told[0] in OWNERS


async def test_a_claim_is_no_part_of_any_job_and_outlives_them_all(
    store: OutputStore,
) -> None:
    await store.claim(OWNERS[0])
    assert await jobs(store) == set()
    put(store, part_key(), b"data")
    assert await jobs(store) == {JOB}
    await store.delete_job(JOB)
    assert await store.claim(OWNERS[1]) == OWNERS[0]
