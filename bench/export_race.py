"""Those who export token transfers: what each of them writes is counted, its first time
by a reader of its own and later by its size."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

import duckdb
import pyarrow as pa

import exportd
from bench.contest import Contestant, Run, cpu_seconds, forget_peak, peak_mib
from bench.machine import Measured
from bench.report import Result
from bench.working import worked

DATASET = "token_transfers"

_READERS = {
    "csv": "read_csv({}, header = true, all_varchar = true, delim = ',', quote = '\"', "
    "escape = '\"', compression = '{}')",
    "jsonl": "read_ndjson_objects({}, compression = '{}')",
    "parquet": "read_parquet({})",
}
_EXTENSIONS = {"arrow": "arrows"}
_SAME_SIZE = 0.01
"""How much two runs may differ: where a compressor is flushed depends on the batches."""


class Race:
    """Contestants that export `rows` rows to files in a directory."""

    def __init__(self, directory: Path, rows: int) -> None:
        self.contestants: dict[str, Contestant] = {}
        self._directory = directory
        self._rows = rows
        self._sizes: dict[str, int] = {}
        self._client_cpu: dict[str, list[float]] = {}

    def exportd(
        self,
        source: str,
        formats: Sequence[str],
        served: Sequence[str],
        catalogue: Path,
        running: Measured,
    ) -> None:
        """The pipeline alone and, for some formats, the whole service, from what a
        catalogue names."""
        for fmt in formats:

            def alone(to: Path, fmt: str = fmt) -> Run:
                return worked(
                    "bench.pipeline_run", str(catalogue), fmt, str(to), rows=self._rows
                )

            def whole(to: Path, fmt: str = fmt, name: str = f"{source} to {fmt}") -> Run:
                run, client = _serve(running, fmt, to, self._rows)
                self._client_cpu.setdefault(name, []).append(client)
                return run

            self._enter(f"{source} to {fmt}, pipeline", fmt, alone)
            if fmt in served:
                self._enter(f"{source} to {fmt}, service", fmt, whole)

    def peer(self, name: str, fmt: str, export: Callable[[Path], Run]) -> None:
        """Another one, that writes to the file it is given."""
        self._enter(f"{name} to {fmt}", fmt, export)

    def program(self, name: str, fmt: str, module: str, *arguments: str) -> None:
        """One that is a program of `working`; its last argument is the file."""

        def export(to: Path) -> Run:
            return worked(module, *arguments, str(to), rows=self._rows)

        self.peer(name, fmt, export)

    def clients_cpu(self) -> Iterator[Result]:
        """CPU seconds of the clients that downloaded from the service."""
        for name, (_, *counted) in self._client_cpu.items():
            middle = sorted(counted)[len(counted) // 2]
            yield Result(f"{name}, service, CPU of the client", middle, "CPU s")

    def _enter(self, name: str, fmt: str, export: Callable[[Path], Run]) -> None:
        def contestant() -> Run:
            target = self._directory / f"output.{_EXTENSIONS.get(fmt, fmt)}"
            run = export(target)
            self._check(name, fmt, target)
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            return run

        self.contestants[name] = contestant

    def _check(self, name: str, fmt: str, target: Path) -> None:
        paths = [target] if target.is_file() else sorted(target.rglob("*"))
        files = [path for path in paths if path.is_file() and path.stat().st_size]
        size = sum(path.stat().st_size for path in files)
        if name not in self._sizes:
            count = _count(fmt, files)
            assert count == self._rows, f"{name}: {count} rows of {self._rows}"
            self._sizes[name] = size
        expected = self._sizes[name]
        assert abs(size - expected) <= _SAME_SIZE * expected, f"{name}: {size} bytes"


def _serve(running: Measured, fmt: str, target: Path, rows: int) -> tuple[Run, float]:
    """Create, wait, download; also the CPU seconds of this process meanwhile."""
    kind, _, compression = fmt.partition("+")
    with exportd.Client(running.address) as client:
        forget_peak(running.pid)
        before, client_before = cpu_seconds(running.pid), time.process_time()
        started = time.perf_counter()
        job = client.export(
            DATASET,
            format=cast("Literal['csv', 'jsonl', 'parquet', 'arrow']", kind),
            compression=cast("Literal['none', 'gzip', 'zstd']", compression or "none"),
        )
        job.wait(timeout=3600).download(target)
        seconds = time.perf_counter() - started
        run = Run(seconds, cpu_seconds(running.pid) - before, peak_mib(running.pid))
        spent = time.process_time() - client_before
        assert job.progress.rows == rows, f"{fmt}: {job.progress.rows} rows of {rows}"
        job.delete()
    return run, spent


def _count(fmt: str, files: Sequence[Path]) -> int:
    kind, _, compression = fmt.partition("+")
    if kind == "arrow":
        streams = [pa.ipc.open_stream(pa.memory_map(str(path))) for path in files]
        return sum(batch.num_rows for stream in streams for batch in stream)
    reader = _READERS[kind].format([str(path) for path in files], compression or "none")
    row = duckdb.execute(f"SELECT count(*) FROM {reader}").fetchone()
    assert row is not None
    return int(row[0])
