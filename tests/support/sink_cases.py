"""One case for each sink that the contract suite runs on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from exportd_server.sinks.base import Part, Sink, SinkType
from exportd_server.sinks.local_file import (
    LocalFileConnection,
    LocalFileRequest,
    LocalFileSinkType,
)
from exportd_server.sinks.object_storage import (
    ObjectStorageConnection,
    ObjectStorageRequest,
    ObjectStorageSinkType,
)
from exportd_server.store.s3_client import S3Options
from tests.support.seaweed import RawS3, SeaweedServer
from tests.support.sinks import JOB_ID
from tests.support.webhook_case import WebhookCase

MANIFEST = f"orders-{JOB_ID}.manifest.json"


class SinkCase(Protocol):
    """A sink under test, and what the suite must see of its receiver. All is new for each
    test; a part's bytes are CSV of `tests.support.sinks.COLUMNS`, header included."""

    @property
    def sink_type(self) -> SinkType[Any, Any]:
        """The sink's type."""
        ...

    @property
    def request(self) -> Any:
        """What a caller says."""
        ...

    @property
    def connection(self) -> Any:
        """What the operator configured; None where the type needs nothing."""
        ...

    @property
    def lists_parts(self) -> bool:
        """Whether its receiver is told the names of the parts by the completion."""
        ...

    @property
    def broken(self) -> Any:
        """A connection to a receiver that is not there."""
        ...

    def expected(self, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        """What `arrived` says when these have arrived, by file name."""
        ...

    def arrived(self) -> dict[str, bytes]:
        """What is there to read, without what lists the parts."""
        ...

    def listed(self) -> list[str] | None:
        """The parts that the completion told, in its order; None before."""
        ...

    def remains(self) -> list[str]:
        """Whatever lies at the receiver, finished or not, as text."""
        ...


@asynccontextmanager
async def opened(case: SinkCase, connection: Any = None) -> AsyncIterator[Sink[Any]]:
    """The sink, open."""
    sink = await case.sink_type.open(connection or case.connection)
    try:
        yield sink
    finally:
        await sink.close()


class LocalFileCase:
    """Files below `tmp_path`."""

    sink_type = LocalFileSinkType()
    lists_parts = True

    def __init__(self, root: Path) -> None:
        self._root = root / "exports"
        self._root.mkdir()
        self.connection = LocalFileConnection(root=self._root)
        self.request = LocalFileRequest(path="daily/orders")

    @property
    def broken(self) -> LocalFileConnection:
        return LocalFileConnection(root=self._root / "missing")

    def expected(self, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        return {f"daily/orders/{name}": data for name, data in parts.items()}

    def arrived(self) -> dict[str, bytes]:
        return {
            name: (self._root / name).read_bytes()
            for name in self.remains()
            if not name.endswith(MANIFEST)
        }

    def listed(self) -> list[str] | None:
        path = self._root / "daily/orders" / MANIFEST
        return _file_names(path.read_bytes()) if path.exists() else None

    def remains(self) -> list[str]:
        return sorted(
            str(path.relative_to(self._root))
            for path in self._root.rglob("*")
            if not path.is_dir()
        )


class ObjectStorageCase:
    """Objects on a real service."""

    sink_type = ObjectStorageSinkType()
    lists_parts = True

    def __init__(self, server: SeaweedServer, options: S3Options) -> None:
        self._client = server.raw
        self._options = options
        self._raw = RawS3(server.raw, options)
        self.connection = connection_of(options)
        self.request = ObjectStorageRequest(prefix="daily/orders")

    @property
    def broken(self) -> ObjectStorageConnection:
        return self.connection.model_copy(update={"bucket": "missing"})

    def expected(self, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        return {f"daily/orders/{name}": data for name, data in parts.items()}

    def arrived(self) -> dict[str, bytes]:
        return {
            name: self._read(name)
            for name in self._raw.objects()
            if not name.endswith(MANIFEST)
        }

    def listed(self) -> list[str] | None:
        name = f"daily/orders/{MANIFEST}"
        return _file_names(self._read(name)) if name in self._raw.objects() else None

    def remains(self) -> list[str]:
        return self._raw.objects() + [f"{name} unfinished" for name in self._raw.uploads()]

    def _read(self, name: str) -> bytes:
        answer = self._client.get_object(
            Bucket=self._options.bucket, Key=f"{self._options.root}{name}"
        )
        data: bytes = answer["Body"].read()
        return data


def connection_of(options: S3Options, **named: Any) -> ObjectStorageConnection:
    """A connection to a place of the store's tests, with small buffers."""
    told = {
        "bucket": options.bucket,
        "prefix": options.prefix,
        "endpoint_url": options.endpoint_url,
        "region": options.region,
        "path_style": options.path_style,
        "access_key_id": options.access_key_id,
        "secret_access_key": options.secret_access_key,
        "part_bytes": 5 << 20,
    }
    return ObjectStorageConnection.model_validate(told | named)


def _file_names(manifest: bytes) -> list[str]:
    return [part["file_name"] for part in json.loads(manifest)["parts"]]


def data_of(parts: Sequence[Part]) -> dict[str, bytes]:
    """The bytes of parts whose content is in memory, by file name."""
    return {part.file_name: part.content.data for part in parts}  # type: ignore[attr-defined]


def _webhook(test: pytest.FixtureRequest) -> SinkCase:
    case = WebhookCase(test.getfixturevalue("tmp_path"))
    test.addfinalizer(case.close)
    return case


CASES: dict[str, Callable[[pytest.FixtureRequest], SinkCase]] = {
    "local_file": lambda test: LocalFileCase(test.getfixturevalue("tmp_path")),
    "object_storage": lambda test: ObjectStorageCase(
        test.getfixturevalue("seaweed"), test.getfixturevalue("s3_options")
    ),
    "webhook": _webhook,
}
"""To run the suite on another sink, add it here."""
