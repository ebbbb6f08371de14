"""What is the local file sink's own: where it writes and where never, what is left when
the disk fails, and what it says."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.errors import ConfigurationError, DeliveryFailed
from exportd_server.platform.threads import left_over
from exportd_server.sinks import local_file
from exportd_server.sinks.base import BadSinkRequest, Delivery, Part, Takes
from exportd_server.sinks.local_file import (
    Access,
    LocalFileConnection,
    LocalFileRequest,
    LocalFileSink,
    LocalFileSinkType,
)
from exportd_server.sinks.manifest import manifest_json, manifest_name
from tests.security.path_race import race
from tests.support.sinks import (
    COLUMNS,
    JOB_ID,
    GeneratedContent,
    StalledContent,
    a_part,
    an_export,
    deliver_part,
    deliver_whole,
)
from tests.support.store import FaultySystem, fail_once, full_from, tree
from tests.support.waits import ENOUGH

DATA = b"id,name\n1,one\n"
PART = a_part(DATA)
SINK = LocalFileSinkType()
DAY = 86_400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    outside = tmp_path / "outside"
    (outside / "b" / "c").mkdir(parents=True)
    return outside


def sink_at(root: Path) -> LocalFileSink:
    return LocalFileSink(LocalFileConnection(root=root))


async def deliver(root: Path, path: str = "", part: Part = PART) -> str:
    request = LocalFileRequest(path=path)
    return await sink_at(root).deliver(request, deliver_part(an_export(), part))


async def complete(root: Path, path: str = "") -> str:
    request = LocalFileRequest(path=path)
    return await sink_at(root).deliver(request, deliver_whole(an_export(), PART))


# --- which paths are taken at all

ESCAPES = [
    "..",
    "../..",
    "a/../b",
    "a/..",
    "../a",
    "./a",
    "a/./b",
    ".",
    "/",
    "/etc",
    "//a",
    "a//b",
    "a/",
    "/a",
    "~",
    "~root",
    "$HOME",
    "a\\b",
    "..\\..",
    "C:\\a",
    "\\\\host\\share",
    "%2e%2e",
    "%2e%2e%2fa",
    "%252e%252e",
    "..%2f",
    "..%c0%af",
    "a\0b",
    "\0",
    "a\nb",
    "a\n",
    "a\r",
    "a\tb",
    "a\x1bb",
    "a\x7fb",
    " ",
    " a",
    "a b",
    ".hidden",
    "a/.hidden",
    "-rf",
    "_a",
    "a:b",
    "a*",
    "a;b",
    "a|b",
    "a'b",
    'a"b',
    "\u2025",  # two dot leader
    "\u2024\u2024",  # one dot leaders
    "\uff0e\uff0e",  # full width full stops
    "a\uff0fb",  # full width solidus
    "a\u2215b",  # division slash
    "a\u202eb",  # right to left override
    "\u00e9",
    "a\u0301",
    "\udce9",  # what a name that is no UTF-8 becomes
    "a" * 129,
    "a" * 100_000,
    "/".join("a" * 17),
    "/".join(["a" * 128] * 5),
]


@pytest.mark.parametrize("path", ESCAPES, ids=ascii)
async def test_a_path_that_could_lead_elsewhere_is_refused(
    root: Path, outside: Path, path: str
) -> None:
    """At the check, and at every later step as well."""
    request, connection = LocalFileRequest(path=path), LocalFileConnection(root=root)
    with pytest.raises(BadSinkRequest) as refused:
        SINK.check(request, connection, an_export())
    assert refused.value.field == "path"
    assert "; " in refused.value.description
    assert len(refused.value.description) < 300
    assert refused.value.description.isascii()
    with pytest.raises(BadSinkRequest):
        await sink_at(root).deliver(request, deliver_part(an_export(), PART))
    with pytest.raises(BadSinkRequest):
        await sink_at(root).probe(request, an_export())
    assert tree(root) == []


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a",
        "A/b/9",
        "2026-01-02/orders_v1.5",
        "a..b",
        "a" * 128,
        "/".join("a" * 16),
        "CON",
    ],
)
async def test_a_path_of_plain_names_is_taken(root: Path, path: str) -> None:
    plan = SINK.check(
        LocalFileRequest(path=path), LocalFileConnection(root=root), an_export()
    )
    assert plan.takes is Takes.PARTS
    assert plan.endpoint == ""
    receipt = await deliver(root, path)
    assert receipt == f"{path}/{PART.file_name}".removeprefix("/")
    assert (root / receipt).read_bytes() == DATA


def test_the_root_must_be_absolute() -> None:
    with pytest.raises(ValidationError, match="absolute"):
        LocalFileConnection(root=Path("exports"))


# --- links


@pytest.mark.parametrize("target", ["directory", "file", "nothing", "itself"])
@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_a_link_at_any_depth_is_no_way(
    root: Path, outside: Path, depth: int, target: str
) -> None:
    names = ["a", "b", "c"]
    place = root.joinpath(*names[:depth])
    place.mkdir(parents=True, exist_ok=True)
    link = place / names[depth]
    (outside / "file").write_bytes(b"precious")
    link.symlink_to(
        {
            "directory": outside,
            "file": outside / "file",
            "nothing": outside / "new",
            "itself": link,
        }[target]
    )
    before = tree(outside.parent)
    with pytest.raises(DeliveryFailed, match="link") as refused:
        await deliver(root, "a/b/c")
    assert not refused.value.retryable
    with pytest.raises(BadSinkRequest, match="link") as told:
        await sink_at(root).probe(LocalFileRequest(path="a/b/c"), an_export())
    assert told.value.field == "path"
    assert tree(outside.parent) == before
    assert (outside / "file").read_bytes() == b"precious"


async def test_a_file_where_a_directory_should_be_is_refused(root: Path) -> None:
    (root / "a").write_bytes(b"kept")
    with pytest.raises(DeliveryFailed) as refused:
        await deliver(root, "a/b")
    assert not refused.value.retryable
    with pytest.raises(BadSinkRequest):
        await sink_at(root).probe(LocalFileRequest(path="a/b"), an_export())
    assert (root / "a").read_bytes() == b"kept"


@pytest.mark.parametrize("target", ["file", "missing", "b"])
async def test_a_link_under_the_final_name_is_replaced_and_not_followed(
    root: Path, outside: Path, target: str
) -> None:
    (outside / "file").write_bytes(b"precious")
    (root / PART.file_name).symlink_to(outside / target)
    before = tree(outside)
    await deliver(root)
    assert not (root / PART.file_name).is_symlink()
    assert (root / PART.file_name).read_bytes() == DATA
    assert tree(outside) == before
    assert (outside / "file").read_bytes() == b"precious"


async def test_a_directory_under_the_final_name_is_refused(root: Path) -> None:
    (root / PART.file_name).mkdir()
    with pytest.raises(DeliveryFailed) as refused:
        await deliver(root)
    assert not refused.value.retryable
    assert tree(root) == [PART.file_name]


async def test_the_way_to_the_root_is_trusted(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    await deliver(tmp_path / "link", "a")
    assert (root / "a" / PART.file_name).read_bytes() == DATA


async def test_swapping_directories_for_links_leads_nothing_outside(
    tmp_path: Path,
) -> None:
    figures = await race(tmp_path, 2.0)
    assert figures.outside == []
    assert figures.broken == []
    assert figures.swaps > 100
    assert figures.delivered > 0
    assert figures.refused.total() > 0


async def test_the_race_catches_a_writer_that_follows_links(tmp_path: Path) -> None:
    """Otherwise the race proves nothing."""

    async def naive(root: Path, path: str, part: Part) -> None:
        directory = root / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / part.file_name).write_bytes(DATA)
        await asyncio.sleep(0)

    def caught(outside: Path) -> bool:
        return any(path.is_file() for path in outside.rglob("*"))

    figures = await race(tmp_path, 30.0, naive, until=caught)
    assert figures.outside


async def test_a_directory_that_is_moved_meanwhile_is_noticed(root: Path) -> None:
    (root / "a").mkdir()
    content = GeneratedContent(DATA, b"", 0)
    part = content.part()

    def move() -> None:
        """Called when the part is read, and its file has been begun."""
        if not (root / "moved").exists():
            (root / "a").rename(root / "moved")
            (root / "a").mkdir()

    content.on_read = move
    with pytest.raises(DeliveryFailed, match="moved") as failed:
        await deliver(root, "a", part)
    assert failed.value.retryable
    assert tree(root / "a") == []
    await deliver(root, "a", part)
    assert tree(root / "a") == [part.file_name]


# --- a root that is not there


async def test_a_root_that_is_missing_is_told_to_the_operator(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ConfigurationError, match=r"missing.*make it"):
        await SINK.open(LocalFileConnection(root=missing))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"file.*make it"):
        await SINK.open(LocalFileConnection(root=tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="connection"):
        await SINK.open(None)
    assert not missing.exists()


async def test_a_root_that_went_away_may_come_back(root: Path) -> None:
    sink = await SINK.open(LocalFileConnection(root=root))
    await asyncio.to_thread(root.rename, root.with_name("away"))
    request, delivery = LocalFileRequest(path="a"), deliver_part(an_export(), PART)
    with pytest.raises(DeliveryFailed, match="No such file") as failed:
        await sink.deliver(request, delivery)
    assert failed.value.retryable
    assert str(root) not in failed.value.message
    with pytest.raises(DeliveryFailed):
        await sink.probe(request, an_export())
    await asyncio.to_thread(root.with_name("away").rename, root)
    await sink.deliver(request, delivery)
    assert (root / "a" / PART.file_name).read_bytes() == DATA


# --- a disk that fails

ERRORS = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS]


def left(root: Path) -> list[str]:
    """What is no directory."""
    return [name for name in tree(root) if not (root / name).is_dir()]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after it was done"])
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
async def test_whichever_call_fails_the_file_is_whole_or_not_there(
    root: Path, number: int, late: bool
) -> None:
    with FaultySystem().in_place() as watched:
        await deliver(root, "a/b")
    final = root / "a" / "b" / PART.file_name
    for index, call in enumerate(watched.calls):
        final.unlink(missing_ok=True)
        told: DeliveryFailed | None = None
        with FaultySystem(fail_once(index, number), late=late).in_place():
            try:
                await deliver(root, "a/b")
            except DeliveryFailed as failure:
                told = failure
        assert left(root) in ([], [f"a/b/{PART.file_name}"]), call
        if final.exists():
            assert final.read_bytes() == DATA
        if told is None:
            assert final.exists()
            continue
        assert str(root) not in told.message
        if number in {errno.EACCES, errno.EROFS}:
            assert "moved" in told.message or not told.retryable
        else:
            assert told.retryable
        after_the_name = index > watched.calls.index("rename")
        assert not final.exists() or after_the_name or (late and call == "rename")
        await deliver(root, "a/b")
        assert final.read_bytes() == DATA


async def test_a_disk_that_is_full_leaves_nothing(root: Path) -> None:
    with FaultySystem().in_place() as watched:
        await deliver(root, "a")
    (root / "a" / PART.file_name).unlink()
    for index in range(watched.calls.index("rename")):
        with (
            FaultySystem(full_from(index)).in_place(),
            pytest.raises(DeliveryFailed, match="no room") as failed,
        ):
            await deliver(root, "a")
        assert failed.value.retryable
        assert left(root) == []


_LIMITED = """
import asyncio, resource, sys
from pathlib import Path
from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.local_file import *
from tests.support.sinks import *
async def main():
    sink = LocalFileSink(LocalFileConnection(root=Path(sys.argv[1])))
    part = GeneratedContent(b"id\\n", bytes(1 << 16), 16).part()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
    try:
        await sink.deliver(LocalFileRequest(), deliver_part(an_export(), part))
    except DeliveryFailed as error:
        print(error.retryable, error.message)
