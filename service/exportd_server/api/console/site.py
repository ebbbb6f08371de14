"""What every page of the console goes through: who asks, what they may, how it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from exportd_server.api.console.access import WORKERS, Access, Visit, check_form
from exportd_server.api.console.reading import read_form
from exportd_server.api.console.rendering import Renderer
from exportd_server.api.http import ABOUT, Refusal, refusal_of
from exportd_server.api.http_audit import ending_of, peer_of
from exportd_server.errors import Unauthenticated
from exportd_server.jobs.audit import AuditMethod, Entry
from exportd_server.jobs.audit_log import AuditLog

PATH = "/console"
_HOME = "/jobs"


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows. `settled`: the script need not ask for it again."""

    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    settled: bool = False


Look = Callable[[Visit], Awaitable[Page]]
Change = Callable[[Visit, Mapping[str, str], Entry], Awaitable[str]]
"""Does what a form asks for; gives where to look at it then, below the console's root."""


class Site:
    """Adds pages and forms to an application."""

    def __init__(
        self, app: web.Application, access: Access, renderer: Renderer, audit: AuditLog
    ) -> None:
        self.access = access
        self.renderer = renderer
        self._router = app.router
        self._audit = audit
        app.middlewares.append(self._guard)
        app.router.add_get(PATH + "/static/{version}/{name}", renderer.file)

    def page(self, path: str, method: str, look: Look) -> None:
        """Serve a page, or a fragment of one, to those who may call the method of the
        contract, or whatever else `Access` knows by that name."""

        async def handle(request: web.Request) -> web.Response:
            visit = await self.access.recognise(request)
            with _logged(visit):
                self.access.permit(visit, method)
                page = await look(visit)
            response = self.renderer.page(page.template, {**_about(visit), **page.values})
            if page.settled:
                response.headers["Exportd-Settled"] = "true"
            if visit.is_new:
                self.access.sessions.keep(response, visit.session)
            return response

        self._router.add_get(PATH + path, handle)

    def form(self, path: str, method: AuditMethod, change: Change) -> None:
        """Take a form that does what the method of the contract does, with its rights and
        its record."""

        async def handle(request: web.Request) -> web.Response:
            with self._audit.auditing(method, peer_of(request), ending_of) as entry:
                form = await read_form(request)
                visit = await self.access.recognise(request)
                entry.by(visit.principal)
                with _logged(visit):
                    self.access.permit(visit, method.value)
                    check_form(visit.session, form.get("csrf", ""))
                    to = await change(visit, form, entry)
            return self.renderer.redirect(self.renderer.root + to)

        self._router.add_post(PATH + path, handle)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Tell errors as pages."""
        if request.path != PATH and not request.path.startswith(f"{PATH}/"):
            return await handler(request)
        try:
            self.access.check_host(request)
            return await handler(request)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Unauthenticated as error:
            same = request.path_qs.removeprefix(PATH)
            return self.ask(request, error, same if request.method == "GET" else _HOME)
        except Exception as error:  # noqa: BLE001 - every error becomes a page
            return self._told(request, refusal_of(error, request))

    def ask(
        self, request: web.Request, error: Unauthenticated | None, onward: str
    ) -> web.Response:
        """The page to sign in on, which goes on to `onward` below the console's root.
        Whoever was not let in, or no more, is told why."""
        before = self.access.sessions.of(request)
        tried = request.method == "POST" or (before is not None and before.credential)
        # The browser's own, or a second page would make the form of the first one old.
        session = self.access.sessions.of_form(request) or self.access.sessions.begin()
        response = self.renderer.page(
            "sign_in.html",
            {
                **_NOBODY,
                "csrf": session.csrf,
                "next": onward,
                "message": error.message if error is not None and tried else "",
            },
            HTTPStatus.OK if error is None else HTTPStatus.UNAUTHORIZED,
        )
        self.access.sessions.keep(response, session)
        return response

    def _told(self, request: web.Request, refusal: Refusal) -> web.Response:
        request[ABOUT]["cause"] = refusal.reason
        response = self.renderer.page(
            "error.html",
            {
                **_NOBODY,
                "status": refusal.status,
                "reason": refusal.reason,
                "message": refusal.message,
            },
            refusal.status,
        )
        response.headers.update(refusal.headers)
        return response


_NOBODY: Mapping[str, Any] = {"visit": None, "csrf": "", "notice": ""}
_NOTICES: Mapping[str, str] = {
    "CANCELLED": "The job is cancelled.",
    "ALREADY_CANCELLED": "The job was cancelled already.",
    "ALREADY_FINISHED": "The job had finished already; nothing was cancelled.",
    "enabled": "The queue is enabled: its deliveries are tried again.",
}
REDRIVEN = "redriven"


def address(path: str, **query: str) -> str:
    """A path with a query, without what is empty in it."""
    pairs = urlencode({name: value for name, value in query.items() if value})
    return f"{path}?{pairs}" if pairs else path


def _about(visit: Visit) -> dict[str, Any]:
    """What every page shows of its visitor."""
    notice = visit.request.query.get("notice", "")
    count = visit.request.query.get("count", "")
    if notice == REDRIVEN and count.isascii() and count.isdigit():
        what = "delivery is" if int(count[:9]) == 1 else "deliveries are"
        told = f"{int(count[:9])} {what} sent again."
    else:
        told = _NOTICES.get(notice, "")
    return {
        "visit": visit,
        "csrf": visit.session.csrf,
        "notice": told,
        "path": visit.request.path.removeprefix(PATH),
        "workers": WORKERS,
    }


def _logged(visit: Visit) -> Any:
    # A connection has many requests in one task: what is bound must not stay.
    return structlog.contextvars.bound_contextvars(
        tenant=visit.tenant, subject=visit.principal.subject
    )
