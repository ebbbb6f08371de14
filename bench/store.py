"""S3 beside boto3: one object through the store's own adapter and through the SDK's, and
an export of the whole service.

All go to one server on this machine, which shares its cores, so that what it takes itself
bounds each alike. Signing and checksums are the same on both sides: without TLS each part
of an upload is signed with its SHA-256 and carries a CRC. Objects come from memory and go
there (`/dev/shm`), so that no disk but the server's is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import exportd
from bench.contest import (
    Contestant,
    Run,
    beside,
    contest,
    cpu_seconds,
    forget_peak,
    peak_mib,
)
from bench.machine import CACHE, Measured, sample_data, scaled, server
from bench.report import Result, smaller_is_better
from bench.store_run import OBJECT, Options
from exportd_server.store.s3_client import S3Options
from tests.support.seaweed import RawS3, SeaweedServer, raw_client, running_seaweed

SIZE = scaled(2**30)
ROWS = scaled(3_650_000)
"""About 1 GiB, as CSV and as Arrow."""
GOAL_UPLOAD = 1.0
GOAL_DOWNLOAD = 0.9
GOAL_MIB = 350
MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it
Fmt = Literal["csv", "arrow"]

_OURS = "bench.store_run"
_PEER = "bench.peers.boto3"


def results() -> Iterator[Result]:
    """Measure."""
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as directory,
        tempfile.TemporaryDirectory(dir=MEMORY) as memory,
        running_seaweed(Path(directory) / "seaweed") as seaweed,
    ):
        yield from _object(seaweed, Path(memory))
        catalogue = sample_data(ROWS)
        formats: tuple[Fmt, ...] = ("arrow", "csv")
        for fmt in formats:
            yield from _exported(
                Path(directory) / fmt, Path(memory), seaweed.options(), catalogue, fmt
            )


def _object(seaweed: SeaweedServer, memory: Path) -> Iterator[Result]:
    data, fetched = memory / "data", memory / "fetched"
    digest = _random_file(data)
    places = {name: seaweed.options() for name in ("ours", "theirs")}
    client = seaweed.raw

    def uploads(module: str, options: S3Options) -> Contestant:
        def upload() -> Run:
            name = f"{options.root}{OBJECT}"
            client.delete_object(Bucket=options.bucket, Key=name)
            run = _child(module, "upload", options, data)
            stored = client.head_object(Bucket=options.bucket, Key=name)
            assert stored["ContentLength"] == SIZE
            return run

        return upload

    def downloads(module: str, what: str, options: S3Options) -> Contestant:
        def download() -> Run:
            run = _child(module, what, options, fetched)
            assert _sha256(fetched) == digest, f"{module} {what}"
            fetched.unlink()
            return run

        return download

    runs = contest(
        {
            "store": uploads(_OURS, places["ours"]),
            "boto3": uploads(_PEER, places["theirs"]),
        }
    )
    mib = SIZE / 2**20
    yield from beside(
        f"S3 upload, {mib:,.0f} MiB",
        runs["store"],
        "boto3 upload_fileobj",
        runs["boto3"],
        amount=mib,
        unit="MiB/s",
        goal=GOAL_UPLOAD,
    )
    runs = contest(
        {
            "store": downloads(_OURS, "download", places["ours"]),
            "aioboto3": downloads(_PEER, "get", places["ours"]),
            "boto3": downloads(_PEER, "download", places["ours"]),
        }
    )
    for name, peer, goal in (
        ("aioboto3", "one aioboto3 GET", GOAL_DOWNLOAD),
        ("boto3", "boto3 download_fileobj", None),
    ):
        yield from beside(
            f"S3 download, {mib:,.0f} MiB, beside {name}",
            runs["store"],
            peer,
            runs[name],
            amount=mib,
            unit="MiB/s",
            goal=goal,
        )
    data.unlink()


def _child(module: str, what: str, options: S3Options, path: Path) -> Run:
    where = Options(
        options.bucket,
        options.prefix,
        str(options.endpoint_url),
        str(options.region),
        str(options.access_key_id),
        str(options.secret_access_key),
    )
    done = subprocess.run(
        [sys.executable, "-m", module, what, where.text(), str(path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Run(**json.loads(done.stdout))


def _random_file(path: Path) -> str:
    """A file of the size that is measured; returns its SHA-256."""
    with path.open("wb") as file:
        for start in range(0, SIZE, 2**24):
            file.write(os.urandom(min(2**24, SIZE - start)))
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exported(
    folder: Path, memory: Path, options: S3Options, catalogue: Path, fmt: Fmt
) -> Iterator[Result]:
    """From running to succeeded, by the ledger's clock, beside boto3's upload of the very
    same bytes."""
    with (
        server(folder / "s3", catalogue, _variables(options)) as to_s3,
        server(folder / "disk", catalogue) as to_disk,
    ):
        data = memory / "data"
        size = _stored_bytes(to_disk, fmt, folder / "disk" / "outputs", data)
        place = S3Options(
            bucket=options.bucket,
            prefix=f"{options.prefix.partition('/')[0]}-peer",
            endpoint_url=options.endpoint_url,
            region=options.region,
            access_key_id=options.access_key_id,
            secret_access_key=options.secret_access_key,
        )
        client = _boto3(options)

        def upload() -> Run:
            run = _child(_PEER, "upload", place, data)
            name = f"{place.root}{OBJECT}"
            stored = client.head_object(Bucket=place.bucket, Key=name)
            assert stored["ContentLength"] == size
            client.delete_object(Bucket=place.bucket, Key=name)
            return run

        runs = contest(
            {
                "S3": _exports(to_s3, fmt),
                "boto3": upload,
                "disk": _exports(to_disk, fmt),
            }
        )
        data.unlink()
        left = RawS3(client, options)
        while left.objects() != [".owner"] or left.uploads():
            time.sleep(0.1)
    mib = size / 2**20
    for peer, name, goal in (
        ("boto3 upload_fileobj of the same bytes", "boto3", None),
        ("onto a local disk", "disk", None),
    ):
        yield from beside(
            f"export to S3, {fmt}, {mib:,.0f} MiB, beside {name}",
            runs["S3"],
            peer,
            runs[name],
            amount=mib,
            unit="MiB/s",
            goal=goal,
        )
    peaks = {name: runs[name].peak for name in ("S3", "disk")}
    assert peaks["S3"] is not None
    assert peaks["disk"] is not None
    yield smaller_is_better(
        f"peak memory of the server, {fmt} to S3, one export",
        peaks["S3"],
        "MiB",
        peer="onto a local disk",
        peer_value=peaks["disk"],
        goal=f"< {GOAL_MIB}",
    )


def _exports(measured: Measured, fmt: Fmt) -> Callable[[], Run]:
    def export() -> Run:
        forget_peak(measured.pid)
        before = cpu_seconds(measured.pid)
        with exportd.Client(measured.address) as client:
            job = client.export("token_transfers", format=fmt)
            job.wait(timeout=600)
            cpu, peak = cpu_seconds(measured.pid) - before, peak_mib(measured.pid)
            info = job.refresh().info
            assert info.manifest is not None
            assert info.manifest.rows == ROWS
            job.delete()
        assert info.start_time is not None
        assert info.finish_time is not None
        return Run((info.finish_time - info.start_time).total_seconds(), cpu, peak)

    return export


def _stored_bytes(measured: Measured, fmt: Fmt, outputs: Path, path: Path) -> int:
    """Store what an export stores in one file; returns its size."""
    with exportd.Client(measured.address) as client:
        job = client.export("token_transfers", format=fmt)
        job.wait(timeout=600)
        parts = sorted(outputs.rglob("output/*"), key=lambda part: part.name)
        with path.open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
        job.delete()
    return path.stat().st_size


def _boto3(options: S3Options) -> Any:
    assert options.endpoint_url is not None
    return raw_client(options.endpoint_url)


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
