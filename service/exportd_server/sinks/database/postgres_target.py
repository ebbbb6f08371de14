"""Tables of PostgreSQL, and how an export fits one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from exportd_server.sinks.base import BadSinkRequest, Export
from exportd_server.sinks.database.postgres_types import (
    Carrier,
    Misfit,
    PgType,
    carrier,
    own_type,
)
from exportd_server.sinks.database.request import (
    DatabaseConnection,
    DatabaseRequest,
    TableName,
    allow,
    parse_table,
)

Session = psycopg.Connection[Any]

_LONGEST_NAME = 63
_TABLE_KINDS = ("r", "p")

_FIND = """
SELECT c.oid::int8 AS oid, n.nspname::text AS schema, c.relname::text AS name,
       c.relkind::text AS kind
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname::text = %(name)s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND CASE WHEN %(schema)s::text = '' THEN pg_catalog.pg_table_is_visible(c.oid)
           ELSE n.nspname::text = %(schema)s::text END
"""
_COLUMNS = """
WITH RECURSIVE resolved (number, type, typmod) AS (
    SELECT attnum, atttypid, atttypmod FROM pg_catalog.pg_attribute
    WHERE attrelid = %(oid)s::int8::oid AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT r.number, t.typbasetype,
           CASE WHEN t.typtypmod <> -1 THEN t.typtypmod ELSE r.typmod END
    FROM resolved r JOIN pg_catalog.pg_type t ON t.oid = r.type
    WHERE t.typtype = 'd'
)
SELECT a.attnum::int4 AS number, a.attname::text AS name,
       CASE WHEN n.nspname = 'pg_catalog' OR t.typname = 'citext'
            THEN t.typname ELSE '' END::text AS type,
       pg_catalog.format_type(a.atttypid, a.atttypmod) AS shown,
       r.typmod::int4 AS typmod, t.typtype = 'e' AS is_enum,
       a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AS required,
       a.attgenerated <> '' OR a.attidentity = 'a' AS generated,
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'INSERT') AS may_insert,
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'UPDATE') AS may_update,
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'SELECT') AS may_select
FROM resolved r
JOIN pg_catalog.pg_type t ON t.oid = r.type AND t.typtype <> 'd'
JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = %(oid)s::int8::oid AND a.attnum = r.number
ORDER BY a.attnum
"""
_UNIQUE = """
SELECT ((indkey::int2[])[0:indnkeyatts - 1])::int4[] AS keys FROM pg_catalog.pg_index
WHERE indrelid = %(oid)s::int8::oid AND indisunique AND indisvalid AND indimmediate
  AND indpred IS NULL AND indexprs IS NULL
"""
# What comes with the database is not listed as what anything depends on.
_STRAIGHT = """
SELECT c.relkind = 'r' AND NOT c.relhastriggers AND NOT c.relhasrules
       AND NOT c.relrowsecurity AND NOT c.relhassubclass AND NOT c.relispartition
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid
                       AND (i.indisunique OR i.indisexclusion))
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a
                       JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
                       WHERE a.attrelid = c.oid AND a.attnum > 0 AND t.typtype = 'd')
       AND NOT EXISTS (
           SELECT FROM pg_catalog.pg_depend d
           WHERE d.refclassid IN (
                 'pg_catalog.pg_proc'::pg_catalog.regclass::oid,
                 'pg_catalog.pg_operator'::pg_catalog.regclass::oid,
                 'pg_catalog.pg_opclass'::pg_catalog.regclass::oid)
             AND (d.classid, d.objid) IN (
                 SELECT 'pg_catalog.pg_attrdef'::pg_catalog.regclass::oid, oid
                 FROM pg_catalog.pg_attrdef WHERE adrelid = c.oid
                 UNION ALL
                 SELECT 'pg_catalog.pg_constraint'::pg_catalog.regclass::oid, oid
                 FROM pg_catalog.pg_constraint WHERE conrelid = c.oid
                 UNION ALL
                 SELECT 'pg_catalog.pg_class'::pg_catalog.regclass::oid, indexrelid
                 FROM pg_catalog.pg_index WHERE indrelid = c.oid)) AS it
