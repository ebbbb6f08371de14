"""`python -m bench.pipeline_run CATALOGUE FORMAT[+COMPRESSION] DIRECTORY` exports token
transfers as a worker does, with its default settings, but for the ledger and the API:
shards, two at a time, into a local store."""

from __future__ import annotations

import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.working import working
from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.pipeline.run import FinishedPart, PartLimits, ShardRun, ShardTask
from exportd_server.platform.malloc import keep_large_buffers
from exportd_server.settings import WorkerSettings
from exportd_server.sources.base import Query, Shard
from exportd_server.sources.catalogue import Dataset, load_catalogue
from exportd_server.store.key import JobPrefix
from exportd_server.store.local import LocalStore


def export(dataset: Dataset, output: OutputFormat, store: LocalStore) -> int:
    """Plan, and write the parts; returns the rows."""
    settings = WorkerSettings()
    query = Query(tuple(column.name for column in dataset.columns))
    plan = dataset.source.plan(query, shard_rows=settings.shard_rows)
    prefix = JobPrefix("default", str(uuid.uuid4()))
    parts: list[FinishedPart] = []

    def run(shard: Shard) -> None:
        ShardRun(
            ShardTask(dataset.source, query, shard, output, PartLimits(), prefix, token=1),
            store,
            commit=parts.append,
            check=lambda *_: None,
            max_bytes_in_flight=settings.bytes_in_flight,
        )()

    with ThreadPoolExecutor(settings.concurrency) as threads:
        list(threads.map(run, plan.shards))
    if plan.anchor is not None:
        plan.anchor.close()
    return sum(part.rows for part in parts)


def main() -> None:
    """Export once."""
    catalogue, name, directory = sys.argv[1:]
    kind, _, compression = name.upper().partition("+")
    output = OutputFormat(Format(kind), Compression(compression or "NONE"))
    keep_large_buffers()
    dataset = load_catalogue(Path(catalogue)).find("token_transfers", "default")
    assert dataset is not None
    store = LocalStore(Path(directory))
    with working() as work:
        work.rows = export(dataset, output, store)


if __name__ == "__main__":
    main()
