"""The catalogue: which datasets there are, and where their rows come from.

Read once, at start, from a TOML file that docs/catalogue.md describes. Every mistake in
it ends as one line that names the file, the key and the mend.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from sqlglot import exp

from exportd_server.errors import ConfigurationError, SourceFailed
from exportd_server.platform.urls import BadUrl, parse_postgres_url
from exportd_server.sources import query as sql
from exportd_server.sources.adbc import AdbcSource, Vendor
from exportd_server.sources.base import (
    BatchStream,
    Column,
    ColumnKind,
    Filter,
    FilterOperator,
    Plan,
    Query,
    Scalar,
    Shard,
    Source,
)
from exportd_server.sources.duckdb import FileSource
from exportd_server.sources.file_sql import FileFormat
from exportd_server.sources.literals import coerce
from exportd_server.sources.masks import MASKED_KINDS, Mask, Masks
from exportd_server.sources.postgres import Postgres
from exportd_server.sources.postgres_shards import KEY_KINDS
from exportd_server.sources.sqlite import Sqlite
from exportd_server.sources.types import parse_type

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_PART = r'(?:"(?:[^"]|"")+"|[^".\s]+)'
_TABLE = re.compile(rf"{_PART}(?:\.{_PART}){{0,2}}")
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_WHOLE = re.compile(r"0|[1-9][0-9]*")
_KEY_LENGTH = 32
"""Fewest characters of a key: 128 bits, written in hexadecimal."""
_FILE_FORMATS: tuple[FileFormat, ...] = ("parquet", "csv", "json")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset as callers may see it. Caps of None are the server's defaults. One that
    is not exportable has no columns, and its source refuses to be read.

    It serves `tenants`, None: all. Where there is a `tenant_column`, which callers need
    not see, each of them has the rows in which it holds the tenant's name.
    """

    name: str
    columns: tuple[Column, ...]
    source: Source
    description: str = ""
    exportable: bool = True
    target_column: str | None = None
    network_column: str | None = None
    time_column: str | None = None
    max_rows: int | None = None
    max_bytes: int | None = None
    tenants: frozenset[str] | None = None
    tenant_column: Column | None = None

    def serves(self, tenant: str) -> bool:
        """Whether it is there for a tenant at all. One whose column is of numbers is
        not for a tenant whose name is none."""
        if self.tenants is not None and tenant not in self.tenants:
            return False
        return self.tenant_column is None or _tenant_value(self.tenant_column, tenant) != ()

    def conditions(self, tenant: str) -> tuple[Filter, ...]:
        """What holds for the rows of a tenant that it serves; raises `ValueError` for
        another one."""
        if not self.serves(tenant):
            raise ValueError(f"dataset {self.name} does not serve {tenant}")
        column = self.tenant_column
        if column is None:
            return ()
        values = _tenant_value(column, tenant)
        return (Filter(column.name, FilterOperator.EQUAL, values),)

    @property
    def counted(self) -> bool:
        """Whether callers may be told estimates of rows. Those come from statistics of
        everybody's rows: their number, and by filters what stands in them."""
        return self.tenant_column is None

    def told(self, estimated_rows: int | None) -> int | None:
        """An estimate as callers may see it."""
        return estimated_rows if self.counted else None


def _tenant_value(column: Column, tenant: str) -> tuple[Scalar, ...]:
    """A tenant's name as a value of the column; nothing where it is none. A number has
    one name only: 7 is not 07."""
    if column.kind is not ColumnKind.INTEGER:
        return (coerce(column, "string", tenant),)
    if not _WHOLE.fullmatch(tenant):
        return ()
    try:
        return (coerce(column, "int", tenant),)
    except ValueError:
        return ()


