"""What a download reads is its chunk, and nobody changes that any more."""

from __future__ import annotations

import tracemalloc

import pytest

from exportd_server.api.chunks import ChunkBuffer, ChunkMemory
from tests.support.lent import nothing_lent

MIB = 2**20


@pytest.fixture
def buffer() -> ChunkBuffer:
    with ChunkMemory(most=MIB).download() as buffer:
        while len(buffer.room(MIB)) < MIB:
            pass
        return buffer


def _read(buffer: ChunkBuffer, byte: bytes, count: int = MIB, head: bytes = b"") -> bytes:
    room = buffer.room(MIB, lambda _: len(head))
    room[:count] = byte * count
    return buffer.chunk(room[:count], head)


def test_a_chunk_is_its_head_and_what_was_read(buffer: ChunkBuffer) -> None:
    assert _read(buffer, b"a", head=b"head") == b"head" + b"a" * MIB
    assert _read(buffer, b"b", head=b"long head") == b"long head" + b"b" * MIB
    assert _read(buffer, b"c") == b"c" * MIB


@pytest.mark.parametrize("count", [1, MIB - 1])
def test_a_chunk_holds_no_more_than_was_read(buffer: ChunkBuffer, count: int) -> None:
    assert _read(buffer, b"a", count, b"head") == b"head" + b"a" * count


@pytest.mark.parametrize("head", [b"", b"short", b"longer than expected"])
def test_a_head_may_turn_out_to_have_another_length(
    buffer: ChunkBuffer, head: bytes
) -> None:
    room = buffer.room(MIB, lambda _: 9)
    room[:] = b"a" * MIB
    assert buffer.chunk(room, head) == head + b"a" * MIB


def test_a_chunk_that_somebody_has_stays_what_it_is(buffer: ChunkBuffer) -> None:
    first = _read(buffer, b"a", head=b"1")
    second = _read(buffer, b"b", head=b"2")
    unread = buffer.room(MIB, lambda _: 1)
    unread[:] = b"c" * MIB
    assert (first, second) == (b"1" + b"a" * MIB, b"2" + b"b" * MIB)


def test_a_room_that_somebody_still_writes_to_is_no_part_of_the_chunk(
    buffer: ChunkBuffer,
) -> None:
    room = buffer.room(MIB)
    room[:] = b"a" * MIB
    chunk = buffer.chunk(room[:])
    room[:] = b"b" * MIB
    assert chunk == b"a" * MIB


def test_a_chunk_that_is_gone_leaves_its_memory_to_the_next(buffer: ChunkBuffer) -> None:
    _read(buffer, b"a", head=b"head")
    data = b"b" * MIB
    tracemalloc.start()
    try:
        room = buffer.room(MIB, lambda _: 4)
        room[:] = data
        chunk = buffer.chunk(room, b"head")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert chunk == b"head" + data
    assert peak < MIB // 64


def test_two_downloads_read_into_memory_of_their_own() -> None:
    memory = ChunkMemory(most=2**16, in_flight=2**20)
    with memory.download() as one, memory.download() as other:
        mine = one.room(4)
        mine[:] = b"mine"
        other.room(4)[:] = b"your"
        assert one.chunk(mine) == b"mine"


def test_what_was_read_in_vain_is_kept_by_nobody_who_keeps_the_error() -> None:
    def read(room: memoryview) -> None:
        part = room[1:]
        try:
            bytes(part).index(b"nowhere")
        except ValueError as error:
            raise LookupError from error

    def download() -> None:
        with ChunkMemory().download() as buffer:
            read(buffer.room(MIB))

    with nothing_lent():
        with pytest.raises(LookupError) as failed:
            download()
        assert isinstance(failed.value.__cause__, ValueError)


@pytest.mark.parametrize("short", [False, True])
def test_who_waits_for_more_keeps_no_memory(buffer: ChunkBuffer, *, short: bool) -> None:
    tracemalloc.start()
    try:
        buffer.release()
        before, _ = tracemalloc.get_traced_memory()
        _read(buffer, b"a", 1 if short else MIB, head=b"takes new memory")
        if not short:
            buffer.release()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < MIB // 64
    assert _read(buffer, b"b") == b"b" * MIB
