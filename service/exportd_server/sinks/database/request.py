"""What a caller says of a database sink, what its operator configures, and what can be
told of both without asking a database."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from exportd_server.encoders.base import CsvDialect, Format
from exportd_server.platform.urls import BadUrl, parse_postgres_url
from exportd_server.sinks.base import PLACE, BadSinkRequest, Export

Mode = Literal["APPEND", "REPLACE", "MERGE"]

POSTGRESQL = "postgresql"
SQLITE = "sqlite"
ADBC = "adbc"
_SCHEMES = {"postgresql": POSTGRESQL, "postgres": POSTGRESQL, "sqlite": SQLITE}
_SQLITE_URL = "sqlite:///"
_PART = re.compile(r'"(?:[^"]|"")+"|[^".]+')
_LONGEST_NAME = 1_000


class DatabaseRequest(BaseModel):
    """The contract's `DatabaseSink`, but for its connection."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    mode: Mode = "APPEND"
    key_columns: tuple[str, ...] = ()
    create_table: bool = False


class DatabaseConnection(BaseModel):
    """A database that exports may be written to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[SecretStr | None, PLACE] = None
    """`postgresql://USER:PASSWORD@HOST:PORT/DATABASE` or `sqlite:///PATH`. Either this or
    `driver`."""
    driver: Annotated[str, Field(min_length=1)] | None = None
    """An ADBC driver: the name or path of its shared library, or an installed package
    `adbc_driver_*`."""
    options: Annotated[dict[str, SecretStr], PLACE] = Field(default_factory=dict)
    """What the driver wants to be told, by its own names: addresses, credentials, limits.
    `entrypoint` is the driver manager's."""
    schemas: Annotated[tuple[str, ...], PLACE] = ()
    """Schemas that may be written to, by their names; none named: any."""
    tables: tuple[str, ...] = ()
    """Tables that may be written to, as patterns with `*`, `?` and `[...]` for their
    names without the schema; none named: any. No place of a tenant's own: the name of one
    may begin with that of another."""
    deliveries_table: str = "exportd_deliveries"
    """`TABLE` or `SCHEMA.TABLE` that tells what has been delivered; made when it is
    missing."""
    statement_timeout: Annotated[float, Field(gt=0, le=86_400)] = 3_600.0
    """Longest time for one statement, in seconds; PostgreSQL alone has it."""
    always_stage: bool = False
    """Have all rows go through a temporary table, those too that PostgreSQL could put into
    their table at once; of PostgreSQL by its `url` alone."""
    spool_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30
    """Most bytes of rows that are kept on the disk to go straight into a table of
    PostgreSQL; those of larger exports go through a temporary table."""
    spool_directory: Path | None = None
    """Where these rows lie until all are here, and a Parquet part while it is read; the
    system's directory for temporary files when it is not given."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.url is None) == (self.driver is None):
            raise ValueError("a database has either url or driver")
        if self.url is None:
            if "driver" in self.options:
                raise ValueError("options: the driver is named by driver")
        elif self.options:
            raise ValueError("options go with driver; a url has them as ?name=value")
        else:
            _check_url(self.url.get_secret_value(), self.schemas)
        if self.always_stage and self.kind != POSTGRESQL:
            raise ValueError("always_stage is for PostgreSQL; others always do")
        try:
            parse_table(self.deliveries_table)
        except ValueError as error:
            raise ValueError(f"deliveries_table {error}") from None
        return self

    @property
    def kind(self) -> str:
        """Which database it is."""
        return ADBC if self.url is None else _SCHEMES[self.address.partition("://")[0]]

    @property
    def address(self) -> str:
        """The URL in clear; empty with a driver."""
        return "" if self.url is None else self.url.get_secret_value()

    @property
    def path(self) -> str:
        """The file of a SQLite database."""
        return self.address.removeprefix(_SQLITE_URL)


def _check_url(url: str, schemas: tuple[str, ...]) -> None:
    # Nothing here repeats the URL: it has a password.
    kind = _SCHEMES.get(url.partition("://")[0])
    if kind is None:
        raise ValueError(
            "url begins with none of postgresql://, sqlite:///; name an ADBC driver as "
            "driver for other databases"
        )
    if kind == SQLITE and (not url.startswith(_SQLITE_URL) or url == _SQLITE_URL):
        raise ValueError("url of SQLite is sqlite:///PATH, with //// before a root")
    if kind == POSTGRESQL:
        try:
            parse_postgres_url(url)
        except BadUrl as error:
            raise ValueError(f"url is no URL of PostgreSQL: it {error}") from None
    if kind == SQLITE and schemas:
        raise ValueError("schemas: SQLite has none; use tables")


@dataclass(frozen=True, slots=True)
class TableName:
    """A table as a caller names it; `schema` is empty when it is left to the database."""

    schema: str
    name: str

    def __str__(self) -> str:
        return ".".join(_shown(part) for part in (self.schema, self.name) if part)


def _shown(name: str) -> str:
    if re.fullmatch(r'[^".]+', name):
        return name
    return '"' + name.replace('"', '""') + '"'


def parse_table(text: str) -> TableName:
    """Read `TABLE` or `SCHEMA.TABLE`. A name in double quotes may hold dots, and double
    quotes when they are doubled; a name is taken as it is written, capitals included.
    Raises `ValueError`."""
    mend = (
        "is no TABLE or SCHEMA.TABLE; put a name with a dot or a double quote in it into "
        "double quotes, and double those inside"
    )
    if "\0" in text or len(text) > _LONGEST_NAME:
        raise ValueError(mend)
    names: list[str] = []
    rest = "." + text
    while rest:
        found = _PART.match(rest, 1)
        if rest[0] != "." or found is None:
            raise ValueError(mend)
        part = found[0]
        names.append(part[1:-1].replace('""', '"') if part[0] == '"' else part)
        rest = rest[found.end() :]
    if len(names) > 2:
        raise ValueError(mend)
    return TableName(names[0] if len(names) == 2 else "", names[-1])


def check_request(
    request: DatabaseRequest, connection: DatabaseConnection, export: Export
) -> None:
    """Raises `BadSinkRequest` for what can be seen without the database."""
    try:
        table = parse_table(request.table)
    except ValueError as error:
        raise BadSinkRequest("table", str(error)) from None
    if connection.kind == SQLITE and table.schema:
        raise BadSinkRequest("table", "SQLite has no schemas; give the name alone")
    if connection.kind == ADBC and connection.schemas and not table.schema:
        raise BadSinkRequest(
            "table",
            "this connection leaves no schema to the database; name one of "
            f"{', '.join(connection.schemas)}, as SCHEMA.TABLE",
        )
    if connection.kind != POSTGRESQL and request.mode == "MERGE":
        raise BadSinkRequest(
            "mode", "MERGE needs PostgreSQL; this connection takes APPEND and REPLACE"
        )
    allow(connection, table)
    _check_format(export)
    names = [column.name for column in export.columns]
    for name, times in Counter(names).items():
        if times > 1:
            raise BadSinkRequest(
                "", f"the export has {times} columns {name!r}, and a table has one"
            )
    _check_keys(request, names)


def _check_format(export: Export) -> None:
    if export.output.format is Format.JSONL:
        raise BadSinkRequest(
            "", "a database takes no JSON Lines; choose CSV, PARQUET or ARROW"
        )
    safe = export.output.csv.dialect is CsvDialect.SPREADSHEET_SAFE
    if export.output.format is Format.CSV and safe:
        raise BadSinkRequest(
            "",
            "the CSV dialect SPREADSHEET_SAFE changes texts, which a database would keep "
            "so; choose the dialect RAW, PARQUET or ARROW",
        )


def _check_keys(request: DatabaseRequest, names: list[str]) -> None:
    keys = request.key_columns
    if request.mode != "MERGE":
        if keys:
            raise BadSinkRequest("key_columns", f"{request.mode} has none; MERGE does")
        return
    if not keys:
        raise BadSinkRequest(
            "key_columns", "MERGE needs the columns that tell one row from another"
        )
    for name in keys:
        if name not in names:
            raise BadSinkRequest("key_columns", f"{name!r} is no column of the export")
    if len(set(keys)) < len(keys):
        raise BadSinkRequest("key_columns", "names a column twice")


def allow(connection: DatabaseConnection, table: TableName) -> None:
    """Raises `BadSinkRequest` when the operator does not want this table written to. A
    schema that is empty is not known yet."""
    schemas = connection.schemas
    if table.schema.startswith("pg_") or table.schema == "information_schema":
        raise BadSinkRequest("table", f"schema {table.schema!r} is the database's own")
    if table.schema and schemas and table.schema not in schemas:
        raise BadSinkRequest(
            "table",
            f"schema {table.schema!r} may not be written to by this connection; "
            f"{', '.join(schemas)} may",
        )
    if connection.tables and not any(
        fnmatchcase(table.name, pattern) for pattern in connection.tables
    ):
        raise BadSinkRequest(
            "table",
            f"table {table.name!r} may not be written to by this connection; "
            f"{', '.join(connection.tables)} may",
        )
    ledger = parse_table(connection.deliveries_table)
    same = not (table.schema and ledger.schema) or table.schema == ledger.schema
    if table.name.lower() == ledger.name.lower() and same:
        raise BadSinkRequest("table", "is where exportd keeps what it has delivered")