asyncio.run(main())
"""


def test_a_file_that_outgrows_its_limit_leaves_nothing(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(root)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout == "True directory: no room for the file\n"
    assert tree(root) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
async def test_what_may_not_be_written_is_not_tried_again(root: Path, number: int) -> None:
    def denied(name: str, index: int) -> None:
        if name == "mkdir":
            raise OSError(number, os.strerror(number), str(root))

    with FaultySystem(denied).in_place(), pytest.raises(DeliveryFailed) as failed:
        await deliver(root, "a/b")
    assert not failed.value.retryable
    assert failed.value.message == "directory 'a/b': the server may not write"


async def test_bytes_are_durable_before_their_name_and_the_name_before_success(
    root: Path,
) -> None:
    part = GeneratedContent(DATA, b"", 0).part()
    with FaultySystem().in_place() as watched:
        await deliver(root, "a/b", part)
    calls = [
        call for call in watched.calls if call in {"mkdir", "write", "fsync", "rename"}
    ]
    assert calls == [
        *("mkdir", "fsync"),
        *("mkdir", "fsync"),
        *("write", "fsync", "rename", "fsync"),
    ]


async def test_a_disk_that_hangs_holds_nobody_up_and_is_cleaned_up_when_it_is_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_file, "_CLEANING_SECONDS", 0.05)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(name: str, index: int) -> None:
        if name == "write":
            hangs.set()
            goes_on.wait(10 * ENOUGH)

    system = FaultySystem(hang)
    with system.in_place():
        task = asyncio.create_task(deliver(root))
        await asyncio.to_thread(hangs.wait, ENOUGH)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "close" not in system.calls[system.calls.index("write") :]
        goes_on.set()
        await _until(lambda: not left_over())
    assert tree(root) == []


async def test_nothing_is_held_after_deliveries_however_they_end(root: Path) -> None:
    await deliver(root, "a")
    await _until(lambda: not left_over())
    assert open_files(root) == []
    stalled = StalledContent(DATA)
    task = asyncio.create_task(deliver(root, "a", a_part(DATA, content=stalled)))
    await stalled.reached.wait()
    task.cancel()
    (root / "file").touch()
    await asyncio.gather(
        task,
        deliver(root, "a"),
        complete(root, "a"),
        deliver(root, "file"),
        deliver(root, "a", replace(PART, sha256=bytes(32))),
        return_exceptions=True,
    )
    await _until(lambda: not left_over())
    assert open_files(root) == []


def open_files(root: Path) -> list[str]:
    """Those at or below it that this process holds, some of them deleted, perhaps."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(each.readlink()))
    return [path for path in found if path.startswith(str(root))]


