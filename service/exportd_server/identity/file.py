"""API keys in a file, for the embedded ledger, which one process has to itself while the
command that makes keys is another."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from exportd_server.identity.base import ApiKey, KeysUnreadable, Scope
from exportd_server.platform.files import Directory

NAME = "api-keys.json"
_MOST_BYTES = 64 * 2**20

T = TypeVar("T")


class _Entry(BaseModel):
    """One key as the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_id: str
    tenant: str
    scopes: tuple[Scope, ...]
    name: str
    sha256: str
    create_time: AwareDatetime
    expire_time: AwareDatetime | None
    revoke_time: AwareDatetime | None


class _Content(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[_Entry, ...] = ()


class FileKeyStore:
    """A `KeyStore`. A change replaces the file as a whole, so that readers need no lock;
    those who change it stand in line. A file that is missing is one without keys."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def add(self, key: ApiKey) -> None:
        """See `KeyStore`."""

        def change(keys: dict[str, ApiKey]) -> None:
            if key.key_id in keys:
                raise ValueError(f"there is a key {key.key_id} already")
            keys[key.key_id] = key

        await asyncio.to_thread(self._change, change)

    async def revoke(self, key_id: str, moment: datetime) -> ApiKey | None:
        """See `KeyStore`."""

        def change(keys: dict[str, ApiKey]) -> ApiKey | None:
            before = keys.get(key_id)
            if before is not None and before.revoke_time is None:
                keys[key_id] = replace(before, revoke_time=moment)
            return before

        return await asyncio.to_thread(self._change, change)

    async def keys(self) -> list[ApiKey]:
        """See `KeyStore`."""
        return list((await asyncio.to_thread(self._read)).values())

    async def version(self) -> Hashable:
        """See `KeyStore`."""
        return await asyncio.to_thread(self._version)

    # --- in threads

    def _version(self) -> Hashable:
        try:
            status = (self._directory / NAME).stat()
        except FileNotFoundError:
            return None, 0, 0
        # A file that replaces another may have its size, or its number, but not both and
        # the moment it was written at.
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self) -> dict[str, ApiKey]:
        path = self._directory / NAME
        try:
            with Directory.at(self._directory) as folder, folder.open(NAME) as file:
                text = file.read_at(0, _MOST_BYTES)
        except FileNotFoundError:
            return {}
        try:
            content = _Content.model_validate_json(text)
            return {entry.key_id: _key(entry) for entry in content.keys}
        except (ValidationError, ValueError):
            # Without the text, which is not for logs.
            raise KeysUnreadable(
                f"{path} is no file of keys; restore it, or delete it, and no key works"
            ) from None

    def _change(self, change: Callable[[dict[str, ApiKey]], T]) -> T:
        with self._turn():
            keys = self._read()
            before = dict(keys)
            result = change(keys)
            if keys != before:
                self._write(keys)
            return result

    def _write(self, keys: dict[str, ApiKey]) -> None:
        content = _Content(keys=tuple(_entry(key) for key in keys.values()))
        text = content.model_dump_json(indent=1).encode() + b"\n"
        with Directory.at(self._directory) as folder:
            folder.replace(NAME, text, prepare=self._hand_over)

    def _hand_over(self, name: str) -> None:
        """Give a file that the superuser made to the directory's owner: the server, which
        runs as that user, must be able to read it."""
        if os.geteuid() == 0:
            owner = self._directory.stat()
            os.chown(
                self._directory / name, owner.st_uid, owner.st_gid, follow_symlinks=False
            )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"{NAME}.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(self._directory / name, flags, 0o600)
        try:
            self._hand_over(name)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _entry(key: ApiKey) -> _Entry:
    return _Entry(
        key_id=key.key_id,
        tenant=key.tenant,
        scopes=tuple(sorted(key.scopes)),
        name=key.name,
        sha256=key.digest.hex(),
        create_time=key.create_time,
        expire_time=key.expire_time,
        revoke_time=key.revoke_time,
    )


def _key(entry: _Entry) -> ApiKey:
    return ApiKey(
        key_id=entry.key_id,
        tenant=entry.tenant,
        scopes=frozenset(entry.scopes),
        name=entry.name,
        digest=bytes.fromhex(entry.sha256),
        create_time=entry.create_time,
        expire_time=entry.expire_time,
        revoke_time=entry.revoke_time,
    )
