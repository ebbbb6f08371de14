"""Where an export is delivered to: `sinks=[to_file("reports", "daily"), ...]`.

Connections are named by the operator, who keeps their addresses and credentials. The
contract, `exportd.v1.sink_pb2`, explains each field; what a sink may be told is the
server's to judge, when the export is created.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from exportd.errors import InvalidRequest
from exportd.v1 import sink_pb2

_T = TypeVar("_T")

WebhookModeName = Literal["NOTIFY", "PUSH_PARTS"]
WriteModeName = Literal["APPEND", "REPLACE", "MERGE"]
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What the configuration of a plug-in may hold."""

_WEBHOOK_MODES: Mapping[str, sink_pb2.WebhookMode.ValueType] = {
    "NOTIFY": sink_pb2.WEBHOOK_MODE_NOTIFY,
    "PUSH_PARTS": sink_pb2.WEBHOOK_MODE_PUSH_PARTS,
}
_WRITE_MODES: Mapping[str, sink_pb2.WriteMode.ValueType] = {
    "APPEND": sink_pb2.WRITE_MODE_APPEND,
    "REPLACE": sink_pb2.WRITE_MODE_REPLACE,
    "MERGE": sink_pb2.WRITE_MODE_MERGE,
}
_EXACT = range(-(2**53), 2**53 + 1)
"""Whole numbers that survive a Struct, which knows only floating point."""


@dataclass(frozen=True, slots=True, repr=False)
class Sink:
    """A sink of an export, made by `to_file` and its siblings. Its text shows no secret."""

    proto: sink_pb2.Sink

    def __repr__(self) -> str:
        kind = self.proto.WhichOneof("kind") or "none"
        connection = getattr(getattr(self.proto, kind, None), "connection", "")
        words = (kind, connection and f"connection={connection!r}")
        name = self.proto.name and f"name={self.proto.name!r}"
        return f"<Sink {' '.join(filter(None, (*words, name)))}>"


SinkLike = Sink | sink_pb2.Sink
"""A `Sink`, or the contract's message."""


def to_file(connection: str, path: str = "", *, name: str = "") -> Sink:
    """Files in the directory `path` below that of a connection, and a manifest.

    `name` tells the sinks of one job apart; all have it, and none needs it.
    """
    message = sink_pb2.LocalFileSink(connection=connection, path=path.removesuffix("/"))
    return Sink(sink_pb2.Sink(name=name, local_file=message))


def to_s3(connection: str, prefix: str = "", *, name: str = "") -> Sink:
    """Objects under `prefix` below that of a connection, and a manifest."""
    message = sink_pb2.ObjectStorageSink(
        connection=connection, prefix=prefix.removesuffix("/")
    )
    return Sink(sink_pb2.Sink(name=name, object_storage=message))


def to_webhook(
    url: str = "",
    *,
    connection: str = "",
    mode: WebhookModeName = "NOTIFY",
    secret: str = "",
    headers: Mapping[str, str] | None = None,
    name: str = "",
) -> Sink:
    """HTTP POST requests, signed as Standard Webhooks has it.

    Args:
        url: Where to send; may be left out when the connection has one.
        connection: None is needed for public addresses.
        mode: `NOTIFY` sends JSON with links once the job has succeeded, `PUSH_PARTS` the
            bytes of each part besides.
        secret: Signs: `whsec_` and the base64 of 24 to 64 bytes. Needed unless the
            connection has one; never given back.
        headers: To send besides; values are never given back.
        name: Tells the sinks of one job apart.
    """
    message = sink_pb2.WebhookSink(
        connection=connection,
        url=url,
        mode=_pick(_WEBHOOK_MODES, mode),
        headers=dict(headers or {}),
        secret=secret,
    )
    return Sink(sink_pb2.Sink(name=name, webhook=message))


def to_database(
    connection: str,
    table: str,
    *,
    mode: WriteModeName = "APPEND",
    key_columns: Sequence[str] = (),
    create_table: bool = False,
    name: str = "",
) -> Sink:
    """Rows in a table, loaded in one transaction once the job has succeeded.

    Args:
        connection: The database.
        table: `TABLE`, or `SCHEMA.TABLE`; a name with a dot goes in double quotes.
        mode: `APPEND` adds the rows, `REPLACE` replaces all that is there, `MERGE` those
            with the same `key_columns`.
        key_columns: Columns that tell a row, for `MERGE`.
        create_table: Make the table when it is missing.
        name: Tells the sinks of one job apart.
    """
    if isinstance(key_columns, str):  # a string is a sequence of strings too
        raise InvalidRequest.of("key_columns", f"give a list: [{key_columns!r}]")
    message = sink_pb2.DatabaseSink(
        connection=connection,
        table=table,
        mode=_pick(_WRITE_MODES, mode),
        key_columns=key_columns,
        create_table=create_table,
    )
    return Sink(sink_pb2.Sink(name=name, database=message))


def to_plugin(
    type_: str, connection: str = "", /, *, name: str = "", **config: Json
) -> Sink:
    """A sink of a type that the operator has installed, with its configuration.

    `name` is the sink's; a configuration with a `name` of its own needs the contract's
    message.

    Raises:
        InvalidRequest: A value that JSON cannot hold, or not without loss.
    """
    return plugin(type_, connection, config, name=name)


def plugin(
    type_: str, connection: str, config: Mapping[str, Json], *, name: str = ""
) -> Sink:
    """As `to_plugin`, for a configuration that is a value already."""
    _check_json("config", config)
    message = sink_pb2.PluginSink(type=type_, connection=connection)
    message.config.update(dict(config))
    return Sink(sink_pb2.Sink(name=name, plugin=message))


def sink_proto(where: str, sink: object) -> sink_pb2.Sink:
    """A sink for the wire. `where` names it in errors."""
    if isinstance(sink, Sink):
        return sink.proto
    if isinstance(sink, sink_pb2.Sink):
        return sink
    raise InvalidRequest.of(
        where,
        f"a sink is needed, not a {type(sink).__name__}; make one by to_file, to_s3, "
        "to_webhook, to_database or to_plugin",
    )


def _check_json(where: str, value: object) -> None:
    """Raise for what a Struct would change or refuse."""
    match value:
        case None | bool() | str():
            return
        case int() if value in _EXACT:
            return
        case float() if math.isfinite(value):
            return
        case int():
            problem = f"{value} is too large to stay exact; write it as text"
        case float():
            problem = f"{value} is no number that JSON can hold"
        case Mapping() if all(isinstance(key, str) for key in value):
            for key, each in value.items():
                _check_json(f"{where}.{key}", each)
            return
        case list() | tuple():
            for index, each in enumerate(value):
                _check_json(f"{where}[{index}]", each)
            return
        case _:
            problem = f"JSON cannot hold a {type(value).__name__}"
    raise InvalidRequest.of(where, problem)


def _pick(table: Mapping[str, _T], mode: str) -> _T:
    if mode not in table:
        raise InvalidRequest.of("mode", f"{mode!r}: use {', '.join(table)}")
    return table[mode]
