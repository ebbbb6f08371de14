"""Files reached through open directories: no link is ever followed on the way."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from exportd_server.platform import files
from exportd_server.platform.files import Directory, File
from tests.support.store import FaultySystem, tree

NO_DIRECTORY = {errno.ENOTDIR, errno.ELOOP}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory.at(tmp_path) as opened:
        yield opened


def content(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "/etc", "../x", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused_by_every_call(
    directory: Directory, name: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: directory.child(name),
        lambda: directory.make_child(name),
        lambda: directory.create(name),
        lambda: directory.open(name),
        lambda: directory.size(name),
        lambda: directory.identity(name),
        lambda: directory.has(name),
        lambda: directory.link(name, "x"),
        lambda: directory.link("x", name),
        lambda: directory.rename(name, "x"),
        lambda: directory.rename("x", name),
        lambda: directory.unlink(name),
        lambda: directory.rmdir(name),
        lambda: directory.remove_tree(name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="not a single path component"):
            call()


def test_what_is_made_belongs_to_the_user_alone(
    directory: Directory, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        directory.make_child("d").close()
        directory.create("f").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


def test_create_never_opens_what_is_there(directory: Directory, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("f", "dangling"):
        with pytest.raises(FileExistsError):
            directory.create(name)
    assert content(tmp_path / "f") == b"kept"
    assert not (tmp_path / "nowhere").exists()


def test_links_are_followed_neither_as_directories_nor_as_files(
    directory: Directory, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_bytes(b"secret")
    (tmp_path / "to_d").symlink_to(tmp_path / "d")
    (tmp_path / "to_f").symlink_to(tmp_path / "f")
    for call in (directory.child, directory.make_child):
        with pytest.raises(OSError) as refused:
            call("to_d")
        assert refused.value.errno in NO_DIRECTORY
    with pytest.raises(OSError) as refused:
        directory.open("to_f")
    assert refused.value.errno == errno.ELOOP
    for status in (directory.size, directory.identity):
        with pytest.raises(OSError, match="not a regular file"):
            status("to_f")


def test_only_regular_files_are_opened_and_a_pipe_does_not_block(
    directory: Directory, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "d").mkdir()
    for name in ("pipe", "d"):
        with pytest.raises(OSError, match="not a regular file"):
            directory.open(name)


def test_a_directory_stays_the_same_when_its_path_is_taken_by_another(
    directory: Directory, tmp_path: Path
) -> None:
    child = directory.make_child("d")
    (tmp_path / "d").rename(tmp_path / "moved")
    (tmp_path / "d").mkdir()
    child.create("f").close()
    child.close()
    assert tree(tmp_path) == ["d", "moved", "moved/f"]


def test_writes_go_on_until_everything_is_written(
    directory: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def short(fd: int, view: memoryview) -> int:
        sizes.append(len(view))
        return real(fd, view[: max(1, len(view) // 3)])

    real = os.write
    monkeypatch.setattr(os, "write", short)
    with directory.create("f") as file:
        assert file.write(b"0123456789" * 10) == 100
        assert file.write(b"") == 0
    monkeypatch.undo()
    assert content(tmp_path / "f") == b"0123456789" * 10
    assert len(sizes) > 3


def test_a_view_of_wide_items_is_written_byte_for_byte(
    directory: Directory, tmp_path: Path
) -> None:
    with directory.create("f") as file:
        assert file.write(memoryview(bytearray(16)).cast("I")) == 16
    assert content(tmp_path / "f") == bytes(16)


def test_a_lock_keeps_others_out_until_its_file_is_closed(directory: Directory) -> None:
    with directory.create("f") as owner:
        assert owner.try_lock()
        assert owner.try_lock()
        with directory.open("f", writable=True) as other:
            assert not other.try_lock()
    with directory.open("f", writable=True) as other:
        assert other.try_lock()


def test_a_file_knows_whether_it_still_has_a_name(directory: Directory) -> None:
    with directory.create("f") as file:
        assert file.linked
        assert directory.identity("f") == file.identity
        directory.unlink("f")
        assert not file.linked


def test_a_link_never_overwrites(directory: Directory, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        directory.link("new", "old")
    assert content(tmp_path / "old") == b"old"
    directory.link("new", "third")
    assert content(tmp_path / "third") == b"new"


def cache_tells(file: File) -> bool:
    try:
        file.read_cached_into(memoryview(bytearray(1)), 0)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def test_reading_from_the_cache_tells_end_from_would_wait(
    directory: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    buffer = bytearray(4)
    with directory.open("f") as file:
        if not cache_tells(file):
            pytest.skip("this file system cannot say what is cached")
        assert file.read_cached_into(memoryview(buffer), 3) == 4
        assert buffer == b"3456"
        assert file.read_cached_into(memoryview(buffer), 10) == 0

        def would_wait(*_: object) -> int:
            raise BlockingIOError(errno.EAGAIN, "would wait")

        monkeypatch.setattr(os, "preadv", would_wait)
        assert file.read_cached_into(memoryview(buffer), 0) is None
        assert file.read_at(8, 4) == b"89"
        assert file.read_at(10, 4) == b""


def test_removing_a_tree_counts_files_and_links_and_leaves_their_targets(
    directory: Directory, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"kept")
    deep = tmp_path / "t" / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "f").write_bytes(b"")
    (deep / "to_directory").symlink_to(outside)
    (tmp_path / "t" / "to_file").symlink_to(outside / "precious")
    os.mkfifo(tmp_path / "t" / "pipe")
    assert directory.remove_tree("t") == 4
    assert directory.remove_tree("t") == 0
    (tmp_path / "to_tree").symlink_to(outside)
    assert directory.remove_tree("to_tree") == 1
    assert tree(tmp_path) == ["outside", "outside/precious"]


def test_several_remove_one_tree_and_each_file_is_counted_once(
    directory: Directory, tmp_path: Path
) -> None:
    for number in range(300):
        branch = tmp_path / "t" / str(number % 7)
        branch.mkdir(parents=True, exist_ok=True)
        (branch / str(number)).write_bytes(b"")
    counts: list[int] = []
    workers = [
        threading.Thread(target=lambda: counts.append(directory.remove_tree("t")))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(counts) == 300
    assert tree(tmp_path) == []


def test_what_is_added_during_a_removal_is_removed_too(
    directory: Directory, tmp_path: Path
) -> None:
    inside = directory.make_child("t")
    inside.create("f").close()
    added: list[int] = []

    def add_before_rmdir(name: str, index: int) -> None:
        if name == "rmdir" and not added:
            added.append(index)
            (tmp_path / "t" / "late").write_bytes(b"")

    with FaultySystem(add_before_rmdir).in_place():
        assert directory.remove_tree("t") == 2
    assert tree(tmp_path) == []
    with inside, pytest.raises(FileNotFoundError):
        inside.create("too late")


def test_a_removal_that_fails_says_so(directory: Directory, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "f").write_bytes(b"")

    def refuse(name: str, index: int) -> None:
        if name == "unlink":
            raise OSError(errno.EBUSY, "busy")

    with FaultySystem(refuse).in_place(), pytest.raises(OSError, match="busy"):
        directory.remove_tree("t")


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_descriptors_are_closed_once_and_never_leak(
    directory: Directory, tmp_path: Path
) -> None:
    (tmp_path / "to_d").symlink_to(tmp_path)
    (tmp_path / "d").mkdir()
    gc.collect()
    before = open_files()
    for call in (directory.child, directory.make_child, directory.open, directory.create):
        with suppress(OSError):
            call("to_d")
    with suppress(OSError):
        directory.open("d")
    list(directory.entries())
    file: File | None = directory.create("f")
    assert file is not None
    assert open_files() != before
    file.close()
    file.close()
    assert open_files() == before
    file = directory.open("f")
    file = None
    gc.collect()
    assert open_files() == before


def test_a_closed_file_touches_no_descriptor_that_took_its_number(
    directory: Directory, tmp_path: Path
) -> None:
    file = directory.create("f")
    file.close()
    with (tmp_path / "g").open("wb"):
        with pytest.raises(OSError, match="Bad file descriptor"):
            file.write(b"stray")
        with pytest.raises((OSError, ValueError)):
            file.sync()
        file.close()
    assert content(tmp_path / "g") == b""


def test_entries_tell_directories_from_links_to_them(
    directory: Directory, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_bytes(b"")
    (tmp_path / "l").symlink_to(tmp_path / "d")
    expected = {("d", True), ("f", False), ("l", False)}
    assert set(directory.entries()) == expected
    assert set(directory.entries()) == expected


def test_modes_may_be_wider_than_the_owner(directory: Directory, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        directory.create("f", 0o666).close()
        directory.make_child("d", 0o777).close()
        directory.make_child("d", 0o700).close()
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


def test_the_time_of_the_last_write_is_that_of_regular_files_alone(
    directory: Directory, tmp_path: Path
) -> None:
    directory.create("f").close()
    os.utime(tmp_path / "f", (1, 1_700_000_000))
    assert directory.modified("f") == 1_700_000_000
    (tmp_path / "link").symlink_to("f")
    (tmp_path / "d").mkdir()
    for name in ("link", "d"):
        with pytest.raises(OSError, match="regular"):
            directory.modified(name)


def test_a_directory_is_known_again_after_it_was_moved(
    directory: Directory, tmp_path: Path
) -> None:
    first = directory.make_child("d")
    (tmp_path / "d").rename(tmp_path / "moved")
    with first, directory.make_child("d") as second, directory.child("moved") as moved:
        assert first.same_as(moved)
        assert not first.same_as(second)


def test_a_range_is_sent_to_the_device_where_the_c_library_can(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[int] = []
    call = files.find_sync_file_range()
    assert call is not None

    def noting(*arguments: int) -> int:
        answers.append(call(*arguments))
        return answers[-1]

    monkeypatch.setattr(files, "_sync_file_range", noting)
    with directory.create("part") as file:
        file.write(b"x" * 10_000)
        file.write_out(0, 10_000)
        file.sync()
    assert answers == [0]


def test_a_c_library_without_that_call_leaves_all_to_the_sync(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bare:
        """What another C library has."""

        def __init__(self, _: None) -> None: ...

    monkeypatch.setattr(ctypes, "CDLL", Bare)
    assert files.find_sync_file_range() is None
    monkeypatch.setattr(files, "_sync_file_range", None)
    with directory.create("part") as file:
        file.write(b"x")
        file.write_out(0, 1)
        file.sync()
    assert directory.size("part") == 1


def test_a_file_is_replaced_as_a_whole_and_for_its_owner_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    (tmp_path / "a").chmod(0o644)
    seen: list[bytes] = []

    def prepare(made: str) -> None:
        seen.extend(((tmp_path / made).read_bytes(), (tmp_path / "a").read_bytes()))

    with Directory.at(tmp_path) as folder:
        folder.replace("a", b"after", prepare)
    assert seen == [b"after", b"before"]
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == b"after"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_replaced_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def fail(_: str) -> None:
        raise PermissionError

    with Directory.at(tmp_path) as folder, pytest.raises(PermissionError):
        folder.replace("a", b"after", fail)
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == b"before"
