"""Who calls, what they may do, and where API keys are kept."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


class Scope(enum.StrEnum):
    """What a caller may do. `ADMIN` is all of it."""

    READ = "exports.read"
    WRITE = "exports.write"
    ADMIN = "admin"


class Method(enum.StrEnum):
    """How a caller was recognised."""

    NONE = "none"
    API_KEY = "api_key"
    TOKEN = "token"  # noqa: S105 - a word, no secret
    CERTIFICATE = "certificate"


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller. `subject` names it in logs; `key_id` is set for one with an API key."""

    subject: str
    tenant: str
    scopes: frozenset[Scope]
    method: Method
    key_id: str | None = None

    def may(self, scope: Scope) -> bool:
        """Whether the caller has the scope."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


DEFAULT_TENANT = "default"

ANYBODY = Principal("anybody", DEFAULT_TENANT, frozenset({Scope.ADMIN}), Method.NONE)
"""The caller while nobody has to identify themselves."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of an API key. `digest` is the SHA-256 of its secret; moments are
    aware, in UTC; without `expire_time` it works until it is revoked."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    name: str
    digest: bytes
    create_time: datetime
    expire_time: datetime | None = None
    revoke_time: datetime | None = None


class KeyStore(Protocol):
    """Keeps API keys. Several processes may use one at a time: what one of them has
    changed, the others see with their next call.

    Raises `KeysUnreadable` when what is kept is no set of keys, `OSError` or
    `LedgerUnavailable` when it cannot be reached.
    """

    async def add(self, key: ApiKey) -> None:
        """Keep a key; durable when this returns. Raises `ValueError` when there is one
        with that id."""
        ...

    async def revoke(self, key_id: str, moment: datetime) -> ApiKey | None:
        """Set `revoke_time`, unless it is set; durable when this returns. Gives the key
        as it was before, None when there is none."""
        ...

    async def keys(self) -> list[ApiKey]:
        """All keys, those that work no more included, the oldest first."""
        ...

    async def version(self) -> Hashable:
        """Another one whenever `keys` gives something else; cheap to ask for."""
        ...


class KeysUnreadable(Exception):
    """What the store holds is no set of API keys."""
