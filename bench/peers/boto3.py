"""What a program of boto3 or aioboto3 does with an object: `python -m bench.peers.boto3
upload|download|get OPTIONS PATH`.

`upload` and `download` are boto3's transfer manager as it comes: parts of 8 MiB, ten
threads. `get` is one streaming GET by aioboto3 into a file. Uploads carry a CRC32 of each
part, and sign it as SDKs do without TLS; downloads are not checked.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aioboto3
import boto3
from aiobotocore.config import AioConfig
from botocore.config import Config

from bench.store_run import BLOCK, OBJECT, Options, timed


def main() -> None:
    """Do it once, and print what it took as JSON."""
    what, options, path = sys.argv[1], Options.read(sys.argv[2]), Path(sys.argv[3])
    work: dict[str, Callable[[Options, Path], None]] = {
        "upload": upload,
        "download": download,
        "get": lambda options, path: asyncio.run(get(options, path)),
    }
    work[what](options, path)


def upload(options: Options, path: Path) -> None:
    """The transfer manager's upload of a file that is open."""
    client = boto3.client("s3", **_where(options), config=Config(**_HOW))
    client.head_bucket(Bucket=options.bucket)
    with path.open("rb") as data, timed():
        client.upload_fileobj(
            data,
            options.bucket,
            f"{options.prefix}/{OBJECT}",
            ExtraArgs={"ChecksumAlgorithm": "CRC32"},
        )


def download(options: Options, path: Path) -> None:
    """The transfer manager's download: ranges at a time."""
    client = boto3.client("s3", **_where(options), config=Config(**_HOW))
    client.head_bucket(Bucket=options.bucket)
    with path.open("wb") as file, timed():
        client.download_fileobj(options.bucket, f"{options.prefix}/{OBJECT}", file)


async def get(options: Options, path: Path) -> None:
    """One GET."""
    async with aioboto3.Session().client(
        "s3", **_where(options), config=AioConfig(**_HOW)
    ) as client:
        await client.head_bucket(Bucket=options.bucket)
        with path.open("wb") as file, timed():
            answer = await client.get_object(
                Bucket=options.bucket, Key=f"{options.prefix}/{OBJECT}"
            )
            async for data in answer["Body"].iter_chunks(BLOCK):
                file.write(data)


_HOW: dict[str, Any] = {
    "s3": {"addressing_style": "path"},
    "response_checksum_validation": "when_required",
}


def _where(options: Options) -> dict[str, Any]:
    return {
        "endpoint_url": options.endpoint_url,
        "region_name": options.region,
        "aws_access_key_id": options.access_key_id,
        "aws_secret_access_key": options.secret_access_key,
    }


if __name__ == "__main__":
    main()
