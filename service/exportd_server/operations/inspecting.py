"""Reads settings that may be wrong, goes on at each mistake, and tells all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from exportd_server.addresses import address_keys, check_address, rules
from exportd_server.errors import ConfigurationError
from exportd_server.settings import (
    Flags,
    Settings,
    explained,
    field_of,
    keys,
    mistakes,
    read_settings_file,
    unknown_variables,
    variable,
    with_flags,
)


@dataclass(frozen=True, slots=True)
class Inspected:
    """Settings with everything that is wrong with them, one line each. Keys that do not
    exist are left out. `unchecked` says of fields why more may be wrong with them.

    What is `broken` holds its default, and not what was meant: fields and tables, dotted,
    each with the fields to mend for it.
    """

    settings: Settings
    wrong: tuple[str, ...]
    unchecked: Mapping[str, str]
    broken: Mapping[str, frozenset[str]]

    def to_mend(self, needs: Iterable[str]) -> list[str]:
        """The fields to mend before these fields, or tables, are what was meant."""
        return _to_mend(self.broken, needs)


def inspect_settings(
    file: Path | None, flags: Mapping[str, Any], *, serves: bool = True
) -> Inspected:
    """Read the settings as `load_settings` does, and go on at each mistake. Raises
    `ConfigurationError` when the file cannot be read at all."""
    values = read_settings_file(file) if file is not None else {}
    inspection = _Inspection(file)
    settings = inspection.fields(inspection.with_variables(values))
    settings = inspection.with_flags(settings, flags)
    inspection.addresses(settings, serves=serves)
    if _to_mend(inspection.broken, ["listen"]):
        # As the other addresses are by default: it is nobody's.
        settings = settings.model_copy(update={"listen": ""})
    inspection.rules(settings, serves=serves)
    return Inspected(
        settings, tuple(inspection.wrong), inspection.unchecked, inspection.broken
    )


class _Given(Settings):
    """Settings from what is passed in alone."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the base's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """See the base."""
        return (init_settings,)


class _Inspection:
    """What is found, step by step."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.wrong: list[str] = []
        self.unchecked: dict[str, str] = {}
        self.broken: dict[str, frozenset[str]] = {}

    def with_variables(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of the file, those of the environment over them."""
        self.wrong += unknown_variables(os.environ)
        named = {variable(key): key for key in keys()}
        for name, text in sorted(os.environ.items()):
            key = named.get(name.upper())
            if key is None:
                continue
            try:
                values = _merged(values, _from_variable(name, text))
            except SettingsError:
                self.wrong.append(
                    f"environment: {name}: lists and tables stand there as JSON"
                )
                self.broken[key] = frozenset({key})
                values = _without_key(values, key.split("."))
        return values

    def fields(self, values: dict[str, Any]) -> Settings:
        """The settings, without what is wrong."""
        while True:
            try:
                settings: Settings = _Given(**values)
            except ValidationError as error:
                for mistake in mistakes(error):
                    values = self._without(values, mistake)
            else:
                break
        for table in sorted({key.rpartition(".")[0] for key in self.broken} - {""}):
            if _has_rules(table):
                culprits = " and ".join(self._inside(table))
                self.unchecked[table] = (
                    f"whether its fields go together is not checked; first mend {culprits}"
                )
        return settings

    def _without(self, values: dict[str, Any], mistake: ErrorDetails) -> dict[str, Any]:
        """Take down a mistake; gives the values without it."""
        if mistake["type"] == "extra_forbidden":
            self.wrong.append(explained(mistake, self._file))
            return _without_key(values, mistake["loc"])
        key = field_of(mistake)
        # A table's own rule may miss what was taken out of it before.
        culprits = self._inside(key) if mistake["type"] == "value_error" else []
        if not culprits:
            self.wrong.append(explained(mistake, self._file))
        self.broken[key] = frozenset(culprits or [key])
        return _without_key(values, key.split("."))

    def _inside(self, table: str) -> list[str]:
        return sorted(key for key in self.broken if key.startswith(f"{table}."))

    def with_flags(self, settings: Settings, flags: Mapping[str, Any]) -> Settings:
        """The settings, the flags over them."""
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return with_flags(settings, Flags(**given))
        except ValidationError as error:
            self.wrong += [explained(mistake, None) for mistake in mistakes(error)]
            self.broken |= {name: frozenset({name}) for name in given}
            return settings

    def addresses(self, settings: Settings, *, serves: bool) -> None:
        """Whether they are any."""
        for key in address_keys(serves=serves):
            if _to_mend(self.broken, [key]):
                continue
            try:
                check_address(settings, key)
            except ConfigurationError as error:
                self.wrong.append(str(error))
                self.broken[key] = frozenset({key})

    def rules(self, settings: Settings, *, serves: bool) -> None:
        """Whether the addresses and who is let in go together."""
        skipped: dict[str, set[str]] = {}
        for rule in rules(serves=serves):
            known = not _to_mend(self.broken, [rule.key])
            if known and not rule.applies(settings):
                continue
            culprits = _to_mend(self.broken, [rule.key, *rule.others])
            if culprits:
                skipped.setdefault(rule.key, set()).update(culprits)
                continue
            problem = rule.problem_in(settings)
            if problem:
                self.wrong.append(problem)
        for key, found in skipped.items():
            self.unchecked[key] = (
                "whether it goes with other fields is not checked; first mend "
                + " and ".join(sorted(found))
            )


def _to_mend(broken: Mapping[str, frozenset[str]], needs: Iterable[str]) -> list[str]:
    found = {
        culprit
        for need in needs
        for key, culprits in broken.items()
        if f"{need}.".startswith(f"{key}.") or key.startswith(f"{need}.")
        for culprit in culprits
    }
    return sorted(found)


def _has_rules(table: str) -> bool:
    """Whether the table asks something of its fields together."""
    model: type[BaseModel] = Settings
    for name in table.split("."):
        inner = model.model_fields[name].annotation
        assert isinstance(inner, type)  # noqa: S101 - it is a table
        model = inner
    return bool(model.__pydantic_decorators__.model_validators)


def _from_variable(name: str, value: str) -> dict[str, Any]:
    """What one environment variable sets. Raises `SettingsError`."""
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value}
    return source()


def _merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables in tables, the second over the first."""
    both = {**values, **over}
    for name in values.keys() & over.keys():
        if isinstance(values[name], dict) and isinstance(over[name], dict):
            both[name] = _merged(values[name], over[name])
    return both


def _without_key(values: dict[str, Any], path: Sequence[str | int]) -> dict[str, Any]:
    """A copy that lacks what lies at the path, if anything does."""
    copied = deepcopy(values)
    inner: Any = copied
    with suppress(LookupError, TypeError):
        for step in path[:-1]:
            inner = inner[step]
        del inner[path[-1]]
    return copied
