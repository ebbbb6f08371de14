"""Delivers into a bucket of an S3 service; `docs/sinks.md` tells what it promises.

    s3://<bucket>/<prefix>/<the request's prefix>/<file name>    a part, or the manifest

Reading a part belongs to the loop of whoever delivers; sending and signing it has a loop
and a thread of its own, as in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from exportd_server.errors import ConfigurationError, DeliveryFailed
from exportd_server.sinks.base import (
    PLACE,
    Delivery,
    Export,
    Part,
    SinkDefaults,
    SinkPlan,
    Takes,
)
from exportd_server.sinks.manifest import CONTENT_TYPE, manifest_json, manifest_name
from exportd_server.sinks.names import path_names
from exportd_server.store.base import PartReader
from exportd_server.store.s3_client import CallFailed, S3Options
from exportd_server.store.s3_upload import MOST_PARTS, Body, Upload, Uploads

log = structlog.get_logger(__name__)

_NAME = "object_storage"
_CLEANING_SECONDS = 5.0
"""How long a delivery that ended early is held up by a service that does not answer; the
abort goes on after that."""

_BAD_CREDENTIALS = "the service does not accept the connection's credentials"
_ELSEWHERE = "the bucket is in another region than the connection says"
_REDIRECTED = frozenset({"301", "PermanentRedirect"})
_PERMANENT = {
    "301": _ELSEWHERE,
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "access to the bucket is denied",
    "AllAccessDisabled": "access to the bucket is denied",
    "AccountProblem": "access to the bucket is denied",
    "InvalidAccessKeyId": _BAD_CREDENTIALS,
    "SignatureDoesNotMatch": _BAD_CREDENTIALS,
    "InvalidToken": _BAD_CREDENTIALS,
    "NoCredentials": "the connection has no credentials",
    "ExpiredToken": "the connection's credentials have expired",
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "PermanentRedirect": _ELSEWHERE,
    "MethodNotAllowed": "the service does not take uploads",
    "NotImplemented": "the service does not take uploads as they are made here",
    "KeyTooLongError": "the object's name is too long",
    "EntityTooLarge": "the part is larger than the service takes",
}
_PASSING = {
    "Tls": "the service's certificate is not trusted, or it does not speak TLS",
    "Unreachable": "the service cannot be reached",
    "Timeout": "the service does not answer in time",
    "Broken": "the connection to the service broke off",
    "SlowDown": "the service asks for fewer requests",
    "RequestTimeTooSkewed": "the clocks of the service and of this machine differ",
}

_CODE = re.compile(r"[A-Za-z0-9.]{1,64}\Z")

_T = TypeVar("_T")


class ObjectStorageRequest(BaseModel):
    """What a caller says: the prefix below that of the connection."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str = ""


class ObjectStorageConnection(BaseModel):
    """What the operator configures; it means what the output store's S3 settings mean.
    Times are in seconds, sizes in bytes.

    Without keys they are looked for as the AWS tools do. A delivery holds at most
    `part_bytes` times `parts_in_flight` + 1 in memory.
    """

    # An error that shows what it was given would show the secrets.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    bucket: Annotated[str, PLACE]
    prefix: Annotated[str, PLACE] = Field(default="", max_length=255)
    endpoint_url: str | None = None
    region: str | None = None
    path_style: bool = False
    access_key_id: str | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None
    ca_file: Path | None = None
    part_bytes: int = 8 << 20
    parts_in_flight: int = 2
    attempts: int = 3
    connect_timeout: float = Field(default=5.0, gt=0)
    read_timeout: float = Field(default=30.0, gt=0)
    call_timeout: float = Field(default=120.0, gt=0)

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        try:
            _ = self.options
        except ConfigurationError as error:
            raise ValueError(str(error).removeprefix(f"{_NAME}: ")) from error
        return self

    @property
    def options(self) -> S3Options:
        """The same, as the client takes it. Raises `ConfigurationError`."""
        named = self.model_dump(exclude={"secret_access_key", "session_token"})
        return S3Options(
            **named,
            secret_access_key=_plain(self.secret_access_key),
            session_token=_plain(self.session_token),
            used_for=_NAME,
        )


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


