"""From Python values to a `CreateExportRequest`, checked before anything is sent."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Literal, Required, TypedDict, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from exportd._audit import AuditOutcome
from exportd._deliveries import DeliveryState
from exportd._model import JobState
from exportd._sinks import SinkLike, sink_proto
from exportd.errors import InvalidRequest
from exportd.v1 import audit_pb2, dataset_pb2, export_service_pb2, job_pb2, sink_pb2

_T = TypeVar("_T")

FormatName = Literal["csv", "jsonl", "parquet", "arrow"]
RowErrorPolicyName = Literal["fail", "skip"]
CompressionName = Literal["none", "gzip", "zstd", "snappy", "lz4"]
Operator = Literal[
    "=",
    "==",
    "!=",
    "<",
    "<=",
    ">",
    ">=",
    "in",
    "not in",
    "is null",
    "is not null",
    "starts with",
    "contains",
]
Scalar = str | int | float | bool | Decimal | datetime | date | time | bytes
"""What a filter compares with."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition on one column. `value` is a scalar, a sequence of them for `in` and
    `not in`, and left out for `is null` and `is not null`."""

    column: str
    operator: Operator
    value: Scalar | Sequence[Scalar] | None = field(default=None)


FilterLike = (
    Filter
    | tuple[str, Literal["is null", "is not null"]]
    | tuple[str, Operator, Scalar | Sequence[Scalar] | None]
)
"""A `Filter`, or a tuple such as `("amount", ">=", Decimal("1.5"))`."""


class ExportOptions(TypedDict, total=False):
    """What `export` takes beside the dataset's name; the contract explains each.

    Attributes:
        format: File format. Required.
        target_id: Keep only rows of this target.
        network: Keep only rows of this network.
        start: First moment to keep; must carry its time zone.
        end: First moment to leave out again; likewise.
        columns: Columns to carry, in this order.
        filters: Conditions; a row must meet all.
        limit: Stop after this many rows.
        compression: Around CSV and JSON Lines: none, gzip, zstd. Inside Parquet: none,
            snappy, zstd, lz4. Inside Arrow: none, lz4, zstd.
        delimiter: CSV's separator.
        header: Whether CSV begins with the column names.
        null_marker: How CSV writes a missing value.
        spreadsheet_safe: Whether CSV makes formulas harmless; not lossless.
        row_group_rows: Most rows in a Parquet row group.
        max_part_rows: Begin a new part after this many rows.
        max_part_bytes: Begin a new part after about this many bytes.
        ttl: How long the output is kept once the job has ended.
        priority: From -100 to 100, higher first.
        labels: Marks to find jobs by.
        request_id: Makes the call safe to repeat; a fresh UUID unless given.
        on_row_error: Whether a row that cannot be exported fails the job, the default,
            or is left out and told in `manifest.error_parts`.
        max_row_errors: With "skip": most rows that may be left out.
        sinks: Where to deliver the export besides keeping it, each made by `to_file`,
            `to_s3`, `to_webhook`, `to_database` or `to_plugin`.
        drop_after_delivery: Drop the stored output once every sink has all of it.
        validate_only: Check, try the sinks and estimate, but record nothing.
    """

    format: Required[FormatName]
    target_id: str
    network: str
    start: datetime | None
    end: datetime | None
    columns: Sequence[str]
    filters: Iterable[FilterLike]
    limit: int | None
    compression: CompressionName | None
    delimiter: str | None
    header: bool | None
    null_marker: str | None
    spreadsheet_safe: bool
    row_group_rows: int | None
    max_part_rows: int | None
    max_part_bytes: int | None
    ttl: timedelta | None
    priority: int
    labels: Mapping[str, str]
    request_id: str | uuid.UUID | None
    on_row_error: RowErrorPolicyName
    max_row_errors: int | None
    sinks: Iterable[SinkLike]
    drop_after_delivery: bool
    validate_only: bool


_FORMATS: Mapping[str, dataset_pb2.Format.ValueType] = {
    "csv": dataset_pb2.FORMAT_CSV,
    "jsonl": dataset_pb2.FORMAT_JSONL,
    "parquet": dataset_pb2.FORMAT_PARQUET,
    "arrow": dataset_pb2.FORMAT_ARROW,
}
_TEXT_COMPRESSION: Mapping[str, job_pb2.Compression.ValueType] = {
    "none": job_pb2.COMPRESSION_NONE,
    "gzip": job_pb2.COMPRESSION_GZIP,
    "zstd": job_pb2.COMPRESSION_ZSTD,
}
_PARQUET_COMPRESSION: Mapping[str, job_pb2.ParquetCompression.ValueType] = {
    "none": job_pb2.PARQUET_COMPRESSION_UNCOMPRESSED,
    "snappy": job_pb2.PARQUET_COMPRESSION_SNAPPY,
    "zstd": job_pb2.PARQUET_COMPRESSION_ZSTD,
    "lz4": job_pb2.PARQUET_COMPRESSION_LZ4,
}
_ARROW_COMPRESSION: Mapping[str, job_pb2.ArrowCompression.ValueType] = {
    "none": job_pb2.ARROW_COMPRESSION_UNCOMPRESSED,
    "lz4": job_pb2.ARROW_COMPRESSION_LZ4,
    "zstd": job_pb2.ARROW_COMPRESSION_ZSTD,
}
_ROW_ERRORS: Mapping[str, job_pb2.RowErrorPolicy.ValueType] = {
    "fail": job_pb2.ROW_ERROR_POLICY_FAIL,
    "skip": job_pb2.ROW_ERROR_POLICY_SKIP_AND_REPORT,
}
_OPERATORS: Mapping[str, dataset_pb2.FilterOperator.ValueType] = {
    "=": dataset_pb2.FILTER_OPERATOR_EQUAL,
    "==": dataset_pb2.FILTER_OPERATOR_EQUAL,
    "!=": dataset_pb2.FILTER_OPERATOR_NOT_EQUAL,
    "<": dataset_pb2.FILTER_OPERATOR_LESS,
    "<=": dataset_pb2.FILTER_OPERATOR_LESS_OR_EQUAL,
    ">": dataset_pb2.FILTER_OPERATOR_GREATER,
    ">=": dataset_pb2.FILTER_OPERATOR_GREATER_OR_EQUAL,
    "in": dataset_pb2.FILTER_OPERATOR_IN,
    "not in": dataset_pb2.FILTER_OPERATOR_NOT_IN,
    "is null": dataset_pb2.FILTER_OPERATOR_IS_NULL,
    "is not null": dataset_pb2.FILTER_OPERATOR_IS_NOT_NULL,
    "starts with": dataset_pb2.FILTER_OPERATOR_STARTS_WITH,
    "contains": dataset_pb2.FILTER_OPERATOR_CONTAINS,
}
_NO_VALUE = frozenset({"is null", "is not null"})
_MANY_VALUES = frozenset({"in", "not in"})
_INT64 = range(-(2**63), 2**63)
_INT32 = range(-(2**31), 2**31)


def create_export(dataset: str, options: ExportOptions) -> job_pb2.CreateExportRequest:
    """Build the request. Raises `InvalidRequest` for what cannot be sent at all; all
    else is the server's to judge."""
    request = job_pb2.CreateExportRequest(
        request_id=str(options.get("request_id") or uuid.uuid4()),
        dataset=dataset,
        target_id=options.get("target_id", ""),
        network=options.get("network", ""),
        columns=_names("columns", options.get("columns", ())),
        filters=[
            filter_proto(f"filters[{i}]", f)
            for i, f in enumerate(options.get("filters", ()))
        ],
        priority=_within(_INT32, "priority", options.get("priority", 0)),
        labels=dict(options.get("labels", {})),
        sinks=_sinks(options.get("sinks", ())),
        drop_after_delivery=options.get("drop_after_delivery", False),
        validate_only=options.get("validate_only", False),
    )
    if (limit := options.get("limit")) is not None:
        request.limit = _within(_INT64, "limit", limit)
    if (rows := options.get("max_part_rows")) is not None:
        request.max_part_rows = _within(_INT64, "max_part_rows", rows)
    if (size := options.get("max_part_bytes")) is not None:
        request.max_part_bytes = _within(_INT64, "max_part_bytes", size)
    if (policy := options.get("on_row_error")) is not None:
        if policy not in _ROW_ERRORS:
            known = ", ".join(_ROW_ERRORS)
            raise InvalidRequest.of("on_row_error", f"{policy!r}: use {known}")
        request.on_row_error = _ROW_ERRORS[policy]
    if (most := options.get("max_row_errors")) is not None:
        request.max_row_errors = _within(_INT64, "max_row_errors", most)
    if (ttl := options.get("ttl")) is not None:
        request.ttl.CopyFrom(_duration(ttl))
    if (start := options.get("start")) is not None:
        request.time_range.start_time.CopyFrom(timestamp("start", start))
    if (end := options.get("end")) is not None:
        request.time_range.end_time.CopyFrom(timestamp("end", end))
    _set_format(request, options)
    return request


