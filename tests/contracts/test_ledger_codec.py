"""What the ledger writes as text it reads back exactly."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from exportd_server.encoders.base import (
    ArrowOptions,
    Compression,
    CsvOptions,
    Format,
    OutputFormat,
    ParquetOptions,
)
from exportd_server.errors import ErrorReason, ErrorRecord
from exportd_server.jobs.ledger import codec
from exportd_server.jobs.model import (
    ExportSpec,
    FilterLiteral,
    FilterSpec,
    ManifestColumn,
    SinkSpec,
)
from exportd_server.sinks.base import Takes
from exportd_server.sources.base import FilterOperator

# In UTC no moment comes twice, so that `fold` says nothing.
moments = st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.replace(fold=0))
counts = st.integers(0, 2**63 - 1)
labels = st.dictionaries(st.text(), st.text(), max_size=5)
literals = st.builds(
    FilterLiteral,
    kind=st.sampled_from(["string", "int", "double", "bool", "timestamp", "bytes"]),
    text=st.text(),
)
outputs = st.builds(
    OutputFormat,
    format=st.sampled_from(Format),
    compression=st.sampled_from(Compression),
    csv=st.builds(CsvOptions),
    parquet=st.builds(ParquetOptions),
    arrow=st.builds(ArrowOptions),
)
specs = st.builds(
    ExportSpec,
    dataset=st.text(),
    output=outputs,
    target_id=st.text(),
    network=st.text(),
    start_time=st.none() | moments,
    end_time=st.none() | moments,
    columns=st.lists(st.text(), max_size=3).map(tuple),
    filters=st.lists(
        st.builds(
            FilterSpec,
            column=st.text(),
            operator=st.sampled_from(FilterOperator),
            values=st.lists(literals, max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    limit=st.none() | counts,
    max_part_rows=st.none() | counts,
    max_part_bytes=st.none() | counts,
    max_row_errors=st.none() | counts,
    ttl=st.timedeltas(timedelta(0), timedelta(days=36_500)),
    priority=st.integers(-100, 100),
    labels=labels,
    sinks=st.lists(
        st.builds(
            SinkSpec,
            name=st.text(),
            type=st.text(),
            connection=st.text(),
            config=st.dictionaries(st.text(), st.text() | st.booleans() | st.integers()),
            queue=st.text(),
            takes=st.sampled_from(Takes),
            sealed=st.text(),
        ),
        max_size=2,
    ).map(tuple),
    drop_after_delivery=st.booleans(),
)


@given(specs)
def test_a_request_survives_the_ledger(spec: ExportSpec) -> None:
    again = codec.load_spec(codec.dump_spec(spec))
    assert again == spec
    assert repr(again) == repr(spec), "types, and the order of labels, too"


def test_a_request_is_tried_with_each_of_its_fields() -> None:
    """A new field must be added to the requests above."""
    assert {field.name for field in fields(ExportSpec)} == {
        *("dataset", "output", "target_id", "network", "start_time", "end_time"),
        *("columns", "filters", "limit", "max_part_rows", "max_part_bytes"),
        *("max_row_errors", "ttl", "priority", "labels"),
        *("sinks", "drop_after_delivery"),
    }


@given(st.builds(ErrorRecord, st.sampled_from(ErrorReason), st.text(), labels))
def test_an_error_survives_the_ledger(error: ErrorRecord) -> None:
    again = codec.load_error(codec.dump_error(error))
    assert repr(again) == repr(error)


@given(st.lists(st.builds(ManifestColumn)).map(tuple))
def test_columns_survive_the_ledger(columns: tuple[ManifestColumn, ...]) -> None:
    assert codec.load_columns(codec.dump_columns(columns)) == columns


@given(moments)
def test_a_moment_survives_the_ledger(moment: datetime) -> None:
    assert codec.to_moment(codec.to_micros(moment)) == moment
