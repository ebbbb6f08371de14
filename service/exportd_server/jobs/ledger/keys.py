"""API keys in the ledger's own database, where every process of a fleet sees them."""

from __future__ import annotations

from collections.abc import Hashable
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from exportd_server.identity.base import ApiKey, Scope
from exportd_server.jobs.ledger.codec import to_micros, to_moment, to_moment_or_none
from exportd_server.jobs.ledger.tables import api_keys
from exportd_server.jobs.ledger.transaction import Database, Transaction


class LedgerKeys:
    """A `KeyStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, key: ApiKey) -> None:
        """See `KeyStore`."""

        def work(tx: Transaction) -> None:
            if _find(tx, key.key_id) is not None:
                raise ValueError(f"there is a key {key.key_id} already")
            tx.connection.execute(sa.insert(api_keys).values(_row(key)))

        await self._database.write(work)

    async def revoke(self, key_id: str, moment: datetime) -> ApiKey | None:
        """See `KeyStore`."""

        def work(tx: Transaction) -> ApiKey | None:
            before = _find(tx, key_id)
            if before is not None and before.revoke_time is None:
                tx.connection.execute(
                    sa.update(api_keys)
                    .where(api_keys.c.key_id == key_id, api_keys.c.revoke_time.is_(None))
                    .values(revoke_time=to_micros(moment))
                )
            return before

        return await self._database.write(work)

    async def keys(self) -> list[ApiKey]:
        """See `KeyStore`."""

        def work(tx: Transaction) -> list[ApiKey]:
            order = api_keys.c.create_time, api_keys.c.key_id
            rows = tx.connection.execute(sa.select(api_keys).order_by(*order))
            return [_key(row) for row in rows]

        return await self._database.read(work)

    async def version(self) -> Hashable:
        """See `KeyStore`. Keys are only ever added and revoked, each once."""

        def work(tx: Transaction) -> Hashable:
            found = tx.connection.execute(
                sa.select(
                    sa.func.count(),
                    sa.func.count(api_keys.c.revoke_time),
                    sa.func.max(api_keys.c.create_time),
                    sa.func.max(api_keys.c.revoke_time),
                ).select_from(api_keys)
            ).one()
            return tuple(found)

        return await self._database.read(work)


def _find(tx: Transaction, key_id: str) -> ApiKey | None:
    query = sa.select(api_keys).where(api_keys.c.key_id == key_id)
    row = tx.connection.execute(query.with_for_update()).one_or_none()
    return None if row is None else _key(row)


def _row(key: ApiKey) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "tenant": key.tenant,
        "scopes": " ".join(sorted(key.scopes)),
        "name": key.name,
        "digest": key.digest.hex(),
        "create_time": to_micros(key.create_time),
        "expire_time": None if key.expire_time is None else to_micros(key.expire_time),
        "revoke_time": None if key.revoke_time is None else to_micros(key.revoke_time),
    }


def _key(row: Any) -> ApiKey:
    return ApiKey(
        key_id=row.key_id,
        tenant=row.tenant,
        scopes=frozenset(Scope(scope) for scope in row.scopes.split()),
        name=row.name,
        digest=bytes.fromhex(row.digest),
        create_time=to_moment(row.create_time),
        expire_time=to_moment_or_none(row.expire_time),
        revoke_time=to_moment_or_none(row.revoke_time),
    )
