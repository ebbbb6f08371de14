"""What the client makes of Python values and of what people type."""

from __future__ import annotations

import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from google.protobuf import any_pb2
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2

from exportd import (
    Client,
    DeliveryState,
    DeliveryStatus,
    Filter,
    JobInfo,
    Sink,
    to_database,
    to_file,
    to_plugin,
    to_s3,
    to_webhook,
)
from exportd._model import Column, Dataset, JobState, counted
from exportd._request import create_export, filter_proto, list_deliveries, list_jobs
from exportd.cli.progress import fit
from exportd.cli.show import delivery_json, job_json, queue_json
from exportd.cli.where import parse_duration, parse_moment, parse_where
from exportd.errors import InvalidRequest, NotDelivered
from exportd.v1 import dataset_pb2, export_service_pb2, job_pb2, sink_pb2
from tests.support.scripted_server import dataset as scripted_dataset

DATASET = Dataset.of(scripted_dataset("token_transfers"))


def build(**options: Any) -> job_pb2.CreateExportRequest:
    return create_export("d", {"format": "csv", **options})  # type: ignore[typeddict-item]  # Any from the tests


@pytest.mark.parametrize(
    ("value", "member", "sent"),
    [
        (True, "bool_value", True),
        (0, "int_value", 0),
        (-(2**63), "int_value", -(2**63)),
        (2**63, "string_value", "9223372036854775808"),
        (1.5, "double_value", 1.5),
        (Decimal("1E+3"), "string_value", "1000"),
        (Decimal("0.000000000000000001"), "string_value", "0.000000000000000001"),
        ("", "string_value", ""),
        (b"\0\xff", "bytes_value", b"\0\xff"),
        (date(2026, 1, 31), "string_value", "2026-01-31"),
        (time(13, 45, 0, 500), "string_value", "13:45:00.000500"),
    ],
)
def test_each_python_type_has_its_place_on_the_wire(
    value: Any, member: str, sent: object
) -> None:
    proto = filter_proto("f", ("c", "=", value))
    assert proto.values[0].WhichOneof("kind") == member
    assert getattr(proto.values[0], member) == sent


def test_a_moment_is_sent_in_utc_whatever_its_zone() -> None:
    there = datetime(2026, 1, 31, 14, 0, tzinfo=timezone(timedelta(hours=2)))
    value = filter_proto("f", ("c", ">=", there)).values[0].timestamp_value
    assert value.ToJsonString() == "2026-01-31T12:00:00Z"


