"""The console: pages for those who run exportd or watch its jobs, on the HTTP port."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from aiohttp import web

from exportd_server.api.console.access import Access
from exportd_server.api.console.changes import Changes
from exportd_server.api.console.rendering import Renderer
from exportd_server.api.console.session import Sessions
from exportd_server.api.console.signing import Signing
from exportd_server.api.console.site import PATH, Site
from exportd_server.api.console.views.datasets import Datasets
from exportd_server.api.console.views.deliveries import DeliveryList
from exportd_server.api.console.views.job import JobPage
from exportd_server.api.console.views.jobs import JobList
from exportd_server.api.console.views.queues import QueueList
from exportd_server.api.console.views.workers import WorkerList
from exportd_server.api.limits import CallerLimits
from exportd_server.identity.authenticator import Authenticator
from exportd_server.jobs.audit_log import AuditLog
from exportd_server.jobs.manager import JobManager
from exportd_server.platform.clock import Clock


@dataclass(frozen=True, slots=True)
class ConsoleOptions:
    """`base` is what browsers reach the HTTP port by; `keys` seal what they keep, for
    `session` each."""

    base: str
    keys: Sequence[bytes]
    session: timedelta


class Console:
    """Serves the pages below `/console`."""

    def __init__(
        self,
        manager: JobManager,
        authenticator: Authenticator,
        limits: CallerLimits,
        audit: AuditLog,
        options: ConsoleOptions,
        clock: Clock,
    ) -> None:
        base = urlsplit(options.base)
        self._audit = audit
        self._renderer = Renderer(base.path.rstrip("/") + PATH)
        sessions = Sessions(
            options.keys, clock, lifetime=options.session, secure=base.scheme == "https"
        )
        self._access = Access(
            authenticator, limits.rates, sessions, frozenset({base.hostname or ""})
        )
        self._pages = (
            JobList(manager),
            JobPage(manager),
            DeliveryList(manager),
            QueueList(manager),
            WorkerList(manager),
            Datasets(manager),
            Changes(manager),
        )

    def add_routes(self, app: web.Application) -> None:
        """Serve them."""
        site = Site(app, self._access, self._renderer, self._audit)
        for page in self._pages:
            page.add_to(site)
        Signing(site).add_routes(app)
        for path in (PATH, f"{PATH}/"):
            app.router.add_get(path, self._home)

    async def _home(self, _request: web.Request) -> web.Response:
        return self._renderer.redirect(f"{self._renderer.root}/jobs")
