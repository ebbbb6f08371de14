"""Between the contract's messages and the domain's values.

Reading collects every bad field instead of stopping at the first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID

from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2

from exportd.v1 import dataset_pb2, export_service_pb2, job_pb2
from exportd_server.encoders.base import (
    ArrowCompression,
    ArrowOptions,
    Compression,
    CsvDialect,
    CsvOptions,
    Format,
    OutputFormat,
    ParquetCompression,
    ParquetOptions,
)
from exportd_server.errors import TABLE as ERROR_TABLE
from exportd_server.errors import (
    ErrorRecord,
    ExportdError,
    FieldViolation,
    InvalidRequest,
    JobNotFinished,
    QuotaExceeded,
)
from exportd_server.jobs.ledger.base import JobQuery
from exportd_server.jobs.lower import MAX_FILTERS
from exportd_server.jobs.manager import MAX_LABELS
from exportd_server.jobs.model import (
    CancelOutcome,
    ExportSpec,
    FilterLiteral,
    FilterSpec,
    Job,
    JobState,
    Manifest,
)
from exportd_server.jobs.output import file_name, joined_layout, part_file_name
from exportd_server.sources.base import ColumnKind, FilterOperator
from exportd_server.sources.catalogue import Dataset

DOMAIN = "exportd"
MAX_ROW_GROUP_ROWS = 10_000_000
MAX_NULL_MARKER = 16
_LATEST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)

E = TypeVar("E", Format, Compression, CsvDialect, ParquetCompression, ArrowCompression)


class Reader:
    """Reads one request; `violations` grows as fields turn out bad."""

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []

    def complain(self, field: str, description: str) -> None:
        """Note a bad field."""
        self.violations.append(FieldViolation(field, description))

    def check(self) -> None:
        """Raise `InvalidRequest` if a field was bad."""
        if self.violations:
            raise InvalidRequest(self.violations)

    def uuid(self, field: str, text: str, *, required: bool) -> str:
        """A UUID in its canonical form."""
        if not text:
            if required:
                self.complain(field, "is required: a UUID")
            return ""
        try:
            canonical = str(UUID(text))
        except ValueError:
            canonical = ""
        if canonical != text.lower():
            self.complain(
                field, "must be a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057"
            )
            return ""
        return canonical

    def moment(
        self, field: str, message: timestamp_pb2.Timestamp, *, present: bool
    ) -> datetime | None:
        """A timestamp, to the microsecond."""
        if not present:
            return None
        seconds, nanos = message.seconds, message.nanos
        if not 0 <= nanos < 10**9:
            self.complain(field, "nanos must lie between 0 and 999 999 999")
            return None
        try:
            return datetime.fromtimestamp(0, UTC) + timedelta(
                seconds=seconds, microseconds=nanos // 1000
            )
        except OverflowError:
            self.complain(field, "must lie between the years 1 and 9999")
            return None

    def choice(
        self, field: str, number: int, wrapper: object, kind: type[E], default: E | None
    ) -> E | None:
        """A member of an enum; `default` stands for UNSPECIFIED, None refuses it."""
        name = _enum_name(wrapper, number)
        if name is None:
            self.complain(field, f"{number} is not a value of it")
            return default
        if name == "UNSPECIFIED":
            if default is None:
                known = ", ".join(member.value for member in kind)
                self.complain(field, f"is required: one of {known}")
            return default
        return kind(name)


def _prefix(wrapper: object) -> str:
    full: str = wrapper.DESCRIPTOR.values_by_number[0].name  # type: ignore[attr-defined]
    return full.removesuffix("UNSPECIFIED")


def _enum_name(wrapper: object, number: int) -> str | None:
    value = wrapper.DESCRIPTOR.values_by_number.get(number)  # type: ignore[attr-defined]
    return None if value is None else value.name.removeprefix(_prefix(wrapper))


def _enum_number(wrapper: object, name: str) -> int:
    full = _prefix(wrapper) + name
    number: int = wrapper.DESCRIPTOR.values_by_name[full].number  # type: ignore[attr-defined]
    return number


# --- requests


def read_create(
    request: job_pb2.CreateExportRequest, default_ttl: timedelta
) -> tuple[ExportSpec, str, list[FieldViolation]]:
    """The request's spec, its request_id, and what is wrong with it so far."""
    reader = Reader()
    request_id = reader.uuid("request_id", request.request_id, required=False)
    has_range = request.HasField("time_range")
    spec = ExportSpec(
        dataset=request.dataset,
        output=_read_output(reader, request),
        target_id=request.target_id,
        network=request.network,
        start_time=reader.moment(
            "time_range.start_time",
            request.time_range.start_time,
            present=has_range and request.time_range.HasField("start_time"),
        ),
        end_time=reader.moment(
            "time_range.end_time",
            request.time_range.end_time,
            present=has_range and request.time_range.HasField("end_time"),
        ),
        columns=tuple(request.columns),
        filters=_read_filters(reader, request.filters),
        limit=request.limit if request.HasField("limit") else None,
        max_part_rows=(
            request.max_part_rows if request.HasField("max_part_rows") else None
        ),
        max_part_bytes=(
            request.max_part_bytes if request.HasField("max_part_bytes") else None
        ),
        ttl=_read_ttl(reader, request, default_ttl),
        priority=request.priority,
        labels=dict(sorted(request.labels.items())),
    )
    return spec, request_id, reader.violations


