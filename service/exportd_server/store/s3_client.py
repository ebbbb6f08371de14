"""One bucket of an S3 service, through the one SDK that is known here and nowhere else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import aioboto3
import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore import exceptions
from botocore.credentials import RefreshableCredentials
from botocore.loaders import create_loader

from exportd_server.errors import ConfigurationError, StoreFailed
from exportd_server.store.base import SignedUrl
from exportd_server.store.key import JobPrefix, OutputKey

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*\Z")
_LEAST_PART = 5 << 20
_MOST_PART = 1 << 30
_CONNECTIONS = 1000
"""Downloads that have stalled keep theirs, so this must not be a limit in practice."""
_DESCRIPTIONS = create_loader()
"""What the SDK knows of S3, read once: 11 MiB and 30 ms for each client otherwise."""
_FULL = frozenset(
    {
        "InsufficientStorage",
        "QuotaExceeded",
        "StorageFull",
        "XMinioAdminBucketQuotaExceeded",
        "XMinioStorageFull",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """Where objects lie, and how to get there. Times are in seconds. `used_for` begins
    what the operator is told.

    Without keys they are looked for as the AWS tools do: environment, files, the role of
    the container or machine. Without an endpoint it is AWS.
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    public_endpoint_url: str | None = None
    region: str | None = None
    path_style: bool = False
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    part_bytes: int = 8 << 20
    parts_in_flight: int = 2
    attempts: int = 5
    connect_timeout: float = 5.0
    read_timeout: float = 30.0
    call_timeout: float = 120.0
    used_for: str = "output store"

    def __post_init__(self) -> None:
        """Raises `ConfigurationError`."""
        if not _BUCKET.match(self.bucket):
            raise ConfigurationError(
                f"{self.used_for}: {self.bucket!r} is no name of a bucket; use 3 to 63 "
                "lower case letters, digits, dots and hyphens"
            )
        if self.prefix and not _PREFIX.match(self.prefix):
            raise ConfigurationError(
                f"{self.used_for}: the prefix {self.prefix!r} must be names of letters, "
                "digits, _, - and dots (not first), joined by single slashes"
            )
        if not _LEAST_PART <= self.part_bytes <= _MOST_PART:
            raise ConfigurationError(
                f"{self.used_for}: part_bytes must lie between {_LEAST_PART} and "
                f"{_MOST_PART}"
            )
        if self.parts_in_flight < 1 or self.attempts < 1:
            raise ConfigurationError(
                f"{self.used_for}: parts_in_flight and attempts must be at least 1"
            )
        if self.ca_file is not None and not self.ca_file.is_file():
            raise ConfigurationError(
                f"{self.used_for}: ca_file {str(self.ca_file)!r} is no file; name one that "
                "holds the certificates to trust"
            )
        if bool(self.access_key_id) != bool(self.secret_access_key):
            raise ConfigurationError(
                f"{self.used_for}: give both access_key_id and secret_access_key, or "
                "neither"
            )

    @property
    def url(self) -> str:
        """The place as text, for messages."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def root(self) -> str:
        """What every object's name begins with."""
        return f"{self.prefix}/" if self.prefix else ""

    def name(self, key: OutputKey) -> str:
        """The name of a part's object."""
        return f"{self.root}{key}"

    def job(self, prefix: JobPrefix) -> str:
        """What the names of all objects of a job, and of no other, begin with."""
        return f"{self.root}{prefix}/"


class CallFailed(Exception):
    """A call that S3 refused, or that came to no end. `code` is the S3 error code, or
    one of `NoCredentials`, `Unreachable`, `Tls`, `Timeout` and `Broken`."""

    def __init__(
        self, code: str, status: int = 0, message: str = "", region: str = ""
    ) -> None:
        self.code = code
        self.status = status
        self.message = message
        self.region = region
        super().__init__(f"{code} {status or ''} {message}".strip())

    @property
    def missing(self) -> bool:
        """Whether it is the object that is not there. HEAD has no code to tell."""
        return self.code in {"NoSuchKey", "404"}

    def as_store_failed(self) -> StoreFailed:
        """The error of the seam; raise it from this one."""
        full = self.status == 507 or self.code in _FULL or "no free volume" in self.message
        return StoreFailed(full=full)


