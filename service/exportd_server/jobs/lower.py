"""Turns a request into a query: checks it against the dataset, and types its values."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import pyarrow as pa

from exportd_server.encoders.base import CsvDialect, OutputFormat
from exportd_server.encoders.csv import is_formula
from exportd_server.encoders.registry import unsupported
from exportd_server.errors import FieldViolation, InvalidRequest
from exportd_server.jobs.model import ExportSpec, FilterSpec, ManifestColumn
from exportd_server.sources.base import (
    Column,
    ColumnKind,
    Filter,
    FilterOperator,
    Query,
    Scalar,
)
from exportd_server.sources.catalogue import Dataset
from exportd_server.sources.literals import coerce

MAX_FILTERS = 100
MAX_VALUES = 1000

_NO_VALUE = (FilterOperator.IS_NULL, FilterOperator.IS_NOT_NULL)
_MANY_VALUES = (FilterOperator.IN, FilterOperator.NOT_IN)


class _Lowering:
    """Collects conditions, and everything that is wrong with the request."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.by_name = {column.name: column for column in dataset.columns}
        self.filters: list[Filter] = []
        self.violations: list[FieldViolation] = []

    def complain(self, field: str, description: str) -> None:
        self.violations.append(FieldViolation(field, description))

    def columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        seen: set[str] = set()
        for index, name in enumerate(names):
            if name not in self.by_name:
                self.complain(f"columns[{index}]", self.unknown_column(name))
            elif name in seen:
                self.complain(f"columns[{index}]", f"{name!r} is named twice")
            seen.add(name)
        return names or tuple(self.by_name)

    def unknown_column(self, name: str) -> str:
        return (
            f"dataset {self.dataset.name} has no column {name!r}; "
            "GetDataset lists its columns"
        )

    def equal(self, field: str, column_name: str, text: str) -> None:
        """A condition of `target_id` or `network`."""
        column = self.by_name.get(column_name) if column_name else None
        if column is None:
            self.complain(field, f"dataset {self.dataset.name} has no such column")
            return
        kind = "int" if column.kind is ColumnKind.INTEGER else "string"
        value = self.value(field, column, kind, text)
        if value is not None:
            self.filters.append(Filter(column.name, FilterOperator.EQUAL, (value,)))

    def time(self, start: datetime | None, end: datetime | None) -> None:
        if start is None and end is None:
            return
        column = self.by_name.get(self.dataset.time_column or "")
        if column is None:
            self.complain("time_range", f"dataset {self.dataset.name} has no time column")
            return
        if start is not None and end is not None and end <= start:
            self.complain("time_range.end_time", "must lie after start_time")
            return
        for operator, field, moment in (
            (FilterOperator.GREATER_OR_EQUAL, "time_range.start_time", start),
            (FilterOperator.LESS, "time_range.end_time", end),
        ):
            if moment is not None:
                text = moment.isoformat().replace("+00:00", "Z")
                value = self.value(field, column, "timestamp", text)
                if value is not None:
                    self.filters.append(Filter(column.name, operator, (value,)))

    def value(self, field: str, column: Column, kind: str, text: str) -> Scalar | None:
        try:
            return coerce(column, kind, text)
        except ValueError as error:
            self.complain(field, str(error))
            return None

    def condition(self, index: int, spec: FilterSpec) -> None:
        field = f"filters[{index}]"
        column = self.by_name.get(spec.column)
        if column is None:
            self.complain(f"{field}.column", self.unknown_column(spec.column))
            return
        if column.masked:
            self.complain(
                f"{field}.column", f"column {column.name} is masked; it cannot be filtered"
            )
            return
        if spec.operator not in column.operators:
            usable = ", ".join(column.operators)
            self.complain(
                f"{field}.operator",
                f"{spec.operator} does not apply to {column.name} ({column.type}); "
                + (f"use one of {usable}" if usable else "it cannot be filtered"),
            )
            return
        if not self.right_number(field, spec):
            return
        values = [
            self.value(f"{field}.values[{i}]", column, literal.kind, literal.text)
            for i, literal in enumerate(spec.values)
        ]
        present = tuple(value for value in values if value is not None)
        if len(present) == len(values):
            self.filters.append(Filter(column.name, spec.operator, present))

    def right_number(self, field: str, spec: FilterSpec) -> bool:
        count = len(spec.values)
        if spec.operator in _NO_VALUE:
            right, wanted = count == 0, "no value"
        elif spec.operator in _MANY_VALUES:
            right, wanted = 1 <= count <= MAX_VALUES, f"1 to {MAX_VALUES} values"
        else:
            right, wanted = count == 1, "exactly one value"
        if not right:
            self.complain(f"{field}.values", f"{spec.operator} takes {wanted}, not {count}")
        return right

    def carried(self, output: OutputFormat, names: tuple[str, ...]) -> None:
        known = [self.by_name[name] for name in names if name in self.by_name]
        if not known:
            return
        for name, why in unsupported(output, schema_of(known)):
            self.complain("format", f"{output.format} cannot carry {name}: {why}")

    def harmless(self, output: OutputFormat) -> None:
        safe = output.csv.dialect is CsvDialect.SPREADSHEET_SAFE
        if safe and is_formula(output.csv.null_marker):
            self.complain(
                "csv_options.null_marker",
                "begins as a formula does, which SPREADSHEET_SAFE keeps out of the file",
            )


def schema_of(columns: Iterable[Column]) -> pa.Schema:
    """The Arrow schema of columns."""
    return pa.schema(
        pa.field(column.name, column.type, nullable=column.nullable) for column in columns
    )


def to_query(dataset: Dataset, spec: ExportSpec, tenant: str) -> Query:
    """The query a tenant's request stands for, over the tenant's rows of a dataset that
    serves it.

    Raises `InvalidRequest` with a violation for each field that does not fit the
    dataset.
    """
    lowering = _Lowering(dataset)
    columns = lowering.columns(spec.columns)
    if spec.target_id:
        lowering.equal("target_id", dataset.target_column or "", spec.target_id)
    if spec.network:
        lowering.equal("network", dataset.network_column or "", spec.network)
    lowering.time(spec.start_time, spec.end_time)
    if len(spec.filters) > MAX_FILTERS:
        lowering.complain(
            "filters", f"at most {MAX_FILTERS} conditions, not {len(spec.filters)}"
        )
    else:
        for index, condition in enumerate(spec.filters):
            lowering.condition(index, condition)
    lowering.carried(spec.output, columns)
    lowering.harmless(spec.output)
    if lowering.violations:
        raise InvalidRequest(lowering.violations)
    filters = (*dataset.conditions(tenant), *lowering.filters)
    return Query(columns, filters, spec.limit)


def output_columns(dataset: Dataset, names: tuple[str, ...]) -> tuple[ManifestColumn, ...]:
    """The columns of the output, as the manifest tells them."""
    by_name = {column.name: column for column in dataset.columns}
    schema = schema_of(by_name[name] for name in names)
    return tuple(
        ManifestColumn(
            field.name, ColumnKind.of(field.type), str(field.type), field.nullable
        )
        for field in schema
    )
