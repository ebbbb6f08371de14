"""API keys: what they look like, and which of them work now.

A key is `exportd_<id>_<secret>`. The id is public and finds the record; the secret is 256
random bits, of which only the SHA-256 is kept. That is enough: slow password hashes make
guesses expensive because people choose from few passwords, and nobody guesses one of
2**256. It also lets every call be checked afresh.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import secrets
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from datetime import datetime, timedelta

import structlog

from exportd_server.errors import ConfigurationError, ExportdError, Unauthenticated
from exportd_server.identity.base import (
    ApiKey,
    KeyStore,
    KeysUnreadable,
    Method,
    Principal,
    Scope,
)
from exportd_server.platform.clock import Clock

log = structlog.get_logger(__name__)

PREFIX = "exportd_"
REFRESH_SECONDS = 2.0
"""How often a server looks for keys that were made or revoked."""

_ID_BYTES = 10
_SECRET_BYTES = 32
_SECRET_LENGTH = 52
_NO_DIGEST = bytes(hashlib.sha256().digest_size)


def new_key(
    tenant: str,
    scopes: Collection[Scope],
    *,
    name: str = "",
    now: datetime,
    lifetime: timedelta | None = None,
) -> tuple[str, ApiKey]:
    """Make a key: the text that its owner keeps, and what the service keeps."""
    key_id, secret = _random(_ID_BYTES), _random(_SECRET_BYTES)
    kept = ApiKey(
        key_id,
        tenant,
        frozenset(scopes),
        name,
        _digest(secret),
        now,
        None if lifetime is None else now + lifetime,
    )
    return f"{PREFIX}{key_id}_{secret}", kept


def _random(size: int) -> str:
    """Random bytes as small letters and digits: a double click takes the whole word."""
    return base64.b32encode(secrets.token_bytes(size)).decode().lower()[: -(-size * 8 // 5)]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _split(text: str) -> tuple[str, str] | None:
    """Id and secret of a key's text."""
    key_id, underscore, secret = text.removeprefix(PREFIX).partition("_")
    if not (text.startswith(PREFIX) and underscore and len(secret) == _SECRET_LENGTH):
        return None
    return key_id, secret


class KeyRing:
    """The keys that a server knows, in memory: a call asks no store. They are looked up
    anew every `REFRESH_SECONDS`; while that fails, the last ones hold."""

    def __init__(self, store: KeyStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._keys: Mapping[str, ApiKey] = {}
        self._version: Hashable = None
        self._failing = False
        self._watched: set[tuple[str, Callable[[], None]]] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys, and keep them fresh until `close`. Raises `ConfigurationError`
        when they cannot be read."""
        try:
            await self.refresh()
        except (OSError, KeysUnreadable, ExportdError) as error:
            raise ConfigurationError(f"identity.api_keys: {error}") from error
        self._task = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        """Stop looking for changes."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def authenticate(self, text: str) -> Principal:
        """Who has this key. Raises `Unauthenticated`."""
        parts = _split(text)
        if parts is None:
            raise Unauthenticated(cause="not the form of an API key")
        key_id, secret = parts
        key = self._keys.get(key_id)
        # Compared as well when there is no such key, so that both take the same time.
        right = hmac.compare_digest(
            _digest(secret), _NO_DIGEST if key is None else key.digest
        )
        if key is None or not right:
            raise Unauthenticated(
                cause="unknown API key" if key is None else f"wrong secret of key {key_id}"
            )
        # From here on the caller has proven that the key is its own, and may know.
        if key.revoke_time is not None:
            raise Unauthenticated(f"API key {key_id} was revoked")
        if key.expire_time is not None and key.expire_time <= self._clock.now():
            raise Unauthenticated(f"API key {key_id} has expired")
        return Principal(
            f"key:{key_id}", key.tenant, key.scopes, Method.API_KEY, key_id=key_id
        )

    @contextlib.contextmanager
    def watching(self, key_id: str, revoked: Callable[[], None]) -> Iterator[None]:
        """Have `revoked` called, once, if the key is revoked within the context."""
        watch = (key_id, revoked)
        self._watched.add(watch)
        try:
            yield
        finally:
            self._watched.discard(watch)

    async def refresh(self) -> None:
        """Read the keys if they have changed. Raises what the store raises."""
        # Before the keys: what changes in between is then read the next time.
        version = await self._store.version()
        if version == self._version:
            return
        self._keys = {key.key_id: key for key in await self._store.keys()}
        self._version = version
        for watch in tuple(self._watched):
            key_id, revoked = watch
            key = self._keys.get(key_id)
            if key is None or key.revoke_time is not None:
                self._watched.discard(watch)
                revoked()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except (OSError, KeysUnreadable, ExportdError) as error:
                if not self._failing:
                    log.error(  # noqa: TRY400 - its text tells all
                        "API keys cannot be read; the last ones hold", error=str(error)
                    )
                self._failing = True
            except Exception:
                log.exception("API keys cannot be read; the last ones hold")
                self._failing = True
            else:
                if self._failing:
                    log.info("API keys can be read again")
                self._failing = False
