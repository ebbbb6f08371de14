"""The local store under faults, crashes, planted links and a cold cache: what the suite
for every store cannot bring about from outside."""

from __future__ import annotations

import asyncio
import errno
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from exportd_server.encoders.base import Format, OutputFormat
from exportd_server.errors import ConfigurationError, ErrorReason, StoreFailed
from exportd_server.jobs.housekeeping import manifest_key
from exportd_server.jobs.manifest import store_manifest
from exportd_server.jobs.model import ExportSpec, Job, JobState, Manifest, PartRecord
from exportd_server.platform.files import Directory, File
from exportd_server.store import local
from exportd_server.store.key import JobPrefix, OutputKey, OutputKind
from exportd_server.store.local import LocalStore
from tests.support.store import (
    JOB,
    FaultySystem,
    drain,
    fail_once,
    full_from,
    jobs,
    keys,
    part_key,
    put,
    read,
    tree,
    writer_elsewhere,
)
from tests.support.waits import ENOUGH

REPOSITORY = Path(__file__).parents[2]
DATA = random.Random(0).randbytes(10_000)
KEY = part_key()
PATH = f"{JOB}/output/{KEY.name}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[LocalStore]:
    store = LocalStore(root)
    yield store
    await store.close()


def write_part(store: LocalStore, key: OutputKey = KEY) -> None:
    """Everything a writer does, with the abort that follows an error."""
    writer = store.create(key)
    try:
        writer.write(DATA[:5000])
        writer.write(DATA[5000:])
        writer.finalize()
    finally:
        writer.abort()


def failure_of(store: LocalStore) -> StoreFailed | None:
    """Write the part; what came of it."""
    try:
        write_part(store)
    except StoreFailed as error:
        return error
    return None


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- layout and order


async def test_a_part_lies_where_the_layout_says_and_is_the_users_alone(
    store: LocalStore, root: Path
) -> None:
    put(store, KEY, DATA)
    assert (root / PATH).read_bytes() == DATA
    assert (root / PATH).stat().st_mode & 0o777 == 0o600
    assert (root / PATH).stat().st_nlink == 1
    for directory in (root, *(root / PATH).parents[:3]):
        assert directory.stat().st_mode & 0o777 == 0o700


async def test_an_unfinished_part_has_a_hidden_name_beside_the_final_one(
    store: LocalStore, root: Path
) -> None:
    writer = store.create(KEY)
    (name,) = os.listdir((root / PATH).parent)  # noqa: PTH208 - names, not paths
    assert name.startswith(f".{KEY.name}.")
    writer.abort()
    assert tree(root) == []


async def test_bytes_are_durable_before_the_name_and_the_name_before_the_return(
    store: LocalStore,
) -> None:
    """P5, in the order of the calls to the system."""
    with FaultySystem().in_place() as system:
        writer = store.create(KEY)
        begun = len(system.calls)
        writer.write(DATA)
        writer.finalize()
    create, finish = system.calls[:begun], system.calls[begun:]
    # Three directories were made, and the three that hold them were synced after.
    assert create.count("mkdir") == 3
    assert create[create.index("flock") :].count("fsync") == 3
    told = [name for name in finish if name in {"write", "fsync", "link", "unlink"}]
    assert told == ["write", "fsync", "link", "unlink", "fsync"]


