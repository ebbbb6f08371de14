"""Programs that tell what their work took once they were loaded. A worker lives for weeks:
what its start takes, and that of the peers in Python, is told by the bench `start`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.contest import Run, command, peak_mib


@dataclass
class Work:
    """What a program says that it wrote."""

    rows: int = 0


@contextmanager
def working() -> Iterator[Work]:
    """Around the work: prints how many rows, and what it took, when it has ended."""
    work = Work()
    started, cpu = time.perf_counter(), time.process_time()
    yield work
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = peak_mib(os.getpid())
    told = {"rows": work.rows, "seconds": seconds, "cpu": cpu, "peak": peak}
    print(json.dumps(told))


def worked(module: str, *arguments: str, rows: int) -> Run:
    """Run such a program in a process of its own; what it took is what it tells. Fails when
    it wrote another number of rows."""
    with tempfile.NamedTemporaryFile() as out:
        command([sys.executable, "-m", module, *arguments], stdout=Path(out.name))
        told = json.loads(out.read())
    assert told["rows"] == rows, f"{module} wrote {told['rows']} rows of {rows}"
    return Run(told["seconds"], told["cpu"], told["peak"])
