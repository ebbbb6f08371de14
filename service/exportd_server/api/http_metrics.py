"""`GET /metrics`: what this process measures, as Prometheus and OpenMetrics have it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from exportd_server.platform import metrics

METRICS_PATH = "/metrics"
MOST_CONNECTIONS = 32
"""At a time. Those who ask are few, and ask seldom."""
_TAKING = 10.0
"""Seconds in which an answer must have been taken."""


def add_metrics(app: web.Application) -> None:
    """Serve them."""
    page = _Page()
    app.router.add_get(METRICS_PATH, page.get)
    app.on_cleanup.append(page.close)


class _Page:
    """The metrics as text, made in a thread: thousands of series take tens of milliseconds.
    In one of its own, so that however many ask, they wait for each other alone."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "exportd-metrics")

    async def close(self, _app: web.Application) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def get(self, request: web.Request) -> web.Response:
        """Answer, once for each connection: one that nobody reads would keep its place."""
        loop = asyncio.get_running_loop()
        if request.transport is not None:
            loop.call_later(_TAKING, request.transport.abort)
        try:
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        except (ValueError, TypeError):
            # What it makes of versions that are none.
            encode, content_type = choose_encoder("")
        names = [name for name in request.query.getall("name[]", []) if name]
        everything = metrics.REGISTRY
        wanted: Any = everything.restricted_registry(names) if names else everything
        text = await loop.run_in_executor(self._thread, encode, wanted)
        response = web.Response(body=text, headers={"Content-Type": content_type})
        response.enable_compression()
        response.force_close()
        return response