@pytest.mark.parametrize("field", ["start", "end"])
def test_a_naive_datetime_is_refused_with_the_mend(field: str) -> None:
    with pytest.raises(InvalidRequest, match=r"no time zone; give one.*tzinfo=UTC") as e:
        build(**{field: datetime(2026, 1, 31)})  # noqa: DTZ001 - naive on purpose
    assert e.value.violations[0].subject == field
    assert isinstance(e.value, ValueError)


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        (("c", "=", None), "use 'is null'"),
        (("c", "=", float("nan")), "NaN"),
        (("c", "=", Decimal("Infinity")), "finite"),
        (("c", "=", datetime(2026, 1, 1)), "no time zone"),  # noqa: DTZ001 - on purpose
        (("c", "=", time(1, tzinfo=UTC)), "no time zone"),
        (("c", "=", {"a": 1}), "dict"),
        (("c", "like", "x"), "unknown operator"),
        (("c", "in", "abc"), "sequence"),
        (("c", "in", 5), "sequence"),
        (("c", "is null", 5), "takes no value"),
        (("c",), "column, operator, value"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(condition: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        filter_proto("f", condition)


def test_filters_of_several_and_of_no_values() -> None:
    many = filter_proto("f", ("c", "in", (1, 2)))
    assert many.operator == dataset_pb2.FILTER_OPERATOR_IN
    assert [v.int_value for v in many.values] == [1, 2]
    assert not filter_proto("f", ("c", "is not null")).values
    assert filter_proto("f", Filter("c", "contains", "x")).values[0].string_value == "x"


def test_each_call_has_a_fresh_request_id_unless_one_is_given() -> None:
    first, second = build().request_id, build().request_id
    assert uuid.UUID(first) != uuid.UUID(second)
    own = uuid.uuid4()
    assert build(request_id=own).request_id == str(own)


def test_every_option_reaches_its_field() -> None:
    request = build(
        target_id="0xabc",
        network="base",
        start=datetime(2026, 1, 1, tzinfo=UTC),
        end=datetime(2026, 2, 1, tzinfo=UTC),
        columns=["a", "b"],
        filters=[("a", ">", 1)],
        limit=10,
        compression="zstd",
        delimiter=";",
        header=False,
        null_marker="NULL",
        spreadsheet_safe=True,
        max_part_rows=5,
        max_part_bytes=70_000,
        ttl=timedelta(hours=2),
        priority=-3,
        labels={"team": "data"},
        validate_only=True,
    )
    expected = job_pb2.CreateExportRequest(
        request_id=request.request_id,
        dataset="d",
        target_id="0xabc",
        network="base",
        columns=["a", "b"],
        limit=10,
        format=dataset_pb2.FORMAT_CSV,
        csv_options=job_pb2.CsvOptions(
            delimiter=";",
            header=False,
            null_marker="NULL",
            dialect=job_pb2.CSV_DIALECT_SPREADSHEET_SAFE,
        ),
        compression=job_pb2.COMPRESSION_ZSTD,
        max_part_rows=5,
        max_part_bytes=70_000,
        priority=-3,
        labels={"team": "data"},
        validate_only=True,
    )
    expected.filters.append(filter_proto("f", ("a", ">", 1)))
    expected.ttl.FromTimedelta(timedelta(hours=2))
    expected.time_range.start_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
    expected.time_range.end_time.FromDatetime(datetime(2026, 2, 1, tzinfo=UTC))
    assert request == expected


def test_compression_goes_to_where_the_format_keeps_it() -> None:
    parquet = build(format="parquet", compression="snappy", row_group_rows=7)
    assert parquet.parquet_options.compression == job_pb2.PARQUET_COMPRESSION_SNAPPY
    assert parquet.parquet_options.row_group_rows == 7
    arrow = build(format="arrow", compression="lz4")
    assert arrow.arrow_options.compression == job_pb2.ARROW_COMPRESSION_LZ4
    assert not parquet.HasField("csv_options")


@pytest.mark.parametrize(
    "options",
    [
        {"format": "xml"},
        {"format": "parquet", "compression": "gzip"},
        {"format": "csv", "compression": "snappy"},
        {"format": "jsonl", "delimiter": ";"},
        {"format": "parquet", "header": False},
        {"format": "csv", "row_group_rows": 5},
        {"columns": "abc"},
    ],
)
def test_an_option_that_does_not_fit_the_format_is_never_dropped_silently(
    options: dict[str, Any],
) -> None:
    with pytest.raises(InvalidRequest):
        build(**options)


def test_job_states_may_be_given_by_name() -> None:
    request = list_jobs(states=["RUNNING", JobState.FAILED])
    assert list(request.states) == [job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_FAILED]
    with pytest.raises(InvalidRequest, match="CANCELLED, FAILED"):
        list_jobs(states=["DONE"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("amount>=1.5", Filter("amount", ">=", Decimal("1.5"))),
        ("block = 7", Filter("block", "=", 7)),
        ("price < 1e3", Filter("price", "<", 1000.0)),
        ("ok!=TRUE", Filter("ok", "!=", True)),
        ("sender=a=b", Filter("sender", "=", "a=b")),
        ("sender=", Filter("sender", "=", "")),
        ('sender=" x "', Filter("sender", "=", " x ")),
        ("sender^=0x", Filter("sender", "starts with", "0x")),
        ("sender ~ (foo", Filter("sender", "contains", "(foo")),
        ("sender is null", Filter("sender", "is null")),
        ("sender IS  NOT NULL", Filter("sender", "is not null")),
        ("block in (1, 2)", Filter("block", "in", [1, 2])),
        ('sender not in (a, "b,c")', Filter("sender", "not in", ["a", "b,c"])),
        ("block == 7", Filter("block", "=", 7)),
        ("sender = 'base'", Filter("sender", "=", "base")),
        ('sender = "=x"', Filter("sender", "=", "=x")),
        ('sender = "a ""b"""', Filter("sender", "=", 'a "b"')),
        ('sender = invoice "7"', Filter("sender", "=", 'invoice "7"')),
        ('sender in (\'a,b\', "c""", d e)', Filter("sender", "in", ["a,b", 'c"', "d e"])),
        ("block in ()", Filter("block", "in", [])),
        ("time>=2025-06-01", Filter("time", ">=", "2025-06-01T00:00:00Z")),
        ("time>=2025-06-01T00:00Z", Filter("time", ">=", "2025-06-01T00:00:00Z")),
        ("time<2025-06-01T02:00+02:00", Filter("time", "<", "2025-06-01T02:00:00+02:00")),
        (f"block<{2**63 - 1}", Filter("block", "<", 2**63 - 1)),
        (f"amount<{2**64}", Filter("amount", "<", Decimal(2**64))),
        ("day>2026-01-31", Filter("day", ">", date(2026, 1, 31))),
        ("at>=13:45:00.5", Filter("at", ">=", "13:45:00.5")),
        ("hash=0xC0FFEE", Filter("hash", "=", b"\xc0\xff\xee")),
        (
            "time<2026-01-31T00:00:00.123456789Z",
            Filter("time", "<", "2026-01-31T00:00:00.123456789Z"),
        ),
    ],
)
def test_typed_conditions_take_their_types_from_the_columns(
    text: str, expected: Filter
) -> None:
    assert parse_where(text, DATASET) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("amount", "cannot read"),
        (">=5", "cannot read"),
        ("nope=1", "no column 'nope'; there are block"),
        ("within (1)", "cannot read"),
        ("block=1.5", "block .int64. takes a whole number"),
        ("amount=abc", "decimal number"),
        ("ok=yes", "true or false"),
        ("hash=xyz", "hexadecimal"),
        ("time>2026-01-31T00:00:00", "with an offset"),
        ("day=2026-13-01", "date such as"),
        ("time>2026-02-30", "takes a date, or time with an offset"),
        ("time>2026-01-31T25:00Z", "takes a date, or time with an offset"),
        ("block in 1,2", "brackets"),
        ("sender <> base", "unknown operator '<>' in 'sender <> base'; write !=,"),
        ("block => 5", "unknown operator '=>'.*write >=,"),
        ("block =< 5", "unknown operator '=<'.*write <=,"),
        ("sender =~ x", "unknown operator '=~'.*write ~,"),
        ("sender === x", "unknown operator '==='.*use ~, "),
        ("sender ! x", "unknown operator '!'"),
        ("sender < > x", "two operators; .* in quotes"),
        ('sender = "base', 'quotes of "base are not closed'),
        ("sender = 'base", "quotes of 'base are not closed"),
        ('sender = base"', "not closed"),
        ('sender = "a" b', "not closed"),
        ('sender in (a, "b)', 'quotes of "b are not closed'),
        ("sender in ('a, b)", "quotes of 'a are not closed"),
        ('sender in ("a" b, c)', "not closed"),
        (f"block={2**63}", "9223372036854775808 is too large for block .int64."),
        (f"block in (1, -{2**63 + 1})", "too large for block"),
        ("amont > 1", "no column 'amont'; did you mean amount?"),
        ("BLOCK > 1", "no column 'BLOCK'; did you mean block?"),
        ("sender is null x", "takes no value"),
    ],
)
def test_conditions_that_cannot_be_read_say_how_to_mend_them(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse_where(text, DATASET)


def test_a_column_named_like_an_operator_word_can_be_filtered() -> None:
    column = Column("is", "INTEGER", "int64", nullable=True, operators=("EQUAL",))
    odd = Dataset.of(dataset_pb2.Dataset(name="d"))
    odd = Dataset("d", "", True, (column,), (), "", "", "", None, None, None, odd.proto)
    assert parse_where("is = 5", odd) == Filter("is", "=", 5)


def test_moments_need_an_offset_and_dates_mean_midnight_utc() -> None:
    assert parse_moment("--since", "2026-01-31") == datetime(2026, 1, 31, tzinfo=UTC)
    moment = parse_moment("--since", "2026-01-31T02:00:00+02:00")
    assert moment == datetime(2026, 1, 31, tzinfo=UTC)
    with pytest.raises(InvalidRequest, match="add Z for UTC"):
        parse_moment("--since", "2026-01-31T00:00:00")
    with pytest.raises(InvalidRequest, match="cannot read"):
        parse_moment("--since", "yesterday")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("limit", 10**20),
        ("limit", -(2**63) - 1),
        ("max_part_rows", 2**63),
        ("max_part_bytes", 2**63),
        ("priority", 2**31),
    ],
)
def test_a_number_that_its_field_cannot_hold_is_refused_by_name(
    name: str, number: int
) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: {number} is no whole number") as e:
        build(**{name: number})
    assert e.value.violations[0].subject == name