def download_urls(
    job_id: str, lifetime: timedelta | None, part: int | None
) -> export_service_pb2.GetDownloadUrlsRequest:
    """Build the request for URLs."""
    request = export_service_pb2.GetDownloadUrlsRequest(job_id=job_id)
    if lifetime is not None:
        request.lifetime.CopyFrom(_duration(lifetime))
    if part is not None:
        try:
            request.part_index = part
        except ValueError:
            raise InvalidRequest.of("part", f"{part} is no index of a part") from None
    return request


def list_jobs(
    *,
    states: Iterable[JobState | str] = (),
    dataset: str = "",
    labels: Mapping[str, str] | None = None,
    created_from: datetime | None = None,
    created_before: datetime | None = None,
    page_size: int = 0,
) -> export_service_pb2.ListJobsRequest:
    """Build the request for the first page."""
    request = export_service_pb2.ListJobsRequest(
        states=[_state(s) for s in states],
        dataset=dataset,
        labels=dict(labels or {}),
        page_size=_within(_INT32, "page_size", page_size),
    )
    if created_from is not None:
        request.created_from.CopyFrom(timestamp("created_from", created_from))
    if created_before is not None:
        request.created_before.CopyFrom(timestamp("created_before", created_before))
    return request


def list_deliveries(
    *,
    job_id: str = "",
    sink: str = "",
    queue: str = "",
    states: Iterable[DeliveryState | str] = (),
    page_size: int = 0,
) -> export_service_pb2.ListDeliveriesRequest:
    """Build the request for the first page."""
    return export_service_pb2.ListDeliveriesRequest(
        job_id=job_id,
        sink=sink,
        queue=queue,
        states=[_delivery_state(s) for s in states],
        page_size=_within(_INT32, "page_size", page_size),
    )


