"""Makes the bucket of store.url, unless it is there.

    python make_bucket.py --config FILE

exportd itself does not: in most places a bucket is made by those who answer for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from exportd_server.errors import ConfigurationError
from exportd_server.places import outputs
from exportd_server.settings import load_settings


def make(config: Path) -> str:
    """Make it; returns its name. Raises what the settings or the service have against
    it."""
    place = outputs(load_settings(config, {}, serves=False))
    if isinstance(place, Path):
        raise ConfigurationError(f"store.url: {place} is a directory and no bucket")
    client = boto3.client(
        "s3",
        endpoint_url=place.endpoint_url,
        region_name=place.region,
        aws_access_key_id=place.access_key_id,
        aws_secret_access_key=place.secret_access_key,
        config=Config(s3={"addressing_style": "path" if place.path_style else "auto"}),
    )
    try:
        client.create_bucket(Bucket=place.bucket)
    except ClientError as error:
        there = {"BucketAlreadyExists", "BucketAlreadyOwnedByYou"}
        if error.response["Error"]["Code"] not in there:
            raise
    return place.bucket


def main() -> int:
    """Make it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    try:
        print(make(parser.parse_args().config))
    except (ConfigurationError, BotoCoreError, ClientError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
