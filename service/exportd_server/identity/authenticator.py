"""Finds out who calls, by whatever kinds of credentials the operator accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from exportd_server.errors import Unauthenticated
from exportd_server.identity.base import ANYBODY, Principal
from exportd_server.identity.keys import PREFIX, KeyRing

if TYPE_CHECKING:
    # What it is made of takes a while to load, and most do without.
    from exportd_server.identity.certificates import CertificateCallers


class Tokens(Protocol):
    """See `TokenVerifier`, whose libraries are loaded only where tokens are accepted."""

    async def authenticate(self, token: str) -> Principal:
        """The caller that the token names. Raises `Unauthenticated`."""
        ...


@dataclass(frozen=True, slots=True)
class Authenticator:
    """The kinds of credentials that are accepted; with none of them, everybody is
    `ANYBODY`. Costs no call to a store: what it needs is in memory."""

    keys: KeyRing | None = None
    tokens: Tokens | None = None
    certificates: CertificateCallers | None = None

    @property
    def required(self) -> bool:
        """Whether callers must identify themselves."""
        return not (self.keys is None and self.tokens is None and self.certificates is None)

    async def principal(
        self, authorization: Sequence[str | bytes], certificate: bytes | None
    ) -> Principal:
        """Who calls with these `authorization` headers over a connection with this
        verified certificate, in PEM. Raises `Unauthenticated`.

        A header that is sent decides alone: if it is bad, a good certificate does not
        help, for the caller meant to be somebody else.
        """
        if not self.required:
            return ANYBODY
        if authorization:
            return await self._bearer(authorization)
        if certificate is not None and self.certificates is not None:
            return self.certificates.authenticate(certificate)
        raise Unauthenticated(
            f"the call carries no credentials; {self._wanted()}", cause="no credentials"
        )

    async def _bearer(self, authorization: Sequence[str | bytes]) -> Principal:
        header = authorization[0]
        scheme, _, text = (header if isinstance(header, str) else "").partition(" ")
        text = text.strip()
        if len(authorization) != 1 or scheme.lower() != "bearer" or not text:
            raise Unauthenticated(
                f"the `authorization` metadata cannot be read; {self._wanted()}",
                cause="not one bearer credential",
            )
        if text.startswith(PREFIX):
            if self.keys is not None:
                return self.keys.authenticate(text)
        elif self.tokens is not None:
            return await self.tokens.authenticate(text)
        raise Unauthenticated(
            f"such credentials are not accepted here; {self._wanted()}",
            cause="a kind of credentials that is not accepted",
        )

    def while_valid(
        self, principal: Principal, revoked: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """Have `revoked` called, once, if the caller's API key is revoked within the
        context. What merely expires does not end a call that began in time."""
        if principal.key_id is None or self.keys is None:
            return nullcontext()
        return self.keys.watching(principal.key_id, revoked)

    def _wanted(self) -> str:
        bearers = [
            *(["an API key"] if self.keys else []),
            *(["a token"] if self.tokens else []),
        ]
        ways = [f"send `authorization: Bearer` with {' or '.join(bearers)}"] * bool(bearers)
        if self.certificates:
            ways.append("call with a client certificate")
        return ", or ".join(ways)
