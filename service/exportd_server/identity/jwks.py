"""The keys that tokens are verified with: a JSON Web Key Set (RFC 7517) from a URL or a
file, kept fresh."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

log = structlog.get_logger(__name__)

FETCH_SECONDS = 5.0
PAUSE_SECONDS = 10.0
"""Shortest time between two looks, whoever asks for them."""
_MOST_BYTES = 2**20
_MIN_RSA_BITS = 2048

_PUBLIC = {
    "RS256": rsa.RSAPublicKey,
    "ES256": ec.EllipticCurvePublicKey,
    "EdDSA": ed25519.Ed25519PublicKey,
}


class KeySetUnusable(Exception):
    """The key set cannot be had, or holds no key that may be used."""


class KeySource(Protocol):
    """Where a key set lies."""

    async def read(self) -> bytes:
        """The JSON text. Raises `KeySetUnusable` saying what is wrong."""
        ...

    async def close(self) -> None:
        """Free what it holds."""
        ...


class FileSource:
    """A key set in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self) -> bytes:
        """See `KeySource`."""
        try:
            return await asyncio.to_thread(self._path.read_bytes)
        except OSError as error:
            raise KeySetUnusable(
                f"{self._path} cannot be read ({error.strerror})"
            ) from error

    async def close(self) -> None:
        """See `KeySource`."""


class UrlSource:
    """A key set behind a URL. Redirects are not followed: the operator named the place."""

    def __init__(self, url: str, *, timeout: float = FETCH_SECONDS) -> None:
        self._url = httpx.URL(url)
        # A password or a key in it is not for the log.
        self._shown = self._url.copy_with(userinfo=b"", query=None, fragment=None)
        self._timeout = timeout
        # A proxy from the environment cannot know this machine's own ports.
        local = self._url.host in {"localhost", "127.0.0.1", "::1"}
        self._client = httpx.AsyncClient(timeout=timeout, trust_env=not local)

    async def read(self) -> bytes:
        """See `KeySource`."""
        text = bytearray()
        try:
            # The client's own limit is for each step, this one for all of them.
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream("GET", self._url) as answer,
            ):
                if answer.status_code != httpx.codes.OK:
                    raise KeySetUnusable(
                        f"{self._shown} answers with status {answer.status_code}"
                    )
                async for piece in answer.aiter_bytes():
                    text += piece
                    if len(text) > _MOST_BYTES:
                        raise KeySetUnusable(f"{self._shown} answers with too much")
        except (httpx.HTTPError, TimeoutError) as error:
            raise KeySetUnusable(
                f"{self._shown} cannot be fetched ({type(error).__name__})"
            ) from error
        return bytes(text)

    async def close(self) -> None:
        """See `KeySource`."""
        await self._client.aclose()


def parse(text: bytes, algorithms: Sequence[str]) -> list[jwt.PyJWK]:
    """The keys of a set that may verify tokens; others are passed by, as RFC 7517 wants.
    Raises `KeySetUnusable` when none is left."""
    try:
        entries = list(json.loads(text)["keys"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise KeySetUnusable("is no JSON Web Key Set") from None
    keys = [key for entry in entries if (key := _usable(entry, algorithms)) is not None]
    if not keys:
        raise KeySetUnusable(f"holds no public key for {', '.join(algorithms)}")
    return keys


def _usable(entry: Any, algorithms: Sequence[str]) -> jwt.PyJWK | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    operations = entry.get("key_ops")
    if isinstance(operations, list) and "verify" not in operations:
        return None
    try:
        key = jwt.PyJWK(entry)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, NotImplementedError):
        return None
    # Private and symmetric keys, which have no business in such a set, are none of these.
    kind = _PUBLIC.get(key.algorithm_name)
    if key.algorithm_name not in algorithms or kind is None:
        return None
    if not isinstance(key.key, kind):
        return None
    if isinstance(key.key, rsa.RSAPublicKey) and key.key.key_size < _MIN_RSA_BITS:
        return None
    return key


class KeySet:
    """The keys of a source. They are read anew every `refresh` seconds and when a token
    names one that is not there, at most once in `pause` seconds. While that fails, the
    last good ones hold."""

    def __init__(
        self,
        source: KeySource,
        algorithms: Sequence[str],
        *,
        refresh: float,
        pause: float = PAUSE_SECONDS,
    ) -> None:
        self._source = source
        self._algorithms = tuple(algorithms)
        self._refresh = refresh
        self._pause = pause
        self._keys: Sequence[jwt.PyJWK] = ()
        self._text = b""
        self.generation = 0
        """Another one whenever the keys are others."""
        self._looked = -float("inf")
        self._failing = False
        self._reading: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        """Whether there are keys at all."""
        return bool(self._keys)

    async def start(self) -> None:
        """Read the keys, and keep them fresh until `close`. Raises `KeySetUnusable`, and
        is kept fresh all the same."""
        self._looked = time.monotonic()
        try:
            await self._read()
        finally:
            self._task = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        """Stop looking for changes."""
        for task in (self._task, self._reading):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._source.close()

    async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """The key for a token whose header says that. One that names no key gets the
        only one there is for its algorithm."""
        found = self._find(kid, algorithm)
        if found is None and await self._look_again():
            found = self._find(kid, algorithm)
        return found

    def _find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        found = [
            key
            for key in self._keys
            if key.algorithm_name == algorithm and (kid is None or key.key_id == kid)
        ]
        return found[0] if len(found) == 1 else None

    async def _look_again(self) -> bool:
        """Read the keys because one is not there, unless that was done just now; those
        who want it at the same time share it. Whether it was done."""
        if self._reading is None or self._reading.done():
            if time.monotonic() - self._looked < self._pause:
                return False
            self._looked = time.monotonic()
            self._reading = asyncio.create_task(self._try())
        # A caller that goes away takes nobody's answer along.
        await asyncio.shield(self._reading)
        return True

    async def _keep_fresh(self) -> None:
        while True:
            # While there are none at all, nobody with a token gets in.
            await asyncio.sleep(self._refresh if self._keys else self._pause)
            self._looked = time.monotonic()
            await self._try()

    async def _try(self) -> None:
        try:
            await self._read()
        except KeySetUnusable as error:
            if not self._failing:
                log.error(  # noqa: TRY400 - its text tells all
                    "keys of tokens cannot be read; the last ones hold", error=str(error)
                )
            self._failing = True
        except Exception:
            log.exception("keys of tokens cannot be read; the last ones hold")
            self._failing = True
        else:
            if self._failing:
                log.info("keys of tokens can be read again")
            self._failing = False

    async def _read(self) -> None:
        text = await self._source.read()
        if text != self._text:
            self._keys = parse(text, self._algorithms)
            self._text = text
            self.generation += 1
