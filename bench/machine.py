"""The server under measurement, in a process of its own, and what the kernel says of
it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.contest import peak_mib

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".data" / "bench"
"""Sample data that is kept between runs."""

# Taken out of the environment: a server refuses variables that are no settings of its own.
SCALE = float(os.environ.pop("EXPORTD_BENCH_SCALE", "1"))


def scaled(amount: int) -> int:
    """A size or a number of runs, times EXPORTD_BENCH_SCALE where that is set."""
    return max(1, round(amount * SCALE))


@dataclass(frozen=True, slots=True)
class Measured:
    """A server process."""

    address: str
    pid: int

    def memory_mib(self) -> float:
        """Peak resident memory of the process since it began, in MiB."""
        return peak_mib(self.pid)


@contextlib.contextmanager
def server(
    data_dir: Path, catalogue: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Measured]:
    """Run a server on a catalogue with the default settings, but for those that are
    given as environment variables."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with listening(
        [
            *(sys.executable, "-m", "exportd_server", "serve"),
            *("--listen", "127.0.0.1:0", "--data-dir", str(data_dir)),
            *("--catalogue", str(catalogue), "--log-level", "warning"),
        ],
        data_dir / "server.log",
        **(variables or {}),
    ) as measured:
        yield measured


@contextlib.contextmanager
def listening(argv: Sequence[str], log: Path, **variables: str) -> Iterator[Measured]:
    """Run a server whose first line of output is where it listens; what it complains of
    goes to `log`."""
    with log.open("w", encoding="utf-8") as complaints:
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env={**os.environ, **variables},
        )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, f"it did not start: {log.read_text(encoding='utf-8')}"
        yield Measured(address, process.pid)
        process.terminate()
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def sample_data(rows: int) -> Path:
    """Generate sample data of a size once; returns its catalogue."""
    directory = CACHE / f"samples-{rows}"
    subprocess.run(
        [
            *(sys.executable, "-m", "exportd_server", "samples"),
            *(str(directory), "--rows", str(rows)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return directory / "datasets.toml"