def test_numbers_out_of_range_are_refused_wherever_they_go() -> None:
    with pytest.raises(InvalidRequest, match="row_group_rows"):
        build(format="parquet", row_group_rows=2**63)
    with pytest.raises(InvalidRequest, match="page_size"):
        list_jobs(page_size=2**31)
    with pytest.raises(InvalidRequest, match=r"start: .* out of range"):
        build(start=datetime.min.replace(tzinfo=timezone(timedelta(hours=2))))
    assert build(limit=2**63 - 1).limit == 2**63 - 1


@pytest.mark.parametrize("address", ["", "  "])
def test_an_empty_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address: is empty"):
        Client(address)


@pytest.mark.parametrize(
    ("room", "name", "words"),
    [
        (40, "a-long-file-name.csv", "running, 5 rows"),
        (30, "a-long-file-na…", "running, 5 rows"),
        (20, "a-long-file…", "running…"),
    ],
)
def test_a_narrow_line_shortens_the_name_first_and_then_the_details(
    room: int, name: str, words: str
) -> None:
    shown = fit("a-long-file-name.csv", "running, 5 rows", room)
    assert shown == (name, words)
    assert sum(map(len, shown)) <= room


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (2000, "2,000 rows")]
)
def test_one_row_is_no_rows(number: int, text: str) -> None:
    assert counted(number, "row") == text
    assert counted(2, "delivery") == "2 deliveries"


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        (
            to_file("reports", "daily/", name="archive"),
            sink_pb2.Sink(
                name="archive",
                local_file=sink_pb2.LocalFileSink(connection="reports", path="daily"),
            ),
        ),
        (
            to_s3("lake", "a/b"),
            sink_pb2.Sink(
                object_storage=sink_pb2.ObjectStorageSink(connection="lake", prefix="a/b")
            ),
        ),
        (
            to_webhook(
                "https://h/in",
                connection="c",
                mode="PUSH_PARTS",
                secret="whsec_x",
                headers={"x-team": "data"},
            ),
            sink_pb2.Sink(
                webhook=sink_pb2.WebhookSink(
                    connection="c",
                    url="https://h/in",
                    mode=sink_pb2.WEBHOOK_MODE_PUSH_PARTS,
                    headers={"x-team": "data"},
                    secret="whsec_x",
                )
            ),
        ),
        (
            to_database(
                "warehouse", "sales.orders", mode="MERGE", key_columns=["a"], name="db"
            ),
            sink_pb2.Sink(
                name="db",
                database=sink_pb2.DatabaseSink(
                    connection="warehouse",
                    table="sales.orders",
                    mode=sink_pb2.WRITE_MODE_MERGE,
                    key_columns=["a"],
                ),
            ),
        ),
    ],
)
def test_each_sink_reaches_its_message(sink: Sink, message: sink_pb2.Sink) -> None:
    request = build(sinks=[sink, message], drop_after_delivery=True)
    assert list(request.sinks) == [message, message]
    assert request.drop_after_delivery


