"""The operator's connections: where sinks lead, with what credentials, and within what
limits. One TOML file, read once."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from exportd_server.errors import ConfigurationError
from exportd_server.sinks.base import Batching, Place, RetryPolicy, SinkDefaults
from exportd_server.sinks.registry import AnySinkType, SinkTypes
from exportd_server.store.key import is_tenant

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}\Z")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TENANT = "{tenant}"
_EVERYBODY = "*"
_SOMEBODY = "tenant"
"""Stands for those whom nobody knows yet when the file is read."""

_Seconds = Annotated[float, Field(gt=0, le=30 * 86_400)]
_Count = Annotated[int, Field(ge=1)]


def _tenants(value: object) -> object:
    if value == _EVERYBODY:
        return [_EVERYBODY]
    named = value if isinstance(value, list) else []
    if not named or not all(isinstance(one, str) and is_tenant(one) for one in named):
        raise ValueError(
            'must name tenants, as tenants = ["acme"], or everybody, as tenants = "*"'
        )
    return value


class _Limits(BaseModel):
    """What every connection may say, whatever its type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenants: Annotated[tuple[str, ...] | None, BeforeValidator(_tenants)] = None
    shared: bool = False
    concurrency: _Count | None = None
    queue_depth: _Count = 1000
    on_full: Literal["BLOCK", "DROP"] = "BLOCK"
    timeout_seconds: _Seconds | None = None
    max_attempts: _Count | None = None
    retry_base_seconds: _Seconds | None = None
    retry_cap_seconds: _Seconds | None = None
    disable_after_seconds: _Seconds | None = None
    batch_size: _Count | None = None
    batch_wait_seconds: Annotated[float, Field(ge=0, le=60)] | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The tenants that are named; none when it is for everybody."""
        return () if self.tenants in (None, (_EVERYBODY,)) else self.tenants or ()

    @property
    def several(self) -> bool:
        """Whether more than one tenant is to use it."""
        return self.tenants == (_EVERYBODY,) or len(set(self.named)) > 1


@dataclass(frozen=True, slots=True)
class SinkLimits:
    """Limits of a connection; `tenants` None: everybody may use it."""

    concurrency: int
    queue_depth: int
    on_full: str
    timeout: float
    retry: RetryPolicy
    disable_after: float | None
    batching: Batching | None = None
    tenants: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection; `settings` is its type's `connection_model`. With `shared` several
    tenants write to one place. Where each has a place of its own, `of_tenant` makes the
    settings of one, and those here are an example; it raises `ValidationError`."""

    name: str
    type: str
    settings: BaseModel
    limits: SinkLimits
    shared: bool = False
    of_tenant: Callable[[str], BaseModel] | None = None

    def settings_for(self, tenant: str) -> BaseModel:
        """The settings that hold for a tenant. Raises `ValidationError`."""
        return self.settings if self.of_tenant is None else self.of_tenant(tenant)


def default_limits(defaults: SinkDefaults) -> SinkLimits:
    """Limits where nobody said anything."""
    return _limits(defaults, _Limits())


def _limits(defaults: SinkDefaults, said: _Limits) -> SinkLimits:
    retry = defaults.retry
    paced = said.retry_base_seconds is not None or said.retry_cap_seconds is not None
    return SinkLimits(
        concurrency=said.concurrency or defaults.concurrency,
        queue_depth=said.queue_depth,
        on_full=said.on_full,
        timeout=said.timeout_seconds or defaults.timeout,
        retry=RetryPolicy(
            max_attempts=said.max_attempts or retry.max_attempts,
            base=said.retry_base_seconds or retry.base,
            cap=said.retry_cap_seconds or max(retry.cap, said.retry_base_seconds or 0),
            # Who says how to double does not want the schedule.
            schedule=() if paced else retry.schedule,
        ),
        disable_after=said.disable_after_seconds or defaults.disable_after,
        batching=_batching(defaults.batching, said),
        tenants=frozenset(said.named) or None,
    )


