"""Tries everything that the settings name, before a server does: all that is wrong, and
how to mend it, at once. What is tried leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exportd_server.errors import ConfigurationError
from exportd_server.operations.checking import (
    Check,
    Finding,
    Level,
    failed,
    run_checks,
    told,
    warning,
)
from exportd_server.operations.data import catalogue_checks, sink_checks
from exportd_server.operations.doors import (
    identity_checks,
    port_checks,
    tls_checks,
    tracing_checks,
)
from exportd_server.operations.keeping import (
    data_dir_checks,
    key_checks,
    ledger_checks,
    store_checks,
)
from exportd_server.settings import Inspected, Settings, inspect_settings

SECONDS = 15.0
"""What a check may take when nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class _Area:
    """Makes the checks of an area for a process that serves, or for one that does not.
    They need these sections of the settings."""

    name: str
    checks: Callable[[Settings, bool], Iterable[Check]]
    needs: tuple[str, ...]


_AREAS = (
    _Area("data_dir", data_dir_checks, ("data_dir",)),
    _Area("ledger", ledger_checks, ("ledger", "data_dir", "worker")),
    _Area("store", store_checks, ("store", "ledger", "data_dir", "worker", "parts")),
    _Area("catalogue", catalogue_checks, ("catalogue",)),
    _Area("sinks", sink_checks, ("sinks", "identity")),
    _Area("keys", key_checks, ("delivery", "http", "ledger", "data_dir")),
    _Area("tls", tls_checks, ("tls",)),
    _Area("identity", identity_checks, ("identity", "listen", "ledger", "data_dir")),
    _Area("ports", port_checks, ("listen", "tls", "http", "metrics")),
    _Area("tracing", tracing_checks, ("tracing",)),
)


async def check(
    config: Path | None,
    flags: Mapping[str, Any],
    *,
    serves: bool = True,
    seconds: float = SECONDS,
) -> AsyncIterator[Finding]:
    """All findings, area by area."""
    where = str(config or "environment")
    try:
        inspected = inspect_settings(config, flags, serves=serves)
    except ConfigurationError as error:
        yield Finding(Level.FAILED, "settings", where, str(error))
        return
    for text in inspected.wrong:
        yield Finding(Level.FAILED, "settings", where, text)
    if not inspected.wrong:
        yield Finding(Level.OK, "settings", where, "every field is right")
    checks = list(_checks(inspected, serves))
    async for finding in run_checks(checks, seconds=seconds):
        yield finding


def _checks(inspected: Inspected, serves: bool) -> Iterator[Check]:
    for area in _AREAS:
        unknown = sorted(inspected.broken.intersection(area.needs))
        if unknown:
            text = f"not tried; first mend the settings of {' and '.join(unknown)}"
            yield Check(area.name, "all", told(warning(text)))
            continue
        try:
            yield from area.checks(inspected.settings, serves)
        except ConfigurationError as error:
            yield Check(area.name, "all", told(failed(str(error))))