def list_sink_queues(page_size: int = 0) -> export_service_pb2.ListSinkQueuesRequest:
    """Build the request for the first page."""
    return export_service_pb2.ListSinkQueuesRequest(
        page_size=_within(_INT32, "page_size", page_size)
    )


def list_audit_records(
    *,
    tenant: str = "",
    subject: str = "",
    job_id: str = "",
    methods: Iterable[str] = (),
    outcomes: Iterable[AuditOutcome | str] = (),
    from_time: datetime | None = None,
    before_time: datetime | None = None,
    page_size: int = 0,
) -> export_service_pb2.ListAuditRecordsRequest:
    """Build the request for the first page."""
    request = export_service_pb2.ListAuditRecordsRequest(
        tenant=tenant,
        subject=subject,
        job_id=job_id,
        methods=_names(
            "methods", list(methods) if not isinstance(methods, str) else methods
        ),
        outcomes=[_audit_outcome(each) for each in outcomes],
        page_size=_within(_INT32, "page_size", page_size),
    )
    if from_time is not None:
        request.from_time.CopyFrom(timestamp("from_time", from_time))
    if before_time is not None:
        request.before_time.CopyFrom(timestamp("before_time", before_time))
    return request


def timestamp(name: str, moment: object) -> Timestamp:
    """A moment for the wire; refuses one without a time zone."""
    if not isinstance(moment, datetime):
        raise InvalidRequest.of(
            name, f"a datetime with a time zone is needed, not {type(moment).__name__}"
        )
    if moment.utcoffset() is None:
        raise InvalidRequest.of(
            name,
            f"{moment.isoformat()} has no time zone; give one, for example "
            f"datetime({moment.year}, {moment.month}, {moment.day}, tzinfo=UTC)",
        )
    proto = Timestamp()
    try:
        proto.FromDatetime(moment.astimezone(UTC))
    except OverflowError:  # the first or last hours of all years, seen from UTC
        raise InvalidRequest.of(name, f"{moment.isoformat()} is out of range") from None
    return proto


