"""What PostgreSQL's errors mean for a delivery, in words that tell no host, no password
and no value of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import psycopg

from exportd_server.errors import DeliveryFailed

# The server tells its reasons to refuse a connection as text alone.
_REFUSED = (
    (re.compile(r"authentication failed|no password supplied"), "credentials are refused"),
    (
        re.compile(r'FATAL:\s+role ".*" (does not exist|is not permitted)'),
        "role is refused",
    ),
    (re.compile(r'FATAL:\s+database ".*" does not exist'), "database does not exist"),
    (
        re.compile(r"no pg_hba\.conf entry|permission denied for database"),
        "role is refused",
    ),
    (re.compile(r"certificate|does not support SSL"), "encryption cannot be agreed on"),
)
_PASSING = {
    "55P03": "another one held a lock on the table for too long",
    "40P01": "it came into a deadlock with another writer",
    "57014": "a statement took longer than the connection's statement_timeout",
    "25P03": "it was idle in its transaction for too long",
    "25006": "the database takes no writes now",
    "53100": "the database has no disk space left",
    "53200": "the database has no memory left",
    "53300": "the database has no connections left",
}
_PASSING_CLASSES = {
    "08": "the connection broke",
    "40": "another writer was in its way",
    "53": "the database lacks resources",
    "57": "the database ended the session",
    "58": "the database has an error of its system",
    "XX": "the database has an internal error",
}
_REASONS = {
    "22001": "a text is too long",
    "22003": "a number is out of range",
    "22008": "a date or time is out of range",
    "22009": "a date or time is out of range",
    "22015": "a duration is out of range",
    "22021": "a text holds what the database cannot store, such as a NUL character",
    "22P05": "a text holds what the database's encoding cannot store",
    "21000": "several rows of the export meet the same row of the table",
    "42501": "the connection's role lacks a right",
    "42P01": "a table does not exist",
    "42703": "a column does not exist",
    "42P10": "the table has no unique constraint on exactly the key columns",
    "23502": "the table needs a value where the export has none",
    "23503": "a row refers to one that is not there",
    "23505": "a row is there already",
    "23514": "a row breaks a rule of the table",
    "23P01": "a row excludes one that is there",
    "P0001": "a trigger of the table refuses a row",
    "44000": "a row breaks the rule of a view",
}
_CLASSES = {
    "22": "a value does not fit the type of its column",
    "23": "a row breaks a constraint of the table",
    "42": "the table cannot be written to so",
}


def unreachable(error: psycopg.Error) -> DeliveryFailed:
    """Why there is no connection."""
    for pattern, why in _REFUSED:
        if pattern.search(str(error)):
            return DeliveryFailed(
                f"the database cannot be used: {why}; the operator has to mend the "
                "connection",
                retryable=False,
            )
    return DeliveryFailed("the database cannot be reached", retryable=True)


@dataclass(frozen=True, slots=True)
class Copied:
    """What a COPY goes into, by which the server tells where it failed: a relation, and
    for each of its columns that is filled the target's name and type."""

    relation: str
    columns: Mapping[str, tuple[str, str]]


def failure(error: psycopg.Error, copied: Copied | None = None) -> DeliveryFailed:
    """Why a statement failed."""
    state = error.sqlstate
    if state is None:
        if isinstance(error, psycopg.OperationalError):
            return DeliveryFailed("the connection to the database broke", retryable=True)
        return DeliveryFailed("the database's driver failed", retryable=True)
    passing = _PASSING.get(state) or _PASSING_CLASSES.get(state[:2])
    if passing:
        return DeliveryFailed(f"{passing} (SQLSTATE {state})", retryable=True)
    reason = _REASONS.get(state) or _CLASSES.get(state[:2]) or "the database refuses it"
    where = _where(error.diag, copied)
    return DeliveryFailed(f"{where}{reason} (SQLSTATE {state})", retryable=False)


def _where(diag: psycopg.errors.Diagnostic, copied: Copied | None) -> str:
    if diag.constraint_name:
        return f"constraint {diag.constraint_name!r}: "
    if copied is not None and (found := _column(diag.context or "", copied)):
        name, kind = found
        return f"column {name!r} of type {kind}: "
    if diag.column_name:
        return f"column {diag.column_name!r}: "
    return ""


def _column(context: str, copied: Copied) -> tuple[str, str] | None:
    # Above it may stand what a type has to say of the value.
    begin = rf"^COPY {re.escape(copied.relation)}, line \d+, column "
    place = re.search(begin, context, re.MULTILINE)
    if place is None:
        return None
    rest = context[place.end() :]
    # After the name, a colon and the value; a name may have a colon in it as well.
    named = [name for name in copied.columns if f"{rest}:".startswith(f"{name}:")]
    return copied.columns[max(named, key=len)] if named else None
