"""An export to S3 beside boto3's own upload of the very same bytes.

Both go to one server on this machine, in turns. What the service does besides, reading
and encoding, is told by the same export onto a local disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import exportd
from bench.machine import CACHE, Measured, sample_data, server
from bench.report import Result, smaller_is_better
from exportd_server.store.s3_client import S3Options
from tests.support.seaweed import RawS3, raw_client, running_seaweed

ROWS = 3_650_000
"""About 1 GiB, as CSV and as Arrow."""
ROUNDS = 3
GOAL_RATIO = 1.3
GOAL_MIB = 350
Fmt = Literal["csv", "arrow"]


def results() -> Iterator[Result]:
    """Measure."""
    catalogue = sample_data(ROWS)
    formats: tuple[Fmt, ...] = ("arrow", "csv")
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        folder = Path(directory)
        with running_seaweed(folder / "seaweed") as seaweed:
            for fmt in formats:
                yield from _compared(folder / fmt, seaweed.options(), catalogue, fmt)


def _compared(
    folder: Path, options: S3Options, catalogue: Path, fmt: Fmt
) -> Iterator[Result]:
    client, exports, disks, uploads = _boto3(options), [], [], []
    with (
        server(folder / "s3", catalogue, _variables(options)) as to_s3,
        server(folder / "disk", catalogue) as to_disk,
    ):
        data = folder / "data"
        size = _stored_bytes(to_disk, fmt, data)
        # One of each beforehand: the first writes make the server's volumes.
        _export_time(to_s3, fmt)
        _upload_time(client, options, data)
        for _ in range(ROUNDS):
            exports.append(_export_time(to_s3, fmt))
            uploads.append(_upload_time(client, options, data))
            disks.append(_export_time(to_disk, fmt))
        peak, usual = to_s3.memory_mib(), to_disk.memory_mib()
        left = RawS3(client, options)
        while left.objects() != [".owner"] or left.uploads():
            time.sleep(0.1)
    yield smaller_is_better(
        f"running -> succeeded on S3, {fmt}, {size / 2**20:.0f} MiB, median",
        statistics.median(exports),
        "s",
        peer="boto3 upload_fileobj",
        peer_value=statistics.median(uploads),
        goal=f"ratio {1 / GOAL_RATIO:.2f}",
    )
    yield Result(
        f"running -> succeeded on a local disk, {fmt}, median",
        statistics.median(disks),
        "s",
    )
    yield smaller_is_better(
        f"peak memory, {fmt} to S3, {1 + ROUNDS} exports",
        peak,
        "MiB",
        peer="onto a local disk",
        peer_value=usual,
        goal=f"< {GOAL_MIB}",
    )


def _export_time(measured: Measured, fmt: Fmt) -> float:
    """From running to succeeded, by the ledger's clock."""
    with exportd.Client(measured.address) as client:
        job = client.export("token_transfers", format=fmt)
        job.wait(timeout=600)
        info = job.refresh().info
        job.delete()
    assert info.start_time is not None
    assert info.finish_time is not None
    return (info.finish_time - info.start_time).total_seconds()


def _stored_bytes(measured: Measured, fmt: Fmt, path: Path) -> int:
    """Store what an export stores in one file; returns its size."""
    with exportd.Client(measured.address) as client:
        job = client.export("token_transfers", format=fmt)
        job.wait(timeout=600)
        outputs = path.parent / "disk" / "outputs"
        parts = sorted(outputs.rglob("output/*"), key=lambda part: part.name)
        with path.open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
        job.delete()
    return path.stat().st_size


def _boto3(options: S3Options) -> Any:
    assert options.endpoint_url is not None
    return raw_client(options.endpoint_url)


def _upload_time(client: Any, options: S3Options, path: Path) -> float:
    name = f"{options.prefix.partition('/')[0]}-peer/object"
    started = time.perf_counter()
    with path.open("rb") as data:
        client.upload_fileobj(data, options.bucket, name)
    taken = time.perf_counter() - started
    head = client.head_object(Bucket=options.bucket, Key=name)
    assert head["ContentLength"] == path.stat().st_size
    client.delete_object(Bucket=options.bucket, Key=name)
    return taken


def _variables(options: S3Options) -> dict[str, str]:
    s3 = {
        "ENDPOINT_URL": options.endpoint_url,
        "REGION": options.region,
        "PATH_STYLE": "true",
        "ACCESS_KEY_ID": options.access_key_id,
        "SECRET_ACCESS_KEY": options.secret_access_key,
    }
    variables = {f"EXPORTD_STORE__S3__{name}": str(value) for name, value in s3.items()}
    return variables | {"EXPORTD_STORE__URL": options.url}