class ObjectStorageSinkType:
    """Objects in an S3 bucket."""

    name = _NAME
    request_model = ObjectStorageRequest
    connection_model = ObjectStorageConnection
    needs_connection = True
    defaults = SinkDefaults()

    def check(
        self,
        request: ObjectStorageRequest,
        connection: ObjectStorageConnection | None,
        export: Export,
    ) -> SinkPlan:
        """See whether the prefix stays below the connection's."""
        del connection, export
        path_names("prefix", request.prefix)
        return SinkPlan(Takes.PARTS)

    async def open(self, connection: ObjectStorageConnection | None) -> ObjectStorageSink:
        """Make a client. Nothing is sent yet."""
        if connection is None:
            raise ConfigurationError(f"{_NAME}: name a connection; it has the bucket")
        return ObjectStorageSink(await asyncio.to_thread(Uploads, connection.options))


class ObjectStorageSink:
    """Delivers below one prefix of a bucket."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._options = uploads.options

    async def probe(self, request: ObjectStorageRequest, export: Export) -> None:
        """Begin an upload and abort it: no object ever comes of that."""
        del export
        upload = self._upload(self._key(request, ".probe"), "application/octet-stream")
        with self._told():
            await self._begin(upload)
            await self._insist(upload.abort())

    async def deliver(self, request: ObjectStorageRequest, delivery: Delivery) -> str:
        """Put an object, whatever is there under its name; the receipt is its URL."""
        part = delivery.part
        name = manifest_name(delivery) if part is None else part.file_name
        key = self._key(request, name)
        with self._told():
            if part is None:
                await self._put(
                    key, Body(memoryview(manifest_json(delivery))), CONTENT_TYPE
                )
            else:
                content_type = delivery.export.output.file_content_type
                if part.bytes > self._options.part_bytes and delivery.attempt > 1:
                    await self._abort_left_over(key)
                async with part.content.open() as reader:
                    await self._put_part(key, _Checked(reader, part), content_type)
        return f"s3://{self._options.bucket}/{key}"

    async def close(self) -> None:
        """End the thread and its connections."""
        await asyncio.to_thread(self._uploads.close)

    async def _put_part(self, key: str, source: _Checked, content_type: str) -> None:
        size, piece = source.size, self._options.part_bytes
        if size > piece * MOST_PARTS:
            raise DeliveryFailed(
                f"the part has {size} bytes, and the connection's part_bytes allows for "
                f"{piece * MOST_PARTS}",
                retryable=False,
            )
        if size > piece:
            await self._put_pieces(source, self._upload(key, content_type))
            return
        body = await source.read(memoryview(bytearray(size)))
        await source.require_whole()
        await self._put(key, body, content_type)

    async def _put(self, key: str, body: Body, content_type: str) -> None:
        """Put an object in one call, after which all of it is there or nothing."""
        bucket = self._uploads.bucket
        try:
            await self._run(
                bucket.call(
                    "put_object",
                    Key=key,
                    Body=body,
                    ContentType=content_type,
                    ChecksumCRC32C=body.checksum,
                )
            )
        except CallFailed as error:
            if error.code == "Broken":
                await self._require_here()
            raise

    async def _require_here(self) -> None:
        """See that the bucket is in the region where it is looked for.

        When a call with a body is redirected, the client says that it was cut. One
        without a body tells; on AWS it also teaches the client where the bucket is, so
        that the next attempt goes there.
        """
        try:
            await self._run(self._uploads.bucket.call("head_bucket"))
        except CallFailed as error:
            if error.code in _REDIRECTED:
                raise

    async def _put_pieces(self, source: _Checked, upload: Upload) -> None:
        """Put an object in pieces, of which several are sent while one is read."""
        size, piece = source.size, self._options.part_bytes
        free: list[memoryview] = []
        sending: set[asyncio.Future[memoryview]] = set()
        await self._begin(upload)
        try:
            for number, start in enumerate(range(0, size, piece), 1):
                view = free.pop() if free else memoryview(bytearray(piece))
                body = await source.read(view[: size - start])
                if len(sending) >= self._options.parts_in_flight:
                    done, _ = await asyncio.wait(
                        sending, return_when=asyncio.FIRST_COMPLETED
                    )
                    free += await asyncio.gather(*done)
                    sending -= done
                sending.add(self._start(_send(upload, number, body, view)))
            await source.require_whole()
            await asyncio.gather(*sending)
            await self._run(upload.complete())
        except BaseException:
            for some in sending:
                some.cancel()
                some.add_done_callback(_retrieve)
            await self._undo(upload.abort())
            raise

    async def _begin(self, upload: Upload) -> None:
        begun = self._uploads.submit(upload.begin())
        try:
            await asyncio.shield(asyncio.wrap_future(begun))
        except asyncio.CancelledError:
            await self._undo(_abort_when_begun(upload, begun))
            raise

    async def _undo(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait a little for what must be done even when this is cancelled."""
        undone = self._start(work)
        undone.add_done_callback(_note)
        await asyncio.wait({undone}, timeout=_CLEANING_SECONDS)

    async def _abort_left_over(self, key: str) -> None:
        """Abort what an earlier attempt left when its process died. Those who may not
        list uploads need a lifecycle rule for it."""
        with contextlib.suppress(CallFailed):
            await self._run(_abort_uploads(self._uploads, key))

    async def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do it on the loop of the uploads; cancelling cancels it."""
        return await self._start(work)

    async def _insist(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do it on the loop of the uploads, to its end, even when this is cancelled."""
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Future[_T]:
        return asyncio.wrap_future(self._uploads.submit(work))

    def _upload(self, key: str, content_type: str) -> Upload:
        return Upload(self._uploads, key, content_type=content_type, overwrite=True)

    def _key(self, request: ObjectStorageRequest, name: str) -> str:
        names = path_names("prefix", request.prefix)
        return self._options.root + "/".join((*names, name))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except CallFailed as error:
            raise _failed(error, self._options.bucket) from error