async def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + ENOUGH
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


# --- what lies there


async def test_what_was_left_behind_is_swept_when_it_is_old(root: Path) -> None:
    directory = root / "a"
    directory.mkdir()
    old = f".{PART.file_name}.0123456789abcdef.tmp"
    names = {
        old: True,
        ".probe.0123456789abcdef.tmp": True,
        f".{PART.file_name}.fedcba9876543210.tmp": False,
    }
    others = [".hidden", "mine.tmp", ".x.0123.tmp", "orders.csv"]
    for name in [*names, *others]:
        (directory / name).write_bytes(b"")
        if names.get(name, True):
            os.utime(directory / name, (time.time() - DAY - 60,) * 2)
    (directory / ".d.0123456789abcdef.tmp").mkdir()
    await complete(root, "a")
    young = f".{PART.file_name}.fedcba9876543210.tmp"
    manifest = f"orders-{JOB_ID}.manifest.json"
    kept = [young, manifest, ".d.0123456789abcdef.tmp", *others]
    assert sorted(tree(directory)) == sorted(kept)


@pytest.mark.parametrize(
    ("access", "file_mode", "directory_mode"),
    [
        (Access.OWNER, 0o600, 0o700),
        (Access.GROUP, 0o640, 0o750),
        (Access.EVERYONE, 0o644, 0o755),
    ],
)
async def test_the_operator_says_who_may_read(
    root: Path, access: Access, file_mode: int, directory_mode: int
) -> None:
    sink = LocalFileSink(LocalFileConnection(root=root, access=access))
    umask = os.umask(0)
    try:
        await sink.deliver(LocalFileRequest(path="a"), deliver_part(an_export(), PART))
    finally:
        os.umask(umask)
    assert stat.S_IMODE((root / "a").stat().st_mode) == directory_mode
    assert stat.S_IMODE((root / "a" / PART.file_name).stat().st_mode) == file_mode


