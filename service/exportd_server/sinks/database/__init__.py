"""Rows into a table of a database, all or nothing."""

from __future__ import annotations

from exportd_server.errors import ConfigurationError
from exportd_server.sinks.base import (
    Export,
    RetryPolicy,
    Sink,
    SinkDefaults,
    SinkPlan,
    Takes,
)
from exportd_server.sinks.database.generic import open_generic
from exportd_server.sinks.database.postgres import PostgresSink
from exportd_server.sinks.database.request import (
    ADBC,
    SQLITE,
    DatabaseConnection,
    DatabaseRequest,
    check_request,
)
from exportd_server.sinks.database.sqlite import SqliteSink

__all__ = ["DatabaseConnection", "DatabaseRequest", "DatabaseSink"]


class DatabaseSink:
    """The sink type `database`."""

    name = "database"
    request_model = DatabaseRequest
    connection_model = DatabaseConnection
    needs_connection = True
    defaults = SinkDefaults(
        retry=RetryPolicy(max_attempts=5, base=1.0, cap=60.0),
        timeout=3_600.0,
        concurrency=2,
    )

    def check(
        self,
        request: DatabaseRequest,
        connection: DatabaseConnection | None,
        export: Export,
    ) -> SinkPlan:
        """See `SinkType`."""
        check_request(request, _required(connection), export)
        return SinkPlan(Takes.WHOLE, overwrites="" if request.mode == "APPEND" else "mode")

    async def open(self, connection: DatabaseConnection | None) -> Sink[DatabaseRequest]:
        """See `SinkType`. A driver is loaded; nothing else is connected to yet."""
        connection = _required(connection)
        if connection.kind == ADBC:
            return await open_generic(connection)
        if connection.kind == SQLITE:
            return SqliteSink(connection)
        return PostgresSink(connection)


def _required(connection: DatabaseConnection | None) -> DatabaseConnection:
    if connection is None:
        raise ConfigurationError("a database sink needs a connection")
    return connection