def filter_proto(where: str, condition: FilterLike) -> job_pb2.Filter:
    """One condition for the wire. `where` names it in errors."""
    if not isinstance(condition, Filter):
        condition = _from_tuple(where, condition)
    operator: str = condition.operator
    number = _OPERATORS.get(operator)
    if number is None:
        known = ", ".join(_OPERATORS)
        raise InvalidRequest.of(where, f"unknown operator {operator!r}; use {known}")
    value = condition.value
    if operator in _NO_VALUE:
        if value is not None:
            raise InvalidRequest.of(where, f"{operator!r} takes no value")
        values: Sequence[object] = ()
    elif operator in _MANY_VALUES:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise InvalidRequest.of(where, f"{operator!r} needs a sequence of values")
        values = tuple(value)
    else:
        values = (value,)
    return job_pb2.Filter(
        column=condition.column,
        operator=number,
        values=[filter_value(where, v) for v in values],
    )


def filter_value(where: str, value: object) -> job_pb2.FilterValue:
    """A typed literal for the wire."""
    # The order matters: a bool is an int too, and a datetime a date.
    if isinstance(value, bool):
        return job_pb2.FilterValue(bool_value=value)
    if isinstance(value, bytes):
        return job_pb2.FilterValue(bytes_value=value)
    if isinstance(value, datetime):
        return job_pb2.FilterValue(timestamp_value=timestamp(where, value))
    if isinstance(value, int) and value in _INT64:
        return job_pb2.FilterValue(int_value=value)
    if isinstance(value, float):
        if math.isnan(value):
            raise InvalidRequest.of(where, "NaN compares with nothing")
        return job_pb2.FilterValue(double_value=value)
    return job_pb2.FilterValue(string_value=_text(where, value))


def _text(where: str, value: object) -> str:
    """Values that travel as text."""
    match value:
        case str():
            return value
        case int():  # beyond 64 bits: only a decimal column can hold it
            return str(value)
        case Decimal() if value.is_finite():
            return format(value, "f")
        case date():
            return value.isoformat()
        case time() if value.tzinfo is None:
            return value.isoformat()
        case None:
            problem = "nothing equals None; use 'is null' or 'is not null'"
        case Decimal():
            problem = f"{value} is no finite decimal"
        case time():
            problem = "a time of day carries no time zone"
        case _:
            problem = f"cannot compare with a {type(value).__name__}"
    raise InvalidRequest.of(where, problem)


def _from_tuple(where: str, condition: tuple[object, ...]) -> Filter:
    if len(condition) not in {2, 3}:
        raise InvalidRequest.of(where, "give (column, operator, value), or a Filter")
    return Filter(*cast("tuple[str, Operator]", condition))


