"""The manifest of a job as an object in the store: what its parts are, for whoever has
the store and not the ledger. `docs/store.md` tells its fields."""

from __future__ import annotations

import json

from exportd_server.jobs.housekeeping import manifest_key, part_key
from exportd_server.jobs.model import Job, Manifest, PartRecord
from exportd_server.jobs.output import error_part_file_name, part_file_name
from exportd_server.store.base import OutputStore
from exportd_server.store.key import JobPrefix

VERSION = 1


def manifest_json(job: Job, manifest: Manifest) -> bytes:
    """The manifest's text, which ends with a newline."""
    prefix = JobPrefix(job.tenant, job.job_id)
    output = job.spec.output
    told = {
        "manifest_version": VERSION,
        "job_id": job.job_id,
        "tenant": job.tenant,
        "dataset": job.spec.dataset,
        "generation": job.generation,
        "format": output.format.value,
        "content_type": output.content_type,
        "content_encoding": output.content_encoding,
        "rows": sum(part.rows for part in manifest.parts),
        "bytes": sum(part.bytes for part in manifest.parts),
        "columns": [
            {
                "name": column.name,
                "kind": column.kind,
                "type": column.type,
                "nullable": column.nullable,
            }
            for column in manifest.columns
        ],
        "parts": [
            {
                "index": index,
                "file_name": part_file_name(job, index),
                "key": str(part_key(prefix, part)),
                "rows": part.rows,
                "bytes": part.bytes,
                "prefix_bytes": part.prefix_bytes,
                "suffix_bytes": part.suffix_bytes,
                "crc32c": part.crc32c,
                "sha256": part.sha256.hex(),
            }
            for index, part in enumerate(manifest.parts)
        ],
        "row_errors": sum(part.rows for part in manifest.error_parts),
        "error_parts": [
            {
                "index": index,
                "file_name": error_part_file_name(job, index),
                "key": str(part_key(prefix, part)),
                "rows": part.rows,
                "bytes": part.bytes,
                "crc32c": part.crc32c,
                "sha256": part.sha256.hex(),
            }
            for index, part in enumerate(manifest.error_parts)
        ],
    }
    return json.dumps(told, ensure_ascii=False, indent=1).encode() + b"\n"


async def missing_parts(
    store: OutputStore, job: Job, manifest: Manifest
) -> list[PartRecord]:
    """What the manifest names and the store has not. Raises `StoreFailed`."""
    prefix = JobPrefix(job.tenant, job.job_id)
    there = {key async for key in store.list_job(prefix)}
    return [part for part in manifest.all_parts if part_key(prefix, part) not in there]


def store_manifest(store: OutputStore, job: Job, manifest: Manifest, token: int) -> None:
    """Store the manifest durably under the token of the lease that publishes it; blocks.
    Raises `StoreFailed`."""
    writer = store.create(manifest_key(JobPrefix(job.tenant, job.job_id), token))
    try:
        writer.write(manifest_json(job, manifest))
        writer.finalize()
    finally:
        writer.abort()
