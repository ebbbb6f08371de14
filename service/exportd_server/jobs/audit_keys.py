"""API keys whose changes are audited: those that operators make by command."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from datetime import datetime

import structlog

from exportd_server.errors import Code, LedgerUnavailable
from exportd_server.identity.base import ApiKey, KeyStore
from exportd_server.jobs.audit import (
    OPERATOR,
    AuditMethod,
    AuditRecord,
    Ending,
    Entry,
    auditing,
)
from exportd_server.jobs.audit_log import write_line
from exportd_server.jobs.changes import to_its_end
from exportd_server.platform.clock import Clock

log = structlog.get_logger(__name__)

Keep = Callable[[AuditRecord], Awaitable[None]]

_KEY_ID = re.compile(r"[a-z2-7]{16}")


class AuditedKeyStore:
    """A `KeyStore` that leaves a record of every change, failed ones included: who did it
    is this process's user, and from where this machine. A change stands even when its
    record cannot be kept; the line in the log has it then."""

    def __init__(self, store: KeyStore, keep: Keep, clock: Clock) -> None:
        self._store = store
        self._keep = keep
        self._clock = clock

    async def add(self, key: ApiKey) -> None:
        """See `KeyStore`."""
        entry = _entry(AuditMethod.CREATE_API_KEY, key.key_id)
        entry.tenant = key.tenant
        async with self._audited(entry):
            await to_its_end(self._store.add(key))

    async def revoke(self, key_id: str, moment: datetime) -> ApiKey | None:
        """See `KeyStore`."""
        # What is no id may be a whole key.
        known = key_id if _KEY_ID.fullmatch(key_id) else ""
        entry = _entry(AuditMethod.REVOKE_API_KEY, known)
        async with self._audited(entry):
            before = await to_its_end(self._store.revoke(key_id, moment))
            if before is None:
                entry.ending = Ending(Code.NOT_FOUND.name, "API_KEY_NOT_FOUND")
            else:
                entry.tenant = before.tenant
        return before

    async def keys(self) -> list[ApiKey]:
        """See `KeyStore`."""
        return await self._store.keys()

    async def version(self) -> Hashable:
        """See `KeyStore`."""
        return await self._store.version()

    @contextlib.asynccontextmanager
    async def _audited(self, entry: Entry) -> AsyncIterator[None]:
        records: list[AuditRecord] = []
        try:
            with auditing(entry, self._clock, records.append):
                yield
        finally:
            (record,) = records
            write_line(record)
            try:
                await self._keep(record)
            except (OSError, LedgerUnavailable) as error:
                log.error("the audit record is in this log only", cause=repr(error))  # noqa: TRY400 - its text tells all


def _entry(method: AuditMethod, key_id: str) -> Entry:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # One that has no name here.
        user = str(os.getuid())
    return Entry(
        method,
        socket.gethostname(),
        subject=f"os:{user}",
        identity=OPERATOR,
        key_id=key_id,
    )
