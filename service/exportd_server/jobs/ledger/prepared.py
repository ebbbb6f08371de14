"""Statements that calls and workers run all the time.

The library takes many times as long to build, look up and prepare a statement, and to wrap
its rows, as the database takes to run it. So these are compiled once for each database, and
go to its driver as they are. The library knows nothing of them: whoever opens a transaction
sees to it that it is begun and committed.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection


@dataclass(slots=True)
class _Compiled:
    """A statement in a database's own words. `names` says which value goes where, None for
    one that takes them by name; `given` are the values that it brings along. `row` makes
    its rows, once it was run."""

    text: str
    names: Sequence[str] | None
    given: Mapping[str, Any]
    row: Callable[[Sequence[Any]], Any] | None = None

    def rows(self, cursor: Any) -> list[Any]:
        """The rows that a cursor has of it."""
        row = self.row
        if row is None:
            # Once: a driver may make objects of each column to tell.
            row = self.row = _row_of(cursor.description)
        return [] if row is _no_row else [*map(row, cursor.fetchall())]


def _row_of(description: Sequence[Sequence[Any]] | None) -> Callable[[Sequence[Any]], Any]:
    """What makes named tuples of a statement's rows; `_no_row` for one that has none."""
    if description is None:
        return _no_row
    names = [column[0] for column in description]
    row: Any = namedtuple("Row", names, rename=True)  # type: ignore[misc] # noqa: PYI024 - of the statement's columns
    make: Callable[[Sequence[Any]], Any] = row._make
    return make


def _no_row(row: Sequence[Any]) -> Any:
    raise AssertionError(f"a row of a statement that has none: {row!r}")


class Prepared:
    """A statement whose values are named by `sa.bindparam`, none of them expanding, and
    whose columns come as drivers give them. One that inserts or updates also sets the
    columns that its values name."""

    def __init__(self, statement: sa.Executable) -> None:
        self._statement = statement
        self._compiled: dict[tuple[str, ...], _Compiled] = {}

    def rows(self, connection: Connection, /, **values: Any) -> list[Any]:
        """Run it within the connection's transaction; its rows as named tuples. Raises as
        the library does."""
        dialect = connection.dialect
        compiled, parameters = self._bound(dialect, values)
        driver: Any = connection.connection.driver_connection
        try:
            return compiled.rows(driver.execute(compiled.text, parameters))
        except dialect.loaded_dbapi.Error as error:
            raise _wrapped(dialect, compiled.text, parameters, error) from error

    def first(self, connection: Connection, /, **values: Any) -> Any:
        """The first row; None when there is none."""
        rows = self.rows(connection, **values)
        return rows[0] if rows else None

    def scalar(self, connection: Connection, /, **values: Any) -> Any:
        """The first column of the first row; None when there is none."""
        rows = self.rows(connection, **values)
        return rows[0][0] if rows else None

    def _bound(
        self, dialect: sa.Dialect, values: Mapping[str, Any]
    ) -> tuple[_Compiled, Any]:
        """The statement in the database's words, and its parameters."""
        # The code of this project names the values, so there are few of these.
        which = (dialect.name, *values)
        compiled = self._compiled.get(which)
        if compiled is None:
            compiled = self._compiled[which] = self._compile(dialect, list(values))
        named = {**compiled.given, **values} if compiled.given else values
        if compiled.names is None:
            return compiled, named
        return compiled, tuple(named[name] for name in compiled.names)

    def _compile(self, dialect: sa.Dialect, names: list[str]) -> _Compiled:
        statement: Any = self._statement
        compiled = statement.compile(dialect=dialect, column_keys=names)
        # The others have to be given; to leave one out is an error.
        given = {
            name: value
            for name, value in compiled.params.items()
            if not compiled.binds[name].required
        }
        return _Compiled(str(compiled), compiled.positiontup, given)


Call = tuple[Prepared, Mapping[str, Any]]
"""A statement and its values."""


def run_all(connection: Connection, calls: Sequence[Call]) -> list[list[Any]]:
    """Run statements with their values, one after the other, and return the rows of each.
    To a server they go together, as one round trip (libpq's pipeline mode).
    The first that fails undoes the transaction, and is raised as the library does."""
    dialect = connection.dialect
    if len(calls) == 1 or dialect.name != "postgresql":
        return [statement.rows(connection, **values) for statement, values in calls]
    bound = [statement._bound(dialect, values) for statement, values in calls]  # noqa: SLF001 - the same module
    driver: Any = connection.connection.driver_connection
    try:
        with driver.pipeline():
            cursors = [
                driver.execute(compiled.text, parameters) for compiled, parameters in bound
            ]
        return [
            compiled.rows(cursor)
            for (compiled, _), cursor in zip(bound, cursors, strict=True)
        ]
    except dialect.loaded_dbapi.Error as error:
        texts = "; ".join(compiled.text for compiled, _ in bound)
        given = [parameters for _, parameters in bound]
        raise _wrapped(dialect, texts, given, error) from error


def _wrapped(
    dialect: sa.Dialect, text: str, parameters: Any, error: Exception
) -> BaseException:
    return sa.exc.DBAPIError.instance(
        text, parameters, error, dialect.loaded_dbapi.Error, dialect=dialect
    )
