"""Signing in and out."""

from __future__ import annotations

from aiohttp import web

from exportd_server.api.console.access import check_form
from exportd_server.api.console.reading import read_form
from exportd_server.api.console.site import PATH, Site
from exportd_server.errors import InvalidRequest, Unauthenticated


class Signing:
    """Takes an API key or a token, and keeps it in the browser alone."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def add_routes(self, app: web.Application) -> None:
        """Serve `/sign-in` and `/sign-out`, where there is anything to sign in with."""
        if not self._site.access.required:
            return
        app.router.add_get(f"{PATH}/sign-in", self._ask)
        app.router.add_post(f"{PATH}/sign-in", self._sign_in)
        app.router.add_post(f"{PATH}/sign-out", self._sign_out)

    async def _ask(self, request: web.Request) -> web.Response:
        return self._site.ask(request, None, "/jobs")

    async def _sign_in(self, request: web.Request) -> web.Response:
        access = self._site.access
        form = await read_form(request)
        # Without this, somebody else's page could sign its reader in as somebody else.
        check_form(access.sessions.of_form(request), form.get("csrf", ""))
        credential = form.get("credential", "").strip()
        if not credential:
            raise InvalidRequest.of("credential", "is required: an API key or a token")
        onward = _within(form.get("next", ""))
        try:
            principal = await access.principal(request, credential)
        except Unauthenticated as error:
            return self._site.ask(request, error, onward)
        access.count(principal)
        response = self._to(onward)
        access.sessions.keep(response, access.sessions.begin(credential))
        return response

    async def _sign_out(self, request: web.Request) -> web.Response:
        access = self._site.access
        form = await read_form(request)
        check_form(access.sessions.of(request), form.get("csrf", ""))
        response = self._to("/sign-in")
        access.sessions.end(response)
        return response

    def _to(self, path: str) -> web.Response:
        return self._site.renderer.redirect(self._site.renderer.root + path)


def _within(path: str) -> str:
    """Where to go on: a page of the console, and none elsewhere."""
    fine = path.startswith("/") and path.isascii() and path.isprintable()
    return path if fine and len(path) <= 1000 else "/jobs"