def _set_format(request: job_pb2.CreateExportRequest, options: ExportOptions) -> None:
    """Sets the format and what belongs to it; an option of another format is refused
    here, so that it is never dropped without a word."""
    name: str = options["format"]
    if name not in _FORMATS:
        raise InvalidRequest.of("format", f"{name!r}: use {', '.join(_FORMATS)}")
    request.format = _FORMATS[name]
    if (compression := options.get("compression")) is not None:
        _set_compression(request, name, compression)
    csv = job_pb2.CsvOptions(
        delimiter=options.get("delimiter") or "",
        header=options.get("header"),
        null_marker=options.get("null_marker") or "",
        dialect=job_pb2.CSV_DIALECT_SPREADSHEET_SAFE
        if options.get("spreadsheet_safe")
        else job_pb2.CSV_DIALECT_UNSPECIFIED,
    )
    if csv != job_pb2.CsvOptions():
        if name != "csv":
            raise InvalidRequest.of("csv_options", f"format {name} takes no CSV options")
        request.csv_options.CopyFrom(csv)
    if (rows := options.get("row_group_rows")) is not None:
        if name != "parquet":
            raise InvalidRequest.of("row_group_rows", f"format {name} has no row groups")
        request.parquet_options.row_group_rows = _within(_INT64, "row_group_rows", rows)


def _set_compression(
    request: job_pb2.CreateExportRequest, name: str, compression: str
) -> None:
    if name == "parquet":
        request.parquet_options.compression = _pick(_PARQUET_COMPRESSION, name, compression)
    elif name == "arrow":
        request.arrow_options.compression = _pick(_ARROW_COMPRESSION, name, compression)
    else:
        request.compression = _pick(_TEXT_COMPRESSION, name, compression)


def _pick(table: Mapping[str, _T], name: str, compression: str) -> _T:
    if compression not in table:
        raise InvalidRequest.of(
            "compression", f"{compression!r}: format {name} takes {', '.join(table)}"
        )
    return table[compression]


def _within(allowed: range, name: str, number: int) -> int:
    """The number, as far as its field on the wire holds it."""
    if number not in allowed:
        raise InvalidRequest.of(
            name, f"{number!r} is no whole number from {allowed[0]} to {allowed[-1]}"
        )
    return number


def _duration(value: timedelta) -> Duration:
    proto = Duration()
    proto.FromTimedelta(value)
    return proto


def _names(where: str, names: Sequence[str]) -> Sequence[str]:
    if isinstance(names, str):  # a string is a sequence of strings too
        raise InvalidRequest.of(where, f"give a list: [{names!r}]")
    return names


def _sinks(sinks: Iterable[SinkLike]) -> list[sink_pb2.Sink]:
    if not isinstance(sinks, Iterable):  # one sink, most likely
        raise InvalidRequest.of("sinks", "give a list: [...]")
    return [sink_proto(f"sinks[{i}]", sink) for i, sink in enumerate(sinks)]


def _state(state: JobState | str) -> job_pb2.JobState.ValueType:
    return job_pb2.JobState.Value(f"JOB_STATE_{_known(JobState, state)}")


def _delivery_state(state: DeliveryState | str) -> sink_pb2.DeliveryState.ValueType:
    name = _known(DeliveryState, state)
    return sink_pb2.DeliveryState.Value(f"DELIVERY_STATE_{name}")


def _audit_outcome(outcome: AuditOutcome | str) -> audit_pb2.AuditOutcome.ValueType:
    name = _known(AuditOutcome, outcome, "outcomes")
    return audit_pb2.AuditOutcome.Value(f"AUDIT_OUTCOME_{name}")


def _known(states: type[StrEnum], state: str, where: str = "states") -> str:
    """The state, which must be one that the contract has."""
    known = {s.value for s in states} - {"UNKNOWN"}
    if state not in known:
        raise InvalidRequest.of(where, f"{state!r}: use {', '.join(sorted(known))}")
    return state