class Catalogue:
    """All datasets, by name."""

    def __init__(self, datasets: Mapping[str, Dataset]) -> None:
        self._datasets = dict(datasets)

    def get(self, name: str) -> Dataset | None:
        """The dataset of that name, whomever it serves; None when there is none."""
        return self._datasets.get(name)

    def names(self) -> list[str]:
        """The names of all datasets, sorted."""
        return sorted(self._datasets)

    def find(self, name: str, tenant: str) -> Dataset | None:
        """A tenant's dataset of that name; None when there is none, or when it does not
        serve the tenant: nobody is told which."""
        dataset = self._datasets.get(name)
        return dataset if dataset is not None and dataset.serves(tenant) else None

    def names_for(self, tenant: str) -> list[str]:
        """The names of the datasets that serve a tenant, sorted."""
        return [name for name in self.names() if self._datasets[name].serves(tenant)]

    def close(self) -> None:
        """Free what is held. Sources open a connection for each stream and keep none."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1)]


_M = TypeVar("_M", bound=_Model)


class _Connection(_Model):
    url: _Text
    statement_timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    driver: _Text | None = None


class _Column(_Model):
    description: str = ""
    type: _Text | None = None
    filterable: bool = True


class _Dataset(_Model):
    description: str = ""
    exportable: bool = True
    parquet: _Text | None = None
    csv: _Text | None = None
    json_: _Text | None = Field(default=None, alias="json")
    csv_delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    connection: _Text | None = None
    table: _Text | None = None
    query: _Text | None = None
    columns: list[_Text] | None = None
    hidden: list[_Text] = []
    column: dict[str, _Column] = {}
    target_column: _Text | None = None
    network_column: _Text | None = None
    time_column: _Text | None = None
    partition_key: _Text | None = None
    tenants: list[_Text] | None = None
    tenant_column: _Text | None = None
    mask: dict[str, Literal["null", "hash", "last4"]] = {}
    mask_key: _Text | None = None
    max_rows: _Count | None = None
    max_bytes: _Count | None = None


class _File(_Model):
    """The top level. Its tables are read each for itself."""

    mask_key: _Text | None = None
    connections: dict[str, object] = {}
    datasets: dict[str, object] = {}


class BadConnection(ConfigurationError):
    """A connection that cannot be used, whatever dataset names it."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class CatalogueParts:
    """What is wrong at the top of a catalogue, and what opens each connection and each
    dataset for itself, as `load_catalogue` opens all of them: each call blocks and raises
    `ConfigurationError`, which is a `BadConnection` where it is the connection's."""

    wrong: tuple[str, ...]
    connections: Mapping[str, Callable[[], object]]
    datasets: Mapping[str, Callable[[], Dataset]]


def load_catalogue(path: Path) -> Catalogue:
    """Read the catalogue and ask every exportable dataset for its columns.

    Blocks for as long as the databases take to answer. Raises `ConfigurationError`.
    """
    return _Loader(path).load()


def catalogue_parts(path: Path) -> CatalogueParts:
    """The catalogue, to be tried part by part. Raises `ConfigurationError` when the file
    is none."""
    return _Loader(path).parts()


class _Unread:
    """The source of a dataset that is not exportable: nobody asks for its rows."""

    def columns(self) -> tuple[Column, ...]:
        return ()

    def count(self) -> int | None:
        return None

    def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
        del query, shard_rows
        raise SourceFailed("the dataset is not exportable")

    def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> BatchStream:
        del query, shard, skip_rows
        raise SourceFailed("the dataset is not exportable")


