"""Which types of sinks there are: those that come with exportd, and those of other
packages that register under the entry point group `exportd.sinks`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import structlog

from exportd_server.errors import ConfigurationError
from exportd_server.sinks.base import SinkType

log = structlog.get_logger(__name__)

GROUP = "exportd.sinks"

AnySinkType = SinkType[Any, Any]

_BUILT_IN: Mapping[str, str] = {
    "local_file": "exportd_server.sinks.local_file:LocalFileSinkType",
    "webhook": "exportd_server.sinks.webhook:WebhookType",
    "object_storage": "exportd_server.sinks.object_storage:ObjectStorageSinkType",
    "database": "exportd_server.sinks.database:DatabaseSink",
}
"""Loaded when they are asked for: their libraries take a while."""

_NEED_CONNECTION = frozenset(_BUILT_IN) - {"webhook"}
"""Told here, so that nobody loads them to see."""


class SinkTypes:
    """The types of sinks, by name."""

    def __init__(self, types: Mapping[str, str | EntryPoint | AnySinkType]) -> None:
        self._sources = dict(types)
        self._loaded: dict[str, AnySinkType] = {}

    @classmethod
    def installed(cls) -> SinkTypes:
        """Those that come with exportd and those that are installed beside it. One that
        takes a name twice raises `ConfigurationError`."""
        found: dict[str, str | EntryPoint | AnySinkType] = dict(_BUILT_IN)
        for entry in entry_points(group=GROUP):
            if entry.name in found:
                raise ConfigurationError(
                    f"sink type {entry.name}: {entry.value} takes a name that is taken; "
                    "uninstall one of the two"
                )
            found[entry.name] = entry
        return cls(found)

    def with_type(self, type_: AnySinkType) -> SinkTypes:
        """These, and one more."""
        return SinkTypes({**self._sources, type_.name: type_})

    def names(self) -> list[str]:
        """Names of the types, in order."""
        return sorted(self._sources)

    def without_connection(self) -> list[str]:
        """Names of those that can be reached without a connection, in order."""
        found = []
        for name in self.names():
            # Not by ==, which an entry point has for its like alone.
            if self._sources[name] is _BUILT_IN.get(name):
                needs = name in _NEED_CONNECTION
            else:
                type_ = self.get(name)
                needs = type_ is None or type_.needs_connection
            if not needs:
                found.append(name)
        return found

    def get(self, name: str) -> AnySinkType | None:
        """A type; None when there is none of that name, or when it cannot be loaded,
        which is logged."""
        if name not in self._loaded:
            source = self._sources.get(name)
            if source is None:
                return None
            try:
                self._loaded[name] = _load(source)
            except Exception:
                # Whatever a package of somebody else's does while it is imported.
                log.exception("sink type cannot be loaded", sink=name)
                return None
        return self._loaded[name]


def _load(source: str | EntryPoint | AnySinkType) -> AnySinkType:
    if isinstance(source, EntryPoint):
        return _made(source.load())
    if isinstance(source, str):
        module, _, name = source.partition(":")
        return _made(getattr(import_module(module), name))
    return source


def _made(found: Any) -> AnySinkType:
    """An entry point names a class, or an object that is there already."""
    made: AnySinkType = found() if isinstance(found, type) else found
    return made
