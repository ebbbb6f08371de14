"""Reads the contract's requests into the domain's values.

Reading collects every bad field instead of stopping at the first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf import timestamp_pb2

from exportd.v1 import dataset_pb2, export_service_pb2, job_pb2
from exportd_server.api.urls import UrlOptions
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
from exportd_server.errors import (
    FieldViolation,
    InvalidRequest,
)
from exportd_server.jobs.audit import uuid_or_nothing
from exportd_server.jobs.ledger.base import JobQuery
from exportd_server.jobs.lower import MAX_FILTERS
from exportd_server.jobs.manager import MAX_LABELS
from exportd_server.jobs.model import (
    ExportSpec,
    FilterLiteral,
    FilterSpec,
    JobState,
    RowErrorPolicy,
)
from exportd_server.sources.base import FilterOperator

MAX_ROW_GROUP_ROWS = 10_000_000
MAX_NULL_MARKER = 16
DEFAULT_ROW_ERRORS = 10_000

E = TypeVar(
    "E",
    Format,
    Compression,
    CsvDialect,
    ParquetCompression,
    ArrowCompression,
    RowErrorPolicy,
)


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
        canonical = uuid_or_nothing(text)
        if not canonical:
            self.complain(
                field, "must be a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057"
            )
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

    def text(self, field: str, text: str) -> str:
        """Text that every database can keep: PostgreSQL refuses NUL."""
        if "\0" in text:
            self.complain(field, "must not contain the character NUL")
        return text

    def labels(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Labels, by key."""
        return {
            self.text("labels", key): self.text(f"labels[{key[:64]!r}]", value)
            for key, value in sorted(labels.items())
        }

    def choice(
        self, field: str, number: int, wrapper: object, kind: type[E], default: E | None
    ) -> E | None:
        """A member of an enum; `default` stands for UNSPECIFIED, None refuses it."""
        name = enum_name(wrapper, number)
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


def enum_name(wrapper: object, number: int) -> str | None:
    """The name of a value without its prefix; None for a number that is none."""
    value = wrapper.DESCRIPTOR.values_by_number.get(number)  # type: ignore[attr-defined]
    return None if value is None else value.name.removeprefix(_prefix(wrapper))


def read_create(
    request: job_pb2.CreateExportRequest, default_ttl: timedelta
) -> tuple[ExportSpec, str, Reader]:
    """The request's spec, its request_id, and the reader that knows what is wrong with
    it so far."""
    reader = Reader()
    request_id = reader.uuid("request_id", request.request_id, required=False)
    has_range = request.HasField("time_range")
    spec = ExportSpec(
        dataset=reader.text("dataset", request.dataset),
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
        max_row_errors=_read_row_errors(reader, request),
        ttl=_read_ttl(reader, request, default_ttl),
        priority=request.priority,
        labels=reader.labels(request.labels),
        drop_after_delivery=request.drop_after_delivery,
    )
    return spec, request_id, reader


def _read_row_errors(reader: Reader, request: job_pb2.CreateExportRequest) -> int | None:
    policy = reader.choice(
        "on_row_error",
        request.on_row_error,
        job_pb2.RowErrorPolicy,
        RowErrorPolicy,
        RowErrorPolicy.FAIL,
    )
    if policy is RowErrorPolicy.SKIP_AND_REPORT:
        return request.max_row_errors or DEFAULT_ROW_ERRORS
    if request.max_row_errors:
        reader.complain(
            "max_row_errors", "goes with on_row_error SKIP_AND_REPORT alone; leave it out"
        )
    return None


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
        name = enum_name(dataset_pb2.FilterOperator, message.operator)
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


def payload(request: job_pb2.CreateExportRequest) -> bytes:
    """Equal for requests that ask for the same, whatever their request_id. It has the
    secrets of sinks in it."""
    bare = job_pb2.CreateExportRequest()
    bare.CopyFrom(request)
    bare.ClearField("request_id")
    bare.ClearField("validate_only")
    return bare.SerializeToString(deterministic=True)


def read_job_query(reader: Reader, request: export_service_pb2.ListJobsRequest) -> JobQuery:
    """The conditions of a ListJobs."""
    if len(request.labels) > MAX_LABELS:
        reader.complain("labels", f"at most {MAX_LABELS} labels, not {len(request.labels)}")
    states: set[JobState] = set()
    for index, number in enumerate(request.states):
        name = enum_name(job_pb2.JobState, number)
        if name is None or name == "UNSPECIFIED":
            known = ", ".join(JobState)
            reader.complain(f"states[{index}]", f"must be one of {known}")
        else:
            states.add(JobState(name))
    return JobQuery(
        states=frozenset(states),
        dataset=reader.text("dataset", request.dataset),
        labels=reader.labels(request.labels),
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


def read_lifetime(
    reader: Reader, request: export_service_pb2.GetDownloadUrlsRequest, options: UrlOptions
) -> timedelta:
    """How long the URLs of a GetDownloadUrls are to work."""
    if not request.HasField("lifetime"):
        return options.default_lifetime
    most = options.max_lifetime.total_seconds()
    asked = request.lifetime
    # Compared as it came: what is far too long is no `timedelta` at all.
    if not 1 <= asked.seconds + asked.nanos / 10**9 <= most:
        reader.complain("lifetime", f"must lie between 1 s and {most:.0f} s")
        return options.default_lifetime
    return timedelta(seconds=asked.seconds, microseconds=asked.nanos // 1000)


def query_digest(*parts: object) -> str:
    """A short mark of a list query, so that a page token fits no other one."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