def _read_ttl(
    reader: Reader, request: job_pb2.CreateExportRequest, default: timedelta
) -> timedelta:
    if not request.HasField("ttl"):
        return default
    try:
        return timedelta(
            seconds=request.ttl.seconds, microseconds=request.ttl.nanos // 1000
        )
    except OverflowError:
        reader.complain("ttl", "is far too long")
        return default


def _read_output(reader: Reader, request: job_pb2.CreateExportRequest) -> OutputFormat:
    chosen = reader.choice("format", request.format, dataset_pb2.Format, Format, None)
    compression = reader.choice(
        "compression",
        request.compression,
        job_pb2.Compression,
        Compression,
        Compression.NONE,
    )
    if chosen is None:
        return OutputFormat(Format.CSV)
    for field, owner in (
        ("csv_options", Format.CSV),
        ("parquet_options", Format.PARQUET),
        ("arrow_options", Format.ARROW),
    ):
        if request.HasField(field) and chosen is not owner:  # type: ignore[arg-type]
            reader.complain(field, f"does not go with format {chosen}; leave it out")
    if compression is not Compression.NONE and chosen in (Format.PARQUET, Format.ARROW):
        reader.complain(
            "compression",
            f"does not go with format {chosen}, which has its own: "
            f"{chosen.lower()}_options.compression",
        )
        compression = Compression.NONE
    return OutputFormat(
        chosen,
        compression or Compression.NONE,
        csv=_read_csv(reader, request.csv_options),
        parquet=_read_parquet(reader, request.parquet_options),
        arrow=ArrowOptions(
            reader.choice(
                "arrow_options.compression",
                request.arrow_options.compression,
                job_pb2.ArrowCompression,
                ArrowCompression,
                ArrowCompression.UNCOMPRESSED,
            )
            or ArrowCompression.UNCOMPRESSED
        ),
    )


def _read_csv(reader: Reader, options: job_pb2.CsvOptions) -> CsvOptions:
    delimiter = options.delimiter or ","
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n\0':
        reader.complain(
            "csv_options.delimiter",
            "must be one ASCII character that is no quote, CR, LF or NUL",
        )
        delimiter = ","
    marker = options.null_marker
    if len(marker) > MAX_NULL_MARKER or re.search(
        f'["\r\n\0{re.escape(delimiter)}]', marker
    ):
        reader.complain(
            "csv_options.null_marker",
            f"has at most {MAX_NULL_MARKER} characters, and no quote, delimiter, CR, "
            "LF or NUL",
        )
        marker = ""
    dialect = reader.choice(
        "csv_options.dialect",
        options.dialect,
        job_pb2.CsvDialect,
        CsvDialect,
        CsvDialect.RAW,
    )
    return CsvOptions(
        delimiter=delimiter,
        header=options.header if options.HasField("header") else True,
        null_marker=marker,
        dialect=dialect or CsvDialect.RAW,
    )


