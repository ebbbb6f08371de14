"""What every store of API keys does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from exportd_server.identity.base import ApiKey, KeyStore, KeysUnreadable, Scope
from exportd_server.identity.file import NAME, FileKeyStore
from exportd_server.identity.keys import new_key
from exportd_server.jobs.ledger.postgres import (
    migrate_postgres_ledger,
    open_postgres_ledger,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

Open = Callable[[], Awaitable[KeyStore]]


@pytest.fixture(params=["file", "postgres"])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens the same store anew, as another process would."""
    if request.param == "file":

        async def open_file() -> KeyStore:
            return FileKeyStore(tmp_path / "data")

        yield open_file
        return
    url = request.getfixturevalue("postgres_url")
    await asyncio.to_thread(migrate_postgres_ledger, url)
    ledgers = []

    async def open_table() -> KeyStore:
        ledger = await open_postgres_ledger(url, connections=1)
        ledgers.append(ledger)
        return ledger.keys

    yield open_table
    for ledger in ledgers:
        await ledger.close()


def a_key(tenant: str = "acme", **changes: object) -> ApiKey:
    _, key = new_key(tenant, [Scope.READ, Scope.WRITE], name="für CI", now=NOW)
    return replace(key, **changes)  # type: ignore[arg-type]


async def test_a_new_store_has_no_keys(open_store: Open) -> None:
    assert await (await open_store()).keys() == []


async def test_keys_come_back_whole_and_oldest_first_in_another_process(
    open_store: Open,
) -> None:
    store = await open_store()
    keys = [
        a_key(create_time=NOW, expire_time=NOW + timedelta(days=1)),
        a_key("globex", create_time=NOW + timedelta(seconds=1)),
        a_key(create_time=NOW + timedelta(seconds=2), scopes=frozenset({Scope.ADMIN})),
    ]
    for key in keys:
        await store.add(key)
    assert await (await open_store()).keys() == keys


async def test_an_id_is_given_once(open_store: Open) -> None:
    store, key = await open_store(), a_key()
    await store.add(key)
    with pytest.raises(ValueError, match=key.key_id):
        await store.add(a_key("globex", key_id=key.key_id))
    assert await store.keys() == [key]


async def test_revoking_sets_the_moment_once_and_tells_what_was_before(
    open_store: Open,
) -> None:
    store, key, other = await open_store(), a_key(), a_key()
    await store.add(key)
    await store.add(other)
    assert await store.revoke(key.key_id, NOW) == key
    revoked = replace(key, revoke_time=NOW)
    assert await store.revoke(key.key_id, NOW + timedelta(days=1)) == revoked
    assert {each.key_id: each for each in await store.keys()} == {
        key.key_id: revoked,
        other.key_id: other,
    }


async def test_revoking_a_key_that_is_not_there_changes_nothing(open_store: Open) -> None:
    store = await open_store()
    before = await store.version()
    assert await store.revoke(uuid4().hex, NOW) is None
    assert await store.version() == before


async def test_the_version_tells_another_process_of_each_change(open_store: Open) -> None:
    store, other, key = await open_store(), await open_store(), a_key()
    seen = [await other.version()]
    await store.add(key)
    seen.append(await other.version())
    assert await other.version() == seen[-1]
    await store.add(a_key(create_time=NOW - timedelta(days=1)))
    seen.append(await other.version())
    await store.revoke(key.key_id, NOW)
    seen.append(await other.version())
    assert len(set(seen)) == 4


async def test_keys_that_several_processes_add_at_once_are_all_kept(
    open_store: Open,
) -> None:
    stores = [await open_store() for _ in range(4)]
    keys = [a_key() for _ in range(12)]
    await asyncio.gather(*(stores[index % 4].add(key) for index, key in enumerate(keys)))
    assert {key.key_id for key in await stores[0].keys()} == {key.key_id for key in keys}


async def test_two_that_revoke_a_key_at_once_agree_on_who_was_first(
    open_store: Open,
) -> None:
    stores, key = [await open_store() for _ in range(2)], a_key()
    await stores[0].add(key)
    found = await asyncio.gather(
        *(
            store.revoke(key.key_id, NOW + timedelta(seconds=index))
            for index, store in enumerate(stores)
        )
    )
    assert sum(each is not None and each.revoke_time is None for each in found) == 1


# --- of the file alone


@pytest.mark.parametrize("text", ["", "{", '{"keys": [{}]}', '{"keys": 1}', "\0" * 99])
async def test_a_file_that_is_broken_is_no_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    store = FileKeyStore(tmp_path)
    with pytest.raises(KeysUnreadable, match=NAME):
        await store.keys()
    with pytest.raises(KeysUnreadable):
        await store.add(a_key())
    assert (tmp_path / NAME).read_text() == text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the superuser")
def test_what_the_superuser_makes_belongs_to_the_directorys_owner(tmp_path: Path) -> None:
    os.chown(tmp_path, 12_345, 12_346)
    asyncio.run(FileKeyStore(tmp_path).add(a_key()))
    for name in (NAME, f"{NAME}.lock"):
        status = (tmp_path / name).stat()
        assert (status.st_uid, status.st_gid) == (12_345, 12_346)


def test_only_its_owner_may_read_the_file_and_it_holds_no_secret(
    tmp_path: Path,
) -> None:
    text, key = new_key("acme", [Scope.READ], now=NOW)
    asyncio.run(FileKeyStore(tmp_path).add(key))
    assert (tmp_path / NAME).stat().st_mode & 0o077 == 0
    assert text.rpartition("_")[2] not in (tmp_path / NAME).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, f"{NAME}.lock"]
