"""Writes the domain's values as the contract's messages."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Generic, TypeVar

from google.protobuf.message import Message

from exportd.v1 import dataset_pb2, export_service_pb2, job_pb2
from exportd_server.api.sinks import (
    sink_delivery_message,
    sink_message,
    status_value,
)
from exportd_server.api.status import duration, record_status
from exportd_server.api.timestamps import timestamp
from exportd_server.encoders.base import (
    Format,
)
from exportd_server.jobs.model import (
    CancelOutcome,
    DeliveryStatus,
    ExportSpec,
    FilterLiteral,
    FilterSpec,
    Job,
    JobState,
    Manifest,
)
from exportd_server.jobs.output import (
    error_part_file_name,
    file_name,
    joined_layout,
    part_file_name,
)
from exportd_server.sources.base import ColumnKind
from exportd_server.sources.catalogue import Dataset

_KINDS: Mapping[str, dataset_pb2.ColumnKind.ValueType] = MappingProxyType(
    {kind.value: dataset_pb2.ColumnKind.Value(f"COLUMN_KIND_{kind}") for kind in ColumnKind}
)
_STATES = MappingProxyType(
    {state: job_pb2.JobState.Value(f"JOB_STATE_{state}") for state in JobState}
)


def dataset_message(
    dataset: Dataset,
    *,
    max_rows: int | None,
    max_bytes: int | None,
    estimated_rows: int | None = None,
) -> dataset_pb2.Dataset:
    """A dataset as a caller sees it."""
    return dataset_pb2.Dataset(
        name=dataset.name,
        description=dataset.description,
        exportable=dataset.exportable,
        columns=[
            dataset_pb2.Column(
                name=column.name,
                kind=_KINDS[column.kind],
                type=str(column.type),
                nullable=column.nullable,
                operators=[
                    dataset_pb2.FilterOperator.Value(f"FILTER_OPERATOR_{operator}")
                    for operator in column.operators
                ],
                description=column.description,
            )
            for column in (dataset.columns if dataset.exportable else ())
        ],
        formats=[
            dataset_pb2.Format.Value(f"FORMAT_{fmt}")
            for fmt in (Format if dataset.exportable else ())
        ],
        target_column=dataset.target_column or "",
        network_column=dataset.network_column or "",
        time_column=dataset.time_column or "",
        max_rows=max_rows or 0,
        max_bytes=max_bytes or 0,
        estimated_rows=estimated_rows,
    )


T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Kept(Generic[T, M]):
    """The messages that were last used and what they tell, by job id; few and small ones,
    a MiB of them and a few times that in memory."""

    MOST = 256
    MOST_BYTES = 4 << 10

    def __init__(self) -> None:
        # In the order in which they were last asked for.
        self._kept: dict[str, tuple[T, M]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, job_id: str) -> tuple[T, M] | tuple[None, None]:
        """What was kept, if it still is."""
        kept = self._kept.pop(job_id, None)
        if kept is None:
            return None, None
        self._kept[job_id] = kept
        return kept

    def keep(self, job_id: str, told: T, message: M) -> None:
        """Keep it unless it is large, for as long as others are not asked for instead."""
        if message.ByteSize() > self.MOST_BYTES:
            return
        self._kept[job_id] = (told, message)
        if len(self._kept) > self.MOST:
            del self._kept[next(iter(self._kept))]


def request_message(job: Job) -> job_pb2.CreateExportRequest:
    """The request as accepted."""
    spec, output = job.spec, job.spec.output
    message = job_pb2.CreateExportRequest(
        request_id=job.request_id,
        dataset=spec.dataset,
        target_id=spec.target_id,
        network=spec.network,
        columns=spec.columns,
        filters=[_filter_message(condition) for condition in spec.filters],
        limit=spec.limit,
        format=dataset_pb2.Format.Value(f"FORMAT_{output.format}"),
        max_part_rows=spec.max_part_rows,
        max_part_bytes=spec.max_part_bytes,
        ttl=duration(spec.ttl),
        priority=spec.priority,
        labels=spec.labels,
        on_row_error=job_pb2.RowErrorPolicy.Value(f"ROW_ERROR_POLICY_{spec.on_row_error}"),
        max_row_errors=spec.max_row_errors or 0,
        sinks=[sink_message(sink) for sink in spec.sinks],
        drop_after_delivery=spec.drop_after_delivery,
    )
    if spec.start_time is not None or spec.end_time is not None:
        message.time_range.CopyFrom(
            job_pb2.TimeRange(
                start_time=timestamp(spec.start_time), end_time=timestamp(spec.end_time)
            )
        )
    match output.format:
        case Format.CSV:
            message.csv_options.CopyFrom(
                job_pb2.CsvOptions(
                    delimiter=output.csv.delimiter,
                    header=output.csv.header,
                    null_marker=output.csv.null_marker,
                    dialect=job_pb2.CsvDialect.Value(f"CSV_DIALECT_{output.csv.dialect}"),
                )
            )
        case Format.PARQUET:
            message.parquet_options.CopyFrom(
                job_pb2.ParquetOptions(
                    row_group_rows=output.parquet.row_group_rows,
                    compression=job_pb2.ParquetCompression.Value(
                        f"PARQUET_COMPRESSION_{output.parquet.compression}"
                    ),
                )
            )
        case Format.ARROW:
            message.arrow_options.CopyFrom(
                job_pb2.ArrowOptions(
                    compression=job_pb2.ArrowCompression.Value(
                        f"ARROW_COMPRESSION_{output.arrow.compression}"
                    )
                )
            )
        case Format.JSONL:
            pass
    if output.format in (Format.CSV, Format.JSONL):
        message.compression = job_pb2.Compression.Value(f"COMPRESSION_{output.compression}")
    return message


def _filter_message(condition: FilterSpec) -> job_pb2.Filter:
    return job_pb2.Filter(
        column=condition.column,
        operator=dataset_pb2.FilterOperator.Value(f"FILTER_OPERATOR_{condition.operator}"),
        values=[_literal_message(literal) for literal in condition.values],
    )


def _literal_message(literal: FilterLiteral) -> job_pb2.FilterValue:
    match literal.kind:
        case "string":
            return job_pb2.FilterValue(string_value=literal.text)
        case "int":
            return job_pb2.FilterValue(int_value=int(literal.text))
        case "double":
            return job_pb2.FilterValue(double_value=float(literal.text))
        case "bool":
            return job_pb2.FilterValue(bool_value=literal.text == "true")
        case "timestamp":
            moment = datetime.fromisoformat(literal.text)
            return job_pb2.FilterValue(timestamp_value=timestamp(moment))
        case "bytes":
            return job_pb2.FilterValue(bytes_value=base64.b64decode(literal.text))


def job_message(
    job: Job, request: job_pb2.CreateExportRequest | None = None
) -> job_pb2.Job:
    """A job as its caller sees it; `request` is its request's message, if there is one
    already."""
    message = job_pb2.Job(
        job_id=job.job_id,
        state=_STATES[job.state],
        request=request_message(job) if request is None else request,
        progress=_progress_message(job),
        create_time=timestamp(job.create_time),
        start_time=timestamp(job.start_time),
        finish_time=timestamp(job.finish_time),
        expire_time=timestamp(job.expire_time),
        generation=job.generation,
        attempt=job.attempt,
        revision=job.revision,
        delivery_status=status_value(job.delivery_status),
        delivered_to=[
            each.sink for each in job.deliveries if each.status is DeliveryStatus.DELIVERED
        ],
        deliveries=[sink_delivery_message(each) for each in job.deliveries],
        drop_time=timestamp(job.drop_time),
    )
    if job.error is not None:
        message.error.CopyFrom(record_status(job.error))
    if job.manifest is not None:
        _write_manifest(message.manifest, job, job.manifest)
    return message


class JobAnswers:
    """Tells jobs, without writing again what it has written before. Nobody changes the
    messages."""

    def __init__(self) -> None:
        self._requests: Kept[tuple[ExportSpec, str], job_pb2.CreateExportRequest] = Kept()
        self._got: Kept[Job, export_service_pb2.GetJobResponse] = Kept()

    def job(self, job: Job) -> job_pb2.Job:
        """A job as its caller sees it."""
        # The ledger shares what it has read before: whoever watches a job meets it again.
        told, request = self._requests.find(job.job_id)
        if told is None or told[0] is not job.spec or told[1] != job.request_id:
            request = request_message(job)
            self._requests.keep(job.job_id, (job.spec, job.request_id), request)
        return job_message(job, request)

    def get_job(self, job: Job) -> export_service_pb2.GetJobResponse:
        """GetJob's answer. Callers poll, mostly for jobs that have ended and stay as they
        are, and to write it takes longer than to see that it is the same one."""
        told, answer = self._got.find(job.job_id)
        if answer is None or told != job:
            answer = export_service_pb2.GetJobResponse(job=self.job(job))
            if job.state.terminal:
                self._got.keep(job.job_id, job, answer)
        return answer


def _progress_message(job: Job) -> job_pb2.Progress:
    progress = job.progress
    message = job_pb2.Progress(
        rows=progress.rows,
        bytes=progress.bytes,
        parts_done=progress.parts_done,
        parts_total=progress.parts_total,
        estimated_rows=progress.estimated_rows,
        queue_position=progress.queue_position,
        rows_per_second=progress.rows_per_second,
        row_errors=progress.row_errors,
    )
    if job.state is JobState.SUCCEEDED:
        message.fraction = 1.0
    elif progress.estimated_rows:
        message.fraction = min(1.0, progress.rows / progress.estimated_rows)
    return message


def _write_manifest(message: job_pb2.Manifest, job: Job, manifest: Manifest) -> None:
    """Write it where it belongs: a message that is put into another one is copied."""
    output = job.spec.output
    for column in manifest.columns:
        message.columns.add(
            name=column.name,
            kind=_KINDS[column.kind],
            type=column.type,
            nullable=column.nullable,
        )
    for index, part in enumerate(manifest.parts):
        message.parts.add(
            index=index,
            rows=part.rows,
            bytes=part.bytes,
            crc32c=part.crc32c,
            sha256=part.sha256,
            file_name=part_file_name(job, index),
            prefix_bytes=part.prefix_bytes,
            suffix_bytes=part.suffix_bytes,
        )
    message.rows = sum(part.rows for part in manifest.parts)
    message.bytes = sum(part.bytes for part in manifest.parts)
    message.content_type = output.content_type
    message.content_encoding = output.content_encoding
    message.file_name = file_name(job)
    message.row_errors = sum(part.rows for part in manifest.error_parts)
    message.error_parts.extend(_error_parts(job, manifest))
    layout = joined_layout(output, manifest.parts)
    if layout is not None:
        message.joinable = True
        message.bytes = layout.bytes
        message.crc32c = layout.crc32c
        message.sha256 = layout.sha256


def _error_parts(job: Job, manifest: Manifest) -> list[job_pb2.ErrorPart]:
    # An error part has the key of its output part, but for the kind.
    places = {
        (part.shard, part.sequence): index for index, part in enumerate(manifest.parts)
    }
    return [
        job_pb2.ErrorPart(
            index=index,
            part_index=places[part.shard, part.sequence],
            rows=part.rows,
            bytes=part.bytes,
            crc32c=part.crc32c,
            sha256=part.sha256,
            file_name=error_part_file_name(job, index),
        )
        for index, part in enumerate(manifest.error_parts)
    ]


CANCEL_OUTCOMES = {
    outcome: export_service_pb2.CancelOutcome.Value(f"CANCEL_OUTCOME_{outcome}")
    for outcome in CancelOutcome
}
