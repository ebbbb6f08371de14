"""Databases reached through ADBC drivers: the one file of the sink that knows ADBC.

A driver is a library inside this process. Sessions of one driver with one set of options
share one database handle: of two that open the same file, neither would see the locks of
the other.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import adbc_driver_manager
import pyarrow as pa
from adbc_driver_manager import (
    AdbcConnection,
    AdbcDatabase,
    AdbcStatement,
    AdbcStatusCode,
    GetObjectsDepth,
    StatementOptions,
)
from sqlglot import exp

from exportd_server.errors import ConfigurationError, DeliveryFailed

_PACKAGE = re.compile(r"adbc_driver_[a-z0-9_]+")
_ENTRYPOINTS = {"adbc_driver_duckdb": "duckdb_adbc_init"}
"""Of packages whose library has another than the driver manager looks for."""
_MANAGER = "[Driver Manager]"
"""In errors of the driver manager, which found no driver to ask."""
_TABLE = StatementOptions.INGEST_TARGET_TABLE.value
_SCHEMA = StatementOptions.INGEST_TARGET_DB_SCHEMA.value
_MODE = StatementOptions.INGEST_MODE.value
_TEMPORARY = StatementOptions.INGEST_TEMPORARY.value


@dataclass(frozen=True, slots=True)
class Fault:
    """What a driver said. The text may hold SQL and values, and is not passed on."""

    status: str
    """Name of the ADBC status; empty where a stream of results failed."""
    state: str
    """SQLSTATE, where the driver gives one."""
    text: str = field(repr=False)

    @classmethod
    def of(cls, error: Exception) -> Fault:
        """The fault that an error stands for."""
        if isinstance(error, adbc_driver_manager.Error):
            status = AdbcStatusCode(error.status_code).name
            return cls(status, error.sqlstate or "", str(error))
        return cls("", "", str(error))


Judge = Callable[[Fault], DeliveryFailed]


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver's library, and the options that make a database handle of it."""

    library: str
    options: tuple[tuple[str, str], ...] = field(repr=False)

    @classmethod
    def of(cls, name: str, options: Mapping[str, str]) -> Driver:
        """A driver by the name or path of its library, or by the name of an importable
        package `adbc_driver_*` that brings it along. Raises `ConfigurationError`."""
        library = name
        given = dict(options)
        if _PACKAGE.fullmatch(name) and importlib.util.find_spec(name) is not None:
            library = _library_of(name)
            if name in _ENTRYPOINTS:
                given.setdefault("entrypoint", _ENTRYPOINTS[name])
        return cls(library, tuple(sorted(given.items())))

    def load(self) -> None:
        """Load the library. Raises `ConfigurationError` when that is not possible; what
        is wrong with the database itself is left to whoever uses it."""
        try:
            with _database(self):
                pass
        except adbc_driver_manager.Error as error:
            text = str(error)
            if _MANAGER not in text:
                return
            if "dlsym" in text:
                raise ConfigurationError(
                    f"driver: {self.library!r} has no entry point of ADBC by the name that "
                    "is looked for; name it as options.entrypoint"
                ) from error
            raise ConfigurationError(
                f"driver: {self.library!r} cannot be loaded as an ADBC driver; give the "
                "path of its shared library, its name where the system's linker finds it, "
                "or an installed package adbc_driver_*"
            ) from error


def _library_of(package: str) -> str:
    try:
        module = importlib.import_module(package)
        find = getattr(module, "driver_path", None) or module._driver_path  # noqa: SLF001 - what the packages of the ADBC project call it
        return str(find())
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"driver: package {package!r} brings no ADBC driver along; give the path of "
            "a shared library"
        ) from error