FROM pg_catalog.pg_class c WHERE c.oid = %(oid)s::int8::oid
"""
RIGHTS = """
SELECT pg_catalog.has_database_privilege(current_database(), 'TEMP') AS temporary,
       current_schema()::text AS schema,
       COALESCE(pg_catalog.has_schema_privilege(current_schema(), 'CREATE'), false)
           AS creates
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the target."""

    number: int
    name: str
    type: PgType
    required: bool = False
    generated: bool = False
    may_insert: bool = True
    may_update: bool = True
    may_select: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """The table, as it is now; `oid` 0 when it is to be made. `straight`: COPY does what
    INSERT would, and who adds or changes rows meanwhile need not wait for these."""

    oid: int
    schema: str
    name: str
    columns: tuple[Column, ...]
    unique: tuple[frozenset[int], ...] = ()
    straight: bool = False

    @property
    def identifier(self) -> sql.Identifier:
        """Its whole name."""
        return sql.Identifier(self.schema, self.name)

    def __str__(self) -> str:
        return str(TableName(self.schema, self.name))


@dataclass(frozen=True, slots=True)
class Plan:
    """How an export gets into a target: a column and a carrier for each of its columns."""

    target: Target
    columns: tuple[Column, ...]
    carriers: tuple[Carrier, ...]
    keys: tuple[int, ...]
    """Positions of the key columns in the export."""

    @property
    def straight(self) -> bool:
        """Whether rows that are only added could go into the target at once."""
        return self.target.straight and all(each.straight for each in self.carriers)


def plan_for(
    connection: DatabaseConnection,
    session: Session,
    request: DatabaseRequest,
    export: Export,
) -> Plan:
    """How the export gets into the table that the request names, as it is now. Raises
    `BadSinkRequest` and `psycopg.Error`."""
    target = target_of(connection, session, request, export)
    by_name = {column.name: column for column in target.columns}
    columns, carriers = [], []
    for given in export.columns:
        column = by_name.get(given.name)
        if column is None:
            raise BadSinkRequest(
                "table", f"{target} has no column {given.name!r}, which the export has"
            )
        if column.generated:
            raise BadSinkRequest(
                "table", f"column {column.name!r} of {target} is generated by itself"
            )
        try:
            carriers.append(carrier(given.kind, given.type, column.type))
        except Misfit as misfit:
            raise BadSinkRequest(
                "table",
                f"column {column.name!r} of {target} is of type {column.type.shown}, "
                f"which does not take {given.type} exactly; {misfit.mend} does",
            ) from None
        columns.append(column)
    names = [column.name for column in columns]
    for column in target.columns:
        if column.required and column.name not in names:
            raise BadSinkRequest(
                "table",
                f"column {column.name!r} of {target} must have a value, and the "
                "export has no such column",
            )
    plan = Plan(
        target,
        tuple(columns),
        tuple(carriers),
        tuple(names.index(name) for name in request.key_columns),
    )
    if target.oid:
        _require_rights(session, request, plan)
        _require_unique(request, plan)
    return plan


def target_of(
    connection: DatabaseConnection,
    session: Session,
    request: DatabaseRequest,
    export: Export,
) -> Target:
    """The table that the request names, as it is now, or as it is to be made. Raises
    `BadSinkRequest` and `psycopg.Error`."""
    wanted = parse_table(request.table)
    found = find(session, wanted)
    elsewhere = found is not None and connection.schemas and not wanted.schema
    if found is None or (elsewhere and found.schema not in connection.schemas):
        # Whoever may not write to a schema is not told either what is in it.
        return _to_be_made(connection, session, request, wanted, export)
    allow(connection, TableName(found.schema, found.name))
    if found.kind not in _TABLE_KINDS:
        raise BadSinkRequest("table", f"{wanted} is no table")
    columns = tuple(
        Column(
            row.number,
            row.name,
            PgType(row.type, row.shown, row.typmod, row.is_enum),
            row.required,
            row.generated,
            row.may_insert,
            row.may_update,
            row.may_select,
        )
        for row in session.execute(_COLUMNS, {"oid": found.oid})
    )
    unique = tuple(
        sorted(
            (frozenset(row.keys) for row in session.execute(_UNIQUE, {"oid": found.oid})),
            key=sorted,
        )
    )
    straight = one(session, _STRAIGHT, {"oid": found.oid})
    return Target(
        found.oid,
        found.schema,
        found.name,
        columns,
        unique,
        straight is not None and straight.it,
    )


def _to_be_made(
    connection: DatabaseConnection,
    session: Session,
    request: DatabaseRequest,
    wanted: TableName,
    export: Export,
) -> Target:
    if not request.create_table:
        raise BadSinkRequest(
            "table",
            f"there is no table {wanted} that this connection sees; set create_table "
            "to have it made",
        )
    rights = one(session, RIGHTS)
    schema = wanted.schema or rights.schema
    if not schema:
        raise BadSinkRequest("table", "name its schema: the connection has no own one")
    allow(connection, TableName(schema, wanted.name))
    if not may_create(session, schema):
        raise BadSinkRequest(
            "create_table",
            f"there is no schema {schema!r}, or the connection's role may not make "
            "tables in it",
        )
    for name in (wanted.name, *(column.name for column in export.columns)):
        if not name or "\0" in name or len(name.encode()) > _LONGEST_NAME:
            raise BadSinkRequest(
                "create_table",
                f"{name!r} cannot be a name: those have 1 to {_LONGEST_NAME} bytes",
            )
    columns = tuple(
        Column(number, column.name, own_type(column.type))
        for number, column in enumerate(export.columns, 1)
    )
    return Target(0, schema, wanted.name, columns)


def _require_rights(session: Session, request: DatabaseRequest, plan: Plan) -> None:
    target = plan.target
    lacking = []
    # To lock the table takes one of these on the whole of it.
    locks = _has(session, target, "INSERT, UPDATE, DELETE, TRUNCATE")
    if not locks or not all(column.may_insert for column in plan.columns):
        lacking.append("INSERT")
    if request.mode == "REPLACE" and not _has(session, target, "DELETE"):
        lacking.append("DELETE")
    if request.mode == "MERGE":
        keys = [plan.columns[index] for index in plan.keys]
        if not all(column.may_update for column in plan.columns if column not in keys):
            lacking.append("UPDATE")
        # What is there is compared by its keys, and the new values count as read as well.
        if not all(column.may_select for column in plan.columns):
            lacking.append("SELECT")
    if lacking:
        raise BadSinkRequest(
            "table",
            f"the connection's role lacks {' and '.join(lacking)} on {target}",
        )


def _has(session: Session, target: Target, rights: str) -> bool:
    """Whether the role has one of the rights on the whole table."""
    found = one(
        session,
        "SELECT pg_catalog.has_table_privilege(%(oid)s::int8::oid, %(rights)s::text) AS it",
        {"oid": target.oid, "rights": rights},
    )
    return bool(found.it)


def _require_unique(request: DatabaseRequest, plan: Plan) -> None:
    if request.mode != "MERGE":
        return
    wanted = frozenset(plan.columns[index].number for index in plan.keys)
    if wanted not in plan.target.unique:
        raise BadSinkRequest(
            "key_columns",
            f"{plan.target} has no unique constraint on exactly "
            f"{', '.join(request.key_columns)}, which MERGE needs",
        )


def find(session: Session, table: TableName) -> Any:
    """The row of `_FIND` for a table, None when there is none."""
    return session.execute(_FIND, {"schema": table.schema, "name": table.name}).fetchone()


def may_create(session: Session, schema: str) -> bool:
    """Whether tables may be made in a schema, which there may not be."""
    return (
        session.execute(
            "SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname::text = %s "
            "AND pg_catalog.has_schema_privilege(oid, 'CREATE')",
            (schema,),
        ).fetchone()
        is not None
    )


def one(session: Session, statement: LiteralString, parameters: Any = None) -> Any:
    """The first row."""
    return session.execute(statement, parameters).fetchone()