async def test_a_long_part_is_sent_to_the_device_while_it_is_written(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its end would wait for all of it."""
    told: list[tuple[int, int]] = []
    write_out = File.write_out

    def noting(file: File, offset: int, size: int) -> None:
        told.append((offset, size))
        write_out(file, offset, size)

    monkeypatch.setattr(File, "write_out", noting)
    data, times, mib = os.urandom(3 << 20), 10, 1 << 20
    writer = store.create(KEY)
    for _ in range(times):
        writer.write(data)
    writer.finalize()
    assert told == [(0, 9 * mib), (9 * mib, 9 * mib), (18 * mib, 9 * mib)]
    assert await read(store, KEY) == data * times


async def test_a_deletion_is_durable_when_it_returns(store: LocalStore) -> None:
    put(store, KEY, DATA)
    put(store, part_key(sequence=1), DATA)
    with FaultySystem().in_place() as system:
        await store.delete(KEY)
        assert system.calls.index("unlink") < system.calls.index("fsync")
        system.calls.clear()
        await store.delete_job(JOB)
        assert system.calls.index("rename") < system.calls.index("fsync")


async def test_directories_pruned_at_any_moment_of_a_create_do_not_fail_it(
    tmp_path: Path,
) -> None:
    """Right before each call to the system somebody else removes what is empty."""
    count = length_of(tmp_path / "counted")
    pruned = 0
    for moment in range(count):
        root = tmp_path / str(moment)
        store = LocalStore(root)

        def prune(name: str, index: int, root: Path = root, moment: int = moment) -> None:
            nonlocal pruned
            if index == moment:
                for path in reversed(tree(root)):
                    with suppress(OSError):
                        (root / path).rmdir()
                        pruned += 1

        with FaultySystem(prune).in_place():
            write_part(store)
        assert await read(store, KEY) == DATA
        await store.close()
    assert pruned > 10


async def test_names_that_are_no_parts_are_not_listed(
    store: LocalStore, root: Path
) -> None:
    put(store, KEY, DATA)
    kind = (root / PATH).parent
    for name in ("notes.txt", ".hidden", f"{KEY.name}.bak", "000000-000000.01"):
        (kind / name).write_bytes(b"")
    for name in ("lost+found", "Tenant", ".probe.0"):
        (root / name).mkdir()
    (root / "acme" / "no-uuid").mkdir()
    (root / "stray").write_bytes(b"")
    assert await keys(store) == {KEY}
    assert await jobs(store) == {JOB}
    assert await store.sweep_unfinished(JOB) == 0
    assert (kind / ".hidden").exists()


@pytest.mark.parametrize("what", ["file", "below a file"])
def test_a_root_that_cannot_be_used_is_refused_at_start(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" if what == "file" else tmp_path / "file" / "below"
    with pytest.raises(ConfigurationError, match="output store") as refused:
        LocalStore(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("call", ["link", "flock"])
def test_a_file_system_without_links_or_locks_is_refused_at_start(
    root: Path, call: str
) -> None:
    def missing(name: str, index: int) -> None:
        if name == call:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with (
        FaultySystem(missing).in_place(),
        pytest.raises(ConfigurationError, match="hard links and file locks"),
    ):
        LocalStore(root)
    assert tree(root) == []


async def test_a_full_disk_does_not_keep_the_store_from_opening(root: Path) -> None:
    def full(name: str, index: int) -> None:
        if name in {"open", "link"} and index:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with FaultySystem(full).in_place():
        store = LocalStore(root)
    await store.close()


# --- every call to the system fails in turn


def length_of(root: Path) -> int:
    """How many calls it takes to write one part."""
    store = LocalStore(root)
    with FaultySystem().in_place() as system:
        write_part(store)
    return len(system.calls)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("late", [False, True], ids=["without effect", "with effect"])
async def test_whichever_call_fails_the_part_is_whole_or_nothing_is_left(
    tmp_path: Path, number: int, late: bool
) -> None:
    count = length_of(tmp_path / "counted")
    failed = 0
    for index in range(count):
        root = tmp_path / str(index)
        store = LocalStore(root)
        before = open_descriptors()
        with FaultySystem(fail_once(index, number), late=late).in_place() as system:
            failure = failure_of(store)
        assert open_descriptors() == before, system.calls[index]
        if failure is None:
            assert system.calls[index] == "close"
            assert tree(root)[-1] == PATH
            assert await read(store, KEY) == DATA
        else:
            failed += 1
            assert failure.reason is (
                ErrorReason.STORE_FAILED if number == errno.EIO else ErrorReason.STORE_FULL
            )
            assert failure.retryable is (number == errno.EIO)
            assert isinstance(failure.__cause__, OSError)
            assert tree(root) == [], system.calls[index]
            with pytest.raises(KeyError):
                await store.open(KEY)
            # And the next attempt goes as if nothing had been.
            write_part(store)
            assert await read(store, KEY) == DATA
        await store.close()
    assert failed > count / 2


async def test_a_disk_that_is_full_from_any_call_on_leaves_nothing_and_says_full(
    tmp_path: Path,
) -> None:
    count = length_of(tmp_path / "counted")
    stages = set()
    for index in range(count):
        root = tmp_path / str(index)
        store = LocalStore(root)
        with FaultySystem(full_from(index)).in_place() as system:
            failure = failure_of(store)
        if failure is None:
            assert not {"mkdir", "write", "fsync", "link"} & set(system.calls[index:])
        else:
            assert failure.reason is ErrorReason.STORE_FULL
            assert tree(root) == []
            stages.add(system.calls[index])
        await store.close()
    assert {"mkdir", "write", "fsync", "link"} <= stages


# --- the manifest and the mark of the owner, under the same faults

SPEC = ExportSpec("transfers", OutputFormat(Format.CSV))
RECORD = PartRecord(
    shard=0,
    sequence=0,
    token=1,
    rows=10,
    bytes=len(DATA),
    prefix_bytes=0,
    suffix_bytes=0,
    crc32c=1,
    prefix_crc32c=0,
    body_crc32c=1,
    suffix_crc32c=0,
    sha256=bytes(32),
)
MANIFEST_KEY = manifest_key(JOB, 7)


def write_manifest(store: LocalStore) -> None:
    """What a worker does last before a job succeeds."""
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    job = Job(
        job_id=JOB.job_id,
        tenant=JOB.tenant,
        spec=SPEC,
        state=JobState.RUNNING,
        request_id="",
        create_time=moment,
    )
    store_manifest(store, job, Manifest((), (RECORD,)), MANIFEST_KEY.token)


@pytest.mark.parametrize("late", [False, True], ids=["without effect", "with effect"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
async def test_whichever_call_fails_the_manifest_is_whole_or_absent_and_the_parts_stay(
    tmp_path: Path, number: int, late: bool
) -> None:
    """L8: what cannot be stored is not there, and the next attempt stores it."""
    store = LocalStore(tmp_path / "counted")
    put(store, KEY, DATA)
    with FaultySystem().in_place() as counted:
        write_manifest(store)
    whole = await read(store, MANIFEST_KEY)
    assert json.loads(whole)["parts"][0]["key"] == str(KEY)
    await store.close()
    failed = set()
    for index, call in enumerate(counted.calls):
        root = tmp_path / str(index)
        store = LocalStore(root)
        put(store, KEY, DATA)
        before = open_descriptors()
        told = None
        with FaultySystem(fail_once(index, number), late=late).in_place():
            try:
                write_manifest(store)
            except StoreFailed as failure:
                told = failure
        assert open_descriptors() == before, call
        if told is None:
            # A directory that is there already is no fault.
            assert call in {"close", "mkdir"}
            assert await keys(store) == {KEY, MANIFEST_KEY}
        else:
            failed.add(call)
            assert told.retryable is (number == errno.EIO)
            assert await keys(store) == {KEY}, call
            assert [name for name in tree(root) if (root / name).is_file()] == [PATH]
            write_manifest(store)
        assert await read(store, MANIFEST_KEY) == whole
        assert await read(store, KEY) == DATA
        await store.close()
    assert {"open", "mkdir", "write", "fsync", "link"} <= failed


async def test_a_disk_that_is_full_from_any_call_on_has_no_half_manifest(
    tmp_path: Path,
) -> None:
    stages = set()
    for index in range(length_of(tmp_path / "counted")):
        root = tmp_path / str(index)
        store = LocalStore(root)
        put(store, KEY, DATA)
        with FaultySystem(full_from(index)).in_place() as system:
            told = None
            try:
                write_manifest(store)
            except StoreFailed as failure:
                told = failure
        if told is not None:
            assert told.reason is ErrorReason.STORE_FULL
            stages.add(system.calls[index])
            assert await keys(store) == {KEY}
        assert await read(store, KEY) == DATA
        await store.close()
    assert {"mkdir", "write", "fsync", "link"} <= stages


MINE = "0197c1f0-7a3e-4000-8000-000000000001"
THEIRS = "0197c1f0-7a3e-4000-8000-000000000002"


async def calls_of_a_claim(root: Path) -> list[str]:
    store = LocalStore(root)
    with FaultySystem().in_place() as system:
        assert await store.claim(MINE) == MINE
    await store.close()
    return system.calls


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("late", [False, True], ids=["without effect", "with effect"])
async def test_whichever_call_of_a_claim_fails_the_owner_is_noted_whole_or_not_at_all(
    tmp_path: Path, number: int, late: bool
) -> None:
    """Whoever claims next is told one owner, for good, and never a piece of one."""
    calls = await calls_of_a_claim(tmp_path / "counted")
    failed = set()
    for index, call in enumerate(calls):
        root = tmp_path / str(index)
        store = LocalStore(root)
        before = open_descriptors()
        told = None
        with FaultySystem(fail_once(index, number), late=late).in_place():
            try:
                assert await store.claim(MINE) == MINE
            except StoreFailed as failure:
                told = failure
        assert open_descriptors() == before, call
        if told is not None:
            failed.add(call)
            assert told.retryable is (number == errno.EIO)
        noted = (root / ".owner").exists()
        assert noted or told is not None
        # A hidden name that cannot be removed is nothing's and nobody's.
        left = [name for name in tree(root) if name != ".owner"]
        assert len(left) == (call == "unlink" and not late), call
        owner = MINE if noted else THEIRS
        assert await store.claim(THEIRS) == owner
        assert await store.claim(MINE) == owner
        assert (root / ".owner").read_text() == f"{owner}\n"
        assert await jobs(store) == set()
        await store.close()
    assert {"open", "write", "fsync", "link"} <= failed


async def test_a_disk_that_is_full_from_any_call_of_a_claim_on_says_so(
    tmp_path: Path,
) -> None:
    calls = await calls_of_a_claim(tmp_path / "counted")
    stages = set()
    for index in range(len(calls)):
        root = tmp_path / str(index)
        store = LocalStore(root)
        with FaultySystem(full_from(index)).in_place() as system:
            told = None
            try:
                await store.claim(MINE)
            except StoreFailed as failure:
                told = failure
        if told is not None:
            assert told.reason is ErrorReason.STORE_FULL
            stages.add(system.calls[index])
        assert [name for name in tree(root) if name != ".owner"] == []
        assert await store.claim(MINE) == MINE
        await store.close()
    assert {"write", "fsync", "link"} <= stages


async def test_an_owner_is_durable_before_anybody_is_told_of_it(store: LocalStore) -> None:
    """Also when another one noted it and died, or failed, before its name was durable."""
    synced = 0

    def no_sync_of_the_directory(name: str, index: int) -> None:
        nonlocal synced
        synced += name == "fsync"
        if name == "fsync" and synced == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with FaultySystem(no_sync_of_the_directory).in_place(), pytest.raises(StoreFailed):
        await store.claim(MINE)
    with FaultySystem().in_place() as system:
        assert await store.claim(THEIRS) == MINE
    assert "fsync" in system.calls


async def test_a_writer_that_failed_keeps_saying_why(store: LocalStore) -> None:
    """An encoder in between may have swallowed the first answer."""
    writer = store.create(KEY)

    def full(name: str, index: int) -> None:
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with FaultySystem(full).in_place(), pytest.raises(StoreFailed):
        writer.write(DATA)
    for call in (lambda: writer.write(DATA), writer.finalize):
        with pytest.raises(StoreFailed) as failure:
            call()
        assert failure.value.reason is ErrorReason.STORE_FULL
    writer.abort()
    assert await jobs(store) == set()


@pytest.mark.parametrize("late", [False, True], ids=["without effect", "with effect"])
async def test_a_deletion_that_fails_anywhere_is_completed_by_the_next_one(
    tmp_path: Path, late: bool
) -> None:
    def prepare(root: Path) -> LocalStore:
        store = LocalStore(root)
        for kind in OutputKind:
            put(store, part_key(kind=kind), DATA)
        put(store, part_key(sequence=1), DATA)
        return store

    store = prepare(tmp_path / "counted")
    with FaultySystem().in_place() as system:
        assert await store.delete_job(JOB) == len(OutputKind) + 1
    await store.close()
    gone = 0
    for index in range(len(system.calls)):
        root = tmp_path / str(index)
        store = prepare(root)
        before = open_descriptors()
        with FaultySystem(fail_once(index, errno.EIO), late=late).in_place():
            with suppress(StoreFailed):
                await store.delete_job(JOB)
            # The job's parts vanish together: none of them outlives another.
            left = await keys(store)
        assert open_descriptors() == before
        assert len(left) in {0, len(OutputKind) + 1}
        for key in left:
            assert await read(store, key) == DATA
        if not left and any(root.iterdir()) and tree(root) != ["acme"]:
            gone += 1
            assert await jobs(store) == {JOB}
        # A deletion that was broken off is also completed by a sweep.
        if index % 2 and not left:
            await store.sweep_unfinished(JOB)
        await store.delete_job(JOB)
        assert await jobs(store) == set()
        assert [path for path in tree(root) if path != "acme"] == []
        await store.close()
    assert gone > 3


@pytest.mark.parametrize("stage", ["before write", "before finalize"])
async def test_a_writer_caught_in_a_deletion_that_is_not_over_yet_fails(
    store: LocalStore, root: Path, stage: str
) -> None:
    """The job has been moved out of the way, the writer's directory with it, but not a
    file has been removed."""
    writer = store.create(KEY)
    if stage == "before finalize":
        writer.write(DATA)

    def break_off(name: str, index: int) -> None:
        if name == "scandir":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with FaultySystem(break_off).in_place(), pytest.raises(StoreFailed):
        await store.delete_job(JOB)
    if stage == "before write":
        writer.write(DATA)
    with pytest.raises(StoreFailed):
        writer.finalize()
    assert await keys(store) == set()
    assert not (root / "acme" / f".{JOB.job_id}" / "output" / KEY.name).exists()
    assert await jobs(store) == {JOB}
    await store.delete_job(JOB)
    assert await jobs(store) == set()


@pytest.mark.parametrize("completed_by", ["sweep", "deletion"])
async def test_a_job_begun_anew_beside_its_broken_off_deletion_is_one_job(
    store: LocalStore, root: Path, completed_by: str
) -> None:
    def break_off(name: str, index: int) -> None:
        if name == "scandir":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    put(store, KEY, DATA)
    with FaultySystem(break_off).in_place(), pytest.raises(StoreFailed):
        await store.delete_job(JOB)
    anew = part_key(token=2)
    put(store, anew, DATA)
    assert await jobs(store) == {JOB}
    assert await keys(store) == {anew}
    if completed_by == "sweep":
        assert await store.sweep_unfinished(JOB) == 0
        assert await read(store, anew) == DATA
        assert [path.name for path in (root / "acme").iterdir()] == [JOB.job_id]
        assert await store.delete_job(JOB) == 1
    else:
        assert await store.delete_job(JOB) == 2
    assert tree(root) == []


async def test_reads_that_fail_are_failures_of_the_store_not_missing_parts(
    store: LocalStore,
) -> None:
    put(store, KEY, DATA)

    def broken(name: str, index: int) -> None:
        if name in {"open", "stat", "preadv", "pread", "scandir"}:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    reader = await store.open(KEY)
    with FaultySystem(broken).in_place():
        with pytest.raises(StoreFailed):
            await reader.readinto(memoryview(bytearray(10)))
        with pytest.raises(StoreFailed):
            await store.open(KEY)
        with pytest.raises(StoreFailed):
            await store.size(KEY)
        with pytest.raises(StoreFailed):
            await keys(store)
        with pytest.raises(StoreFailed):
            await jobs(store)
        with pytest.raises(StoreFailed):
            await store.sweep_unfinished(JOB)
    assert await drain(reader) == DATA
    await reader.close()


# --- disks that are really full


async def test_a_file_size_limit_is_a_full_store_and_leaves_nothing(root: Path) -> None:
    script = """
    import resource, sys
    from pathlib import Path
    from exportd_server.errors import StoreFailed
    from exportd_server.store.key import OutputKey
    from exportd_server.store.local import LocalStore
    store = LocalStore(Path(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    writer = store.create(OutputKey.parse(sys.argv[2]))
    try:
        for _ in range(100):
            writer.write(bytes(9_999))
    except StoreFailed as error:
        print(error.reason)
    """
    answer = run_python(script, str(root), str(KEY))
    assert answer.stdout.strip() == "STORE_FULL", answer.stderr
    assert tree(root) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "tiny"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


async def test_a_disk_that_fills_up_loses_the_part_that_did_not_fit_and_no_other(
    tiny_disk: Path,
) -> None:
    store = LocalStore(tiny_disk)
    block = bytes(100_000)
    put(store, KEY, block * 3)
    writer = store.create(part_key(sequence=1))
    room = 1_048_576 // len(block) - 3
    written = [writer.write(block) for _ in range(room)]
    assert sum(written) == room * len(block)
    with pytest.raises(StoreFailed) as failure:
        writer.write(block)
    assert failure.value.reason is ErrorReason.STORE_FULL
    writer.abort()
    # What it had written was given back: another part of seven blocks fits.
    put(store, part_key(sequence=2), block * 7)
    assert await keys(store) == {KEY, part_key(sequence=2)}
    assert await read(store, KEY) == block * 3
    await store.close()


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, check=False, capture_output=True, text=True, timeout=60
    )


# --- processes that die


def killed_after(lines: int, script: str, *arguments: str) -> list[str]:
    """What a process said that was killed as soon as it had said so many lines."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        return said + process.stdout.readlines()


async def test_killed_before_any_call_to_the_system_a_part_is_whole_or_not_there(
    tmp_path: Path,
) -> None:
    """One process for each call it takes to write a part, killed right before it."""
    count = length_of(tmp_path / "counted")
    script = """
    import os, signal, sys
    from pathlib import Path
    from exportd_server.store.local import LocalStore
    from tests.support.store import FaultySystem
    from tests.unit.test_local_store import write_part

    def kill_at(index):
        def fault(name, at):
            if at == index:
                os.kill(os.getpid(), signal.SIGKILL)
        return fault

    base, count = Path(sys.argv[1]), int(sys.argv[2])
    for index in range(count):
        if os.fork() == 0:
            store = LocalStore(base / str(index))
            with FaultySystem(kill_at(index)).in_place():
                write_part(store)
            os._exit(0)
        _, status = os.wait()
        assert os.WTERMSIG(status) == signal.SIGKILL, index
    """
    answer = await asyncio.to_thread(run_python, script, str(tmp_path), str(count))
    assert answer.returncode == 0, answer.stderr
    states = set()
    for index in range(count):
        root = tmp_path / str(index)
        store = LocalStore(root)
        found = await keys(store)
        for key in found:
            assert await read(store, key) == DATA
        swept = await store.sweep_unfinished(JOB)
        states.add((len(found), swept))
        assert await keys(store) == found
        assert not [path for path in tree(root) if Path(path).name.startswith(".")]
        assert await store.delete_job(JOB) == len(found)
        assert await jobs(store) == set()
        await store.close()
    # Not begun; begun; whole with its unfinished name still there; whole.
    assert states == {(0, 0), (0, 1), (1, 1), (1, 0)}


async def test_what_a_process_said_was_finalized_is_there_after_it_was_killed(
    root: Path,
) -> None:
    script = """
    import sys
    from pathlib import Path
    from exportd_server.store.local import LocalStore
    from tests.support.store import part_key
    from tests.unit.test_local_store import write_part
    store = LocalStore(Path(sys.argv[1]))
    for sequence in range(1_000_000):
        write_part(store, part_key(sequence=sequence, token=int(sys.argv[2])))
        print(sequence, flush=True)
    """
    for token, wait_for in enumerate((1, 20, 55)):
        said = killed_after(wait_for, script, str(root), str(token))
        store = LocalStore(root)
        whole = [int(line) for line in said if line.endswith("\n")]
        found = {key.sequence for key in await keys(store) if key.token == token}
        assert found >= set(whole)
        for sequence in found:
            assert await read(store, part_key(sequence=sequence, token=token)) == DATA
        assert await store.sweep_unfinished(JOB) <= 1
        await store.close()
    assert not [path for path in tree(root) if "/." in path]


async def test_a_living_writer_in_another_process_is_spared_by_the_sweep(
    store: LocalStore, root: Path
) -> None:
    with writer_elsewhere(root, KEY, DATA) as process:
        assert await store.sweep_unfinished(JOB) == 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"!")
        process.stdin.flush()
        assert process.stdout.readline() == b"finalized\n"
    assert await read(store, KEY) == DATA


async def test_a_stopped_process_holds_up_neither_sweep_nor_deletion(
    store: LocalStore, root: Path
) -> None:
    """A zombie that is frozen, and goes on after its job was deleted, changes nothing."""
    with writer_elsewhere(root, KEY, DATA) as process:
        process.send_signal(signal.SIGSTOP)
        assert await store.sweep_unfinished(JOB) == 0
        assert await store.delete_job(JOB) == 1
        put(store, part_key(token=2), b"anew")
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"!")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == b""
        assert process.wait() != 0
    assert await keys(store) == {part_key(token=2)}
    await store.delete_job(JOB)
    assert tree(root) == []


# --- planted links and other surprises


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What looks like a store, and must be neither read nor changed."""
    path = tmp_path / "outside"
    file = path / PATH
    file.parent.mkdir(parents=True)
    file.write_bytes(b"secret")
    (file.parent / f".{KEY.name}.0123456789abcdef").write_bytes(b"secret")
    return path


LEVELS = ["acme", str(JOB), f"{JOB}/output", PATH]


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    def state() -> list[tuple[str, bytes]]:
        return [
            (name, (path / name).read_bytes() if (path / name).is_file() else b"")
            for name in tree(path)
        ]

    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize("level", LEVELS, ids=["tenant", "job", "kind", "part"])
async def test_a_link_planted_at_any_depth_is_never_followed(
    store: LocalStore, root: Path, outside: Path, level: str
) -> None:
    planted = root / level
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.symlink_to(outside / level)
    with unchanged(outside):
        with pytest.raises(StoreFailed):
            await store.open(KEY)
        with pytest.raises(StoreFailed):
            await store.size(KEY)
        with pytest.raises(StoreFailed):
            write_part(store)
        for call in (store.sweep_unfinished(JOB), store.delete(KEY)):
            with suppress(StoreFailed):
                await call
        if level != PATH:
            found = []
            with suppress(StoreFailed):
                found = [key async for key in store.list_job(JOB)]
            assert found == []
        with suppress(StoreFailed):
            await store.delete_job(JOB)
    # Deleting the job removes a link within the tenant, and only the link.
    assert planted.is_symlink() is (level == "acme")


async def test_links_below_a_job_are_deleted_with_it_and_not_what_they_point_to(
    store: LocalStore, root: Path, outside: Path
) -> None:
    put(store, KEY, DATA)
    (root / str(JOB) / "planted").symlink_to(outside)
    (root / PATH).with_name("000009-000009.9").symlink_to(outside / PATH)
    with unchanged(outside):
        assert await store.delete_job(JOB) == 3
    assert tree(root) == []


async def test_directories_swapped_for_links_during_a_write_lead_nowhere(
    store: LocalStore, root: Path, outside: Path
) -> None:
    """The job's directory flips between itself and a link to outside, as fast as it
    can, while parts are written, listed and deleted."""
    job, aside, link = root / str(JOB), root / "aside", root / "link"
    stop, flips = threading.Event(), 0

    def flip() -> None:
        nonlocal flips
        link.symlink_to(outside / str(JOB))
        while not stop.is_set():
            with suppress(OSError):
                job.rename(aside)
                link.rename(job)
                job.rename(link)
                aside.rename(job)
                flips += 1

    (root / "acme").mkdir()
    swapper = threading.Thread(target=flip)
    with unchanged(outside):
        swapper.start()
        try:
            for turn in range(300):
                key = part_key(token=turn + 2)
                with suppress(StoreFailed):
                    await asyncio.to_thread(write_part, store, key)
                with suppress(StoreFailed, KeyError):
                    assert await read(store, key) == DATA
                with suppress(StoreFailed, KeyError):
                    assert await read(store, KEY) == b"never", "the one outside"
                with suppress(StoreFailed):
                    await store.sweep_unfinished(JOB)
                if turn % 10 == 0:
                    with suppress(StoreFailed):
                        await store.delete_job(JOB)
        finally:
            stop.set()
            swapper.join()
    assert flips > 0


@pytest.mark.parametrize("what", ["pipe", "directory"])
async def test_what_is_no_regular_file_is_not_served_and_does_not_block(
    store: LocalStore, root: Path, what: str
) -> None:
    path = root / PATH
    path.parent.mkdir(parents=True)
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
        (path / "inside").write_bytes(b"")
    with pytest.raises(StoreFailed):
        await store.open(KEY)
    with pytest.raises(StoreFailed):
        await store.size(KEY)
    with pytest.raises(StoreFailed):
        write_part(store)
    assert await store.delete_job(JOB) == 1
    assert tree(root) == []


# --- reading


async def test_a_file_cut_short_on_disk_shows_in_its_size(
    store: LocalStore, root: Path
) -> None:
    put(store, KEY, DATA)
    os.truncate(root / PATH, 4000)
    assert await store.size(KEY) == 4000
    assert await read(store, KEY) == DATA[:4000]


async def test_what_is_cached_is_read_without_a_thread(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEY, DATA)
    reader = await store.open(KEY)
    buffer = memoryview(bytearray(20_000))
    if await reader.readinto(buffer) and not reader._cache_tells:
        pytest.skip("this file system cannot say what is cached")

    def no_thread(file: File, offset: int, size: int) -> bytes:
        raise AssertionError("a thread was used")

    monkeypatch.setattr(File, "read_at", no_thread)
    assert await read(store, KEY) == DATA
    await reader.close()


async def test_what_is_not_cached_is_read_in_a_thread_and_comes_out_the_same(
    store: LocalStore, root: Path
) -> None:
    data = random.Random(7).randbytes(8 << 20)
    put(store, KEY, data)
    descriptor = os.open(root / PATH, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    with FaultySystem().in_place() as system:
        assert await read(store, KEY) == data
    if "pread" not in system.calls:
        pytest.skip("this file system keeps everything cached")
    assert "preadv" in system.calls


async def test_a_file_system_that_cannot_tell_is_asked_once(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def cannot_tell(file: File, buffer: memoryview, offset: int) -> int | None:
        nonlocal asked
        asked += 1
        raise OSError(errno.EOPNOTSUPP, "not supported")

    put(store, KEY, DATA)
    monkeypatch.setattr(File, "read_cached_into", cannot_tell)
    reader = await store.open(KEY, 10)
    assert await drain(reader, 1000) == DATA[10:]
    await reader.close()
    assert asked == 1


async def test_a_file_system_in_memory_is_read_too(request: pytest.FixtureRequest) -> None:
    """Tmpfs is one that cannot tell."""
    shared = Path("/dev/shm")  # noqa: S108 - a file system in memory is what is wanted
    if not os.access(shared, os.W_OK):
        pytest.skip("there is no /dev/shm to write to")
    root = shared / f"exportd-test-{os.getpid()}"
    store = LocalStore(root)
    request.addfinalizer(root.rmdir)
    try:
        put(store, KEY, DATA)
        assert await read(store, KEY, 5) == DATA[5:]
    finally:
        await store.delete_job(JOB)
        await store.close()


class SlowDevice:
    """Reads that do not return before they are let go, and no cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        real = File.read_at

        def slow(file: File, offset: int, size: int) -> bytes:
            self.begun.set()
            assert self.go.wait(ENOUGH)
            return real(file, offset, size)

        monkeypatch.setattr(File, "read_at", slow)
        monkeypatch.setattr(File, "read_cached_into", lambda *_: None)


async def test_the_event_loop_runs_on_while_a_device_is_waited_for(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEY, DATA)
    device = SlowDevice(monkeypatch)
    reader = await store.open(KEY)
    buffer = memoryview(bytearray(100))
    reading = asyncio.create_task(reader.readinto(buffer))
    assert await asyncio.to_thread(device.begun.wait, ENOUGH)
    assert not reading.done()
    device.go.set()
    assert await reading == 100
    assert buffer == DATA[:100]
    await reader.close()


async def test_a_cancelled_read_leaves_the_callers_buffer_alone_and_loses_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEY, DATA)
    device = SlowDevice(monkeypatch)
    reader = await store.open(KEY)
    first = bytearray(100)
    reading = asyncio.create_task(reader.readinto(memoryview(first)))
    assert await asyncio.to_thread(device.begun.wait, ENOUGH)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    device.go.set()
    # Smaller than the read that still waits, so its result is used in part.
    assert await drain(reader, 64) == DATA
    assert first == bytes(100)
    await reader.close()


