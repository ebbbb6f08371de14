"""Sinks and deliveries in the contract's words, both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf import json_format, struct_pb2

from exportd.v1 import export_service_pb2, sink_pb2
from exportd_server.api.requests import Reader, enum_name
from exportd_server.api.status import record_status
from exportd_server.api.timestamps import timestamp
from exportd_server.delivery.sinks import AskedSink
from exportd_server.jobs.ledger.base import DeliveryQuery
from exportd_server.jobs.manager import MAX_SINKS, JobSink
from exportd_server.jobs.model import (
    DeliveryRecord,
    DeliveryState,
    DeliveryStatus,
    SinkDelivery,
    SinkQueue,
    SinkSpec,
)

_BUILT_IN = ("local_file", "webhook", "object_storage", "database")

# --- what callers ask for


def read_sinks(reader: Reader, sinks: Iterable[sink_pb2.Sink]) -> list[JobSink]:
    """The sinks of a request; what is wrong with them is noted."""
    found = []
    for index, message in enumerate(sinks):
        if index > MAX_SINKS:
            break  # the manager refuses the request for their number
        kind = message.WhichOneof("kind")
        if kind is None:
            reader.complain(f"sinks[{index}]", "has no kind; set one of its members")
            continue
        field = f"sinks[{index}].{kind}"
        asked = _READERS[kind](reader, field, getattr(message, kind))
        if asked is not None:
            found.append(
                JobSink(field, reader.text(f"sinks[{index}].name", message.name), asked)
            )
    return found


def _read_local_file(
    reader: Reader, field: str, message: sink_pb2.LocalFileSink
) -> AskedSink:
    config = {"path": reader.text(f"{field}.path", message.path)}
    return AskedSink("local_file", message.connection, config)


def _read_webhook(reader: Reader, field: str, message: sink_pb2.WebhookSink) -> AskedSink:
    config = {
        "url": reader.text(f"{field}.url", message.url),
        "mode": _choice(
            reader, f"{field}.mode", sink_pb2.WebhookMode, message.mode, "NOTIFY"
        ),
        "headers": dict(message.headers),
        "secret": message.secret or None,
    }
    return AskedSink("webhook", message.connection, config)


def _read_object_storage(
    reader: Reader, field: str, message: sink_pb2.ObjectStorageSink
) -> AskedSink:
    config = {"prefix": reader.text(f"{field}.prefix", message.prefix)}
    return AskedSink("object_storage", message.connection, config)


def _read_database(reader: Reader, field: str, message: sink_pb2.DatabaseSink) -> AskedSink:
    config = {
        "table": reader.text(f"{field}.table", message.table),
        "mode": _choice(
            reader, f"{field}.mode", sink_pb2.WriteMode, message.mode, "APPEND"
        ),
        "key_columns": [
            reader.text(f"{field}.key_columns[{index}]", name)
            for index, name in enumerate(message.key_columns)
        ],
        "create_table": message.create_table,
    }
    return AskedSink("database", message.connection, config)


def _read_plugin(
    reader: Reader, field: str, message: sink_pb2.PluginSink
) -> AskedSink | None:
    if not message.type:
        reader.complain(f"{field}.type", "is required: the type of an installed sink")
        return None
    if message.type in _BUILT_IN:
        reader.complain(f"{field}.type", f"is built in; set {message.type} instead")
        return None
    try:
        config = _whole(json_format.MessageToDict(message.config))
    except (ValueError, RecursionError):
        # JSON has no infinity, and no NaN.
        reader.complain(f"{field}.config", "must be a value that JSON can hold")
        return None
    return AskedSink(message.type, message.connection, config)


def _whole(value: Any) -> Any:
    """The value with whole numbers as such: a Struct knows only floating point."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


_READERS: Mapping[str, Callable[[Reader, str, Any], AskedSink | None]] = {
    "local_file": _read_local_file,
    "webhook": _read_webhook,
    "object_storage": _read_object_storage,
    "database": _read_database,
    "plugin": _read_plugin,
}


def _choice(reader: Reader, field: str, wrapper: Any, number: int, default: str) -> str:
    name = enum_name(wrapper, number)
    if name is None:
        reader.complain(field, f"{number} is not a value of it")
    return default if name in (None, "UNSPECIFIED") else str(name)


def read_delivery_query(
    reader: Reader, request: export_service_pb2.ListDeliveriesRequest
) -> DeliveryQuery:
    """The conditions of a ListDeliveries."""
    states: set[DeliveryState] = set()
    for index, number in enumerate(request.states):
        name = enum_name(sink_pb2.DeliveryState, number)
        if name is None or name == "UNSPECIFIED":
            reader.complain(
                f"states[{index}]", f"must be one of {', '.join(DeliveryState)}"
            )
        else:
            states.add(DeliveryState(name))
    return DeliveryQuery(
        job_id=reader.uuid("job_id", request.job_id, required=False),
        sink=_read_sink_name(reader, request.sink, request.job_id),
        queue=reader.text("queue", request.queue),
        states=frozenset(states),
    )


