"""Finds out at start, not at the end of the first export, what S3 does not allow."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import structlog

from exportd_server.errors import ConfigurationError
from exportd_server.store.s3_client import Bucket, CallFailed, S3Options
from exportd_server.store.s3_upload import Body, Upload, Uploads

log = structlog.get_logger(__name__)

_TEXT = b"exportd was here"
_MENDS = {
    "NoSuchBucket": "there is no such bucket; create it, or name another in store.url",
    "InvalidAccessKeyId": (
        "S3 does not know the access key id; correct store.s3.access_key_id"
    ),
    "SignatureDoesNotMatch": (
        "the secret access key does not match its id; correct store.s3.secret_access_key"
    ),
    "ExpiredToken": (
        "the credentials have expired; get new ones for store.s3.session_token and the "
        "keys that go with it, or where they were found"
    ),
    "InvalidToken": (
        "S3 does not know the session token; correct store.s3.session_token, or get new "
        "credentials"
    ),
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "NoCredentials": (
        "no credentials were found; set store.s3.access_key_id and "
        "store.s3.secret_access_key, or provide them by the environment, the AWS "
        "configuration files or a role"
    ),
    "Tls": (
        "its certificate is not trusted, or it does not speak TLS; set store.s3.ca_file, "
        "or correct store.s3.endpoint_url"
    ),
    "Unreachable": (
        "the endpoint cannot be reached; correct store.s3.endpoint_url, or start it"
    ),
    "Timeout": (
        "the endpoint does not answer in time; correct store.s3.endpoint_url, or start it"
    ),
    "Broken": ("the endpoint does not answer as S3 does; correct store.s3.endpoint_url"),
}
_RIGHTS = {
    "list": "s3:ListBucket",
    "write": "s3:PutObject and s3:AbortMultipartUpload",
    "put": "s3:PutObject",
    "abort": "s3:AbortMultipartUpload",
    "list unfinished uploads": "s3:ListBucketMultipartUploads",
    "read": "s3:GetObject",
    "delete": "s3:DeleteObject",
}


async def probe(uploads: Uploads) -> None:
    """Do once all that the store will do. Runs on the loop of the uploads.

    Raises `ConfigurationError`. Learns whether S3 itself protects parts from being
    overwritten, and warns when it does not list unfinished uploads.
    """
    options, bucket = uploads.options, uploads.bucket
    name = f"{options.root}.probe-{secrets.token_hex(8)}"
    first, second = Upload(uploads, name), Upload(uploads, name)
    doing = "list"
    try:
        await bucket.call("list_objects_v2", Prefix=options.root, MaxKeys=1)
        doing = "write"
        await first.begin()
        await first.send(1, Body(memoryview(_TEXT)))
        doing = "list unfinished uploads"
        listed = await _is_listed(bucket, options.root, name)
        doing = "write"
        await first.complete()
        doing = "read"
        answer = await bucket.call("get_object", Key=name)
        answer["Body"].close()
        doing = "write"
        await second.begin()
        await second.send(1, Body(memoryview(_TEXT)))
        uploads.conditional = uploads.conditional and await _is_refused(second)
        doing = "delete"
        await second.abort()
        await bucket.call("delete_object", Key=name)
    except CallFailed as error:
        await _clean_up(bucket, name, first, second)
        # A full store must not keep the server from starting: it frees room.
        if error.as_store_failed().retryable:
            raise ConfigurationError(
                f"output store: cannot {doing} at {_place(options)}: {remedy(error, doing)}"
            ) from error
        log.warning("the output store is full", store=options.url)
        return
    if not listed:
        log.warning(
            "the endpoint does not list unfinished uploads by prefix: those of writers "
            "that died stay there until a lifecycle rule of the bucket aborts them",
            store=options.url,
        )


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What a survey found: rights that are lacking, by their names on S3, and what does
    not keep the service from working."""

    lacking: tuple[str, ...]
    warnings: tuple[str, ...]


async def survey(uploads: Uploads) -> Surveyed:
    """Try each thing that the store will do, also after one was denied, and remove what
    was made. Runs on the loop of the uploads. Raises `ConfigurationError` for all but
    rights that are lacking."""
    trial = _Trial(uploads)
    try:
        await trial.run()
    except CallFailed as error:
        if error.as_store_failed().retryable:
            raise ConfigurationError(
                f"{_place(uploads.options)}: {remedy(error, trial.doing)}"
            ) from error
        trial.warnings.append("it is full; make room")
    finally:
        await trial.clean_up()
    return Surveyed(tuple(trial.lacking), tuple(trial.warnings))


