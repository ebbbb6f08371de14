"""The digest of a part: taken once, in passing, piece by piece."""

from __future__ import annotations

import hashlib
import random
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from exportd_server.pipeline.digest import EDGE_BYTES, Buffer, HashingSink, PartDigest


class Kept:
    """A writer that keeps what it was given."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Buffer, /) -> int:
        self.data += data
        return len(data)


class Nowhere:
    """A writer that keeps nothing."""

    def write(self, data: Buffer, /) -> int:
        return len(data)


def expected(data: bytes, prefix: int, suffix: int) -> PartDigest:
    end = len(data) - suffix
    return PartDigest(
        bytes=len(data),
        prefix_bytes=prefix,
        suffix_bytes=suffix,
        crc32c=crc32c(data),
        prefix_crc32c=crc32c(data[:prefix]),
        body_crc32c=crc32c(data[prefix:end]),
        suffix_crc32c=crc32c(data[end:]),
        sha256=hashlib.sha256(data).digest(),
    )


@settings(deadline=None)
@given(st.data())
def test_any_writes_give_the_digest_of_the_joined_bytes(draw: st.DataObject) -> None:
    pieces = draw.draw(st.lists(st.binary(max_size=60), max_size=12))
    data = b"".join(pieces)
    prefix = draw.draw(st.integers(0, len(data)))
    suffix = draw.draw(st.integers(0, len(data) - prefix))
    kept = Kept()
    sink = HashingSink(kept)
    for piece in pieces:
        assert sink.write(piece) == len(piece)
        if draw.draw(st.booleans()):
            sink.mark()
    assert sink.finish(prefix, suffix) == expected(data, prefix, suffix)
    assert kept.data == data


@pytest.mark.parametrize("seed", range(8))
def test_writes_around_the_kept_length_give_the_right_digest(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [1, 1000, EDGE_BYTES - 1, EDGE_BYTES, EDGE_BYTES + 1, 5 * EDGE_BYTES]
    pieces = [rng.randbytes(rng.choice(sizes)) for _ in range(rng.randint(2, 12))]
    data = b"".join(pieces)
    kept = Kept()
    sink = HashingSink(kept)
    for piece in pieces:
        sink.write(memoryview(piece))
    longest = min(EDGE_BYTES, len(data) // 2)
    for prefix in (0, 1, longest):
        for suffix in (0, 1, longest):
            assert sink.finish(prefix, suffix) == expected(data, prefix, suffix)
    assert kept.data == data


def test_marks_close_segments_and_tell_each_ones_length_and_crc() -> None:
    sink = HashingSink(Nowhere())
    assert sink.mark() == (0, 0)
    sink.write(b"id,name\n")
    assert sink.mark() == (8, crc32c(b"id,name\n"))
    sink.write(b"1,a\n")
    sink.write(b"2,b\n")
    assert sink.mark() == (8, crc32c(b"1,a\n2,b\n"))
    assert sink.mark() == (0, 0)


def test_a_marked_prefix_and_suffix_may_have_any_length() -> None:
    rng = random.Random(5)
    edge, body = rng.randbytes(3 * EDGE_BYTES), rng.randbytes(10 * EDGE_BYTES)
    sink = HashingSink(Nowhere())
    for piece in (edge, body, edge):
        sink.write(piece)
        sink.mark()
    assert sink.finish(len(edge), len(edge)) == expected(
        edge + body + edge, len(edge), len(edge)
    )


def test_a_long_prefix_that_was_not_marked_is_refused_instead_of_guessed() -> None:
    sink = HashingSink(Nowhere())
    sink.write(bytes(10 * EDGE_BYTES))
    with pytest.raises(ValueError, match="was not marked"):
        sink.finish(4 * EDGE_BYTES, 0)
    with pytest.raises(ValueError, match="was not marked"):
        sink.finish(0, 4 * EDGE_BYTES)


@pytest.mark.parametrize(("prefix", "suffix"), [(11, 0), (0, 11), (6, 5), (-1, 0), (0, -1)])
def test_edges_that_do_not_fit_the_part_are_refused(prefix: int, suffix: int) -> None:
    sink = HashingSink(Nowhere())
    sink.write(b"0123456789")
    with pytest.raises(ValueError, match="do not fit"):
        sink.finish(prefix, suffix)


def test_bytes_that_the_writer_refused_are_not_counted() -> None:
    class Full:
        def write(self, data: Buffer, /) -> int:
            raise OSError(28, "full")

    sink = HashingSink(Full())
    with pytest.raises(OSError, match="full"):
        sink.write(b"data")
    assert sink.finish(0, 0) == expected(b"", 0, 0)


def test_the_first_error_of_the_writer_is_kept_for_whoever_asks() -> None:
    class Failing:
        def write(self, data: Buffer, /) -> int:
            raise OSError(28, bytes(data).decode())

    sink = HashingSink(Failing())
    errors = [sink.error]
    for text in (b"first", b"second"):
        with pytest.raises(OSError, match=text.decode()):
            sink.write(text)
        errors.append(sink.error)
    assert [str(error) for error in errors] == ["None", *["[Errno 28] first"] * 2]


def test_memory_does_not_grow_with_the_part() -> None:
    sink = HashingSink(Nowhere())
    for size in (100, 40_000, 1 << 20) * 40:
        sink.write(bytes(size))
        kept = sys.getsizeof(sink._head) + sys.getsizeof(sink._tail)
        assert kept < 6 * EDGE_BYTES


def test_both_hashes_let_other_threads_run() -> None:
    """While one thread hashes 64 MiB in one call another one must get its turns: a call
    that held the GIL would leave a gap as long as itself."""
    block = bytes(64 << 20)

    def longest_gap(work: Callable[[], object]) -> tuple[float, float]:
        ticks: list[float] = []
        took = 0.0

        def run() -> None:
            nonlocal took
            start = time.perf_counter()
            work()
            took = time.perf_counter() - start

        worker = threading.Thread(target=run)
        worker.start()
        while worker.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(0)
        worker.join()
        gaps = [after - before for before, after in pairwise(ticks)]
        return max(gaps, default=took), took

    for work in (lambda: crc32c(block), lambda: hashlib.sha256(block)):
        # The machine may be busy: one undisturbed round out of many is proof enough.
        rounds = (longest_gap(work) for _ in range(30))
        assert any(gap < took / 2 for gap, took in rounds)