async def test_bytes_that_come_into_the_cache_while_a_read_waits_are_not_read_twice(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEY, DATA)
    asked = 0

    def now_and_then(file: File, buffer: memoryview, offset: int) -> int | None:
        nonlocal asked
        asked += 1
        if asked % 2:
            return None
        data = DATA[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    device = SlowDevice(monkeypatch)
    monkeypatch.setattr(File, "read_cached_into", now_and_then)
    reader = await store.open(KEY)
    reading = asyncio.create_task(reader.readinto(memoryview(bytearray(100))))
    assert await asyncio.to_thread(device.begun.wait, ENOUGH)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    device.go.set()
    assert await drain(reader, 100) == DATA
    await reader.close()


async def test_a_cancelled_read_that_waited_for_a_thread_loses_nothing_either(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEY, DATA)
    device = SlowDevice(monkeypatch)
    readers = [await store.open(KEY) for _ in range(local._THREADS + 1)]
    readings = [
        asyncio.create_task(reader.readinto(memoryview(bytearray(100))))
        for reader in readers
    ]
    assert await asyncio.to_thread(device.begun.wait, ENOUGH)
    assert not any(reading.done() for reading in readings)
    readings[-1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await readings[-1]
    device.go.set()
    assert await drain(readers[-1]) == DATA
    assert await asyncio.gather(*readings[:-1]) == [100] * local._THREADS
    for reader in readers:
        await reader.close()


async def test_closing_during_a_read_keeps_the_file_open_until_the_read_is_over(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the thread would read from whatever takes the descriptor's number next."""
    put(store, KEY, DATA)
    device = SlowDevice(monkeypatch)
    reader = await store.open(KEY)
    reading = asyncio.create_task(reader.readinto(memoryview(bytearray(10))))
    assert await asyncio.to_thread(device.begun.wait, ENOUGH)
    before = open_descriptors()
    reading.cancel()
    await reader.close()
    assert open_descriptors() == before
    waiting = reader._waiting
    assert waiting is not None
    device.go.set()
    assert await asyncio.to_thread(waiting.result) == DATA[:10]
    # The callback that closes runs in the same thread, right after the result is set.
    await asyncio.to_thread(store._threads.shutdown)
    assert open_descriptors() == before - 1
    with pytest.raises(ValueError, match="closed"):
        await reader.readinto(memoryview(bytearray(10)))


async def test_an_open_that_is_cancelled_leaves_no_file_open(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEY, DATA)
    begun, go = threading.Event(), threading.Event()
    real = Directory.open

    def slow(directory: Directory, name: str) -> File:
        begun.set()
        assert go.wait(ENOUGH)
        return real(directory, name)

    monkeypatch.setattr(Directory, "open", slow)
    await store.list_job(JOB).__anext__()  # the threads are there from here on
    before = open_descriptors()
    opening = asyncio.create_task(store.open(KEY))
    assert await asyncio.to_thread(begun.wait, ENOUGH)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    go.set()
    await asyncio.to_thread(store._threads.shutdown)
    assert open_descriptors() == before


async def test_a_listing_that_is_broken_off_closes_its_directories(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_PAGE", 1)
    for sequence in range(3):
        put(store, part_key(sequence=sequence), b"")
    put(store, part_key(JobPrefix("rival", JOB.job_id)), b"")
    for items in (store._tree.parts(JOB), store._tree.jobs()):
        listing = store._paged(items)
        async for _ in listing:
            break
        assert inspect.getgeneratorstate(items) == inspect.GEN_SUSPENDED
        assert isinstance(listing, AsyncGenerator)
        await listing.aclose()
        assert inspect.getgeneratorstate(items) == inspect.GEN_CLOSED