class _Loader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._directory = path.resolve().parent
        self._file = _File()
        self._broken: set[str] = set()
        """Keys at the top that are wrong, and left out."""

    def load(self) -> Catalogue:
        self._file, wrong = self._read()
        for text in wrong:
            raise ConfigurationError(text)
        # Whatever can be said without asking a database comes first.
        for name in self._file.connections:
            self._connection(name)
        entries = {name: self._entry(name) for name in self._file.datasets}
        for name in self._file.connections:
            self._vendor(name)
        if not entries:
            raise ConfigurationError(self._empty())
        return Catalogue({name: self._dataset(name, e) for name, e in entries.items()})

    def parts(self) -> CatalogueParts:
        self._file, wrong = self._read()
        # A table that is wrong may be what was meant.
        if not self._file.datasets and self._broken <= {"mask_key", "connections"}:
            wrong.append(self._empty())
        return CatalogueParts(
            tuple(wrong),
            {name: partial(self._vendor, name) for name in self._file.connections},
            {name: partial(self._opened, name) for name in self._file.datasets},
        )

    def _fail(self, key: str, problem: str, cause: BaseException | None = None) -> NoReturn:
        raise ConfigurationError(self._line(key, problem)) from cause

    def _line(self, key: str, problem: str) -> str:
        where = f"{self._path}: {key}" if key else str(self._path)
        return f"{where}: {problem}".replace("\n", " ").replace("\r", " ")

    def _read(self) -> tuple[_File, list[str]]:
        """The top level without what is wrong with it, and that."""
        document = self._document()
        wrong: list[str] = []
        try:
            file = _File.model_validate(document)
        except ValidationError as error:
            wrong += [self._line("", text) for text in _told((), _File, error)]
            self._broken = {str(each["loc"][0]) for each in error.errors()}
            right = {k: v for k, v in document.items() if k not in self._broken}
            file = _File.model_validate(right)
        return file, wrong

    def _empty(self) -> str:
        return self._line("datasets", "is empty; add a [datasets.NAME] table")

    def _document(self) -> dict[str, object]:
        try:
            return tomllib.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            self._fail("", "there is no such file", error)
        except OSError as error:
            self._fail("", f"cannot be read: {error.strerror}", error)
        except UnicodeDecodeError as error:
            self._fail("", "is not UTF-8; save it as UTF-8", error)
        except tomllib.TOMLDecodeError as error:
            self._fail("", f"is not TOML: {error}", error)

    def _connection(self, name: str) -> _Connection:
        where = ("connections", name)
        return self._parsed(where, _Connection, self._file.connections[name])

    def _entry(self, name: str) -> _Dataset:
        return self._parsed(("datasets", name), _Dataset, self._file.datasets[name])

    def _parsed(self, where: tuple[str, str], model: type[_M], value: object) -> _M:
        """A table of the file; everything that is wrong with it is told."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            self._fail("", "; ".join(_told(where, model, error)), error)

    def _opened(self, name: str) -> Dataset:
        return self._dataset(name, self._entry(name))

    def _dataset(self, name: str, entry: _Dataset) -> Dataset:
        key = f"datasets.{name}"
        if not _NAME.fullmatch(name):
            self._fail(
                key,
                "a dataset's name is up to 63 of a-z, 0-9 and _, beginning with a letter",
            )
        self._check_origin(key, entry)
        tenants = self._tenants(key, entry)
        if not entry.exportable:
            return Dataset(
                name,
                (),
                _Unread(),
                description=entry.description,
                exportable=False,
                tenants=tenants,
            )
        types = self._types(key, entry)
        try:
            source = self._source(key, entry, types)
        except SourceFailed as error:
            self._fail(key, self._why(entry, error), error)
        self._check_partition_key(key, entry, source)
        tenant_column = self._tenant_column(key, entry, source)
        source = source.masked(self._masks(key, entry, source))
        columns = self._columns(key, entry, source)
        by_name = {column.name: column for column in columns}
        return Dataset(
            name=name,
            columns=columns,
            source=source,
            description=entry.description,
            target_column=self._role(
                key, "target_column", entry.target_column, by_name, _COMPARED
            ),
            network_column=self._role(
                key, "network_column", entry.network_column, by_name, _COMPARED
            ),
            time_column=self._role(
                key, "time_column", entry.time_column, by_name, (ColumnKind.TIMESTAMP,)
            ),
            max_rows=entry.max_rows,
            max_bytes=entry.max_bytes,
            tenants=tenants,
            tenant_column=tenant_column,
        )

    def _tenants(self, key: str, entry: _Dataset) -> frozenset[str] | None:
        names = entry.tenants
        if names is None:
            return None
        where = f"{key}.tenants"
        if not names:
            self._fail(where, "names nobody; name a tenant, or leave it out for everybody")
        for name in names:
            if not _TENANT.fullmatch(name):
                self._fail(
                    where,
                    f"no tenant is called {name!r}: a name is up to 63 of a-z, 0-9, _ "
                    "and -, beginning with a letter or a digit",
                )
            if names.count(name) > 1:
                self._fail(where, f"{name!r} is named twice")
        return frozenset(names)

    def _tenant_column(self, key: str, entry: _Dataset, source: Source) -> Column | None:
        """It may be a hidden column: callers do not see it."""
        name = entry.tenant_column
        if name is None:
            return None
        where = f"{key}.tenant_column"
        found = {column.name: column for column in source.columns()}
        if name not in found:
            self._fail(where, f"there is no column {name!r}" + _suggest(name, found))
        column = found[name]
        if column.kind not in _COMPARED:
            self._fail(where, _wrong_kind(key, column, _COMPARED))
        return column

    def _masks(self, key: str, entry: _Dataset, source: Source) -> Masks:
        found = {column.name: column for column in source.columns()}
        kinds: dict[str, Mask] = {}
        for name, written in entry.mask.items():
            where = f"{key}.mask.{name}"
            kinds[name] = mask = Mask(written)
            if name not in found:
                self._fail(where, f"there is no column {name!r}" + _suggest(name, found))
            for role in (
                "tenant_column",
                "target_column",
                "network_column",
                "time_column",
                "partition_key",
            ):
                if getattr(entry, role) == name:
                    self._fail(where, f"{name!r} is the {role}, which cannot be masked")
            if name in entry.hidden or name not in (entry.columns or found):
                self._fail(where, f"{name!r} is not shown at all; leave out its mask")
            if mask is not Mask.NULL and found[name].kind not in MASKED_KINDS:
                self._fail(where, _wrong_kind(key, found[name], MASKED_KINDS))
        return Masks(kinds, self._mask_key(key, entry))

    def _mask_key(self, key: str, entry: _Dataset) -> str:
        hashed = sorted(
            name for name, mask in entry.mask.items() if Mask(mask) is Mask.HASH
        )
        if not hashed:
            if entry.mask_key is not None:
                self._fail(
                    f"{key}.mask_key", 'goes with the mask "hash" only; leave it out'
                )
            return ""
        where, text = f"{key}.mask_key", entry.mask_key
        if text is None:
            where, text = "mask_key", self._file.mask_key
        if text is None and "mask_key" in self._broken:
            self._fail(where, "is wrong; mend it first")
        if text is None:
            self._fail(
                f"{key}.mask.{hashed[0]}",
                "hash needs a secret key, without which values can be guessed; set "
                f'{key}.mask_key, or mask_key at the top of the file, to "${{VARIABLE}}"',
            )
        secret = self._expand(where, text)
        if len(secret) < _KEY_LENGTH:
            self._fail(
                where,
                f"must have at least {_KEY_LENGTH} characters; "
                "openssl rand -hex 32 makes a good one",
            )
        return secret

    def _check_origin(self, key: str, entry: _Dataset) -> None:
        given = [name for name, value in _origins(entry).items() if value is not None]
        if len(given) != 1:
            found = f"has {' and '.join(given)}" if given else "has none of them"
            self._fail(
                key, f"needs exactly one of {', '.join(_origins(entry))}; it {found}"
            )
        if entry.csv_delimiter is not None and entry.csv is None:
            self._fail(f"{key}.csv_delimiter", "goes with csv only; leave it out")
        if given[0] in _FILE_FORMATS:
            if entry.connection is not None:
                self._fail(
                    f"{key}.connection", f"does not go with {given[0]}; leave it out"
                )
        elif entry.connection is None:
            self._fail(
                key, f"{given[0]} needs connection, the name of a [connections.NAME]"
            )
        elif "connections" in self._broken:
            self._fail("connections", "is wrong; mend it first")
        elif entry.connection not in self._file.connections:
            self._fail(
                f"{key}.connection",
                f"there is no [connections.{entry.connection}]"
                + _suggest(entry.connection, self._file.connections),
            )
        if entry.partition_key is not None and (
            entry.connection is None
            or self._vendor(entry.connection).driver != Postgres.driver
        ):
            self._fail(
                f"{key}.partition_key",
                "goes with a postgresql:// connection only; leave it out",
            )

    def _check_partition_key(self, key: str, entry: _Dataset, source: Source) -> None:
        """It may be a hidden column: callers do not see it."""
        name = entry.partition_key
        if name is None:
            return
        where = f"{key}.partition_key"
        found = {column.name: column for column in source.columns()}
        if name not in found:
            self._fail(where, f"there is no column {name!r}" + _suggest(name, found))
        if found[name].kind not in KEY_KINDS:
            self._fail(where, _wrong_kind(key, found[name], KEY_KINDS))

    def _types(self, key: str, entry: _Dataset) -> dict[str, pa.DataType]:
        types = {}
        for name, column in entry.column.items():
            if column.type is not None:
                try:
                    types[name] = parse_type(column.type)
                except ValueError as error:
                    self._fail(f"{key}.column.{name}.type", f"{column.type!r} {error}")
        return types

    def _source(
        self, key: str, entry: _Dataset, types: Mapping[str, pa.DataType]
    ) -> AdbcSource | FileSource:
        for file_format in _FILE_FORMATS:
            pattern = _origins(entry)[file_format]
            if pattern is not None:
                return self._files(
                    f"{key}.{file_format}",
                    file_format,
                    pattern,
                    types,
                    entry.csv_delimiter or ",",
                )
        vendor = self._vendor(entry.connection or "")
        relation = self._relation(key, vendor, entry)
        return AdbcSource(vendor, relation, types, partition_key=entry.partition_key)

    def _relation(self, key: str, vendor: Vendor, entry: _Dataset) -> exp.Expr:
        if entry.table is not None:
            return self._table(key, vendor, entry.table)
        # A line of its own, so that a comment at its end does not swallow the bracket.
        text = (entry.query or "").strip().rstrip(";").rstrip()
        alias = exp.TableAlias(this=exp.to_identifier("t", quoted=True))
        return exp.Subquery(this=sql.raw(f"\n{text}\n"), alias=alias)

    def _files(
        self,
        key: str,
        file_format: FileFormat,
        pattern: str,
        types: Mapping[str, pa.DataType],
        delimiter: str,
    ) -> FileSource:
        absolute = str(self._directory / Path(pattern).expanduser())
        try:
            return FileSource(file_format, absolute, types, delimiter=delimiter)
        except FileNotFoundError:
            self._fail(key, f"no file matches {absolute}")

    def _table(self, key: str, vendor: Vendor, text: str) -> exp.Table:
        parts = re.findall(_PART, text) if _TABLE.fullmatch(text) else []
        most = 1 if vendor.driver == "sqlite" else 2
        if not 1 <= len(parts) <= most:
            wanted = "NAME" if most == 1 else "NAME or SCHEMA.NAME"
            self._fail(
                f"{key}.table",
                f"{text!r} is no table name; write {wanted}, parts with dots in "
                "double quotes",
            )
        names = [
            part[1:-1].replace('""', '"') if part[0] == '"' else part for part in parts
        ]
        identifiers = [exp.to_identifier(name, quoted=True) for name in names]
        return exp.Table(
            this=identifiers[-1], db=identifiers[0] if len(identifiers) > 1 else None
        )

    def _vendor(self, name: str) -> Vendor:
        try:
            return self._open(name, self._connection(name))
        except ConfigurationError as error:
            raise BadConnection(name, str(error)) from error

    def _open(self, name: str, connection: _Connection) -> Vendor:
        key = f"connections.{name}"
        url = self._expand(f"{key}.url", connection.url)
        scheme = url.partition(":")[0].lower()
        if scheme in ("postgresql", "postgres"):
            try:
                parse_postgres_url(url)
            except BadUrl as error:
                self._fail(f"{key}.url", f"is no URL of PostgreSQL: it {error}")
            return Postgres(
                url,
                timeout_seconds=connection.statement_timeout_seconds,
                library=self._library(key, connection),
            )
        if scheme != "sqlite" or not url.startswith("sqlite:///"):
            self._fail(
                f"{key}.url",
                "must begin with postgresql:// or sqlite:/// (a path relative to this "
                "file; sqlite:////path for an absolute one)",
            )
        if connection.statement_timeout_seconds is not None:
            self._fail(f"{key}.statement_timeout_seconds", "applies to postgresql:// only")
        if connection.driver is not None:
            self._fail(f"{key}.driver", "applies to postgresql:// only")
        file = self._directory / unquote(url.removeprefix("sqlite:///"))
        if not file.is_file():
            self._fail(f"{key}.url", f"there is no file {file}")
        return Sqlite(file)

    def _library(self, key: str, connection: _Connection) -> str | None:
        if connection.driver is None:
            return None
        file = self._directory / connection.driver
        if not file.is_file():
            self._fail(
                f"{key}.driver",
                f"there is no file {file}; name the shared library of an ADBC driver for "
                "PostgreSQL",
            )
        return str(file)

    def _expand(self, key: str, text: str) -> str:
        def value(found: re.Match[str]) -> str:
            name = found[1]
            if name not in os.environ:
                self._fail(key, f"environment variable {name} is not set")
            return os.environ[name]

        return _VARIABLE.sub(value, text)

    def _why(self, entry: _Dataset, error: SourceFailed) -> str:
        """What the source says, for the operator; nothing that has a piece of the
        connection's password in it."""
        text = str(error.__cause__ or error).strip().partition("\n")[0]
        if entry.connection is None:
            return f"its files cannot be read: {text}"
        url = self._expand("", self._connection(entry.connection).url)
        if not url.startswith("sqlite:"):
            text = parse_postgres_url(url).said(text)
        return f"connection {entry.connection!r} cannot read it: {text}"

    def _columns(self, key: str, entry: _Dataset, source: Source) -> tuple[Column, ...]:
        found = {column.name: column for column in source.columns()}
        for where, names in (
            ("columns", entry.columns or ()),
            ("hidden", entry.hidden),
            ("column", entry.column),
        ):
            seen: set[str] = set()
            for name in names:
                if name not in found:
                    self._fail(
                        f"{key}.{where}",
                        f"there is no column {name!r}" + _suggest(name, found),
                    )
                if name in seen:
                    self._fail(f"{key}.{where}", f"{name!r} is named twice")
                seen.add(name)
        shown = [n for n in (entry.columns or found) if n not in entry.hidden]
        if not shown:
            self._fail(key, "shows no column; show at least one")
        settings = {name: entry.column.get(name, _Column()) for name in shown}
        return tuple(
            replace(
                found[name],
                description=settings[name].description,
                filterable=found[name].filterable and settings[name].filterable,
            )
            for name in shown
        )

    def _role(
        self,
        key: str,
        role: str,
        name: str | None,
        columns: Mapping[str, Column],
        kinds: tuple[ColumnKind, ...],
    ) -> str | None:
        if name is None:
            return None
        column = columns.get(name)
        if column is None:
            self._fail(
                f"{key}.{role}",
                f"the dataset shows no column {name!r}" + _suggest(name, columns),
            )
        if column.kind not in kinds:
            self._fail(f"{key}.{role}", _wrong_kind(key, column, kinds))
        if not column.filterable:
            self._fail(f"{key}.{role}", f"{name!r} must be filterable")
        return name


