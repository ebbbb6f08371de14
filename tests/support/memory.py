"""How much memory something takes, in a process of its own: in one that runs many tests,
memory comes and goes for reasons of theirs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import pyarrow as pa

from exportd_server.platform.malloc import release_free_memory

MIB = 1 << 20

_P = ParamSpec("_P")
_T = TypeVar("_T")


def apart(work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """What a function returns that runs in a new process. It and what it is given must be
    fit for pickling."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments, **named).result()


@dataclass
class Growth:
    """How far the memory of this process rose."""

    mib: float = 0.0


@contextmanager
def growing() -> Iterator[Growth]:
    """The most resident memory that this process has in the context, above what it has
    now, known when the context ends. What is loaded once must have been."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    release_free_memory()
    # Linux, proc(5): 5 has it forget the highest so far.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kibibytes("VmRSS")
    growth = Growth()
    yield growth
    growth.mib = (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1])