def test_the_configuration_of_a_plugin_arrives_as_it_was_given() -> None:
    values: dict[str, Any] = {
        "topic": "t",
        "acks": 1,
        "share": 0.5,
        "tls": True,
        "none": None,
    }
    sink = to_plugin("kafka", "main", **values, more={"list": [1, "a"]}).proto
    assert (sink.plugin.type, sink.plugin.connection) == ("kafka", "main")
    assert MessageToDict(sink.plugin.config) == {**values, "more": {"list": [1, "a"]}}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (2**53 + 1, "config.x: 9007199254740993 is too large to stay exact"),
        (float("inf"), "config.x: inf is no number"),
        ([1, {"a": b"x"}], r"config.x\[1\].a: JSON cannot hold a bytes"),
        ({1: 2}, "config.x: JSON cannot hold a dict"),
        (date(2026, 1, 1), "config.x: JSON cannot hold a date"),
    ],
)
def test_what_json_would_lose_is_refused(value: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        to_plugin("kafka", x=value)


def test_sinks_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"sinks\[1\]: a sink is needed, not a str"):
        build(sinks=[to_file("reports"), "file:reports"])
    with pytest.raises(InvalidRequest, match="sinks: give a list"):
        build(sinks=to_file("reports"))
    with pytest.raises(InvalidRequest, match="mode: 'merge': use APPEND, REPLACE, MERGE"):
        to_database("c", "t", mode="merge")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InvalidRequest, match=r"key_columns: give a list: \['id'\]"):
        to_database("c", "t", mode="MERGE", key_columns="id")