async def test_jobs_of_two_tenants_share_a_directory(root: Path) -> None:
    sink, request = sink_at(root), LocalFileRequest()
    for tenant, job in (("one", JOB_ID), ("two", JOB_ID[:-1] + "2")):
        export = an_export(tenant=tenant, job_id=job)
        part = replace(
            a_part(tenant.encode()), file_name=f"{export.file_stem}.part-00000-00000.csv"
        )
        await sink.deliver(request, deliver_part(export, part))
        await sink.deliver(request, deliver_whole(export, part))
    assert len(tree(root)) == 4


# --- the manifest


def whole(output: OutputFormat, *parts: Part, dropped: int = 0) -> Delivery:
    return replace(deliver_whole(an_export(output), *parts), dropped=dropped)


async def test_the_manifest_tells_what_a_reader_needs(root: Path) -> None:
    part = replace(PART, rows=1, prefix_bytes=8, crc32c=0xAB)
    output = OutputFormat(Format.CSV, Compression.GZIP)
    delivery = whole(output, part, a_part(b"x" * 10, sequence=1, rows=4), dropped=3)
    receipt = await sink_at(root).deliver(LocalFileRequest(), delivery)
    text = (root / receipt).read_bytes()
    assert text.endswith(b"}\n")
    told = json.loads(text)
    first, second = told.pop("parts")
    assert told == {
        "manifest_version": 1,
        "job_id": JOB_ID,
        "dataset": "orders",
        "generation": 1,
        "format": "CSV",
        "content_type": "text/csv",
        "content_encoding": "gzip",
        "joinable": True,
        "rows": 5,
        "bytes": len(DATA) + 10,
        "dropped": 3,
        "columns": [
            {
                "name": column.name,
                "kind": column.kind,
                "type": column.type,
                "nullable": column.nullable,
            }
            for column in COLUMNS
        ],
    }
    assert first == {
        "file_name": PART.file_name,
        "rows": 1,
        "bytes": len(DATA),
        "prefix_bytes": 8,
        "suffix_bytes": 0,
        "crc32c": "000000ab",
        "sha256": PART.sha256.hex(),
    }
    assert second["rows"] == 4


def test_the_manifest_of_an_empty_export_is_one_too() -> None:
    told = json.loads(manifest_json(whole(OutputFormat(Format.PARQUET))))
    assert (told["rows"], told["bytes"], told["parts"]) == (0, 0, [])
    assert told["joinable"] is False


def test_the_manifest_is_the_same_at_each_attempt() -> None:
    delivery = whole(OutputFormat(Format.CSV), PART)
    again = replace(delivery, attempt=7, delivery_id="another")
    assert manifest_json(again) == manifest_json(delivery)


def test_a_manifest_without_a_job_has_no_name() -> None:
    delivery = deliver_whole(replace(an_export(), file_stem=""))
    with pytest.raises(ValueError, match="stem"):
        manifest_name(delivery)