_COMPARED = (ColumnKind.STRING, ColumnKind.INTEGER)


def _wrong_kind(key: str, column: Column, kinds: Iterable[ColumnKind]) -> str:
    return (
        f"{column.name!r} is {column.type}, and must be {' or '.join(kinds)}; set its "
        f"type in [{key}.column.{column.name}] or choose another column"
    )


def _origins(entry: _Dataset) -> dict[str, str | None]:
    return {
        "parquet": entry.parquet,
        "csv": entry.csv,
        "json": entry.json_,
        "table": entry.table,
        "query": entry.query,
    }


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(sorted(known))}" if known else ""


def _told(where: tuple[str, ...], model: type[_Model], error: ValidationError) -> list[str]:
    """Each mistake in a table, in the operator's words: its key and what is wrong."""
    found = []
    for each in error.errors():
        # Of a dataset only the tables of its columns are tables themselves.
        inner = _Column if len(each["loc"]) > 1 else model
        key = ".".join(map(str, (*where, *each["loc"])))
        found.append(f"{key}: {_problem(inner, each)}")
    return found


def _problem(model: type[_Model], error: ErrorDetails) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        names = [field.alias or name for name, field in model.model_fields.items()]
        return "unknown key" + _suggest(str(error["loc"][-1]), names)
    if kind == "missing":
        return "is missing; add it"
    return error["msg"].replace("Input should be", "must be", 1)