def _read_parquet(reader: Reader, options: job_pb2.ParquetOptions) -> ParquetOptions:
    default = ParquetOptions()
    rows = options.row_group_rows or default.row_group_rows
    if not 1 <= rows <= MAX_ROW_GROUP_ROWS:
        reader.complain(
            "parquet_options.row_group_rows",
            f"must lie between 1 and {MAX_ROW_GROUP_ROWS}, or be 0 for the default",
        )
        rows = default.row_group_rows
    compression = reader.choice(
        "parquet_options.compression",
        options.compression,
        job_pb2.ParquetCompression,
        ParquetCompression,
        ParquetCompression.ZSTD,
    )
    return ParquetOptions(rows, compression or ParquetCompression.ZSTD)


def _read_filters(
    reader: Reader, filters: Iterable[job_pb2.Filter]
) -> tuple[FilterSpec, ...]:
    result: list[FilterSpec] = []
    for index, message in enumerate(filters):
        if index > MAX_FILTERS:
            break  # the manager refuses the request for their number
        field = f"filters[{index}]"
        name = _enum_name(dataset_pb2.FilterOperator, message.operator)
        if not message.column:
            reader.complain(f"{field}.column", "is required")
            continue
        if name is None or name == "UNSPECIFIED":
            known = ", ".join(FilterOperator)
            reader.complain(f"{field}.operator", f"is required: one of {known}")
            continue
        literals = [
            _read_literal(reader, f"{field}.values[{i}]", value)
            for i, value in enumerate(message.values)
        ]
        present = tuple(literal for literal in literals if literal is not None)
        if len(present) == len(literals):
            result.append(FilterSpec(message.column, FilterOperator(name), present))
    return tuple(result)


def _read_literal(
    reader: Reader, field: str, value: job_pb2.FilterValue
) -> FilterLiteral | None:
    match value.WhichOneof("kind"):
        case "string_value":
            return FilterLiteral("string", value.string_value)
        case "int_value":
            return FilterLiteral("int", str(value.int_value))
        case "double_value":
            if math.isnan(value.double_value):
                reader.complain(field, "NaN compares with nothing")
                return None
            return FilterLiteral("double", repr(value.double_value))
        case "bool_value":
            return FilterLiteral("bool", "true" if value.bool_value else "false")
        case "timestamp_value":
            moment = reader.moment(field, value.timestamp_value, present=True)
            if moment is None:
                return None
            text = moment.isoformat().replace("+00:00", "Z")
            return FilterLiteral("timestamp", text)
        case "bytes_value":
            encoded = base64.b64encode(value.bytes_value).decode("ascii")
            return FilterLiteral("bytes", encoded)
        case _:
            reader.complain(field, "has no value; set one of its members")
            return None


def fingerprint(request: job_pb2.CreateExportRequest) -> str:
    """Equal for equal payloads, whatever their request_id."""
    payload = job_pb2.CreateExportRequest()
    payload.CopyFrom(request)
    payload.ClearField("request_id")
    payload.ClearField("validate_only")
    return hashlib.sha256(payload.SerializeToString(deterministic=True)).hexdigest()


def read_job_query(reader: Reader, request: export_service_pb2.ListJobsRequest) -> JobQuery:
    """The conditions of a ListJobs."""
    if len(request.labels) > MAX_LABELS:
        reader.complain("labels", f"at most {MAX_LABELS} labels, not {len(request.labels)}")
    states: set[JobState] = set()
    for index, number in enumerate(request.states):
        name = _enum_name(job_pb2.JobState, number)
        if name is None or name == "UNSPECIFIED":
            known = ", ".join(JobState)
            reader.complain(f"states[{index}]", f"must be one of {known}")
        else:
            states.add(JobState(name))
    return JobQuery(
        states=frozenset(states),
        dataset=request.dataset,
        labels=dict(sorted(request.labels.items())),
        created_from=reader.moment(
            "created_from",
            request.created_from,
            present=request.HasField("created_from"),
        ),
        created_before=reader.moment(
            "created_before",
            request.created_before,
            present=request.HasField("created_before"),
        ),
    )


def query_digest(*parts: object) -> str:
    """A short mark of a list query, so that a page token fits no other one."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- answers


def timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A moment as the contract writes it."""
    if moment is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(min(moment, _LATEST))
    return message


