"""Tokens: JSON Web Tokens (RFC 7519) that an identity provider has signed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jwt

from exportd_server.errors import Unauthenticated
from exportd_server.identity.base import Method, Principal, Scope
from exportd_server.identity.jwks import KeySet
from exportd_server.store.key import is_tenant

_LONGEST_SUBJECT = 256
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class TokenOptions:
    """What tokens must be like. Times in seconds."""

    issuer: str
    audience: str
    algorithms: Sequence[str]
    tenant_claim: str
    scopes_claim: str
    leeway: float
    require_nbf: bool = False


class TokenVerifier:
    """Says whose a token is, without asking anybody but for keys it does not know.

    A signature takes as long to verify as the rest of a small call, and callers send the
    same token many times: those found good are remembered until they expire or the keys
    change.
    """

    def __init__(self, options: TokenOptions, keys: KeySet) -> None:
        self._options = options
        self._keys = keys
        required = ["exp", "iss", "aud", "sub"]
        if options.require_nbf:
            required.append("nbf")
        self._good: dict[bytes, tuple[Principal, float]] = {}
        self._good_for = -1
        self._decoder = jwt.PyJWT(
            {"require": required, "enforce_minimum_key_length": True, "strict_aud": False}
        )

    async def authenticate(self, token: str) -> Principal:
        """The caller that the token names. Raises `Unauthenticated`."""
        digest = hashlib.sha256(token.encode()).digest()
        known = self._known(digest)
        if known is not None:
            return known
        try:
            header = jwt.get_unverified_header(token)
        except _UNREADABLE as error:
            raise Unauthenticated(cause=f"no token: {type(error).__name__}") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in self._options.algorithms:
            raise Unauthenticated(cause="token of an algorithm that is not allowed")
        key = await self._keys.find(kid, algorithm)
        if key is None:
            if not self._keys.available:
                raise Unauthenticated(
                    "tokens cannot be checked at the moment; try again later"
                )
            raise Unauthenticated(cause="token signed with an unknown key")
        # Here and not after: what was verified by these keys is good for these.
        generation = self._keys.generation
        claims, expires = self._verified(token, key)
        principal = self._principal(claims)
        self._remember(digest, principal, expires, generation)
        return principal

    def _known(self, digest: bytes) -> Principal | None:
        if self._good_for != self._keys.generation:
            return None
        principal, expires = self._good.get(digest, (None, 0.0))
        if principal is None or expires <= time.time() - self._options.leeway:
            return None
        return principal

    def _remember(
        self, digest: bytes, principal: Principal, expires: float, generation: int
    ) -> None:
        if generation != self._good_for or len(self._good) >= _REMEMBERED:
            self._good, self._good_for = {}, generation
        self._good[digest] = principal, expires

    def _verified(self, token: str, key: jwt.PyJWK) -> tuple[Mapping[str, Any], float]:
        """The claims of a token that is good, and when it expires."""
        try:
            claims = self._decoder.decode(
                token,
                key,
                algorithms=self._options.algorithms,
                audience=self._options.audience,
                issuer=self._options.issuer,
                leeway=self._options.leeway,
            )
            return claims, float(claims["exp"])
        # These come after the signature was found to be good: the caller may know.
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired") from None
        except jwt.ImmatureSignatureError:
            raise Unauthenticated("the token is not valid yet") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the token lacks claim {error.claim}") from None
        except jwt.InvalidAudienceError:
            raise Unauthenticated("the token is for another audience") from None
        except _UNREADABLE as error:
            raise Unauthenticated(cause=f"bad token: {type(error).__name__}") from None

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        tenant = claims.get(self._options.tenant_claim)
        if not isinstance(tenant, str) or not is_tenant(tenant):
            raise Unauthenticated(
                f"the token names no tenant in claim {self._options.tenant_claim}: it "
                "must be 1 to 63 small letters, digits, - and _, with a letter or digit "
                "first"
            )
        return Principal(
            str(claims["sub"])[:_LONGEST_SUBJECT],
            tenant,
            _scopes(claims.get(self._options.scopes_claim)),
            Method.TOKEN,
        )


_UNREADABLE = (
    jwt.PyJWTError,
    # What unusual numbers and nesting in its JSON bring about.
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def _scopes(claim: object) -> frozenset[Scope]:
    """The scopes in a claim: words with spaces between (RFC 8693), or a list. Those of
    other services are passed by."""
    words = claim.split() if isinstance(claim, str) else claim
    if not isinstance(words, list):
        return frozenset()
    return frozenset(scope for scope in Scope if scope.value in words)
