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
        # The code of this project names the values, so there are few of these.
        which = (dialect.name, *values)
        compiled = self._compiled.get(which)
        if compiled is None:
            compiled = self._compiled[which] = self._compile(dialect, list(values))
        named = {**compiled.given, **values} if compiled.given else values
        parameters: Any = (
            named
            if compiled.names is None
            else tuple(named[name] for name in compiled.names)
        )
        driver: Any = connection.connection.driver_connection
        try:
            cursor = driver.execute(compiled.text, parameters)
            row = compiled.row
            if row is None:
                # Once: a driver may make objects of each column to tell.
                row = compiled.row = _row_of(cursor.description)
            return [] if row is _no_row else [*map(row, cursor.fetchall())]
        except dialect.loaded_dbapi.Error as error:
            raise sa.exc.DBAPIError.instance(
                compiled.text,
                parameters,
                error,
                dialect.loaded_dbapi.Error,
                dialect=dialect,
            ) from error

    def first(self, connection: Connection, /, **values: Any) -> Any:
        """The first row; None when there is none."""
        rows = self.rows(connection, **values)
        return rows[0] if rows else None

    def scalar(self, connection: Connection, /, **values: Any) -> Any:
        """The first column of the first row; None when there is none."""
        rows = self.rows(connection, **values)
        return rows[0][0] if rows else None

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