def read_redrive(
    reader: Reader, request: export_service_pb2.RedriveDeliveriesRequest
) -> DeliveryQuery:
    """Which deliveries to send again."""
    if not (request.delivery_id or request.job_id or request.queue):
        reader.complain("job_id", "is required, unless delivery_id or queue is given")
    return DeliveryQuery(
        delivery_id=reader.uuid("delivery_id", request.delivery_id, required=False),
        job_id=reader.uuid("job_id", request.job_id, required=False),
        sink=_read_sink_name(reader, request.sink, request.job_id),
        queue=reader.text("queue", request.queue),
    )


def _read_sink_name(reader: Reader, name: str, job_id: str) -> str:
    if name and not job_id:
        reader.complain("sink", "is a name inside a job: give job_id, too")
    return reader.text("sink", name)


# --- what callers are told


def sink_message(spec: SinkSpec) -> sink_pb2.Sink:
    """A sink as accepted. Its secrets are not there to be told."""
    message = sink_pb2.Sink(name=spec.name)
    config = dict(spec.config)
    match spec.type:
        case "local_file":
            message.local_file.CopyFrom(
                sink_pb2.LocalFileSink(connection=spec.connection, path=config["path"])
            )
        case "webhook":
            mode = sink_pb2.WebhookMode.Value(f"WEBHOOK_MODE_{config['mode']}")
            message.webhook.CopyFrom(
                sink_pb2.WebhookSink(
                    connection=spec.connection,
                    url=config["url"],
                    mode=mode,
                    headers=config["headers"],
                )
            )
        case "object_storage":
            message.object_storage.CopyFrom(
                sink_pb2.ObjectStorageSink(
                    connection=spec.connection, prefix=config["prefix"]
                )
            )
        case "database":
            write_mode = sink_pb2.WriteMode.Value(f"WRITE_MODE_{config['mode']}")
            message.database.CopyFrom(
                sink_pb2.DatabaseSink(
                    connection=spec.connection,
                    table=config["table"],
                    mode=write_mode,
                    key_columns=config["key_columns"],
                    create_table=config["create_table"],
                )
            )
        case _:
            told = struct_pb2.Struct()
            told.update(config)
            message.plugin.CopyFrom(
                sink_pb2.PluginSink(type=spec.type, connection=spec.connection, config=told)
            )
    return message


def status_value(status: DeliveryStatus | None) -> sink_pb2.DeliveryStatus.ValueType:
    """A delivery status; None where a job has no sinks."""
    name = "UNSPECIFIED" if status is None else status.value
    return sink_pb2.DeliveryStatus.Value(f"DELIVERY_STATUS_{name}")


def sink_delivery_message(found: SinkDelivery) -> sink_pb2.SinkDelivery:
    """How the delivery to one sink stands."""
    return sink_pb2.SinkDelivery(
        sink=found.sink,
        status=status_value(found.status),
        pending=found.pending,
        delivered=found.delivered,
        dropped=found.dropped,
        dead_lettered=found.dead_lettered,
        attempts=found.attempts,
        last_error=None if found.last_error is None else record_status(found.last_error),
        receipt=found.receipt,
    )


def delivery_message(record: DeliveryRecord) -> sink_pb2.Delivery:
    """One delivery."""
    return sink_pb2.Delivery(
        delivery_id=record.delivery_id,
        job_id=record.job_id,
        sink=record.sink,
        queue=record.queue,
        file_name=record.file_name,
        generation=record.generation,
        state=sink_pb2.DeliveryState.Value(f"DELIVERY_STATE_{record.state}"),
        attempts=record.attempts,
        last_error=None if record.last_error is None else record_status(record.last_error),
        receipt=record.receipt,
        create_time=timestamp(record.create_time),
        finish_time=timestamp(record.finish_time),
        next_attempt_time=timestamp(record.next_attempt_time),
    )


def queue_message(queue: SinkQueue) -> sink_pb2.SinkQueue:
    """A queue as its tenant sees it."""
    reason = queue.disabled_reason
    return sink_pb2.SinkQueue(
        queue=queue.queue,
        waiting=queue.waiting,
        retrying=queue.retrying,
        dead_lettered=queue.dead_lettered,
        failing_since=timestamp(queue.failing_since),
        disabled_time=timestamp(queue.disabled_time),
        disabled_reason=None if reason is None else record_status(reason),
    )
