"""The manifest that completes an export in a directory or a bucket. `docs/sinks.md` tells
its fields."""

from __future__ import annotations

import json

from exportd_server.sinks.base import Delivery, Part

CONTENT_TYPE = "application/json"
_VERSION = 1


def manifest_name(delivery: Delivery) -> str:
    """The manifest's file name."""
    stem = delivery.export.file_stem
    if not stem:
        raise ValueError("an export that is delivered has a file stem")
    return f"{stem}.manifest.json"


def manifest_json(delivery: Delivery) -> bytes:
    """The manifest's text, which ends with a newline; the same at each attempt."""
    told = {
        "manifest_version": _VERSION,
        **export_facts(delivery),
        "parts": [part_facts(part) for part in delivery.parts],
    }
    return json.dumps(told, ensure_ascii=False, indent=1).encode() + b"\n"


def export_facts(delivery: Delivery) -> dict[str, object]:
    """What receivers are told of an export as a whole, as JSON has it."""
    export, parts = delivery.export, delivery.parts
    return {
        "job_id": export.job_id,
        "dataset": export.dataset,
        "generation": export.generation,
        "format": export.output.format.value,
        "content_type": export.output.content_type,
        "content_encoding": export.output.content_encoding,
        "joinable": export.output.joinable,
        "rows": sum(part.rows for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "dropped": delivery.dropped,
        "columns": [
            {
                "name": column.name,
                "kind": column.kind,
                "type": column.type,
                "nullable": column.nullable,
            }
            for column in export.columns
        ],
    }


def part_facts(part: Part) -> dict[str, object]:
    """What receivers are told of one part."""
    return {
        "file_name": part.file_name,
        "rows": part.rows,
        "bytes": part.bytes,
        "prefix_bytes": part.prefix_bytes,
        "suffix_bytes": part.suffix_bytes,
        "crc32c": f"{part.crc32c:08x}",
        "sha256": part.sha256.hex(),
    }
