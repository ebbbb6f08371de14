"""What a webhook is sent: the JSON of a completion, or a part's bytes and what is told of
them in headers. `docs/sinks_webhook.md` tells the fields."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime
from typing import Protocol

from exportd_server.encoders.base import Buffer
from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import Delivery, Export, Link, Part
from exportd_server.sinks.manifest import export_facts, part_facts

EVENT = "export.completed"
MOST_PARTS = 256
"""Of how many parts a notification tells. With pre-signed URLs that is about 400 KiB."""
PIECE_BYTES = 256 * 1024


def export_headers(export: Export) -> dict[str, str]:
    """Headers of everything that is sent for an export."""
    return {
        "x-exportd-job-id": export.job_id,
        "x-exportd-dataset": export.dataset,
        "x-exportd-format": export.output.format.value,
        "x-exportd-generation": str(export.generation),
    }


def part_headers(part: Part) -> dict[str, str]:
    """Headers of one part."""
    return {
        "x-exportd-part": f"{part.shard}-{part.sequence}",
        "x-exportd-file-name": part.file_name,
        "x-exportd-rows": str(part.rows),
        "x-exportd-bytes": str(part.bytes),
        "x-exportd-sha256": part.sha256.hex(),
        "x-exportd-crc32c": f"{part.crc32c:08x}",
    }


def completion_json(delivery: Delivery, links: Sequence[Link], now: datetime) -> bytes:
    """The body of a notification."""
    export, parts = delivery.export, delivery.parts
    by_name = {link.file_name: link for link in links}
    told = parts[:MOST_PARTS]
    event = {
        "type": EVENT,
        "timestamp": _rfc3339(now),
        "data": {
            **export_facts(delivery),
            "tenant": export.tenant,
            "labels": dict(export.labels),
            "parts_total": len(parts),
            "parts_omitted": len(parts) - len(told),
            "parts": [_part(part, by_name.get(part.file_name)) for part in told],
        },
    }
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def _part(part: Part, link: Link | None) -> dict[str, object]:
    told = part_facts(part)
    if link is not None:
        told |= {"url": link.url, "url_expire_time": _rfc3339(link.expire_time)}
    return told


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


class Hash(Protocol):
    """Anything that digests bytes."""

    def update(self, data: Buffer, /) -> None:
        """Digest more."""
        ...


async def read_part(part: Part, *hashes: Hash) -> AsyncGenerator[bytes]:
    """The bytes of a part, piece by piece, digested by `hashes` as they come.

    The last piece is given only once all are known to be those that the export wrote:
    whoever is sent them cannot take a broken part for a whole one. Raises
    `DeliveryFailed` when they are not, and what `Content.open` does. Close it.
    """
    digest = hashlib.sha256()

    def add(piece: bytes) -> None:
        for each in (digest, *hashes):
            each.update(piece)

    buffer = memoryview(bytearray(min(PIECE_BYTES, max(part.bytes, 1))))
    held, count = b"", 0
    async with part.content.open() as reader:
        while read := await reader.readinto(buffer):
            count += read
            if count > part.bytes:
                break
            if held:
                yield held
            held = bytes(buffer[:read])
            # Digests release the GIL, and three of them take longer than the loop should
            # be held up.
            await asyncio.to_thread(add, held)
    if count != part.bytes or digest.digest() != part.sha256:
        # It may be the reading that went wrong.
        raise DeliveryFailed(
            "what was read of the part does not match its checksum; it was not sent whole",
            retryable=True,
        )
    if held:
        yield held
