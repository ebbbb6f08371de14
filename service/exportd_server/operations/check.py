"""Tries everything that the settings name, before a server does: all that is wrong, and
how to mend it, at once. What is tried leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from exportd_server.addresses import IDENTITY_KEYS, address_keys
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
    api_key_checks,
    certificate_checks,
    nobody_checks,
    port_checks,
    tls_checks,
    token_checks,
    tracing_checks,
)
from exportd_server.operations.inspecting import Inspected, inspect_settings
from exportd_server.operations.keeping import (
    data_dir_checks,
    ledger_checks,
    secret_key_checks,
    signing_key_checks,
    store_checks,
)
from exportd_server.settings import Settings

SECONDS = 15.0
"""What a check may take when nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class _Area:
    """Makes checks of an area for a process that serves, or for one that does not. Which
    there are is told by the fields and tables that it needs; a check may need more."""

    name: str
    checks: Callable[[Settings, bool], Iterable[Check]]
    needs: tuple[str, ...]
    about: str = "all"
    """What is not tried where a field is wrong that it needs."""
    serving: bool = False
    """Whether it is for processes that serve only."""


_AREAS = (
    _Area("data_dir", data_dir_checks, ("data_dir",)),
    _Area("ledger", ledger_checks, ("ledger.url",)),
    _Area("store", store_checks, ("store",)),
    _Area("catalogue", catalogue_checks, ("catalogue",)),
    _Area("sinks", sink_checks, ("sinks", *IDENTITY_KEYS)),
    _Area(
        "keys",
        secret_key_checks,
        ("delivery.secret_keys", "ledger.url"),
        "delivery.secret_keys",
    ),
    _Area(
        "keys",
        signing_key_checks,
        ("http.listen", "http.signing_keys", "ledger.url"),
        "http.signing_keys",
        serving=True,
    ),
    _Area(
        "tls",
        tls_checks,
        ("tls.cert_file", "tls.key_file", "tls.client_ca_file"),
        serving=True,
    ),
    _Area("identity", nobody_checks, ("listen", *IDENTITY_KEYS), "none", serving=True),
    _Area(
        "identity",
        api_key_checks,
        ("identity.api_keys", "ledger.url"),
        "api_keys",
        serving=True,
    ),
    _Area("identity", token_checks, ("identity.jwt",), "jwt", serving=True),
    _Area("identity", certificate_checks, ("identity.mtls",), "mtls", serving=True),
    *(
        _Area("ports", partial(port_checks, key), (key,), key, key != "metrics.listen")
        for key in address_keys(serves=True)
    ),
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
    for name, text in inspected.unchecked.items():
        yield Finding(Level.WARNING, "settings", name, text)
    checks = list(_checks(inspected, serves))
    async for finding in run_checks(checks, seconds=seconds):
        yield finding


def _checks(inspected: Inspected, serves: bool) -> Iterator[Check]:
    told_of: dict[str, str] = {}
    for area in _AREAS:
        if area.serving and not serves:
            continue
        try:
            untried = _untried(inspected, area.name, area.about, area.needs)
            if untried:
                yield untried
                continue
            for each in area.checks(inspected.settings, serves):
                yield _untried(inspected, each.area, each.name, each.needs) or each
        except ConfigurationError as error:
            # The same mistake may be in the way of several areas. It is told once.
            first = told_of.setdefault(str(error), area.name)
            outcome = (
                failed(str(error))
                if first == area.name
                else warning(f"not tried; first mend what has failed in {first}")
            )
            yield Check(area.name, area.about, told(outcome))


def _untried(
    inspected: Inspected, area: str, name: str, needs: Iterable[str]
) -> Check | None:
    """What says so in place of a check that needs a field which is wrong."""
    fields = inspected.to_mend(needs)
    if not fields:
        return None
    return Check(area, name, told(warning(f"not tried; first mend {' and '.join(fields)}")))