def test_error_details_of_a_kind_unknown_here_do_not_keep_a_delivery_from_being_shown() -> (
    None
):
    unknown = any_pb2.Any(type_url="type.example.com/acme.Odd", value=b"\xff")
    known = any_pb2.Any()
    known.Pack(error_details_pb2.ErrorInfo(reason="DELIVERY_FAILED"))
    status = status_pb2.Status(message="down", details=[unknown, known])
    delivery = sink_pb2.Delivery(last_error=status)
    queue = sink_pb2.SinkQueue(disabled_reason=status)
    job = job_pb2.Job(error=status, deliveries=[sink_pb2.SinkDelivery(last_error=status)])
    for told in (
        delivery_json(delivery)["last_error"],
        queue_json(queue)["disabled_reason"],
        job_json(job)["error"],
        job_json(job)["deliveries"][0]["last_error"],
    ):
        assert [each["reason"] for each in told["details"]] == ["DELIVERY_FAILED"]
    assert len(delivery.last_error.details) == 2, "what is shown is a copy"
    assert "last_error" not in delivery_json(sink_pb2.Delivery())


def test_the_text_of_a_sink_shows_no_secret() -> None:
    sink = to_webhook(
        "https://h/in?token=canary",
        connection="c",
        secret="canary",
        headers={"x": "canary"},
        name="hook",
    )
    assert repr(sink) == "<Sink webhook connection='c' name='hook'>"
    assert repr(to_plugin("kafka", password="canary")) == "<Sink plugin>"


def test_delivery_states_may_be_given_by_name() -> None:
    request = list_deliveries(
        job_id="j", sink="s", queue="q", states=["PENDING", DeliveryState.DROPPED]
    )
    assert request == export_service_pb2.ListDeliveriesRequest(
        job_id="j",
        sink="s",
        queue="q",
        states=[sink_pb2.DELIVERY_STATE_PENDING, sink_pb2.DELIVERY_STATE_DROPPED],
    )
    with pytest.raises(InvalidRequest, match="DEAD_LETTERED, DELIVERED"):
        list_deliveries(states=["DONE"])
    with pytest.raises(InvalidRequest, match="page_size"):
        list_deliveries(page_size=2**31)


def test_a_status_of_tomorrow_is_unknown_and_not_delivered() -> None:
    job = job_pb2.Job(
        job_id="j",
        state=job_pb2.JOB_STATE_SUCCEEDED,
        manifest=job_pb2.Manifest(rows=1),
        deliveries=[sink_pb2.SinkDelivery(sink="a"), sink_pb2.SinkDelivery(sink="b")],
    )
    job.delivery_status = 99  # type: ignore[assignment]  # a newer server's
    job.deliveries[0].status = 99  # type: ignore[assignment]  # a newer server's
    job.deliveries[1].status = sink_pb2.DELIVERY_STATUS_DELIVERED
    info = JobInfo.of(job)
    assert info.delivery_status is DeliveryStatus.UNKNOWN
    with pytest.raises(NotDelivered, match=r"\(a: unknown\)"):
        info.raise_unless_delivered()


def test_durations() -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        parse_duration("--ttl", "99999999999999w")
    assert parse_duration("--ttl", "1d12h") == timedelta(hours=36)
    for bad in ("", "24", "h", "1.5h", "-1h", "1h x"):
        with pytest.raises(InvalidRequest):
            parse_duration("--ttl", bad)
