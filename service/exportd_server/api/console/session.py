"""What a browser carries from one request to the next: a sealed cookie."""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from aiohttp import web

from exportd_server.errors import InvalidRequest
from exportd_server.platform.clock import Clock
from exportd_server.platform.sealing import Sealer, Unreadable

_PURPOSE = b"exportd: sessions of the console"
_MOST_COOKIE = 3900
"""Browsers keep no cookie above 4096 bytes, its name and attributes included."""
_SAME_SITE = "Lax"
"""A link from elsewhere, as in an alert, finds its reader signed in; a form does not."""
_WITHOUT_CREDENTIAL = timedelta(days=1)
"""How long one lasts that only guards forms."""


@dataclass(frozen=True, slots=True)
class Session:
    """A browser's. `credential` is the API key or token it signed in with, empty for
    none; `expires` in seconds since 1970."""

    csrf: str
    credential: str
    expires: int

    def made_the_form(self, token: str) -> bool:
        """Whether a form with this token was one of this session's pages."""
        return hmac.compare_digest(self.csrf.encode(), token.encode())


class Sessions:
    """Nothing is kept here: the cookie is all there is. So a session ends when it expires
    or when the credential in it is accepted no more, whichever comes first."""

    def __init__(
        self,
        keys: Sequence[bytes],
        clock: Clock,
        *,
        lifetime: timedelta,
        secure: bool,
    ) -> None:
        self._sealer = Sealer(keys, _PURPOSE)
        self._clock = clock
        self._lifetime = lifetime
        self._secure = secure
        # By the prefix, browsers refuse it from other hosts and from plain text.
        self._name = "__Host-exportd" if secure else "exportd-console"
        # A cookie of its own: a form sent from elsewhere comes without cookies and is
        # answered with the page to sign in on, which must not sign the visitor out.
        self._form_name = f"{self._name}-form"

    def begin(self, credential: str = "") -> Session:
        """A new one, whose forms are not those of any other."""
        lifetime = self._lifetime if credential else _WITHOUT_CREDENTIAL
        expires = self._clock.now() + lifetime
        return Session(secrets.token_urlsafe(24), credential, int(expires.timestamp()))

    def of(self, request: web.Request) -> Session | None:
        """The session of a request; None without one, or with one that has ended."""
        return self._read(request, self._name) or self.of_form(request)

    def of_form(self, request: web.Request) -> Session | None:
        """The one that guards the form to sign in; None without one that lasts."""
        return self._read(request, self._form_name)

    def _read(self, request: web.Request, name: str) -> Session | None:
        cookie = request.cookies.get(name, "")
        try:
            csrf, credential, expires = json.loads(self._sealer.open(cookie))
        except (Unreadable, ValueError):
            return None
        if expires <= self._clock.now().timestamp():
            return None
        return Session(csrf, credential, expires)

    def keep(self, response: web.StreamResponse, session: Session) -> None:
        """Have the browser keep it. Raises `InvalidRequest` when no browser would."""
        sealed = self._sealer.seal(
            json.dumps([session.csrf, session.credential, session.expires])
        )
        if len(sealed) > _MOST_COOKIE:
            raise InvalidRequest.of(
                "credential", "is too long for a cookie; sign in with an API key"
            )
        left = session.expires - int(self._clock.now().timestamp())
        response.set_cookie(
            self._name if session.credential else self._form_name,
            sealed,
            max_age=max(0, left),
            path="/",
            secure=self._secure,
            httponly=True,
            samesite=_SAME_SITE,
        )

    def end(self, response: web.StreamResponse) -> None:
        """Have the browser forget it. A copy of the cookie would last until it expires:
        what ends it sooner is to revoke the credential."""
        for name in (self._name, self._form_name):
            response.del_cookie(
                name, path="/", secure=self._secure, httponly=True, samesite=_SAME_SITE
            )