def _batching(default: Batching | None, said: _Limits) -> Batching | None:
    # Who cannot take several together is not made to by being told so.
    if default is None:
        return None
    wait = said.batch_wait_seconds
    return Batching(
        most=said.batch_size or default.most, wait=default.wait if wait is None else wait
    )


class Connections:
    """The connections, by name."""

    def __init__(self, connections: Mapping[str, Connection] | None = None) -> None:
        self._connections = dict(connections or {})

    def get(self, name: str) -> Connection | None:
        """A connection, if there is one of that name."""
        return self._connections.get(name)

    def all(self) -> list[Connection]:
        """Every one, by name."""
        return [self._connections[name] for name in sorted(self._connections)]

    def names_for(self, tenant: str, type_: str) -> list[str]:
        """Names of those of a type that a tenant may use."""
        return [
            each.name
            for each in self.all()
            if each.type == type_
            and (each.limits.tenants is None or tenant in each.limits.tenants)
        ]


def load_connections(
    path: Path, types: SinkTypes, *, identified: bool = False
) -> Connections:
    """Read the file; blocks. Where callers are `identified`, each connection must say
    whom it is for. Raises `ConfigurationError` in one line that names the file, the key
    and the mend."""
    return _Loader(path, types, identified=identified).load()


def survey_connections(
    path: Path, types: SinkTypes, *, identified: bool = False
) -> tuple[Connections, Sequence[tuple[str, str]]]:
    """Those that can be read, and what is wrong with each of the others and with keys that
    are not known, by name; blocks.
    Raises `ConfigurationError` when the file is none."""
    return _Loader(path, types, identified=identified).survey()


