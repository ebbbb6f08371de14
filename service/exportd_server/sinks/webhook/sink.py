"""The webhook as a kind of sink."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from exportd_server.errors import ConfigurationError, DeliveryFailed
from exportd_server.platform import tracing
from exportd_server.platform.clock import Clock, SystemClock
from exportd_server.platform.egress import GuardedBackend, Resolver, system_resolver
from exportd_server.sinks.base import (
    BadSinkRequest,
    Delivery,
    Export,
    Part,
    RetryPolicy,
    SinkDefaults,
    SinkPlan,
    Takes,
)
from exportd_server.sinks.webhook.client import Answer, Client, NotReachable, tls_context
from exportd_server.sinks.webhook.payload import (
    completion_json,
    export_headers,
    part_headers,
    read_part,
)
from exportd_server.sinks.webhook.request import (
    Target,
    WebhookConnection,
    WebhookRequest,
    read_target,
)
from exportd_server.sinks.webhook.signature import Signer
from exportd_server.sinks.webhook.status import settle

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86_400.0
SCHEDULE = (
    5.0,
    5 * _MINUTE,
    30 * _MINUTE,
    2 * _HOUR,
    5 * _HOUR,
    10 * _HOUR,
    14 * _HOUR,
    20 * _HOUR,
    24 * _HOUR,
)
"""Pauses between attempts, as the Standard Webhooks specification has them."""


class WebhookType:
    """Posts to an address that the caller chose, or the operator."""

    name = "webhook"
    request_model = WebhookRequest
    connection_model = WebhookConnection
    needs_connection = False
    defaults = SinkDefaults(
        retry=RetryPolicy(max_attempts=len(SCHEDULE) + 1, schedule=SCHEDULE),
        timeout=30.0,
        disable_after=5 * _DAY,
    )

    def __init__(
        self, *, resolve: Resolver = system_resolver, clock: Clock | None = None
    ) -> None:
        self._resolve = resolve
        self._clock = clock or SystemClock()

    def check(
        self,
        request: WebhookRequest,
        connection: WebhookConnection | None,
        export: Export,  # noqa: ARG002 - a webhook takes any
    ) -> SinkPlan:
        """See `SinkType`."""
        target = read_target(request, connection)
        takes = Takes.PARTS if request.mode == "PUSH_PARTS" else Takes.WHOLE
        return SinkPlan(takes, target.url.public)

    async def open(self, connection: WebhookConnection | None) -> WebhookSink:
        """See `SinkType`."""
        config = connection or WebhookConnection()
        path = None if config.ca_file is None else str(config.ca_file)
        try:
            tls = await asyncio.to_thread(tls_context, path)
        except OSError as error:
            raise ConfigurationError(
                f"ca_file {path} has no certificates that can be read: {error}"
            ) from error
        client = Client(
            GuardedBackend(config.allow_private, self._resolve),
            tls,
            connect_timeout=config.connect_timeout,
            read_timeout=config.read_timeout,
        )
        return WebhookSink(config, client, self._clock)


class WebhookSink:
    """See `Sink`."""

    def __init__(self, connection: WebhookConnection, client: Client, clock: Clock) -> None:
        self._connection = connection
        self._client = client
        self._clock = clock

    async def probe(
        self,
        request: WebhookRequest,
        export: Export,  # noqa: ARG002 - a webhook takes any
    ) -> None:
        """See `Sink`: connects, and sends no request."""
        target = read_target(request, self._connection)
        try:
            await self._client.reach(target.url)
        except NotReachable as error:
            raise BadSinkRequest("url", str(error)) from error

    async def deliver(self, request: WebhookRequest, delivery: Delivery) -> str:
        """See `Sink`."""
        try:
            target = read_target(request, self._connection)
        except BadSinkRequest as error:
            # The connection has changed since the request was accepted.
            raise DeliveryFailed(
                f"the connection does not take the request any more: {error}",
                retryable=False,
            ) from error
        if delivery.part is None:
            answer = await self._notify(target, request, delivery)
        else:
            answer = await self._push(target, delivery, delivery.part)
        return settle(answer.status, answer.retry_after, self._clock.now())

    async def close(self) -> None:
        """See `Sink`."""
        await self._client.close()

    async def _notify(
        self, target: Target, request: WebhookRequest, delivery: Delivery
    ) -> Answer:
        links = await delivery.links() if delivery.links else ()
        body = completion_json(delivery, links, self._clock.now())
        signer = self._signer(target, delivery)
        signer.update(body)
        headers = _headers(target, delivery, signer, "application/json", len(body))
        if request.mode == "PUSH_PARTS":
            # The type that was asked for is that of the parts.
            headers["content-type"] = "application/json"
        return await self._client.post(target.url, headers, body)

    async def _push(self, target: Target, delivery: Delivery, part: Part) -> Answer:
        # The signature goes ahead of the body, so the body is read twice.
        signer = self._signer(target, delivery)
        async with aclosing(read_part(part, signer)) as pieces:
            async for _ in pieces:
                pass
        content_type = delivery.export.output.file_content_type
        headers = _headers(target, delivery, signer, content_type, part.bytes)
        async with aclosing(read_part(part)) as pieces:
            return await self._client.post(target.url, headers | part_headers(part), pieces)

    def _signer(self, target: Target, delivery: Delivery) -> Signer:
        return Signer(target.keys, delivery.delivery_id, self._clock.now())


def _headers(
    target: Target, delivery: Delivery, signer: Signer, content_type: str, length: int
) -> dict[str, str]:
    """Those of the caller come first, so that they change none of the others."""
    within = tracing.current().context
    return (
        {"user-agent": "exportd", "accept": "*/*", "content-type": content_type}
        | ({} if within is None else within.headers)
        | target.headers
        | {"content-length": str(length)}
        | export_headers(delivery.export)
        | signer.headers()
    )