class _Shared:
    """A database handle with its users."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.database: AdbcDatabase | None = None
        self.users = 0


_LOCK = threading.Lock()
_SHARED: dict[Driver, _Shared] = {}
"""As many as the operator has connections."""


@contextlib.contextmanager
def _database(driver: Driver) -> Iterator[AdbcDatabase]:
    """The handle that all share; it is closed when nobody uses it any more, so that other
    processes may have a file that the driver had locked."""
    with _LOCK:
        shared = _SHARED.setdefault(driver, _Shared())
    with shared.lock:
        if shared.database is None:
            shared.database = AdbcDatabase(driver=driver.library, **dict(driver.options))
        shared.users += 1
        database = shared.database
    try:
        yield database
    finally:
        with shared.lock:
            shared.users -= 1
            if not shared.users:
                shared.database = None
                database.close()


class Session:
    """One connection. In a `transaction`, what is not committed when it is left is
    undone; after an error it is good for nothing more. Raises `DeliveryFailed`."""

    def __init__(self, driver: Driver, judge: Judge, *, transaction: bool = False) -> None:
        self._judge = judge
        self._open = contextlib.ExitStack()
        try:
            with self._translated():
                database = self._open.enter_context(_database(driver))
                self._connection = AdbcConnection(database)
                self._open.callback(self._quietly, self._connection.close)
                if transaction:
                    self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        try:
            self._connection.set_autocommit(False)
        except adbc_driver_manager.NotSupportedError as error:
            raise DeliveryFailed(
                "the driver has no transactions, without which rows could be loaded in "
                "part or twice; use another driver",
                retryable=False,
            ) from error
        # Not every driver undoes what is open when its connection is closed.
        self._open.callback(self._quietly, self._connection.rollback)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Undo what was not committed, and let go of the database."""
        with contextlib.suppress(adbc_driver_manager.Error):
            self._open.close()

    @staticmethod
    def _quietly(end: Callable[[], object]) -> None:
        # It tells again what has failed before, or that there is nothing to undo.
        with contextlib.suppress(adbc_driver_manager.Error):
            end()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (adbc_driver_manager.Error, pa.ArrowException, OSError) as error:
            raise self._judge(Fault.of(error)) from error

    @contextlib.contextmanager
    def _statement(self) -> Iterator[AdbcStatement]:
        with self._translated(), AdbcStatement(self._connection) as statement:
            yield statement

    def run(self, text: str, *values: str | int) -> None:
        """Run a statement without a result."""
        with self._statement() as statement:
            _prepare(statement, text, values)
            statement.execute_update()

    def fetch(self, text: str, *values: str | int) -> list[dict[str, Any]]:
        """The rows of a small result."""
        with self._statement() as statement:
            _prepare(statement, text, values)
            stream, _ = statement.execute_query()
            with pa.RecordBatchReader.from_stream(stream) as reader:
                rows: list[dict[str, Any]] = reader.read_all().to_pylist()
            return rows

    def commit(self) -> None:
        """Make lasting what was done."""
        with self._translated():
            self._connection.commit()

    def can_ingest(self, table: str) -> None:
        """Raises `DeliveryFailed` when the driver is known to have no bulk ingest."""
        with self._statement() as statement, _ingesting():
            statement.set_options(**{_TABLE: table})

    def ingest(
        self,
        table: str,
        rows: pa.RecordBatch | pa.Table,
        *,
        schema: str = "",
        create: bool = False,
        temporary: bool = False,
    ) -> None:
        """Add rows to a table, by the order of the columns; to one that is made for them
        with `create`."""
        options = {
            _TABLE: table,
            _MODE: f"{_MODE}.{'create' if create else 'append'}",
        }
        if schema:
            options[_SCHEMA] = schema
        if temporary:
            options[_TEMPORARY] = "true"
        with self._statement() as statement, _ingesting():
            statement.set_options(**options)
            statement.bind_stream(
                pa.Table.from_batches([rows]).to_reader()
                if isinstance(rows, pa.RecordBatch)
                else rows.to_reader()
            )
            count = statement.execute_update()
        if count not in {-1, rows.num_rows}:
            raise DeliveryFailed(
                f"the driver took {count} of {rows.num_rows} rows", retryable=True
            )

    def schema(self, table: str, schema: str = "") -> pa.Schema | None:
        """The columns of a table; None where the driver says that there is none."""
        with self._translated():
            try:
                found = self._connection.get_table_schema(None, schema or None, table)
            except adbc_driver_manager.Error as error:
                if error.status_code == AdbcStatusCode.NOT_FOUND:
                    return None
                raise
            return pa.schema(found)

    def listed(self, table: str, schema: str = "") -> dict[str, str] | None:
        """Tables and views of about this name: their names, spelled as the database
        does, and their types. None where the driver cannot tell."""
        with self._translated():
            try:
                stream = self._connection.get_objects(
                    GetObjectsDepth.TABLES,
                    db_schema=schema or None,
                    table_name=_LIKE.sub("_", table),
                )
            except adbc_driver_manager.NotSupportedError:
                return None
            with pa.RecordBatchReader.from_stream(stream) as reader:
                catalogues = reader.read_all().to_pylist()
        return {
            each["table_name"]: each["table_type"] or ""
            for catalogue in catalogues
            for within in catalogue["catalog_db_schemas"] or ()
            for each in within["db_schema_tables"] or ()
            if not schema or within["db_schema_name"] == schema
        }


_LIKE = re.compile(r"[\\%]")
"""What patterns for names have a meaning for; `_` stands for any character."""


@contextlib.contextmanager
def _ingesting() -> Iterator[None]:
    try:
        yield
    except adbc_driver_manager.NotSupportedError as error:
        raise DeliveryFailed(
            "the driver has no bulk ingest of this kind, by which rows are loaded; use "
            "another driver",
            retryable=False,
        ) from error


def _prepare(statement: AdbcStatement, text: str, values: Sequence[str | int]) -> None:
    statement.set_sql_query(text)
    if values:
        statement.prepare()
        statement.bind(
            pa.record_batch(
                [pa.array([value]) for value in values],
                names=[f"p{position}" for position in range(len(values))],
            )
        )


def quoted(name: str) -> str:
    """A name as standard SQL has it."""
    return exp.to_identifier(name, quoted=True).sql("sqlite")


def told(rows: int, target: str) -> str:
    """The receipt."""
    return f"{rows} rows in {target}"