class _Checked:
    """Reads a part, and knows whether it was what it should be."""

    def __init__(self, reader: PartReader, part: Part) -> None:
        self.size = part.bytes
        self._sha256 = part.sha256
        self._reader = reader
        self._digest = hashlib.sha256()

    async def read(self, buffer: memoryview) -> Body:
        """Fill the buffer. Raises `DeliveryFailed` when there is not as much."""
        filled = 0
        while filled < len(buffer):
            count = await self._reader.readinto(buffer[filled:])
            if not count:
                raise _not_whole()
            filled += count
        return await asyncio.to_thread(self._seal, buffer)

    async def require_whole(self) -> None:
        """Raises `DeliveryFailed` when there is more, or it has another checksum."""
        more = await self._reader.readinto(memoryview(bytearray(1)))
        if more or self._digest.digest() != self._sha256:
            raise _not_whole()

    def _seal(self, buffer: memoryview) -> Body:
        self._digest.update(buffer)
        return Body(buffer)


def _not_whole() -> DeliveryFailed:
    return DeliveryFailed(
        "the stored part does not have the size and checksum it should have", retryable=True
    )


async def _send(upload: Upload, number: int, body: Body, view: memoryview) -> memoryview:
    """Send a piece; what it was read into is free then."""
    await upload.send(number, body)
    return view


async def _abort_when_begun(upload: Upload, begun: Future[None]) -> None:
    with contextlib.suppress(CallFailed):
        await asyncio.wrap_future(begun)
    await upload.abort()


async def _abort_uploads(uploads: Uploads, key: str) -> None:
    async for page in uploads.bucket.uploads(key):
        for name, upload_id in page:
            if name == key:
                await uploads.bucket.abort(name, upload_id)


def _retrieve(future: asyncio.Future[Any]) -> BaseException | None:
    """How it failed, so that nobody misses being told."""
    return None if future.cancelled() else future.exception()


def _note(undone: asyncio.Future[None]) -> None:
    error = _retrieve(undone)
    if error is not None:
        log.warning("an upload was not aborted", sink=_NAME, exc_info=error)


def _failed(error: CallFailed, bucket: str) -> DeliveryFailed:
    text = _PERMANENT.get(error.code)
    retryable = text is None
    if text is None and not error.as_store_failed().retryable:
        text = "it has no room"
    if text is None:
        text = _PASSING.get(error.code)
    if text is None and error.status == HTTPStatus.FORBIDDEN:
        text, retryable = _PERMANENT["AccessDenied"], False
    if text is None:
        # What a code looks like; anything else is no text for callers.
        code = error.code if _CODE.match(error.code) else ""
        text = f"the service answered {error.status} {code}".rstrip()
    return DeliveryFailed(f"bucket {bucket!r}: {text}", retryable=retryable)
