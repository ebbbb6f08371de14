"""What of the memory of chunks is kept, and what is lent to somebody."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from exportd_server.api.chunks import ChunkBuffer


@contextmanager
def nothing_lent() -> Iterator[None]:
    """Nobody has a view of the memory of a `BytesIO` in the end who had none before."""
    before = _lent()
    yield
    known = {id(view) for view in before}
    assert not [view for view in _lent() if id(view) not in known]


def chunk_buffers() -> list[ChunkBuffer]:
    """Those of downloads that are under way in this process, or not yet forgotten."""
    return [each for each in gc.get_objects() if type(each) is ChunkBuffer]


def kept_for_chunks(besides: list[ChunkBuffer]) -> list[int]:
    """The bytes that each other download keeps to read into."""
    known = {id(each) for each in besides}
    new = (each for each in chunk_buffers() if id(each) not in known)
    return [each._memory.getbuffer().nbytes for each in new]


def _lent() -> list[memoryview]:
    views = [each for each in gc.get_objects() if type(each) is memoryview]
    return [view for view in views if "BytesIO" in _owner(view)]


def _owner(view: memoryview) -> str:
    try:
        return type(view.obj).__name__
    except ValueError:
        return "released"