class _Loader:
    def __init__(self, path: Path, types: SinkTypes, *, identified: bool) -> None:
        self._path = path
        self._types = types
        self._identified = identified

    def load(self) -> Connections:
        tables, wrong = self._tables()
        for _, text in wrong:
            raise ConfigurationError(text)
        return Connections({name: self._connection(name, t) for name, t in tables.items()})

    def survey(self) -> tuple[Connections, Sequence[tuple[str, str]]]:
        tables, wrong = self._tables()
        good = dict[str, Connection]()
        for name, table in tables.items():
            try:
                good[name] = self._connection(name, table)
            except ConfigurationError as error:
                wrong.append((name, str(error)))
        return Connections(good), wrong

    def _tables(self) -> tuple[dict[str, object], list[tuple[str, str]]]:
        """The connections, and what is wrong with all else at the top."""
        try:
            with self._path.open("rb") as stream:
                found = tomllib.load(stream)
        except OSError as error:
            raise ConfigurationError(
                f"{self._path}: cannot be read ({error.strerror}); name a TOML file"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{self._path}: is not valid TOML: {error}") from None
        mend = "is not known; connections stand under [connections.NAME]"
        wrong = [
            (key, f"{self._path}: {key}: {mend}")
            for key in sorted(found.keys() - {"connections"})
        ]
        tables = found.get("connections", {})
        if not isinstance(tables, dict):
            self._fail("connections", "must be tables: [connections.NAME]")
        return tables, wrong

    def _connection(self, name: str, table: object) -> Connection:
        key = f"connections.{name}"
        if not _NAME.match(name):
            self._fail(key, "a name matches [a-z][a-z0-9_-]{0,62}")
        if not isinstance(table, dict):
            self._fail(key, "must be a table: [connections.NAME]")
        values = {k: self._expand(f"{key}.{k}", v) for k, v in table.items()}
        type_name = values.pop("type", None)
        known = ", ".join(self._types.names())
        if not isinstance(type_name, str):
            self._fail(f"{key}.type", f"is required: one of {known}")
        type_ = self._types.get(type_name)
        if type_ is None:
            self._fail(
                f"{key}.type", f"there is no sink type {type_name!r}: one of {known}"
            )
        shared = {k: values.pop(k) for k in list(values) if k in _Limits.model_fields}
        limits = self._parsed(key, _Limits, shared)
        if type_.defaults.batching is None and {"batch_size", "batch_wait_seconds"} & set(
            shared
        ):
            self._fail(key, f"{type_name} takes one part at a time; leave batch_* out")
        apart = self._is_apart(key, type_, values)
        self._check_tenants(key, type_, limits, apart=apart)
        model = type_.connection_model

        def of_tenant(tenant: str) -> BaseModel:
            made: BaseModel = model.model_validate(_filled(values, tenant))
            return made

        for tenant in limits.named or (_SOMEBODY,):
            settings = self._parsed(key, model, _filled(values, tenant))
        return Connection(
            name,
            type_name,
            settings,
            _limits(type_.defaults, limits),
            shared=limits.several and not apart,
            of_tenant=of_tenant if _mentions(values) else None,
        )

    def _check_tenants(
        self, key: str, type_: AnySinkType, said: _Limits, *, apart: bool
    ) -> None:
        if said.tenants is None and self._identified:
            self._fail(
                f"{key}.tenants",
                "is required where callers identify themselves: name those who may use "
                'it, as tenants = ["acme"], or say tenants = "*" for everybody',
            )
        if apart and said.shared:
            self._fail(
                f"{key}.shared", f"each tenant has its own place by {_TENANT}; leave it out"
            )
        if said.several and not (apart or said.shared):
            places = " or ".join(_places(type_))
            self._fail(
                f"{key}.shared",
                "several tenants would write to one place; "
                + (f"put {_TENANT} into {places}, " if places else "")
                + "make a connection for each, or say shared = true",
            )

    def _is_apart(self, key: str, type_: AnySinkType, values: dict[str, Any]) -> bool:
        """Whether each tenant's deliveries go to a place of their own."""
        places = _places(type_)
        for name, value in values.items():
            if name not in places and _mentions(value):
                where = f"only {', '.join(places)} can" if places else "nothing here can"
                self._fail(f"{key}.{name}", f"cannot have {_TENANT} in it; {where}")
        return any(_always_mentions(values.get(name)) for name in places)

    def _parsed(self, key: str, model: type[Any], values: dict[str, Any]) -> Any:
        try:
            return model.model_validate(values)
        except ValidationError as error:
            # Without the input, which may be a secret.
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join([key, *(str(step) for step in first["loc"])])
            if first["type"] == "extra_forbidden":
                names = sorted([*model.model_fields, *_Limits.model_fields, "type"])
                self._fail(place, f"is not known; a connection has {', '.join(names)}")
            self._fail(place, first["msg"])

    def _expand(self, key: str, value: Any) -> Any:
        """Text with `${NAME}` replaced by environment variables."""
        if isinstance(value, list):
            return [self._expand(key, each) for each in value]
        if isinstance(value, dict):
            return {k: self._expand(f"{key}.{k}", each) for k, each in value.items()}
        if not isinstance(value, str):
            return value

        def variable(found: re.Match[str]) -> str:
            if found[1] not in os.environ:
                self._fail(key, f"environment variable {found[1]} is not set")
            return os.environ[found[1]]

        return _VARIABLE.sub(variable, value)

    def _fail(self, key: str, what: str) -> NoReturn:
        raise ConfigurationError(f"{self._path}: {key}: {what}")


def _places(type_: AnySinkType) -> list[str]:
    """The keys that say where deliveries of a type go."""
    fields = type_.connection_model.model_fields
    return [
        name
        for name, field in fields.items()
        if any(isinstance(mark, Place) for mark in field.metadata)
    ]


def _mentions(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_mentions, value.values()))
    if isinstance(value, list):
        return any(map(_mentions, value))
    return isinstance(value, str) and _TENANT in value


def _always_mentions(value: Any) -> bool:
    """Whether it is another one for each tenant. Of a list each entry is a place."""
    if isinstance(value, list):
        return bool(value) and all(map(_mentions, value))
    return _mentions(value)


def _filled(value: Any, tenant: str) -> Any:
    """The value with the tenant's name in its places."""
    if isinstance(value, dict):
        return {key: _filled(each, tenant) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, tenant) for each in value]
    return value.replace(_TENANT, tenant) if isinstance(value, str) else value
