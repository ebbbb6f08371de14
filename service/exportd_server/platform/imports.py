"""Keeps what an imported library would bring along, and nobody here needs, from a start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(name: str) -> Iterator[None]:
    """For one import: as if the package were not installed while the context is open.

    A name that stands for `None` in `sys.modules` is a `ModuleNotFoundError` to whoever
    imports it (https://docs.python.org/3/reference/import.html#the-module-cache). One that
    has been imported already stays. For a process that has no other threads yet: they would
    miss the package too.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