def duration(length: timedelta) -> duration_pb2.Duration:
    """A length of time as the contract writes it."""
    message = duration_pb2.Duration()
    message.FromTimedelta(length)
    return message


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
                kind=_kind(column.kind),
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


def _kind(kind: str) -> dataset_pb2.ColumnKind.ValueType:
    return dataset_pb2.ColumnKind.Value(f"COLUMN_KIND_{ColumnKind(kind)}")


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


def job_message(job: Job) -> job_pb2.Job:
    """A job as its caller sees it."""
    message = job_pb2.Job(
        job_id=job.job_id,
        state=job_pb2.JobState.Value(f"JOB_STATE_{job.state}"),
        request=request_message(job),
        progress=_progress_message(job),
        create_time=timestamp(job.create_time),
        start_time=timestamp(job.start_time),
        finish_time=timestamp(job.finish_time),
        expire_time=timestamp(job.expire_time),
        generation=job.generation,
        attempt=job.attempt,
        revision=job.revision,
    )
    if job.error is not None:
        message.error.CopyFrom(record_status(job.error))
    if job.manifest is not None:
        message.manifest.CopyFrom(_manifest_message(job, job.manifest))
    return message


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
    )
    if job.state is JobState.SUCCEEDED:
        message.fraction = 1.0
    elif progress.estimated_rows:
        message.fraction = min(1.0, progress.rows / progress.estimated_rows)
    return message


def _manifest_message(job: Job, manifest: Manifest) -> job_pb2.Manifest:
    output = job.spec.output
    layout = joined_layout(output, manifest.parts)
    message = job_pb2.Manifest(
        columns=[
            dataset_pb2.Column(
                name=column.name,
                kind=_kind(column.kind),
                type=column.type,
                nullable=column.nullable,
            )
            for column in manifest.columns
        ],
        parts=[
            job_pb2.Part(
                index=index,
                rows=part.rows,
                bytes=part.bytes,
                crc32c=part.crc32c,
                sha256=part.sha256,
                file_name=part_file_name(job, index),
                prefix_bytes=part.prefix_bytes,
                suffix_bytes=part.suffix_bytes,
            )
            for index, part in enumerate(manifest.parts)
        ],
        rows=sum(part.rows for part in manifest.parts),
        bytes=sum(part.bytes for part in manifest.parts),
        content_type=output.content_type,
        content_encoding=output.content_encoding,
        file_name=file_name(job),
    )
    if layout is not None:
        message.joinable = True
        message.bytes = layout.bytes
        message.crc32c = layout.crc32c
        message.sha256 = layout.sha256
    return message


CANCEL_OUTCOMES = {
    outcome: export_service_pb2.CancelOutcome.Value(f"CANCEL_OUTCOME_{outcome}")
    for outcome in CancelOutcome
}


# --- errors


def record_status(record: ErrorRecord) -> status_pb2.Status:
    """A job's error as `google.rpc.Status`."""
    return _status(
        ERROR_TABLE[record.reason].code,
        record.message,
        error_details_pb2.ErrorInfo(
            reason=record.reason, domain=DOMAIN, metadata=record.metadata
        ),
    )


def error_status(error: ExportdError) -> status_pb2.Status:
    """An error as `google.rpc.Status`, with the details AIP-193 asks for. The reason
    opens the message too, for tools that do not decode details."""
    status = record_status(ErrorRecord.of(error))
    if isinstance(error, InvalidRequest):
        _add(
            status,
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field, description=violation.description
                    )
                    for violation in error.told
                ]
            ),
        )
    if isinstance(error, QuotaExceeded):
        _add(
            status,
            error_details_pb2.QuotaFailure(
                violations=[
                    error_details_pb2.QuotaFailure.Violation(
                        subject=error.subject, description=error.message
                    )
                ]
            ),
        )
    if isinstance(error, JobNotFinished):
        _add(
            status,
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type=error.reason, subject="job", description=error.message
                    )
                ]
            ),
        )
    if isinstance(error, QuotaExceeded | JobNotFinished):
        delay = duration(error.retry_after)
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _status(
    code: int, message: str, info: error_details_pb2.ErrorInfo
) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=f"[{info.reason}] {message}")
    _add(status, info)
    return status


def _add(status: status_pb2.Status, detail: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)  # type: ignore[arg-type]
    status.details.append(packed)
