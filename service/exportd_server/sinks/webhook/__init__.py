"""Posts exports, or news of them, to HTTP receivers."""

from exportd_server.sinks.webhook.request import WebhookConnection, WebhookRequest
from exportd_server.sinks.webhook.sink import WebhookSink, WebhookType

__all__ = ["WebhookConnection", "WebhookRequest", "WebhookSink", "WebhookType"]
