"""`GET /metrics`: what this process measures, as Prometheus and OpenMetrics have it."""

from __future__ import annotations

import asyncio

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from exportd_server.platform import metrics

METRICS_PATH = "/metrics"
MOST_CONNECTIONS = 32
"""At a time. Those who ask are few, and ask seldom."""


def add_metrics(app: web.Application) -> None:
    """Serve them."""
    app.router.add_get(METRICS_PATH, _metrics)


async def _metrics(request: web.Request) -> web.Response:
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    names = request.query.getall("name[]", [])
    registry = metrics.REGISTRY.restricted_registry(names) if names else metrics.REGISTRY
    # Not on the loop: thousands of series take tens of milliseconds.
    text = await asyncio.to_thread(encode, registry)
    response = web.Response(body=text, headers={"Content-Type": content_type})
    response.enable_compression()
    return response