class _Trial:
    """One survey. The names of reading and deleting need not be there: S3 tells first
    whether it is allowed."""

    def __init__(self, uploads: Uploads) -> None:
        self._bucket = uploads.bucket
        self._root = uploads.options.root
        self._name = f"{self._root}.probe-{secrets.token_hex(8)}"
        self._first = Upload(uploads, self._name)
        self._second = Upload(uploads, self._name)
        self._put = False
        self.doing = "list"
        self.lacking: list[str] = []
        self.warnings: list[str] = []

    async def run(self) -> None:
        """All steps."""
        bucket, name = self._bucket, self._name
        await self._step(
            "list", bucket.call("list_objects_v2", Prefix=self._root, MaxKeys=1)
        )
        if await self._step("write", self._write()):
            await self._step("abort", self._abort())
        await self._step("put", self._put_object())
        await self._step("read", self._read())
        if await self._step("delete", bucket.call("delete_object", Key=name)):
            self._put = False

    async def _step(self, doing: str, work: Awaitable[object]) -> bool:
        """Whether it was allowed. Raises `CallFailed` for what else went wrong."""
        self.doing = doing
        try:
            await work
        except CallFailed as error:
            if error.status != 403 or error.code in _MENDS:
                raise
            self.lacking.append(_RIGHTS[self.doing])
            return False
        return True

    async def _write(self) -> None:
        await self._first.begin()
        await self._first.send(1, Body(memoryview(_TEXT)))
        self.doing = "list unfinished uploads"
        if not await _is_listed(self._bucket, self._root, self._name):
            self.warnings.append(
                "it does not list unfinished uploads by prefix: those of writers that "
                "died stay there until a lifecycle rule of the bucket aborts them"
            )
        self.doing, self._put = "write", True
        await self._first.complete()

    async def _abort(self) -> None:
        await self._second.begin()
        await self._second.abort()

    async def _put_object(self) -> None:
        self._put = True
        await self._bucket.call("put_object", Key=self._name, Body=_TEXT)

    async def _read(self) -> None:
        try:
            answer = await self._bucket.call("get_object", Key=self._name)
        except CallFailed as error:
            if not error.missing:
                raise
        else:
            answer["Body"].close()

    async def clean_up(self) -> None:
        """Remove what is still there; what cannot be is told."""
        for upload in (self._first, self._second):
            with suppress(CallFailed):
                await upload.abort()
        if not self._put:
            return
        try:
            await self._bucket.call("delete_object", Key=self._name)
        except CallFailed:
            self.warnings.append(f"the object {self._name} may be left there; delete it")


async def _is_listed(bucket: Bucket, root: str, name: str) -> bool:
    async for page in bucket.uploads(root):
        if any(found == name for found, _ in page):
            return True
    return False


async def _is_refused(upload: Upload) -> bool:
    """Whether S3 refuses to complete an upload whose name is taken."""
    try:
        await upload.complete()
    except CallFailed as error:
        if error.status != 412:
            raise
        return True
    return False


async def _clean_up(bucket: Bucket, name: str, *uploads: Upload) -> None:
    for upload in uploads:
        with suppress(CallFailed):
            await upload.abort()
    with suppress(CallFailed):
        await bucket.call("delete_object", Key=name)


def _place(options: S3Options) -> str:
    if not options.endpoint_url:
        return options.url
    # Without a user name and a password, which belong nowhere near a log.
    parts = urlsplit(options.endpoint_url)
    return f"{options.url} ({parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path})"


def remedy(error: CallFailed, doing: str) -> str:
    """What a failure was, and how to mend it. `doing` is what was tried, as a survey
    names it."""
    if error.region and error.code not in _MENDS:
        return f"the bucket is in the region {error.region!r}; set store.s3.region to that"
    if error.code in _MENDS:
        return _MENDS[error.code]
    if error.status == 403:
        return f"access is denied; allow {_RIGHTS[doing]} to the keys of store.s3"
    answer = f"{error.status} {error.code}: {error.message}".strip(": ")
    return f"S3 answered {answer}; correct store.s3.endpoint_url if that is no S3"
