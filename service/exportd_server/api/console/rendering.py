"""Pages out of templates, and what a browser must be told with each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from http import HTTPStatus
from importlib import resources
from types import MappingProxyType
from typing import Any

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from exportd_server.api.console import words

_PACKAGE = "exportd_server.api.console"
_TYPES: Mapping[str, str] = MappingProxyType(
    {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
)
_SECURITY: Mapping[str, str] = MappingProxyType(
    {
        # Nothing but the files of this server: no script or style inside a page.
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
        "style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
)
_PAGE: Mapping[str, str] = MappingProxyType({**_SECURITY, "Cache-Control": "no-store"})
_FILE: Mapping[str, str] = MappingProxyType(
    # Its address changes with its content.
    {**_SECURITY, "Cache-Control": "public, max-age=31536000, immutable"}
)


class Renderer:
    """Makes pages. `root` is the path of the console as browsers see it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._files = _files()
        content = b"".join(body for _, body in self._files.values())
        self._version = hashlib.sha256(content).hexdigest()[:16]
        environment = Environment(
            loader=PackageLoader(_PACKAGE),
            autoescape=True,
            undefined=StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(
            number=words.number,
            size=words.size,
            span=words.span,
            moment=words.moment,
            words=words.words,
        )
        environment.globals.update(root=root, files=f"{root}/static/{self._version}")
        self._environment = environment

    def page(
        self,
        template: str,
        values: Mapping[str, Any],
        status: HTTPStatus = HTTPStatus.OK,
    ) -> web.Response:
        """A page, or a fragment of one."""
        text = self._environment.get_template(template).render(values)
        return web.Response(
            text=text, status=status, content_type="text/html", headers=_PAGE
        )

    def redirect(self, to: str) -> web.Response:
        """Send the browser there, by GET."""
        return web.Response(status=HTTPStatus.SEE_OTHER, headers={**_PAGE, "Location": to})

    async def file(self, request: web.Request) -> web.Response:
        """Serve a static file."""
        found = self._files.get(request.match_info["name"])
        if found is None or request.match_info["version"] != self._version:
            raise web.HTTPNotFound
        type_, body = found
        return web.Response(body=body, content_type=type_, headers=_FILE)


def _files() -> dict[str, tuple[str, bytes]]:
    """The static files, with their types."""
    folder = resources.files(_PACKAGE) / "static"
    return {
        file.name: (_TYPES["." + file.name.rpartition(".")[2]], file.read_bytes())
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
    }
