"""Who looks at the console, and what they may do: as over gRPC, by the same table."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType

import structlog
from aiohttp import web

from exportd_server.api.console.session import Session, Sessions
from exportd_server.api.http import ABOUT, Refusal
from exportd_server.api.interceptors.identity import SCOPES
from exportd_server.api.limits import RequestRates
from exportd_server.errors import (
    ErrorReason,
    ExportdError,
    PermissionDenied,
    Unauthenticated,
)
from exportd_server.identity.authenticator import Authenticator
from exportd_server.identity.base import Principal, Scope

log = structlog.get_logger(__name__)

WORKERS = "workers"
_NEEDS: Mapping[str, Scope] = MappingProxyType(
    # They tell names of machines, and are of every tenant.
    {**SCOPES, WORKERS: Scope.ADMIN}
)


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of somebody who is known."""

    request: web.Request
    principal: Principal
    session: Session
    is_new: bool
    """Whether the browser does not have the session yet."""

    @property
    def tenant(self) -> str:
        """Whose jobs they see."""
        return self.principal.tenant

    def may(self, method: str) -> bool:
        """Whether they have the scope that a method of the contract, or `WORKERS`,
        needs."""
        return self.principal.may(_NEEDS[method])


class Access:
    """Recognises visitors. Every request is checked afresh, so a key that is revoked is
    out with its next one. `hosts` are the names that the console is called by."""

    def __init__(
        self,
        authenticator: Authenticator,
        rates: RequestRates | None,
        sessions: Sessions,
        hosts: frozenset[str],
    ) -> None:
        self._authenticator = authenticator
        self._rates = rates
        self._hosts = hosts
        self.sessions = sessions

    @property
    def required(self) -> bool:
        """Whether visitors have to sign in."""
        return self._authenticator.required

    def check_host(self, request: web.Request) -> None:
        """Refuse a request for another host while nobody has to sign in. A page of
        anybody's may give its own name this address, and would read along."""
        if self.required or _host(request) in self._hosts or _is_address(_host(request)):
            return
        raise Refusal(
            HTTPStatus.MISDIRECTED_REQUEST,
            "WRONG_HOST",
            "the console has another name; call it by the one in http.public_url, or "
            "by its address",
        )

    async def recognise(self, request: web.Request) -> Visit:
        """Who it is. Raises `Unauthenticated`."""
        session = self.sessions.of(request)
        credential = session.credential if session else ""
        principal = await self.principal(request, credential)
        return Visit(
            request, principal, session or self.sessions.begin(), is_new=session is None
        )

    async def principal(self, request: web.Request, credential: str) -> Principal:
        """Whose credential it is. Raises `Unauthenticated`."""
        shown = [f"Bearer {credential}"] if credential else []
        try:
            principal = await self._authenticator.principal(shown, None)
        except Unauthenticated as refused:
            if shown:
                log.info("visitor refused", cause=refused.cause, peer=request.remote)
            raise
        request[ABOUT].update(tenant=principal.tenant, subject=principal.subject)
        return principal

    def permit(self, visit: Visit, method: str) -> None:
        """Count the request and let it do what `method` does. Raises `QuotaExceeded` and
        `PermissionDenied`."""
        self.count(visit.principal)
        if not visit.may(method):
            raise PermissionDenied(_NEEDS[method])

    def count(self, principal: Principal) -> None:
        """Count a request of the tenant's. Raises `QuotaExceeded`."""
        if self._rates is not None:
            self._rates.take(principal.tenant)


def check_form(session: Session | None, token: str) -> None:
    """Refuse a form that did not come from a page of this session."""
    if session is None or not session.made_the_form(token):
        raise ExportdError(
            ErrorReason.PERMISSION_DENIED,
            "the form was not sent from a page of this session, or the page is too old; "
            "load the page again and repeat",
        )


def _host(request: web.Request) -> str:
    """The name or address that was called, without its port."""
    host = request.host
    return host.rpartition("]")[0].lstrip("[") if host[:1] == "[" else host.split(":")[0]


def _is_address(host: str) -> bool:
    """Nobody else can give a name to an address that stands there itself."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True