class Bucket:
    """Calls on one bucket. It belongs to the event loop that it was opened on."""

    def __init__(
        self, options: S3Options, client: Any, signing: Any, credentials: Any
    ) -> None:
        self.options = options
        self._client = client
        self._signing = signing
        self._credentials = credentials

    async def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Make a call, with its repetitions; raises `CallFailed`."""
        with _told_as_call_failed():
            async with asyncio.timeout(self.options.call_timeout):
                answer: dict[str, Any] = await getattr(self._client, operation)(
                    Bucket=self.options.bucket, **parameters
                )
        return answer

    async def signed_get(
        self, name: str, lifetime: timedelta, **headers: str
    ) -> SignedUrl | None:
        """A URL that gets an object without credentials, for at most `lifetime`; None
        when that is under a second. Raises `CallFailed`."""
        with _told_as_call_failed():
            async with asyncio.timeout(self.options.call_timeout):
                seconds = int(min(lifetime, await self._credentials_last()).total_seconds())
                if seconds < 1:
                    return None
                url = await self._signing.generate_presigned_url(
                    "get_object",
                    Params={"Bucket": self.options.bucket, "Key": name, **headers},
                    ExpiresIn=seconds,
                )
        (signed_at,) = parse_qs(urlsplit(url).query)["X-Amz-Date"]
        begins = datetime.strptime(signed_at, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return SignedUrl(url, begins + timedelta(seconds=seconds))

    async def _credentials_last(self) -> timedelta:
        """How long what signs now is good for; very long where that is not known."""
        if not isinstance(self._credentials, RefreshableCredentials):
            return timedelta.max
        # Fetches new ones if these have not long to live.
        await self._credentials.get_frozen_credentials()
        expires = self._credentials._expiry_time  # noqa: SLF001 - told nowhere else
        return cast("timedelta", expires - datetime.now(UTC))

    async def objects(self, prefix: str) -> AsyncIterator[list[str]]:
        """The names of finished objects, in pages of at most 1000."""
        more: dict[str, str] = {}
        while True:
            page = await self.call("list_objects_v2", Prefix=prefix, **more)
            yield [entry["Key"] for entry in page.get("Contents", [])]
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    async def uploads(self, prefix: str) -> AsyncIterator[list[tuple[str, str]]]:
        """Name and id of each unfinished upload, in pages."""
        more: dict[str, str] = {}
        while True:
            page = await self.call("list_multipart_uploads", Prefix=prefix, **more)
            yield [
                (entry["Key"], entry["UploadId"])
                for entry in page.get("Uploads", [])
                if entry["Key"].startswith(prefix)
            ]
            if not page.get("IsTruncated"):
                return
            more = {
                marker: page[f"Next{marker}"]
                for marker in ("KeyMarker", "UploadIdMarker")
                if page.get(f"Next{marker}")
            }

    async def delete(self, names: list[str]) -> None:
        """Delete objects, at most 1000; those that are missing are fine."""
        answer = await self.call(
            "delete_objects",
            Delete={"Objects": [{"Key": name} for name in names], "Quiet": True},
        )
        for refused in answer.get("Errors", []):
            if refused.get("Code") != "NoSuchKey":
                raise CallFailed(refused.get("Code", ""), 200, refused.get("Message", ""))

    async def text(self, name: str) -> str | None:
        """A small object as text; None when there is none."""
        try:
            answer = await self.call("get_object", Key=name)
        except CallFailed as error:
            if error.missing:
                return None
            raise
        try:
            async with asyncio.timeout(self.options.call_timeout), answer["Body"] as body:
                data: bytes = await body.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise CallFailed("Broken", message=str(error)) from error
        return data.decode(errors="replace")

    async def abort(self, name: str, upload_id: str) -> bool:
        """Abort an upload; returns whether it was there, where S3 tells."""
        try:
            await self.call("abort_multipart_upload", Key=name, UploadId=upload_id)
        except CallFailed as error:
            if error.code != "NoSuchUpload":
                raise
            return False
        return True


@asynccontextmanager
async def open_bucket(options: S3Options) -> AsyncIterator[Bucket]:
    """A client for the loop that runs. Nothing is sent yet."""
    inner = get_session()
    inner.register_component("data_loader", _DESCRIPTIONS)
    session = aioboto3.Session(botocore_session=inner)
    config = AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": "path" if options.path_style else "auto"},
        connect_timeout=options.connect_timeout,
        read_timeout=options.read_timeout,
        max_pool_connections=_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        # Parts carry a CRC32C that is computed here, and readers compare with the
        # manifest, so that what the SDK would add costs and adds nothing.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )

    def client_of(endpoint_url: str | None) -> Any:
        return session.client(
            "s3",
            region_name=options.region or session.region_name or "us-east-1",
            endpoint_url=endpoint_url,
            aws_access_key_id=options.access_key_id,
            aws_secret_access_key=options.secret_access_key,
            aws_session_token=options.session_token,
            verify=str(options.ca_file) if options.ca_file else None,
            config=config,
        )

    async with AsyncExitStack() as stack:
        try:
            client = await stack.enter_async_context(client_of(options.endpoint_url))
            signing = client
            if options.public_endpoint_url:
                signing = await stack.enter_async_context(
                    client_of(options.public_endpoint_url)
                )
            # Keys that were given do not say when they end.
            given = options.access_key_id is not None
            credentials = None if given else await inner.get_credentials()
        except (exceptions.BotoCoreError, ValueError) as error:
            raise ConfigurationError(
                f"{options.used_for}: {options.url}: {error}"
            ) from error
        _sign_bodies_without_tls(client)
        yield Bucket(options, client, signing, credentials)


def _sign_bodies_without_tls(client: Any) -> None:
    # TLS keeps bodies whole, and hashing them for the signature takes time. Whether it is
    # used is known only now: the environment may name the endpoint, too.
    tls = client.meta.endpoint_url.startswith("https:")
    client.meta.config.s3["payload_signing_enabled"] = not tls


@contextmanager
def _told_as_call_failed() -> Iterator[None]:
    """Turns the SDK's errors into `CallFailed`."""
    try:
        yield
    except exceptions.ClientError as error:
        raise _refused(error) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise CallFailed("NoCredentials", message=str(error)) from error
    except (exceptions.SSLError, aiohttp.ClientSSLError) as error:
        raise CallFailed("Tls", message=str(error)) from error
    except (
        exceptions.EndpointConnectionError,
        exceptions.ConnectTimeoutError,
    ) as error:
        raise CallFailed("Unreachable", message=str(error)) from error
    except (TimeoutError, exceptions.ReadTimeoutError) as error:
        raise CallFailed("Timeout", message=str(error)) from error
    except (exceptions.BotoCoreError, aiohttp.ClientError, OSError) as error:
        raise CallFailed("Broken", message=str(error)) from error


def _refused(error: Any) -> CallFailed:
    answer = error.response
    told = answer.get("Error", {})
    metadata = answer.get("ResponseMetadata", {})
    headers = metadata.get("HTTPHeaders", {})
    return CallFailed(
        str(told.get("Code", "")),
        int(metadata.get("HTTPStatusCode", 0)),
        str(told.get("Message", "")),
        str(told.get("Region", "") or headers.get("x-amz-bucket-region", "")),
    )
